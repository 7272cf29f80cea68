"""Everything a layer computes beside matrix products and attention.

Each function takes tensors of any device and dtype. CPU tensors of bf16 or fp32 go to compiled
kernels (cpu.cpp), those of an NVIDIA GPU to Triton's (gpu/), all others to the same in PyTorch
(plain.py). Maths is in fp32 inside, and
rounding follows transformers. The last dimension is contiguous; tokens may be strided, so that
slices of a fused projection need no copy.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.folders import cache_folder
from workers.kernels import plain
from workers.kernels.build import library
from workers.kernels.memory import result_tensor

__all__ = [
    "argmax_lse",
    "bias_act",
    "gated_product",
    "gelu_mul",
    "has_triton",
    "layer_norm",
    "look_up",
    "mask_rows",
    "product",
    "rms_norm",
    "rope",
    "silu_mul",
]

logger = logging.getLogger(__name__)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels compute on ``device``: an NVIDIA GPU from Ampere on, with a C
    compiler on the machine for Triton's launchers. What is missing is logged, once."""
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    try:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder("kernels") / "triton"))
        _binaries_before()
        from workers.kernels.gpu import rows

        zeros = torch.zeros(1, 1, dtype=torch.int32, device=device)
        rows.look_up(zeros, zeros, zeros[0], zeros[0], 1)
    except Exception as error:
        logger.warning(
            "Triton's kernels cannot be compiled, so slower PyTorch operations are used on the GPU;"
            " install a C compiler (Debian/Ubuntu: apt install gcc python3-dev). Reason: %s",
            str(error).strip().split("\n")[0] or type(error).__name__,
        )
        return False
    return True


def compiled() -> str:
    """For people: how many of Triton's kernels this process, or others at the same time, compiled,
    and how many were found compiled."""
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    new = len(_binaries(folder)) - _binaries_before()
    return f"{new} kernels compiled, {_binaries_before()} found in {folder}"


@functools.cache
def _binaries_before() -> int:
    """Of this process's start."""
    return len(_binaries(Path(os.environ["TRITON_CACHE_DIR"])))


def _binaries(folder: Path) -> list[Path]:
    return list(folder.glob("*/*.cubin"))


def _compiled(name: str, x: Tensor) -> Any:
    if not x.is_cpu:
        return None
    lib = library()
    return lib and lib.functions.get((name, x.dtype))


def _add(x: Tensor, update: Tensor | None, bias: Tensor | None) -> None:
    if update is not None:
        x += update if bias is None else update + bias


def rope(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates q [T, heads, D] and k [T, kv_heads, D] in place, NeoX style (RoFormer, Su 2021).

    positions is [T] int64; cos and sin are [max_positions, R / 2] fp32 and rotate the first R
    elements of each head, element i with element i + R / 2.
    """
    kernel = _compiled("rope", q)
    if kernel is None:
        return plain.rope(q, k, positions, cos, sin)
    tokens, heads, dim = q.shape
    assert q.stride(1) == k.stride(1) == dim and q.stride(2) == k.stride(2) == 1
    assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == torch.float32
    kernel(
        q.data_ptr(), q.stride(0), heads, k.data_ptr(), k.stride(0), k.shape[1], dim, tokens,
        positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [T, N] or [T, heads, N],
    after ``x += update + bias`` if there is an update. The weight may be in float32 where x
    is not."""
    if has_triton(x.device) and x.dim() == 2:
        from workers.kernels.gpu import norm

        return norm.rms_norm(x, weight, eps, update, bias)
    _add(x, update, bias)
    if weight.dtype != x.dtype:
        return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)
    kernel = _compiled("rms_norm", x)
    if kernel is None:
        return plain.rms_norm(x, weight, eps)
    width = x.shape[-1]
    inner = x.shape[1] if x.dim() == 3 else 1
    assert x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == width)
    y = result_tensor(x.shape, x.dtype)
    kernel(
        x.data_ptr(), x.stride(0), x.shape[0], inner, width, weight.data_ptr(), eps, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def layer_norm(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    eps: float,
    update: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + offset over the last dimension of x [T, N],
    after ``x += update + bias`` if there is an update."""
    if has_triton(x.device):
        from workers.kernels.gpu import norm

        return norm.layer_norm(x, weight, offset, eps, update, bias)
    _add(x, update, bias)
    kernel = _compiled("layer_norm", x)
    if kernel is None:
        return plain.layer_norm(x, weight, offset, eps)
    rows, width = x.shape
    assert x.stride(1) == 1
    y = result_tensor(x.shape, x.dtype)
    kernel(
        x.data_ptr(), x.stride(0), rows, width, weight.data_ptr(), offset.data_ptr(), eps,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def silu_mul(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up [T, I] of x + bias = [gate, up] [T, 2 I]."""
    if has_triton(x.device):
        from workers.kernels.gpu import elementwise

        return elementwise.silu_mul(x, bias)
    if bias is not None:
        x = x + bias
    kernel = _compiled("silu_mul", x)
    if kernel is None:
        return plain.silu_mul(x)
    rows, width = x.shape[0], x.shape[1] // 2
    assert x.stride(1) == 1
    y = result_tensor((rows, width), x.dtype)
    kernel(x.data_ptr(), x.stride(0), rows, width, y.data_ptr(), torch.get_num_threads())
    return y


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). On a CPU the bits of torch's depend on where in a tensor an element is;
    those of its exp do not."""
    if not x.is_cpu:
        return torch.sigmoid(x)
    return (1 + torch.exp(-x.float())).reciprocal_().to(x.dtype)


def gelu_mul(x: Tensor) -> Tensor:
    """gelu(gate) * up [T, I] of x = [gate, up] [T, 2 I], with gelu's approximation by tanh."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def look_up(
    tokens: Tensor, tables: Tensor, slots: Tensor, positions: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Ids and cells (block * block_size + offset) [T] of the tokens at ``positions`` [T] of
    ``slots`` [T], from a worker's tables: tokens [slots, length], block tables [slots, blocks]."""
    if has_triton(tokens.device):
        from workers.kernels.gpu import rows

        return rows.look_up(tokens, tables, slots, positions, block_size)
    return plain.look_up(tokens, tables, slots, positions, block_size)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times weight [N, K] transposed, on an NVIDIA GPU: the same bits for any T where
    cuBLASLt does not split sums (see workers/products.py)."""
    from workers.kernels.gpu import product

    return product.product(x, weight) if product.serves(x) else F.linear(x, weight)


def gated_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up [T, N / 2] of ``product`` + bias = [gate, up] [T, N]."""
    from workers.kernels.gpu import product

    if product.serves(x):
        return product.product(x, weight, bias, gated=True)
    return silu_mul(F.linear(x, weight), bias)


def bias_act(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation`` ("none", "relu" or "gelu") of x + bias [T, N]; x may be written to."""
    if has_triton(x.device):
        from workers.kernels.gpu import elementwise

        return elementwise.bias_act(x, bias, activation)
    return plain.bias_act(x, bias, activation)


def mask_rows(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Adds -inf, in place, to the tokens of logits [n, V] at rows [m] int32 that masks [m, words]
    int32 do not allow: bit ``i % 32`` of word ``i // 32`` is token i's. What is NaN or +inf there
    becomes NaN."""
    if has_triton(logits.device):
        from workers.kernels.gpu import token_mask

        return token_mask.mask_rows(logits, rows, masks)
    kernel = _compiled("mask_rows", logits)
    if kernel is None:
        return plain.mask_rows(logits, rows, masks)
    assert logits.stride(1) == 1 and rows.is_contiguous() and masks.is_contiguous()
    kernel(
        logits.data_ptr(), logits.stride(0), logits.shape[1], len(rows), rows.data_ptr(),
        masks.data_ptr(), masks.shape[1], torch.get_num_threads(),
    )  # fmt: skip


def argmax_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [n, V]: the first index of the maximum [n] int64, log(sum(exp)) [n]
    fp32, and whether that is finite [n] bool.

    It is not where a logit is NaN or +inf (the index then means nothing) or all are -inf; single
    logits of -inf are allowed.
    """
    kernel = _compiled("argmax_lse", logits)
    if kernel is None:
        return plain.argmax_lse(logits)
    rows, width = logits.shape
    assert logits.stride(1) == 1
    index = torch.empty(rows, dtype=torch.int64)
    lse = torch.empty(rows, dtype=torch.float32)
    finite = torch.empty(rows, dtype=torch.bool)
    kernel(
        logits.data_ptr(), rows, logits.stride(0), width, index.data_ptr(), lse.data_ptr(),
        finite.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return index, lse, finite
