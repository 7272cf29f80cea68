"""What keys and values are kept as: the option ``kv_cache_dtype``, and a checkpoint's wish."""

import torch

from engine.config import FP8_CACHES
from engine.errors import ConfigError
from workers.checkpoint import Config
from workers.quantization.config import settings_of


def keeps_fp8(option: str, config: Config, dtype: torch.dtype) -> bool:
    """Whether a model that computes in ``dtype`` keeps keys and values as 8-bit floats.

    "auto" does where the checkpoint's ``kv_cache_scheme`` has floats of 8 bits. The scales that
    come with it mean nothing here (workers/kernels/fp8_cache.py). Raises ConfigError for another
    type than ``dtype``.
    """
    if option in FP8_CACHES:
        return True
    if option != "auto":
        own = str(dtype).removeprefix("torch.")
        if option != own:
            raise ConfigError(
                f"kv_cache_dtype={option!r}: allowed are auto, fp8 and {own}, the type that the"
                " model computes in (dtype)"
            )
        return False
    settings = settings_of(config)
    scheme = None if settings is None else settings.get("kv_cache_scheme")
    return isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
