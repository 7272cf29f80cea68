"""Products of inputs and weights that are both E4M3, by the matrix units, which take such codes
twice as fast as numbers of 16 bits (Hopper and Ada; elsewhere see coded.py).

A weight's 64 outputs or more are the first operand, whatever the rows, so that the same instruction
serves one row and thousands. 128 inputs are summed in it, in order; then the sum is added to that
of those before in float32, after their scales if these belong to groups of inputs: the matrix units
themselves would lose bits over a long sum (arXiv 2412.19437, section 3.3.2). So a row's bits do not
depend on its tile. Few rows are bound by reading the weight, many by the matrix units.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained
from workers.kernels.gpu.product import Tile, shared_memory
from workers.kernels.gpu.rounding import rounded
from workers.quantization.codes import Coded, Kind

STEP = 128  # inputs
_STEP = tl.constexpr(STEP)


@triton.jit
def sum_of_codes(
    w, n, there, x, m, asked, K, w_scales, w_groups, w_size, w_offset, x_scales, x_stride,
    x_groups, x_size, x_offset, BN: tl.constexpr, BM: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """w · x transposed, [BN, BM] float32, of the outputs n of w and rows m of x, both int64.

    ``x_stride`` is from a row's scales to the next's. GROUPED: more than one group of inputs has
    a scale of its own.
    """
    k = tl.arange(0, _STEP)
    line = w + n[:, None] * K + k[None, :]
    source = x + m[:, None] * K + k[None, :]
    w_scales += n * w_groups
    x_scales += m * x_stride
    acc = tl.zeros([BN, BM], tl.float32)
    for i in range(0, K, _STEP):
        inside = (i + k < K)[None, :]
        a = tl.load(line + i, mask=there[:, None] & inside, other=0.0)
        b = tl.load(source + i, mask=asked[:, None] & inside, other=0.0)
        if GROUPED:
            w_group = tl.minimum((i + w_offset) // w_size, w_groups - 1)
            x_group = tl.minimum((i + x_offset) // x_size, x_groups - 1)
            of_w = tl.load(w_scales + w_group, mask=there, other=0.0)
            of_x = tl.load(x_scales + x_group, mask=asked, other=0.0)
            acc = tl.fma(tl.dot(a, tl.trans(b)), of_w[:, None] * of_x[None, :], acc)
        else:
            acc = tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=_STEP)
    if not GROUPED:
        of_w = tl.load(w_scales, mask=there, other=0.0)
        of_x = tl.load(x_scales, mask=asked, other=0.0)
        acc *= of_w[:, None] * of_x[None, :]
    return acc


@triton.jit
def _product(
    x, w, y, rows, N, K, w_scales, w_groups, w_size, w_offset, x_scales, x_stride, x_groups,
    x_size, x_offset, BM: tl.constexpr, BN: tl.constexpr, GROUPED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """BN outputs of BM rows each: y [rows, N] = x [rows, K] · w [N, K] transposed. Programs that
    follow each other have the same outputs."""
    begin(CHAINED)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    there, asked = n < N, m < rows
    acc = sum_of_codes(
        w, n, there, x, m, asked, K, w_scales, w_groups, w_size, w_offset, x_scales, x_stride,
        x_groups, x_size, x_offset, BN, BM, GROUPED,
    )  # fmt: skip
    to = y + m[None, :] * N + n[:, None]
    tl.store(to, acc.to(y.dtype.element_ty), mask=there[:, None] & asked[None, :])


@functools.cache
def _multiplies(device: torch.device) -> bool:
    """Whether the matrix units of ``device`` take E4M3; Triton's interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def serves(weight: Coded) -> bool:
    """Whether ``product`` is for the weight: it and its inputs are E4M3, and no step of a sum has
    inputs of two groups."""
    rounder = weight.rounder
    if rounder is None or weight.kind is not Kind.E4M3 or not _multiplies(weight.device):
        return False
    whole = weight.scales.shape[-1] == 1
    if not whole and (weight.groups is not None or weight.group_size % STEP):
        return False
    group = rounder.rounding.group if rounder.groups(weight.shape[-1]) > 1 else None
    return (whole or weight.offset % STEP == 0) and (
        group is None or group % STEP == rounder.offset % STEP == 0
    )


def arguments(weight: Coded | None, of_rows: Tensor | None) -> dict[str, object]:
    """Those of a kernel that calls ``sum_of_codes`` with a weight and the scales of rows, or not:
    of one without."""
    if weight is None or of_rows is None:
        names = ("w_groups", "w_size", "w_offset", "x_stride", "x_groups", "x_size", "x_offset")
        numbers = dict.fromkeys(names, 0)
        return {**numbers, "w_scales": None, "x_scales": None, "GROUPED": False}
    rounder = weight.rounder
    assert rounder is not None
    w_groups, x_groups = weight.scales.shape[-1], of_rows.shape[1]
    return {
        "w_scales": weight.scales, "w_groups": w_groups, "w_size": weight.group_size,
        "w_offset": weight.offset, "x_scales": of_rows,
        "x_stride": 0 if rounder.scale is not None else x_groups, "x_groups": x_groups,
        "x_size": rounder.rounding.group or STEP, "x_offset": rounder.offset,
        "GROUPED": w_groups > 1 or x_groups > 1,
    }  # fmt: skip


def operands(x: Tensor, weight: Coded) -> tuple[Tensor, Tensor, dict[str, object]]:
    """The codes of the rounded x and of the weight, and the ``arguments``."""
    assert weight.rounder is not None
    codes, of_rows = rounded(x, weight.rounder)
    return codes, weight.codes.view(torch.float8_e4m3fn), arguments(weight, of_rows)


# Not tuned yet.
_TILES = (Tile(16, 64, 6, 4), Tile(32, 64, 6, 4), Tile(64, 64, 6, 4), Tile(128, 128, 4, 8))


def product(x: Tensor, weight: Coded) -> Tensor:
    """The rounded x [rows, K] · weight [N, K] transposed, in x's type."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    codes, numbers, more = operands(x, weight)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tile = next((tile for tile in _TILES if rows <= tile.rows), _TILES[-1])
    # A code is half as large as what a tile's stages are counted in.
    stages = tile.stages_on(2 * shared_memory(x.device))
    _product[(triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs))](
        codes, numbers, y, rows, outputs, inputs, BM=tile.rows, BN=tile.outputs,
        num_warps=tile.warps, num_stages=stages, **more, **chained(x.device),
    )  # fmt: skip
    return y
