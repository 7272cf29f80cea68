"""Which class serves which architecture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.errors import CheckpointError
from workers.attention.base import AttentionBackend
from workers.checkpoint import Config
from workers.host_memory import host_memory
from workers.models import bert, decoder, opt
from workers.models.base import Model, Traits
from workers.parallel import Place, Stage


@dataclass(frozen=True)
class Network:
    """How a network's config is read, and the class that computes it."""

    read_traits: Callable[[Config], Any]
    model: Callable[..., Model]


DECODER = Network(decoder.read_traits, decoder.DecoderModel)
BERT = Network(bert.read_traits, bert.BertModel)
OPT = Network(opt.read_traits, opt.OPTModel)
GENERATES = "ForCausalLM"
CLASSIFIES = "ForSequenceClassification"
EMBEDS = "Model"
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", DECODER),
    "MistralForCausalLM": ("mistral", DECODER),
    "Qwen2ForCausalLM": ("qwen2", DECODER),
    "Qwen3ForCausalLM": ("qwen3", DECODER),
    "OPTForCausalLM": ("opt", OPT),
    "BertModel": ("bert", BERT),
    "RobertaModel": ("roberta", BERT),
    "XLMRobertaModel": ("xlm-roberta", BERT),
} | {
    f"{family}{head}": (family.lower(), DECODER)
    for head in (EMBEDS, CLASSIFIES)
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
}


def find_network(config: Config) -> Network:
    """The network of a checkpoint, by ``architectures`` or, without that, by ``model_type``.

    Raises CheckpointError, with the known names, for any other.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str | None):
        raise config.error("model_type", "must be a string")
    by_type = {kind: network for kind, network in ARCHITECTURES.values()}
    code = "; manta runs no code of checkpoints (auto_map)" if "auto_map" in config else ""
    name = _architecture(config)
    if name is None:
        if model_type not in by_type:
            raise config.error("model_type", f"is not supported; known: {', '.join(by_type)}{code}")
        return by_type[model_type]
    if not name:
        known_names = ", ".join(ARCHITECTURES)
        raise config.error("architectures", f"none is supported; known: {known_names}{code}")
    kind, network = ARCHITECTURES[name]
    if model_type != kind:
        raise config.error("model_type", f"must be {kind!r} for {name}")
    return network


def _architecture(config: Config) -> str | None:
    """The first name that is known, "" if none is; None if there are no names."""
    if "architectures" not in config:
        return None
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    known = (name for name in names if isinstance(name, str) and name in ARCHITECTURES)
    return next(known, "")


def read_traits(config: Config) -> Traits:
    """The traits of a checkpoint. Raises CheckpointError, naming an unsupported field."""
    traits: Traits = find_network(config).read_traits(config)
    name = _architecture(config) or GENERATES
    if name.endswith(CLASSIFIES):
        return replace(traits, generates=False, labels=_labels(config))
    return replace(traits, generates=traits.generates and name.endswith(GENERATES))


def _labels(config: Config) -> int:
    named = config.get("id2label")
    labels = config.integer("num_labels", len(named) if isinstance(named, dict) else 2)
    if labels != 1:
        field = "num_labels" if "num_labels" in config else "id2label"
        raise config.error(field, "must be one label: a score; manta does not classify")
    return labels


def build_model(
    config: Config, place: Place, stage: Stage, backend: AttentionBackend, max_length: int
) -> Model:
    """This rank's part of the model, its parameters not yet filled (see ``weights.load``).

    ``backend`` serves ``attention_shape(traits, place, block_size)``; ``max_length`` is the
    longest sequence in tokens. Raises CheckpointError for what the config has and the model lacks,
    for more parameters than there is memory, ConfigError where the group does not divide the model.
    """
    network = find_network(config)
    traits = read_traits(config)
    if place.device.type != "meta":
        meta = replace(place, device=torch.device("meta"))
        _check_room(config, network.model(traits, meta, stage, backend, 1), place.device)
    return network.model(traits, place, stage, backend, max_length)


def _check_room(config: Config, model: Model, device: torch.device) -> None:
    """Raise CheckpointError if a rank's parameters are more than all the memory that there is."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        _, there = host_memory()
    if needed > there:
        raise CheckpointError(
            f"{config.source}: a model of these sizes takes {needed / 2**30:,.1f} GiB on each rank;"
            f" there are {there / 2**30:,.1f} GiB of memory in all"
        )
