"""The arithmetic of the Triton kernels, against plain PyTorch: by Triton's interpreter where there
is no GPU (tests/conftest.py), compiled where there is one."""

import random

import pytest
import torch
from torch import Tensor

from tests.support.triton_launches import launches, where_triton_compiles
from workers.attention.triton import write_latents
from workers.kernels import plain
from workers.kernels.fp8_cache import decode, encode
from workers.kernels.gpu import attention, elementwise, heads, norm, product, rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, error


def same(found: Tensor, expected: Tensor) -> None:
    """In every bit where the kernels are compiled; the interpreter's products are NumPy's, whose
    sums depend on the shape."""
    if DEVICE.type == "cuda":
        assert torch.equal(found, expected)
    else:
        close(found, expected)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def coded_blocks(coded: Tensor) -> Tensor:
    """[blocks, planes, heads, BLOCK_SIZE, D + 1] of ``encode`` as the kernels have it."""
    parts = coded[..., :-1].flatten(3), coded[..., -1]
    return torch.cat(parts, -1).view(coded.shape)


class Sequences:
    """Sequences with keys and values in scattered blocks, and queries that end each of them.
    ``values`` is what the blocks of ``cache`` hold, in 8-bit floats if it is ``fp8``."""

    def __init__(self, counts: list[int], contexts: list[int], dim: int, num_heads: int,
                 kv_heads: int, latent: int | None = None, fp8: bool = False) -> None:  # fmt: skip
        self.counts, self.contexts = counts, contexts
        self.num_heads, self.kv_heads, self.value_dim = num_heads, kv_heads, latent or dim
        self.parts = attention.parts_of(num_heads, kv_heads, latent is not None)
        longest = max(contexts)
        per_row = -(-longest // BLOCK_SIZE)
        total = len(counts) * per_row
        planes = 2 if latent is None else 1
        self.values = self.cache = normal(total + 3, planes, kv_heads, BLOCK_SIZE, dim)
        if fp8:
            sizes = torch.randint(-12, 3, self.cache.shape[:-1], device=DEVICE).float().exp2()
            coded = encode(self.cache * sizes[..., None])
            self.values = decode(coded, torch.float32)
            self.cache = coded_blocks(coded)
        self.tables = (torch.randperm(total) + 3).view(len(counts), per_row).int().to(DEVICE)
        self.q = normal(sum(counts), num_heads * dim)

    def rows(self, split: bool = True) -> attention.Rows:
        """``split``: rows of one query as decode items, else as prefill ones."""
        decode, prefill = [], []
        tile = attention.tile_queries(self.num_heads, self.parts, self.value_dim, self.q.dtype)
        token = 0
        for row, (count, context) in enumerate(zip(self.counts, self.contexts, strict=True)):
            if count == 1 and split:
                decode += [(token, row, context, i) for i in range(-(-context // attention.SPLIT))]
            else:
                prefill += [(row, i) for i in range(-(-count // tile))]
            token += count
        starts = [0, *torch.tensor(self.counts).cumsum(0).tolist()]

        def ints(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        return attention.Rows(
            slots=ints(list(range(len(self.counts)))), contexts=ints(self.contexts),
            starts=ints(starts), counts=ints([len(decode), len(prefill)]),
            decode=ints(decode + [(0, 0, 0, 0)] * 3), prefill=ints(prefill + [(0, 0)] * 3),
        )  # fmt: skip

    def attend(self, traits: attention.Traits, split: bool = True, programs: int = 5) -> Tensor:
        rows = self.rows(split)
        shape = len(self.q), self.num_heads * self.value_dim
        out = torch.full(shape, float("nan"), device=DEVICE)
        scratch = attention.Scratch(
            len(rows.decode), self.num_heads, self.parts, self.value_dim, DEVICE
        )
        attention.decode(self.q, self.cache, self.tables, rows, traits, scratch, out, programs)
        attention.prefill(self.q, self.cache, self.tables, rows, traits, out)
        return out

    def expected(self, traits: attention.Traits) -> Tensor:
        found, at = [], 0
        for row, (count, context) in enumerate(zip(self.counts, self.contexts, strict=True)):
            pages = self.values[self.tables[row].long()].double()
            keys, values = (
                page.transpose(0, 1).flatten(1, 2)[:, :context]
                .repeat_interleave(self.num_heads // self.kv_heads, 0)
                for page in (pages[:, 0], pages[:, -1, ..., -self.value_dim :])
            )  # fmt: skip
            q = self.q[at : at + count].double().view(count, self.num_heads, -1).transpose(0, 1)
            s = q @ keys.transpose(1, 2) * traits.scale
            if traits.cap:
                s = traits.cap * (s / traits.cap).tanh()
            key = torch.arange(context, device=DEVICE)
            position = torch.arange(context - count, context, device=DEVICE)[:, None]
            seen = key <= position
            if traits.window is not None:
                seen &= key > position - traits.window
            s = s.masked_fill(~seen, -torch.inf)
            if traits.sinks is not None:
                sink = traits.sinks.double()[:, None, None].expand(-1, count, 1)
                p = torch.cat((s, sink), -1).softmax(-1)[..., :-1]
            else:
                p = s.softmax(-1)
            found.append((p @ values).transpose(0, 1).reshape(count, -1))
            at += count
        return torch.cat(found)


CASES = [
    pytest.param(64, 4, 2, {}, id="grouped"),
    pytest.param(64, 3, 3, {"window": 40}, id="window"),
    pytest.param(80, 6, 2, {}, id="head-80"),
    pytest.param(128, 7, 1, {"cap": 3.0}, id="seven-of-one-capped"),
    pytest.param(64, 4, 4, {"sinks": True}, id="sinks"),
    pytest.param(96, 5, 1, {"window": 700, "sinks": True, "cap": 5.0}, id="everything"),
    pytest.param(112, 20, 1, {"latent": 96}, id="latents"),  # two parts of heads
    pytest.param(80, 6, 2, {"fp8": True, "cap": 5.0}, id="fp8"),
    pytest.param(112, 20, 1, {"fp8": True, "latent": 96}, id="fp8-latents"),
]


def make_traits(num_heads: int, dim: int, options: dict) -> attention.Traits:
    options = {name: value for name, value in options.items() if name != "fp8"}
    if options.get("sinks"):
        options["sinks"] = normal(num_heads)
    return attention.Traits(heads=num_heads, scale=dim**-0.5, **options)


@pytest.mark.parametrize(("dim", "num_heads", "kv_heads", "options"), CASES)
def test_attention_is_that_of_softmax(dim, num_heads, kv_heads, options) -> None:
    counts, contexts = [1, 1, 37, 1, 3, 1], [5, 600, 90, 1, 530, 1100]
    traits = make_traits(num_heads, dim, options)
    fp8 = options.get("fp8", False)
    sequences = Sequences(counts, contexts, dim, num_heads, kv_heads, traits.latent, fp8)
    close(sequences.attend(traits), sequences.expected(traits))


@pytest.mark.parametrize(("dim", "num_heads", "kv_heads", "options"), CASES)
def test_decode_and_prefill_agree_in_every_bit(dim, num_heads, kv_heads, options) -> None:
    """Alone or with others, as a decode or as the end of a longer row."""
    count, context = (530, 1100) if DEVICE.type == "cuda" else (40, 560)
    traits = make_traits(num_heads, dim, options)
    fp8 = options.get("fp8", False)
    whole = Sequences([count], [context], dim, num_heads, kv_heads, traits.latent, fp8)
    expected = whole.attend(traits)
    # Only a single query may be a decode item, and only those depend on the number of programs.
    for count, split, programs in ((1, True, 1), (1, True, 64), (1, False, 1), (2, False, 1),
                                   (33, False, 1)):  # fmt: skip
        part = Sequences([count], [context], dim, num_heads, kv_heads, traits.latent)
        part.cache, part.tables, part.q = whole.cache, whole.tables, whole.q[-count:].contiguous()
        same(part.attend(traits, split, programs), expected[-count:])


@pytest.mark.parametrize("fp8", [False, True])
def test_blocks_that_nobody_sees_may_hold_anything(fp8: bool) -> None:
    sequences = Sequences([1, 20], [700, 650], 64, 2, 1, fp8=fp8)
    traits = attention.Traits(heads=2, scale=0.1, window=50)
    expected = sequences.attend(traits)
    for row, (count, context) in enumerate(zip(sequences.counts, sequences.contexts, strict=True)):
        gone = (context - count - 50) // BLOCK_SIZE
        sequences.cache[sequences.tables[row, :gone].long()] = 255 if fp8 else float("nan")
    same(sequences.attend(traits), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [48, 768])
def test_norms_add_the_update_first(width: int, bias: bool) -> None:
    x, update = normal(5, width), normal(5, width)
    weight, offset, extra = normal(width), normal(width), normal(width)
    added = x + update + extra if bias else x + update
    for kernel, expected in (
        (
            lambda x, *more: norm.rms_norm(x, weight, 1e-5, *more),
            plain.rms_norm(added, weight, 1e-5),
        ),
        (
            lambda x, *more: norm.layer_norm(x, weight, offset, 1e-5, *more),
            plain.layer_norm(added, weight, offset, 1e-5),
        ),
    ):
        y = x.clone()
        close(kernel(y, update, extra if bias else None), expected)
        close(y, added)
    close(norm.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize(
    ("rows", "outputs"), [(1, 150), (16, 150), (19, 150), (40, 150), (64, 110), (50, 50)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, outputs: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "BUSY_PROGRAMS", 1)  # every kind of tile with a small weight
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    x, weight = normal(rows, 320).to(dtype), normal(outputs, 320).to(dtype)
    extra = normal(outputs).to(dtype) if bias else None
    found = product.product(x, weight, extra)
    expected = x.double() @ weight.double().t() + (0 if extra is None else extra.double())
    close(found, expected, 1e-6 if dtype == torch.float32 else 4e-3)
    both = product.product(x, weight, extra, gated=True)
    close(both, plain.silu_mul(found), 1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_activations(bias: bool) -> None:
    x = normal(3, 2 * 1100)
    extra = normal(2 * 1100) if bias else None
    biased = x if extra is None else x + extra
    close(elementwise.silu_mul(x, extra), plain.silu_mul(biased))
    for name, function in (("relu", torch.relu), ("gelu", torch.nn.functional.gelu)):
        close(elementwise.bias_act(x.clone(), extra, name), function(biased))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("half", [None, 32, 24])
def test_heads_are_normed_rotated_and_placed(bias: bool, normed: bool, half: int | None) -> None:
    tokens, num_heads, kv_heads, dim = 5, 6, 2, 64
    qkv = normal(tokens, (num_heads + 2 * kv_heads) * dim)
    extra = normal(qkv.shape[1]) if bias else None
    weights = (normal(dim), normal(dim)) if normed else None
    positions = torch.randint(0, 90, (tokens,), device=DEVICE, dtype=torch.int32)
    tables = None if half is None else (normal(90, half), normal(90, half))
    cells = torch.randperm(4 * BLOCK_SIZE)[:tokens].int().to(DEVICE)
    cache = torch.zeros(4, 2, kv_heads, BLOCK_SIZE, dim, device=DEVICE)
    found = heads.place(
        qkv, cache, cells, positions, num_heads, bias=extra, norms=weights, eps=1e-6,
        rotation=tables,
    )  # fmt: skip
    biased = (qkv if extra is None else qkv + extra).view(tokens, -1, dim)
    q, k, v = (part.clone() for part in biased.split([num_heads, kv_heads, kv_heads], 1))
    if weights is not None:
        q, k = plain.rms_norm(q, weights[0], 1e-6), plain.rms_norm(k, weights[1], 1e-6)
    if tables is not None:
        plain.rope(q, k, positions.long(), *tables)
    close(found, q.reshape(tokens, -1))
    block, offset = cells.long() // BLOCK_SIZE, cells.long() % BLOCK_SIZE
    close(cache[block, 0, :, offset], k)
    close(cache[block, 1, :, offset], v)
    cache[block, :, :, offset] = 0
    assert not cache.any()


def awkward(rows: int, dim: int) -> Tensor:
    """Vectors of every size and of elements far apart, ties between two codes, zeros."""
    x = normal(rows, dim) * torch.randint(-20, 4, (rows, dim), device=DEVICE).float().exp2()
    x *= torch.randint(-100, 100, (rows, 1), device=DEVICE).float().exp2()
    steps = torch.arange(dim, device=DEVICE) / 2 - dim // 4
    x[:2] = torch.stack((steps * 2**-9, steps))
    x[0, 0] = 200.0
    x[2] = 0
    x[3] *= 2.0**-149
    x[4, :3] = torch.tensor([3e38, -1.0, 3e37])
    return x


def test_8_bit_floats_are_placed_as_pytorch_rounds_them() -> None:
    tokens, num_heads, kv_heads, dim = 40, 2, 3, 80
    x = awkward(tokens * 2 * kv_heads, dim).view(tokens, 2, kv_heads, dim)
    qkv = torch.cat((normal(tokens, num_heads, dim), x.flatten(1, 2)), 1).flatten(1)
    cells = torch.randperm(4 * BLOCK_SIZE)[:tokens].int().to(DEVICE)
    coded = torch.zeros(4, 2, kv_heads, BLOCK_SIZE, dim + 1, dtype=torch.uint8, device=DEVICE)
    cache = coded_blocks(coded)
    heads.place(qkv, cache, cells, cells, num_heads)
    block, offset = cells.long() // BLOCK_SIZE, cells.long() % BLOCK_SIZE
    coded[block, :, :, offset] = encode(x)
    assert torch.equal(cache, coded_blocks(coded))


def test_latents_are_placed_as_8_bit_floats() -> None:
    latents = normal(9, 80)
    cells = torch.randperm(4 * BLOCK_SIZE)[:9].to(DEVICE)
    coded = torch.zeros(4, 1, 1, BLOCK_SIZE, 81, dtype=torch.uint8, device=DEVICE)
    cache = coded_blocks(coded)
    write_latents(cache, cells, latents)
    coded[cells // BLOCK_SIZE, 0, 0, cells % BLOCK_SIZE] = encode(latents)
    assert torch.equal(cache, coded_blocks(coded))


def test_what_is_broken_stays_so_in_8_bits() -> None:
    qkv = normal(2, 3 * 64)
    qkv[0, 70], qkv[1, 130] = torch.nan, torch.inf
    cells = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    cache = torch.zeros(1, 2, 1, BLOCK_SIZE, 65, dtype=torch.uint8, device=DEVICE)
    heads.place(qkv, cache, cells, cells, 1)
    exponents = cache.view(2, -1)[:, -BLOCK_SIZE:]
    assert exponents[0, 0] == exponents[1, 1] == 255
    assert max(exponents[0, 1], exponents[1, 0]) < 255
    coded = encode(qkv.view(2, 3, 64))
    assert not decode(coded, torch.float32)[0, 1].isfinite().any()


def test_rows_look_up_their_tokens_and_cells() -> None:
    rng = random.Random(0)
    tokens = torch.randint(0, 999, (7, 100), device=DEVICE, dtype=torch.int32)
    tables = torch.randint(0, 50, (7, 7), device=DEVICE, dtype=torch.int32)
    slots = torch.tensor([rng.randrange(7) for _ in range(200)], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([rng.randrange(100) for _ in range(200)], device=DEVICE).int()
    ids, cells = rows.look_up(tokens, tables, slots, positions, BLOCK_SIZE)
    assert torch.equal(ids, tokens[slots.long(), positions.long()])
    blocks = tables[slots.long(), positions.long() // BLOCK_SIZE]
    assert torch.equal(cells, blocks * BLOCK_SIZE + positions % BLOCK_SIZE)


def compile_attention(arch: int, num_heads: int, dim: int, latent: int | None, fp8: bool) -> int:
    """The most bytes of shared memory that placing, decode or prefill takes, of one kv head."""
    dtype = torch.uint8 if fp8 else torch.bfloat16
    planes = 2 if latent is None else 1
    cache = torch.empty(1, planes, 1, BLOCK_SIZE, dim + fp8, dtype=dtype)
    q, out = (torch.empty(1, num_heads * size).bfloat16() for size in (dim, latent or dim))
    ints = torch.zeros(4, 4, dtype=torch.int32)
    rows = attention.Rows(ints[0], ints[0], ints[0], ints[0], ints, ints[:, :2])
    traits = attention.Traits(num_heads, 0.1, latent=latent)
    parts = attention.parts_of(num_heads, 1, latent is not None)
    scratch = attention.Scratch(1, num_heads, parts, latent or dim, torch.device("cpu"))
    with launches() as found:
        if latent is None:
            heads.place(torch.empty(1, (num_heads + 2) * dim).bfloat16(), cache, ints[0, :1],
                        ints[0, :1], num_heads)  # fmt: skip
        attention.decode(q, cache, ints, rows, traits, scratch, out, 1)
        attention.prefill(q, cache, ints, rows, traits, out)
    return max(launch.compile(arch).metadata.shared for launch in found)


def test_attention_compiles_for_hopper() -> None:
    """Of GLM 4.7 Flash's 20 heads over a latent, and 4 over a key of 128."""
    with where_triton_compiles() as call:
        for shape in ((20, 576, 512, False), (20, 576, 512, True), (4, 128, None, True)):
            assert call(compile_attention, 90, *shape) <= 227 << 10
