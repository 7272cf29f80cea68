"""Which class serves which architecture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.errors import CheckpointError, ConfigError
from engine.log import get_logger
from workers.attention import Backend
from workers.checkpoint import CONDITIONAL, Config
from workers.host_memory import host_memory
from workers.models import bert, decoder, nemotron_h, opt
from workers.models.base import Model, Traits
from workers.models.families import (
    deepseek,
    exaone4,
    gemma,
    gemma4,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmo,
    phi3,
    qwen,
    qwen_hybrid,
    seed_oss,
    smollm3,
)
from workers.parallel import Place, Stage
from workers.quantization.config import quantization_on, read_quantization

log = get_logger("worker")


@dataclass(frozen=True)
class Network:
    """How a network's config is read, and the class that computes it."""

    read_traits: Callable[[Config], Any]
    model: Callable[..., Model]


def _decoder(read_traits: Callable[[Config], Any]) -> Network:
    return Network(read_traits, decoder.DecoderModel)


BERT = Network(bert.read_traits, bert.BertModel)
OPT = Network(opt.read_traits, opt.OPTModel)
NEMOTRON_H = Network(nemotron_h.read_traits, nemotron_h.NemotronHModel)
GENERATES = "ForCausalLM"
CLASSIFIES = "ForSequenceClassification"
EMBEDS = "Model"
# The prefix of a family's architectures, its ``model_type``, and how its config is read.
DECODERS: dict[str, tuple[str, Network]] = {
    "Llama": ("llama", _decoder(llama.read_traits)),
    "Mistral": ("mistral", _decoder(mistral.read_traits)),
    "Qwen2": ("qwen2", _decoder(qwen.read_qwen2)),
    "Qwen3": ("qwen3", _decoder(qwen.read_qwen3)),
    "Qwen3Moe": ("qwen3_moe", _decoder(qwen.read_qwen3_moe)),
    "Mixtral": ("mixtral", _decoder(mixtral.read_traits)),
    "Phi3": ("phi3", _decoder(phi3.read_traits)),
    "Olmo2": ("olmo2", _decoder(olmo.read_olmo2)),
    "Olmo3": ("olmo3", _decoder(olmo.read_olmo3)),
    "SmolLM3": ("smollm3", _decoder(smollm3.read_traits)),
    "Granite": ("granite", _decoder(granite.read_traits)),
    "Ministral3": ("ministral3", _decoder(mistral.read_ministral3)),
    "SeedOss": ("seed_oss", _decoder(seed_oss.read_traits)),
    "Exaone4": ("exaone4", _decoder(exaone4.read_traits)),
    "Glm4": ("glm4", _decoder(glm4.read_traits)),
    "Glm4Moe": ("glm4_moe", _decoder(glm4_moe.read_traits)),
    "GptOss": ("gpt_oss", _decoder(gpt_oss.read_traits)),
    "MiniMaxM2": ("minimax_m2", _decoder(minimax_m2.read_traits)),
    "Gemma2": ("gemma2", _decoder(gemma.read_gemma2)),
    "Gemma3": ("gemma3_text", _decoder(gemma.read_gemma3)),
    "Gemma4": ("gemma4_text", _decoder(gemma4.read_traits)),
    "DeepseekV2": ("deepseek_v2", _decoder(deepseek.read_deepseek_v2)),
    "DeepseekV3": ("deepseek_v3", _decoder(deepseek.read_deepseek_v3)),
    "Glm4MoeLite": ("glm4_moe_lite", _decoder(glm4_moe_lite.read_traits)),
    "Qwen3Next": ("qwen3_next", _decoder(qwen_hybrid.read_qwen3_next)),
    "Qwen3_5": ("qwen3_5_text", _decoder(qwen_hybrid.read_qwen3_5)),
    "Qwen3_5Moe": ("qwen3_5_moe_text", _decoder(qwen_hybrid.read_qwen3_5_moe)),
}
# Those whose names of other heads are of models of images and text.
CONDITIONALS = ("Gemma3", "Gemma4", "Qwen3_5", "Qwen3_5Moe")
ARCHITECTURES = (
    {f"{family}{GENERATES}": network for family, network in DECODERS.items()}
    | {
        "OPTForCausalLM": ("opt", OPT),
        "NemotronHForCausalLM": ("nemotron_h", NEMOTRON_H),
        "BertModel": ("bert", BERT),
        "RobertaModel": ("roberta", BERT),
        "XLMRobertaModel": ("xlm-roberta", BERT),
        "Mistral3ForConditionalGeneration": DECODERS["Ministral3"],
    }
    | {
        f"{family}{head}": DECODERS[family]
        for family in CONDITIONALS
        for head in (f"Text{EMBEDS}", CONDITIONAL)
    }
    | {
        f"{family}{head}": network
        for head in (EMBEDS, CLASSIFIES)
        for family, network in DECODERS.items()
        if family not in CONDITIONALS
    }
)


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
    if name.endswith(CONDITIONAL) and model_type in by_type:
        return by_type[model_type]  # one wrapper holds text models of several kinds
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
    read_quantization(config)
    name = _architecture(config) or GENERATES
    if name.endswith(CLASSIFIES):
        return replace(traits, generates=False, labels=_labels(config))
    if name.endswith(CONDITIONAL):
        return replace(traits, text_part=True)
    return replace(traits, generates=traits.generates and name.endswith(GENERATES))


def _labels(config: Config) -> int:
    named = config.get("id2label")
    labels = config.integer("num_labels", len(named) if isinstance(named, dict) else 2)
    if labels != 1:
        field = "num_labels" if "num_labels" in config else "id2label"
        raise config.error(field, "must be one label: a score; manta does not classify")
    return labels


def build_model(
    config: Config, place: Place, stage: Stage, backend: Backend, max_length: int
) -> Model:
    """This rank's part of the model, its parameters not yet filled (see ``weights.load``).

    ``backend`` serves ``attention_shapes(traits, place, block_size)``; ``max_length`` is the
    longest sequence in tokens. Raises CheckpointError for what the config has and the model lacks,
    for more parameters than there is memory, ConfigError where the group does not divide the model
    or experts are to be split that it does not have.
    """
    network = find_network(config)
    traits = read_traits(config)
    if place.expert_parallel and not traits.has_experts:
        raise ConfigError("enable_expert_parallel: the model has no experts; leave it out")
    place = replace(place, quantization=quantization_on(config, place.device, place.dtype))
    if traits.text_part and stage.first and place.group.rank == 0:
        log.info("%s: the text model alone is served, other parts are skipped", config.source)
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
