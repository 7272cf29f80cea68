"""Attention on the CPU by the compiled kernel: one pass over the cache for any mix of rows."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.plan import StepPlan
from workers.attention.base import Arrays, AttentionShape, Prologue
from workers.batch import Batch
from workers.kernels.build import DTYPES, library
from workers.kernels.memory import huge_tensor, result_tensor

MAX_HEAD_DIM = 576


class AttentionStep(ctypes.Structure):
    """``Step`` of cells.h: what all layers of a step share."""

    _fields_ = [
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("value_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("fp8", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("rows", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class CpuStep:
    """A step's metadata, and the tables that it points to."""

    step: AttentionStep
    tables: Tensor


class CpuAttention:
    """An AttentionBackend for bf16 and fp32, head dimensions that are multiples of 16 up to 576 and
    block sizes that are multiples of 16.

    Causal and without a soft cap only. A query's result does not depend, not in one bit, on the
    other rows of its batch, on how its prompt was cut into chunks or on the number of threads. The
    layout of a block is described in cells.h. Raises ConfigError for a shape outside these limits.
    """

    def __init__(self, shape: AttentionShape) -> None:
        kernels = library() if self.supports(shape) else None
        if kernels is None:
            raise ConfigError(
                f"CpuAttention cannot serve {shape}; needed: compiled kernels, bfloat16 or float32 "
                f"on a CPU, a causal model, no soft cap, head_dim a multiple of 16 up to "
                f"{MAX_HEAD_DIM}, block_size a multiple of 16"
            )
        self.shape = shape
        self.kernel = kernels.functions["attend", shape.dtype]

    @staticmethod
    def supports(shape: AttentionShape) -> bool:
        return (
            shape.device.type == "cpu"
            and shape.causal
            and shape.cap is None
            and shape.dtype in DTYPES
            and shape.head_dim % 16 == shape.value_dim % 16 == 0
            and shape.head_dim <= MAX_HEAD_DIM
            and shape.block_size % 16 == 0
            and library() is not None
        )

    @property
    def block_shape(self) -> tuple[int, ...]:
        s = self.shape
        width = s.cell_size(s.head_dim) + s.cell_size(s.value_dim)
        return s.num_kv_heads, s.block_size, width

    def allocate(self, num_blocks: int) -> Tensor:
        """One layer's cache, on huge pages where the system has them: decode jumps between blocks,
        and with small pages spends its time in page-table walks."""
        return huge_tensor((num_blocks, *self.block_shape), self.shape.cache_dtype)

    def arrays(self, plan: StepPlan) -> Arrays:
        return ()

    def room(self, rows: int, tokens: int, decodes: bool, max_context: int) -> tuple[int, ...]:
        return ()

    def begin(self, batch: Batch, arrays: tuple[Tensor, ...] = ()) -> "CpuStep":
        used = -(-batch.max_context_len // self.shape.block_size)
        tables = batch.block_tables[batch.slots, :used]
        assert tables.stride(1) == 1 and tables.dtype == torch.int32
        shape = self.shape
        step = AttentionStep(
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            dim=shape.head_dim,
            value_dim=shape.value_dim,
            block_size=shape.block_size,
            fp8=shape.fp8,
            scale=shape.scale,
            rows=batch.context_lens.shape[0],
            tokens=batch.cells.shape[0],
            table_stride=tables.stride(0),
            query_starts=batch.query_starts.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            tables=tables.data_ptr(),
            cells=batch.cells.data_ptr(),
        )
        return CpuStep(step, tables)

    def attend(self, batch: Batch, cache: Tensor, qkv: Tensor, prologue: Prologue) -> Tensor:
        q, k, v = prologue.split(qkv, batch.positions, self.shape)
        tokens, count, dim = q.shape
        assert q.stride(1) == k.stride(1) == v.stride(1) == dim
        assert q.stride(2) == k.stride(2) == v.stride(2) == 1
        out = result_tensor((tokens, count * self.shape.value_dim), q.dtype)
        self.kernel(
            ctypes.byref(batch.attention.step), cache.data_ptr(), q.data_ptr(), q.stride(0),
            k.data_ptr() if k.shape[1] else None, k.stride(0), v.data_ptr(), v.stride(0),
            out.data_ptr(), None if prologue.sinks is None else prologue.sinks.data_ptr(),
            prologue.window or 0, torch.get_num_threads(),
        )  # fmt: skip
        return out
