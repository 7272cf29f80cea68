"""Which class serves which architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.attention.base import AttentionBackend
from workers.checkpoint import Config
from workers.models import decoder, opt
from workers.models.base import Model, Traits
from workers.parallel import Place, Stage


@dataclass(frozen=True)
class Network:
    """How a network's config is read, and the class that computes it."""

    read_traits: Callable[[Config], Any]
    model: Callable[..., Model]


DECODER = Network(decoder.read_traits, decoder.DecoderModel)
OPT = Network(opt.read_traits, opt.OPTModel)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", DECODER),
    "MistralForCausalLM": ("mistral", DECODER),
    "Qwen2ForCausalLM": ("qwen2", DECODER),
    "Qwen3ForCausalLM": ("qwen3", DECODER),
    "OPTForCausalLM": ("opt", OPT),
}


def find_network(config: Config) -> Network:
    """The network of a checkpoint, by ``architectures`` or, without that, by ``model_type``.

    Raises CheckpointError, with the known names, for any other.
    """
    model_type = config.get("model_type")
    by_type = {kind: network for kind, network in ARCHITECTURES.values()}
    code = "; manta runs no code of checkpoints (auto_map)" if "auto_map" in config else ""
    if "architectures" not in config:
        if model_type not in by_type:
            raise config.error("model_type", f"is not supported; known: {', '.join(by_type)}{code}")
        return by_type[model_type]
    names = config.get("architectures")
    known = [name for name in names if name in ARCHITECTURES] if isinstance(names, list) else []
    if not known:
        known_names = ", ".join(ARCHITECTURES)
        raise config.error("architectures", f"none is supported; known: {known_names}{code}")
    kind, network = ARCHITECTURES[known[0]]
    if model_type != kind:
        raise config.error("model_type", f"must be {kind!r} for {known[0]}")
    return network


def read_traits(config: Config) -> Traits:
    """The traits of a checkpoint. Raises CheckpointError, naming an unsupported field."""
    traits: Traits = find_network(config).read_traits(config)
    return traits


def build_model(
    config: Config, place: Place, stage: Stage, backend: AttentionBackend, max_length: int
) -> Model:
    """This rank's part of the model, its parameters not yet filled (see ``weights.load``).

    ``backend`` serves ``attention_shape(traits, place, block_size)``; ``max_length`` is the
    longest sequence in tokens. Raises CheckpointError for what the config has and the model lacks,
    ConfigError where the group does not divide the model.
    """
    network = find_network(config)
    return network.model(network.read_traits(config), place, stage, backend, max_length)
