"""``quant_method: compressed-tensors``: groups of linears, each with the arguments of its weights
(github.com/vllm-project/compressed-tensors)."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.checkpoint import Config
from workers.quantization.codes import Kind
from workers.quantization.fp8 import Scaled, read_block
from workers.quantization.names import is_plain, matches, read_names
from workers.quantization.packed import PackedFloats, PackQuantized
from workers.quantization.quantization import Quantization
from workers.quantization.rounding import Rounding
from workers.quantization.stored import Format

FORMATS = (
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
BESIDE = frozenset(
    {
        "weight_shape", "input_zero_point", "input_global_scale",
        "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "output_scale",
        "output_zero_point",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    targets: Sequence[str]
    format: Format


def read_compressed(config: Config) -> Quantization:
    """Of a quantization_config. Raises CheckpointError, naming the field."""
    if config.get("sparsity_config", {}).get("format", "dense") != "dense":
        raise config.error("sparsity_config", "is not supported: weights must be dense")
    if config.get("transform_config", {}).get("config_groups"):
        raise config.error("transform_config", "is not supported")
    named = config.get("config_groups", {})
    if not isinstance(named, dict) or not all(isinstance(v, dict) for v in named.values()):
        raise config.error("config_groups", "must hold an object for each group")
    groups = [
        _read_group(Config(values, f"{config.source}.config_groups.{name}"), config)
        for name, values in named.items()
    ]
    ignored = read_names(config, "ignore")

    def format_of(name: str) -> Format | None:
        if is_plain(name) or matches(name, ignored):
            return None
        best = max(groups, key=lambda group: matches(name, group.targets), default=None)
        return best.format if best and matches(name, best.targets) else None

    kinds = dict.fromkeys(group.format.kind.name.lower() for group in groups)
    what = f"compressed-tensors {', '.join(kinds)}"
    roundings = (group.format.rounding for group in groups)
    what = ", ".join(dict.fromkeys([what, *(r.in_words() for r in roundings if r is not None)]))
    return Quantization(what, format_of, beside=BESIDE)


def _read_group(group: Config, config: Config) -> _Group:
    key = "format" if "format" in group else None
    format = (group if key else config).choice("format", "pack-quantized", FORMATS)
    for which in ("weights", "input_activations", "output_activations"):
        if not isinstance(group.get(which, {}), dict):
            raise group.error(which, "must be an object")
    if "output_activations" in group:
        raise group.error(
            "output_activations", "is not supported: weights and inputs alone may be quantized"
        )
    if "weights" not in group:
        raise group.error("weights", "is missing")
    weights = Config(group.get("weights"), f"{group.source}.weights")
    inputs = Config(group.get("input_activations", {}), f"{group.source}.input_activations")
    rounding = _read_rounding(inputs)
    return _Group(read_names(group, "targets"), _read_format(weights, format, rounding))


def _read_rounding(inputs: Config) -> Rounding | None:
    """Of the arguments of activations: None unless they are floats of 8 bits. A scale of a whole
    batch would make its tokens depend on each other, so those have one for each token."""
    if inputs.get("type") != "float" or inputs.integer("num_bits", 8) != 8:
        return None
    strategy = inputs.choice("strategy", "tensor", ("tensor", "token", "group"))
    if not inputs.boolean("symmetric", True):
        raise inputs.error("symmetric", "must be true")
    if not inputs.get("dynamic", False):
        if strategy != "tensor":
            raise inputs.error("strategy", "must be tensor where dynamic is false")
        return Rounding(static=True)
    return Rounding(inputs.integer("group_size") if strategy == "group" else None)


def _read_format(weights: Config, format: str, rounding: Rounding | None) -> Format:
    four_bits = format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
    floats = four_bits or format == "float-quantized"
    kinds = ("float",) if floats else ("int",)
    kind = weights.choice("type", "int", ("float", "int") if format == "naive-quantized" else kinds)
    bits = weights.integer("num_bits", 8)
    allowed = (4,) if four_bits else (4, 8) if format == "pack-quantized" else (8,)
    if bits not in allowed:
        raise weights.error(
            "num_bits", f"is not supported in {format}; allowed: {', '.join(map(str, allowed))}"
        )
    if weights.get("dynamic"):
        raise weights.error("dynamic", "must be false: weights have their scales")
    strategy = _strategy(weights)
    if four_bits:
        size = 16 if format == "nvfp4-pack-quantized" else 32
        if weights.integer("group_size", size) != size:
            raise weights.error("group_size", f"must be {size} in {format}")
        return PackedFloats(size, has_global=size == 16, rounding=rounding)
    symmetric = weights.boolean("symmetric", True)
    if format == "pack-quantized":
        group = weights.integer("group_size") if strategy == "group" else None
        if strategy not in ("group", "channel"):
            raise weights.error(
                "strategy", f"is not supported in {format}; allowed: channel, group"
            )
        order = weights.get("actorder")
        if order not in (None, False, True, "group", "dynamic", "weight", "static"):
            raise weights.error("actorder", "must be group, weight or null")
        reordered = order in (True, "group", "dynamic")
        return PackQuantized(bits, group, reordered, not symmetric, rounding=rounding)
    if not symmetric:
        raise weights.error("symmetric", f"must be true in {format}")
    blocks: dict[str, tuple[int | None, int | None]] = {
        "tensor": (None, None),
        "channel": (1, None),
    }
    if strategy == "group":
        blocks["group"] = (1, weights.integer("group_size"))
    if strategy == "block":
        blocks["block"] = read_block(weights, "block_structure")
    if strategy not in blocks:
        raise weights.error("strategy", "is not supported; allowed: tensor, channel, group, block")
    what = Kind.E4M3 if kind == "float" else Kind.INT8
    return Scaled("weight_scale", blocks[strategy], what, rounding=rounding)


def _strategy(weights: Config) -> str:
    """The named one, or what ``group_size`` implies."""
    size = weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    return str(weights.get("strategy", implied))
