"""config.json's quantization_config, and the option ``quantization``."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from engine.errors import ConfigError
from workers import kernels
from workers.checkpoint import Config
from workers.kernels.gemm_codes import has_gemm_codes
from workers.quantization.codes import Grouping, Kind
from workers.quantization.compressed import read_compressed
from workers.quantization.fp8 import read_fp8
from workers.quantization.names import HEADS, is_plain, skipped
from workers.quantization.packed import Awq, Gptq, MxBlocks
from workers.quantization.quantization import PLAIN, Quantization
from workers.quantization.stored import Format

FIELD = "quantization_config"
OLD_FIELD = "compression_config"


def _read_gptq(config: Config) -> Quantization:
    bits = config.integer("bits")
    if bits not in (4, 8):
        raise config.error("bits", "is not supported; allowed: 4, 8")
    key = "checkpoint_format" if "checkpoint_format" in config else "format"
    version = config.choice(key, "gptq", ("gptq", "gptq_v2"))
    if config.get("dynamic"):
        raise config.error("dynamic", "is not supported: every linear must be quantized alike")
    format = Gptq(
        bits,
        _group(config),
        config.boolean("desc_act", False),
        zero_offset=1 if version == "gptq" else 0,
    )
    return _of_layers(config, f"gptq of {bits} bits", format)


def _read_awq(config: Config) -> Quantization:
    key = "w_bit" if "w_bit" in config else "bits"
    if config.integer(key, 4) != 4:
        raise config.error(key, "is not supported; allowed: 4")
    key = "format" if "format" in config else "version"
    if str(config.get(key, "gemm")).lower() != "gemm":
        raise config.error(key, "is not supported; allowed: gemm")
    if not config.boolean("zero_point", True):
        raise config.error("zero_point", "must be true")
    return _of_layers(config, "awq of 4 bits", Awq(4, _group(config)))


def _group(config: Config) -> int | None:
    key = "q_group_size" if "q_group_size" in config else "group_size"
    return None if config.get(key, 128) == -1 else config.integer(key, 128)


def _of_layers(config: Config, what: str, format: Format) -> Quantization:
    """Of the linears in a network's layers, all or those of ``modules_in_block_to_quantize``, and
    of its head if ``lm_head`` says so."""
    skips, head = skipped(config, "modules_to_not_convert"), config.boolean("lm_head", False)
    key = "modules_in_block_to_quantize"
    lists = config.get(key, [[""]])
    if not isinstance(lists, list) or not all(isinstance(names, list) for names in lists):
        raise config.error(key, "must be a list of lists of names")
    ends = tuple(str(name) for names in lists for name in names)

    def format_of(name: str) -> Format | None:
        if name in HEADS:
            return format if head else None
        inside = ".layer" in name and name.endswith(ends)
        return format if inside and not is_plain(name) and not skips(name) else None

    return Quantization(what, format_of)


def _read_mxfp4(config: Config) -> Quantization:
    """Of the experts of gpt-oss; its other linears are not quantized."""
    skips = skipped(config, "modules_to_not_convert")

    def format_of(name: str) -> Format | None:
        return MxBlocks() if ".experts." in name and not skips(name) else None

    return Quantization("mxfp4 experts", format_of)


METHODS: dict[str, Callable[[Config], Quantization]] = {
    "fp8": read_fp8,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": read_compressed,
    "mxfp4": _read_mxfp4,
}


def settings_of(config: Config) -> Config | None:
    """The quantization_config, if there is one. Raises CheckpointError if it is no object."""
    field = FIELD if FIELD in config else OLD_FIELD
    if field not in config:
        return None
    values = config.get(field)
    if not isinstance(values, dict):
        raise config.error(field, "must be an object")
    return Config(values, f"{config.source}: {field}")


def read_quantization(config: Config) -> Quantization:
    """How a checkpoint's linears are stored. Raises CheckpointError, naming the field."""
    settings = settings_of(config)
    if settings is None:
        return PLAIN
    default = "compressed-tensors" if "config_groups" in settings else ""
    return METHODS[settings.choice("quant_method", default, tuple(METHODS))](settings)


def quantization_on(config: Config, device: torch.device, dtype: torch.dtype) -> Quantization:
    """The same, where a model's weights are on ``device`` and it computes in ``dtype``."""
    gpu, cpu = kernels.has_triton(device), device.type == "cpu"

    def keeps(kind: Kind, grouping: Grouping) -> bool:
        return gpu or (cpu and has_gemm_codes(kind, grouping, dtype))

    quantization = read_quantization(config)
    return replace(quantization, keeps=keeps, format_of=functools.cache(quantization.format_of))


def with_quantization(config: Config, option: str | None) -> Config:
    """``config`` as the option ``quantization`` wants it.

    "fp8" makes weights of 8 bits of others. What names the method that a checkpoint is quantized
    with asks for nothing; what names another raises ConfigError.
    """
    if option is None:
        return config
    there = config.get(FIELD, config.get(OLD_FIELD))
    if there is not None:
        method = there.get("quant_method") if isinstance(there, dict) else None
        if method == option:
            return config
        raise ConfigError(
            f"quantization={option!r}: the checkpoint is quantized already, by quant_method"
            f" {method!r}, which is used without this option"
        )
    if option != "fp8":
        raise ConfigError(
            f"quantization={option!r}: the checkpoint has no quantization_config; allowed is fp8,"
            " which quantizes its weights while they are loaded"
        )
    made = {"quant_method": "fp8", "is_checkpoint_fp8_serialized": False}
    return Config(config.values | {FIELD: made}, config.source)
