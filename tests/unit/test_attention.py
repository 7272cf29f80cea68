"""Attention backends against exact attention, over caches full of NaN in shuffled blocks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import ConfigError
from workers.attention import AttentionBackend, AttentionShape, Prologue, choose_backend
from workers.attention.cpu import CpuAttention
from workers.attention.gather import GatherAttention
from workers.batch import Batch
from workers.kernels.fp8_cache import decode, encode

BACKENDS = [CpuAttention, GatherAttention]
GONE = 10**8  # a block table entry that must not be read
ALLOWED_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def shape_of(
    heads: int, kv_heads: int, dim: int, block_size: int = 16, dtype: torch.dtype = torch.float32
) -> AttentionShape:
    return AttentionShape(heads, kv_heads, dim, dim**-0.5, block_size, dtype, torch.device("cpu"))


def batch_of(tables: list[Tensor], rows: list[tuple[int, int]], block_size: int) -> Batch:
    """Rows of (queries, context)."""
    width = max(len(t) for t in tables) + 1
    positions = [torch.arange(context - n, context) for n, context in rows]
    cells = [
        t[p // block_size].long() * block_size + p % block_size
        for t, p in zip(tables, positions, strict=True)
    ]
    padded = torch.full((len(rows), width), GONE, dtype=torch.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return Batch(
        tokens=torch.zeros(sum(n for n, _ in rows), dtype=torch.int64),
        positions=torch.cat(positions),
        query_starts=torch.tensor([0] + [n for n, _ in rows]).cumsum(0).int(),
        slots=torch.arange(len(rows)),
        context_lens=torch.tensor([context for _, context in rows]).int(),
        block_tables=padded,
        cells=torch.cat(cells),
        max_context_len=max(context for _, context in rows),
    )


class World:
    """Sequences with random queries, keys and values, and a cache of NaN to put them in, or of what
    is no number in 8-bit floats."""

    def __init__(self, shape: AttentionShape, contexts: list[int], seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.shape, self.contexts = shape, contexts
        self.sinks: Tensor | None = None
        counts = [-(-c // shape.block_size) for c in contexts]
        self.num_blocks = sum(counts) + 2
        order = torch.randperm(self.num_blocks, generator=random).int()
        self.tables = list(order[: sum(counts)].split(counts))
        heads = shape.num_heads + (2 if shape.latent is None else 1) * shape.num_kv_heads
        self.qkv = [
            torch.randn(c, heads, shape.head_dim, generator=random).to(shape.dtype)
            for c in contexts
        ]
        if shape.fp8:  # of keys and values of any size
            for qkv in self.qkv:
                kv = qkv[:, shape.num_heads :]
                kv *= 2.0 ** torch.randint(-9, 2, kv.shape[:2], generator=random)[..., None]

    def cache(self, backend: AttentionBackend) -> Tensor:
        cache = backend.allocate(self.num_blocks)
        return cache.fill_(255 if self.shape.fp8 else float("nan"))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv = self.shape.num_heads, self.shape.num_kv_heads
        q, k, v = qkv.tensor_split((heads, heads + kv), dim=1)
        return q, k, v if self.shape.latent is None else k[..., -self.shape.latent :]

    def step(
        self,
        backend: AttentionBackend,
        cache: Tensor,
        rows: list[tuple[int, int, int]],
        window: int | None = None,
    ) -> list[Tensor]:
        """Runs rows of (sequence, queries, context); the attention of each."""
        tables = [self.tables[s].clone() for s, _, _ in rows]
        for table, (_, n, context) in zip(tables, rows, strict=True):
            if window is not None:  # the blocks that no query sees any more may be gone
                table[: max(0, context - n - window + 1) // self.shape.block_size] = GONE
        batch = batch_of(tables, [r[1:] for r in rows], self.shape.block_size)
        batch = replace(batch, attention=backend.begin(batch, ()))
        parts = [self.qkv[s][context - n : context] for s, n, context in rows]
        qkv = torch.cat(parts).flatten(1)
        out = backend.attend(batch, cache, qkv, Prologue(window=window, sinks=self.sinks))
        return list(out.split([n for _, n, _ in rows]))

    def run(
        self, backend: AttentionBackend, queries: list[int], window: int | None = None
    ) -> list[Tensor]:
        """Prefills all but the last ``queries`` of each sequence, then runs these."""
        cache = self.cache(backend)
        before = [
            (s, c - n, c - n) for s, (c, n) in enumerate(zip(self.contexts, queries, strict=True))
        ]
        if any(n for _, n, _ in before):
            self.step(backend, cache, [row for row in before if row[1]], window)
        rows = [(s, n, self.contexts[s]) for s, n in enumerate(queries)]
        return self.step(backend, cache, rows, window)

    def exact(self, sequence: int, queries: int, window: int | None = None) -> Tensor:
        q, kv = self.qkv[sequence].split(
            [self.shape.num_heads, len(self.qkv[sequence][0]) - self.shape.num_heads], 1
        )
        if self.shape.fp8:
            kv = decode(encode(kv), torch.float32)
        q, k, v = (x.double() for x in self.split(torch.cat((q.to(kv.dtype), kv), 1)))
        group = self.shape.num_heads // self.shape.num_kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[-queries:], k) * self.shape.scale
        key = torch.arange(k.shape[0])
        position = key[-queries:, None]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.double()[:, None, None].expand(-1, queries, 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : len(k)]
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)

    def check(self, results: list[Tensor], queries: list[int], window: int | None = None) -> None:
        for s, (result, n) in enumerate(zip(results, queries, strict=True)):
            assert result.dtype == self.shape.dtype
            error = (result.double() - self.exact(s, n, window)).abs().max().item()
            assert error < ALLOWED_ERROR[self.shape.dtype], (s, n, self.contexts[s], error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (4, 2), (8, 2), (8, 1)])
@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.integers(1, 90).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c))),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([16, 32, 48, 64, 80, 96, 128]),
    st.sampled_from([16, 32, 48]),
    st.sampled_from([None, 1, 7, 33]),
    st.booleans(),
)
def test_any_mix_of_rows(
    backend: type, dtype: torch.dtype, heads: int, kv_heads: int,
    rows: list[tuple[int, int]], dim: int, block_size: int, window: int | None, fp8: bool,
) -> None:  # fmt: skip
    contexts, queries = [c for c, _ in rows], [n for _, n in rows]
    shape = shape_of(heads, kv_heads, dim, block_size, dtype)
    world = World(replace(shape, fp8=fp8), contexts)
    world.check(world.run(backend(world.shape), queries, window), queries, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, fp8", [(None, False), (300, True), (700, False), (None, True)])
def test_long_contexts(backend: type, dtype: torch.dtype, window: int | None, fp8: bool) -> None:
    queries = [1, 1, 60, 600, 3]
    shape = replace(shape_of(4, 2, 64, 32, dtype), fp8=fp8)
    world = World(shape, [513, 1301, 1100, 600, 5])
    world.check(world.run(backend(world.shape), queries, window), queries, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
def test_sinks_take_their_share(backend: type, dtype: torch.dtype, window: int | None) -> None:
    queries = [1, 60, 300, 3]
    world = World(shape_of(4, 2, 64, 32, dtype), [1301, 90, 600, 3])
    world.sinks = torch.tensor([-1e4, 0.5, 3.0, 1e4])  # nothing, some, much, everything
    results = world.run(backend(world.shape), queries, window)
    world.check(results, queries, window)
    assert all((result[:, 3 * 64 :] == 0).all() for result in results)


@pytest.mark.parametrize(
    "heads, kv_heads, dim", [(48, 1, 16), (7, 1, 64), (2, 1, 576), (96, 1, 32), (106, 2, 16)]
)
def test_large_groups_and_heads(heads: int, kv_heads: int, dim: int) -> None:
    queries = [1, 40]
    world = World(shape_of(heads, kv_heads, dim, dtype=torch.bfloat16), [70, 70])
    world.check(world.run(CpuAttention(world.shape), queries), queries)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, dim, latent", [(20, 576, 512), (50, 80, 64)])
@pytest.mark.parametrize("fp8", [False, True])
def test_latents(
    backend: type, dtype: torch.dtype, heads: int, dim: int, latent: int, fp8: bool
) -> None:
    queries = [1, 1, 40, 3]
    shape = replace(shape_of(heads, 1, dim, 32, dtype), latent=latent, fp8=fp8)
    world = World(shape, [513, 70, 129, 5])
    world.check(world.run(backend(shape), queries), queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, latent", [(4, 4, None), (8, 2, None), (50, 1, 48)])
@pytest.mark.parametrize("fp8", [False, True])
def test_result_does_not_depend_on_batch_chunks_or_threads(
    dtype: torch.dtype, heads: int, kv_heads: int, latent: int | None, fp8: bool
) -> None:
    shape = replace(shape_of(heads, kv_heads, 64, 16, dtype), latent=latent, fp8=fp8)
    world = World(shape, [1200, 300, 77])
    backend = CpuAttention(world.shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = world.step(backend, world.cache(backend), [(0, 1200, 1200)])[0]
        torch.set_num_threads(2)
        cache = world.cache(backend)
        for chunk in (range(0, 700), range(700, 701), range(701, 1199), range(1199, 1200)):
            row = (0, len(chunk), chunk.stop)
            alone = world.step(backend, cache, [row])[0]
            others = [(1, 300, 300), (2, 77, 77)]
            mixed = world.step(backend, cache, [others[0], row, others[1]])[1]
            assert torch.equal(alone, whole[chunk.start : chunk.stop])
            assert torch.equal(mixed, alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_filled_in_this_step_is_shared(backend: type) -> None:
    """A row may read a full block whose last token another row writes in the same step."""
    world = World(shape_of(2, 2, 32), [32, 40])
    world.qkv[1][:32] = world.qkv[0]
    world.tables[1][:2] = world.tables[0]
    model = backend(world.shape)
    cache = world.cache(model)
    world.step(model, cache, [(0, 31, 31)])
    world.check(world.step(model, cache, [(1, 8, 40), (0, 1, 32)])[::-1], [1, 8])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", [False, True])
def test_whole_blocks_can_be_copied(backend: type, fp8: bool) -> None:
    world = World(replace(shape_of(4, 2, 32, dtype=torch.bfloat16), fp8=fp8), [50])
    world.num_blocks += 4
    model = backend(world.shape)
    cache, moved = world.cache(model), world.cache(model)
    assert cache[0].shape == model.block_shape
    world.step(model, cache, [(0, 49, 49)])
    used = world.tables[0].long()
    unused = torch.tensor([b for b in range(world.num_blocks) if b not in used])[: len(used)]
    moved[unused] = cache[used]
    world.tables[0] = unused.int()
    world.check(world.step(model, moved, [(0, 1, 50)]), [1])


def test_choice() -> None:
    assert isinstance(choose_backend(shape_of(4, 2, 64)), CpuAttention)
    for other in (
        shape_of(4, 2, 24),
        shape_of(4, 2, 592),
        shape_of(4, 2, 64, block_size=8),
        replace(shape_of(4, 1, 64), latent=24),
        replace(shape_of(4, 2, 64), dtype=torch.float16),
    ):
        assert isinstance(choose_backend(other), GatherAttention)
        with pytest.raises(ConfigError, match="head_dim a multiple of 16"):
            CpuAttention(other)


def test_gather_serves_shapes_that_cpu_refuses() -> None:
    world = World(shape_of(3, 1, 20, block_size=7), [30, 9])
    world.check(world.run(GatherAttention(world.shape), [1, 4]), [1, 4])
