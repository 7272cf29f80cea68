"""The sampler against exact probabilities, plain float64 references, itself in other batches."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import workers.sampler as sampler_module
from engine.plan import Admit, TokenLogprobs
from engine.sampling_params import SamplingParams
from workers.sampler import Sampled, Sampler, SamplingTable

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
on_devices = pytest.mark.parametrize("device", DEVICES)
NEVER = 1e-4  # a p-value under this is a wrong distribution
NAN, INF = math.nan, math.inf


def ints(values: Any) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)


class Bench:
    """A sampler with its tables, filled with one slot for each of ``requests``."""

    def __init__(self, vocab: int, *requests: Admit, device: str = "cpu", length: int = 64,
                 kernels: bool | None = None) -> None:  # fmt: skip
        num_slots = max((r.slot for r in requests), default=0) + 1
        self.tokens = torch.zeros(num_slots, length, dtype=torch.int32, device=device)
        self.table = SamplingTable(num_slots, vocab, self.tokens, kernels)
        self.sampler = Sampler(self.table)
        for request in requests:
            self.admit(request)

    def admit(self, request: Admit) -> None:
        self.table.admit(request)
        self.tokens[request.slot, : len(request.tokens)] = torch.from_numpy(request.tokens)

    def sample(self, logits: Tensor, slots: Any, positions: Any) -> Sampled:
        return self.sampler.sample(logits.to(self.tokens.device), ints(slots), ints(positions))

    def next(self, logits: Tensor, position: int, slot: int = 0) -> int:
        """Samples one token and writes it where the worker would."""
        token = int(self.sample(logits[None], [slot], [position]).tokens[0])
        self.tokens[slot, position] = token
        return token


def request(slot: int = 0, tokens: Any = (0,), prompt_len: int | None = None,
            seed: int = 0, stop_ids: Sequence[int] = (), bad_words: Sequence[Sequence[int]] = (),
            **sampling: Any) -> Admit:  # fmt: skip
    prompt_len = len(tokens) if prompt_len is None else prompt_len
    return Admit(slot, ints(tokens), prompt_len, SamplingParams(**sampling), seed,
                 tuple(stop_ids), tuple(map(tuple, bad_words)))  # fmt: skip


# ---- distributions ----


def probabilities(logits: Tensor, params: SamplingParams) -> NDArray[np.float64]:
    """What a token's probability must be, by sorting in float64: of equals the lower id first."""
    x = logits.double().numpy() / params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    if params.top_p < 1:
        p[order[before >= params.top_p]] = 0
    result: NDArray[np.float64] = p / p.sum()
    return result


def draws(logits: Tensor, params: SamplingParams, num: int, device: str) -> NDArray[np.int64]:
    """How often each token is drawn in ``num`` draws, over 20 seeds and many positions."""
    seeds = 20
    bench = Bench(len(logits), *(Admit(s, ints([0]), 1, params, 7919 * s) for s in range(seeds)),
                  device=device)  # fmt: skip
    counts = np.zeros(len(logits), np.int64)
    for start in range(0, num // seeds, 50):
        positions = np.repeat(np.arange(start, start + 50), seeds)
        slots = np.tile(np.arange(seeds), 50)
        sampled = bench.sample(logits.expand(len(slots), -1), slots, positions)
        assert not sampled.failed.any()
        counts += np.bincount(sampled.tokens.cpu().numpy(), minlength=len(logits))
    return counts


def p_value(counts: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    """Of the chi-square test, rare tokens taken together; 0 if one has no probability at all."""
    if counts[p == 0].any():
        return 0.0
    expected = p * counts.sum()
    order = np.argsort(expected)
    pooled = np.add.accumulate(expected[order])
    group = np.concatenate([[0], np.floor(pooled[:-1] / 10)])  # of at least 10 or single tokens
    _, group = np.unique(group, return_inverse=True)
    seen, should = (np.bincount(group, weights=v[order]) for v in (counts, expected))
    if len(seen) == 1:
        return 1.0
    return float(stats.chisquare(seen, should * seen.sum() / should.sum()).pvalue)


@on_devices
@pytest.mark.parametrize("shape", ["sharp", "flat", "ties"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 100, "temperature": 1.3},
        {"top_p": 0.9},
        {"top_p": 0.3, "temperature": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.05, "top_p": 0.7},
        {"top_k": 7, "min_p": 1.0},
        {"top_k": 6, "top_p": 0.8},
        {"top_k": 7, "top_p": 0.8, "min_p": 0.3, "temperature": 1.2},
        {"top_k": 400, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
def test_distribution_is_exact(params: dict[str, Any], shape: str, device: str) -> None:
    vocab = 503  # no multiple of anything
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(vocab, generator=generator) * (0.5 if shape == "flat" else 3.0) - 20
    if shape == "ties":
        logits = logits.round()
        logits[[3, 300]] = logits.max()
    wanted = SamplingParams(**params)
    counts = draws(logits, wanted, 5000, device)
    assert p_value(counts, probabilities(logits, wanted)) > NEVER


@pytest.mark.timeout(60)
@on_devices
@pytest.mark.parametrize("top_p", [5e-324, 1e-310, 1e-40, 1e-38])
def test_a_top_p_that_is_nothing_in_32_bits_leaves_the_likeliest_token(
    top_p: float, device: str
) -> None:
    """Nor does it keep the engine for ever."""
    bench = Bench(300, request(top_p=top_p, seed=3), device=device)
    logits = torch.zeros(300)
    logits[217] = 1e-3
    assert [bench.next(logits, position) for position in range(1, 9)] == [217] * 8


@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_small_vocabularies(params: dict[str, Any]) -> None:
    for vocab in (1, 2, 3, 5, 33):
        logits = torch.linspace(0, 2, vocab)
        counts = draws(logits, SamplingParams(**params), 3000, "cpu")
        assert p_value(counts, probabilities(logits, SamplingParams(**params))) > NEVER


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """64 tokens share 2 ** -10 of the mass, beside one that has the rest."""
    logits = torch.zeros(65)
    logits[0] = math.log(64 * (2**10 - 1))
    for top_k in (0, 65):
        counts = draws(logits, SamplingParams(top_k=top_k), 60_000, "cpu")
        assert stats.binomtest(int(counts[1:].sum()), 60_000, 2**-10).pvalue > NEVER


@pytest.mark.parametrize("params", [{}, {"top_k": 16}, {"top_p": 0.999}], ids=str)
def test_draws_are_independent(params: dict[str, Any]) -> None:
    """Of neighbours in position, in seed, and of seeds one step of SplitMix64 apart."""
    vocab, length = 16, 1500
    seeds = [0, 1, 2**63, 2**63 + 1, 0x9E3779B97F4A7C15, 2 * 0x9E3779B97F4A7C15 % 2**64]
    bench = Bench(vocab, *(request(s, seed=seed, **params) for s, seed in enumerate(seeds)))
    slots, positions = np.indices((len(seeds), length)).reshape(2, -1)
    flat = torch.zeros(len(slots), vocab)
    tokens = bench.sample(flat, slots, positions).tokens.numpy().reshape(len(seeds), length)
    pairs = [(row[:-lag], row[lag:]) for row in tokens for lag in (1, 2)]
    for i, first in enumerate(tokens):
        for second in tokens[:i]:
            pairs += [(first, second), (first[1:], second[:-1]), (first[:-1], second[1:])]
    for first, second in pairs:
        cells = np.bincount(first * vocab + second, minlength=vocab**2)
        assert stats.chisquare(cells).pvalue > NEVER / 10


def test_noise_is_splitmix64() -> None:
    """Against the published outputs for seed 1234567."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    noise = sampler_module._exponential(torch.tensor([[1234567]]), torch.arange(4))[0]
    uniform = [((word >> 12) + 0.5) / 2**52 for word in words]
    np.testing.assert_allclose(noise.numpy(), -np.log(uniform), rtol=1e-14)
    steps = np.uint64(1234567) + np.arange(1, 5, dtype=np.uint64) * np.uint64(sampler_module.GOLDEN)
    assert sampler_module._mix64(steps).tolist() == words


@on_devices
def test_tokens_of_a_seed_never_change(device: str) -> None:
    """Not between versions, nor devices: a replayed request must go on as it began."""
    logits = (torch.arange(1000) * 37 % 101).float() / 20
    kinds: list[dict[str, Any]] = [{}, {"min_p": 0.1}, {"top_k": 20}, {"top_p": 0.5}]
    bench = Bench(1000, *(request(i, seed=42 + i, **k) for i, k in enumerate(kinds)), device=device)
    slots, positions = np.indices((4, 5)).reshape(2, -1)
    tokens = bench.sample(logits.expand(20, -1), slots, positions + 10).tokens
    assert tokens.view(4, 5).tolist() == [
        [999, 272, 79, 543, 862],
        [109, 215, 633, 70, 370],
        [838, 363, 434, 565, 363],
        [262, 128, 393, 390, 767],
    ]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 3000}], ids=str)
def test_slightly_different_logits_give_the_same_tokens(params: dict[str, Any]) -> None:
    """Where 4096 tokens are about equally likely, noise of 0.001 in each logit moves less than
    0.2 % of the mass; a draw by cumulative sums would flip about 2 % of the tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, generator=generator) * 0.1
    other = logits + torch.randn(4096, generator=generator) * 1e-3
    bench = Bench(4096, request(**params))
    positions = np.arange(1000)
    a, b = (bench.sample(x.expand(1000, -1), np.zeros(1000), positions) for x in (logits, other))
    assert (a.tokens != b.tokens).float().mean() < 0.01


# ---- greedy ----


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}], ids=str
)
def test_of_equal_logits_the_lowest_id_wins(
    params: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-3, 4, (16, 300), generator=generator).to(dtype)
    logits[0], logits[1], logits[2] = 0, -0.0, -INF
    logits[1, 7] = logits[2, 299] = 0.0
    bench = Bench(300, request(seed=3, **params), device=device)
    tokens = bench.sample(logits, np.zeros(16), np.arange(16)).tokens.tolist()
    first = [int(np.argmax(row)) for row in logits.float().numpy()]
    if params == {"temperature": 1e-4}:  # a draw among the equal ones
        assert [float(logits[i, t]) for i, t in enumerate(tokens)] == [
            float(logits[i, t]) for i, t in enumerate(first)
        ]
    else:
        assert tokens == first


# ---- the batch does not matter ----

WORDS = ((3, 4), (9,), (1, 2, 3))
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {5: 3.0}},
    {},
    {"temperature": 0.6, "logprobs": -1},
    {"top_k": 3},
    {"top_k": 40, "top_p": 0.8, "logprobs": 0},
    {"top_k": 250, "min_p": 0.02, "bad_words": WORDS},
    {"top_p": 0.9},
    {"top_p": 0.2, "temperature": 2.0, "frequency_penalty": 0.7},
    {"min_p": 0.1, "stop_ids": (7, 8), "min_tokens": 9},
    {"min_p": 0.01, "top_p": 0.6, "presence_penalty": -1.0},
    {"allowed_token_ids": [3, 5, 8, 13, 21, 34]},
    {"allowed_token_ids": [299], "temperature": 0, "logprobs": 1},
]
VOCAB = 300


def same(a: TokenLogprobs, b: TokenLogprobs) -> bool:
    return (
        np.array_equal(a.ids, b.ids)
        and np.array_equal(a.ranks, b.ranks)
        and np.allclose(a.logprobs, b.logprobs, atol=1e-6)
    )


def bench_of_all_kinds(copies: int, vocab: int, device: str, kernels: bool | None = None) -> Bench:
    rng = np.random.default_rng(0)
    requests = []
    for slot in range(copies * len(KINDS)):
        history = rng.integers(min(vocab, 20), size=rng.integers(1, 24))
        prompt_len = int(rng.integers(1, len(history) + 1))
        kind = KINDS[slot % len(KINDS)]
        requests.append(request(slot, history, prompt_len, seed=int(rng.integers(2**63)), **kind))
    return Bench(vocab, *requests, device=device, kernels=kernels)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_in_any_batch(dtype: torch.dtype, device: str) -> None:
    bench = bench_of_all_kinds(3, VOCAB, device)
    rng = np.random.default_rng(1)
    num = len(bench.tokens)
    positions = ints(rng.integers(1, 24, size=num))
    logits = torch.from_numpy(rng.normal(size=(num, VOCAB)) * 2).to(dtype)
    bad = rng.permutation(num)[:3]
    logits[bad, 17] = NAN
    alone = [bench.sample(logits[i : i + 1], [i], positions[i : i + 1]) for i in range(num)]
    assert [i for i, a in enumerate(alone) if a.failed[0]] == sorted(bad)
    for size in [*range(1, 34, 4), num]:
        rows = rng.permutation(num)[:size]
        host = bench.sample(logits[rows], rows, positions[rows]).to_host()
        assert host.tokens.tolist() == [int(alone[i].tokens[0]) for i in rows]
        assert host.failed.tolist() == [bool(alone[i].failed[0]) for i in rows]
        for j, i in enumerate(rows):
            single = alone[i].to_host().logprobs
            assert (j in host.logprobs) == bool(single)
            assert i in bad or j not in host.logprobs or same(host.logprobs[j], single[0])


def test_pieces_of_a_large_step_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of_all_kinds(3, VOCAB, "cpu")
    slots = np.arange(len(bench.tokens))
    logits = torch.randn(len(slots), VOCAB, generator=torch.Generator().manual_seed(2))
    whole = bench.sample(logits, slots, slots * 0 + 20).tokens
    monkeypatch.setattr(sampler_module, "CPU_ELEMENTS", 4 * VOCAB)
    assert torch.equal(bench.sample(logits, slots, slots * 0 + 20).tokens, whole)


def test_logits_are_left_as_they_are() -> None:
    bench = bench_of_all_kinds(1, VOCAB, "cpu")
    logits = torch.randn(len(KINDS), VOCAB)
    before = logits.clone()
    tokens = bench.sample(logits, np.arange(len(KINDS)), np.full(len(KINDS), 20)).tokens
    assert torch.equal(logits, before)
    part = torch.cat((logits, logits), dim=1)[:, :VOCAB]  # and need not be contiguous
    again = bench.sample(part, np.arange(len(KINDS)), np.full(len(KINDS), 20)).tokens
    assert torch.equal(tokens, again)


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_cuda_gives_the_tokens_of_the_cpu() -> None:
    rng = np.random.default_rng(3)
    vocab = 5000
    logits = torch.from_numpy(rng.normal(size=(len(KINDS) * 8, vocab)) * 2).float()
    slots = np.arange(len(logits))
    tokens = [
        bench_of_all_kinds(8, vocab, device).sample(logits, slots, slots * 0 + 20).tokens.cpu()
        for device in DEVICES
    ]
    assert torch.equal(*tokens)


params_strategy = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.3, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 90, 1000]),
        "top_p": st.sampled_from([0.05, 0.5, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.2]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 0.3]),
        "logit_bias": st.dictionaries(st.integers(0, 89), st.floats(-100, 100), max_size=4),
        "allowed_token_ids": st.lists(st.integers(0, 89), min_size=1, max_size=30),
        "min_tokens": st.integers(0, 8),
        "stop_ids": st.lists(st.integers(0, 89), max_size=4),
        "bad_words": st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=5),
        "seed": st.integers(0, 2**64 - 1),
        "tokens": st.lists(st.integers(0, 3), min_size=1, max_size=16),
        "logprobs": st.sampled_from([-1, 0, 2]),
    },
)


def from_strategy(slot: int, drawn: dict[str, Any], cut: int) -> Admit:
    tokens = drawn.get("tokens", [0])
    return request(slot, **{**drawn, "tokens": tokens}, prompt_len=1 + cut % len(tokens))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(params_strategy, st.integers(0, 99)), min_size=1, max_size=8),
       st.integers(0, 2**32 - 1), st.booleans())  # fmt: skip
def test_any_mix_in_one_batch_is_each_alone(
    drawn: list[tuple[dict[str, Any], int]], seed: int, bf16: bool
) -> None:
    vocab = 90
    requests = [from_strategy(i, *d) for i, d in enumerate(drawn)]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(requests), vocab, generator=generator) * 3
    logits = logits.bfloat16() if bf16 else logits
    positions = [len(r.tokens) for r in requests]
    bench = Bench(vocab, *requests)
    together = bench.sample(logits, np.arange(len(requests)), positions).to_host()
    processed = np.stack([naive(row, r) for row, r in zip(logits, requests, strict=True)])
    for i, r in enumerate(requests):
        alone = Bench(vocab, Admit(0, *[getattr(r, f) for f in Admit.__dataclass_fields__][1:]))
        single = alone.sample(logits[i : i + 1], [0], [positions[i]]).to_host()
        assert single.tokens[0] == together.tokens[i]
        assert single.failed[0] == together.failed[i] == np.isneginf(processed[i]).all()
        if not single.failed[0]:  # whatever is drawn, it must be possible
            assert processed[i][single.tokens[0]] > -INF


# ---- processors, against a plain reference ----


def naive(logits: Tensor, r: Admit) -> NDArray[np.float64]:
    """Logits after the processors, one token at a time, from their definitions."""
    s, past = r.sampling, r.tokens.tolist()
    output = past[r.prompt_len :]
    x = logits.double().numpy().copy()
    for token in range(len(x)):
        if s.allowed_token_ids is not None and token not in s.allowed_token_ids:
            x[token] = -INF
        for *prefix, last in r.bad_words:
            if token == last and output[len(output) - len(prefix) :] == prefix:
                x[token] = -INF
        if len(output) < s.min_tokens and token in r.stop_ids:
            x[token] = -INF
        x[token] += (s.logit_bias or {}).get(token, 0.0)
        if token in past:
            x[token] *= 1 / s.repetition_penalty if x[token] > 0 else s.repetition_penalty
        x[token] -= s.frequency_penalty * output.count(token)
        x[token] -= s.presence_penalty * (token in output)
    return x


@on_devices
@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(params_strategy, st.integers(0, 99)), min_size=1, max_size=6),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_processors_match_their_definitions(
    device: str, drawn: list[tuple[dict[str, Any], int]], seed: int
) -> None:
    vocab = 90
    requests = [from_strategy(i, *d) for i, d in enumerate(drawn)]
    bench = Bench(vocab, *requests, device=device)
    logits = torch.randn(len(requests), vocab, generator=torch.Generator().manual_seed(seed)) * 3
    positions = ints([len(r.tokens) for r in requests])
    x, _ = bench.table.process(logits.to(device), ints(range(len(requests))), positions)
    for row, r, got in zip(logits, requests, x.cpu().numpy(), strict=True):
        np.testing.assert_allclose(got, naive(row, r), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.5}, {"top_k": 30}])
def test_penalties_count_each_step_and_survive_a_move(params: dict[str, Any]) -> None:
    """The same tokens whether the request stays, or is admitted anew with what it has so far."""
    vocab, steps = 50, 40
    sampling = dict(params, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3)
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(steps, vocab, generator=generator)
    prompt = [1, 2, 2, 3]
    stays = Bench(vocab, request(0, prompt, seed=5, **sampling))
    tokens = list(prompt)
    for x in logits:
        expected = naive(x, request(0, tokens, 4, **sampling))
        if params == {"temperature": 0}:
            assert stays.next(x, len(tokens)) == expected.argmax()
        else:
            moved = Bench(vocab, request(2, tokens, 4, seed=5, **sampling))
            assert stays.next(x, len(tokens)) == moved.next(x, len(tokens), slot=2)
        tokens.append(int(stays.tokens[0, len(tokens)]))
    assert len(set(tokens[4:])) > 5


def test_bad_words_are_never_completed() -> None:
    """A prefix counts only in the output, and only right before the token."""
    favourite = torch.arange(10.0)  # 9 is likeliest, then 8, ...
    bench = Bench(10, request(0, [5, 9, 9], 3, temperature=0, bad_words=[[9, 9], [8], [9, 7, 9]]))
    # The prompt's 9, 9 does not count; after an output 9 comes 7 (8 is banned), and then not 9.
    assert [bench.next(favourite, p) for p in range(3, 9)] == [9, 7, 7, 9, 7, 7]


def test_min_tokens_masks_the_end_until_then() -> None:
    favourite = torch.arange(10.0)
    ends: dict[str, Any] = {"temperature": 0, "min_tokens": 3, "stop_ids": [9, 8]}
    bias = {0: 0.5}  # which stays
    bench = Bench(10, request(0, [1, 2], **ends), request(1, [1, 2], logit_bias=bias, **ends))
    for slot in (0, 1):
        assert [bench.next(favourite, p, slot) for p in range(2, 7)] == [7, 7, 7, 9, 9]


def test_a_slot_forgets_what_it_held() -> None:
    favourite = torch.arange(10.0)
    held: dict[str, Any] = {
        "logit_bias": {1: 100.0}, "bad_words": [[9]], "allowed_token_ids": [1, 2],
        "min_tokens": 5, "stop_ids": [8], "repetition_penalty": 9.0,
        "logprobs": 2, "prompt_logprobs": 1,
    }  # fmt: skip
    bench = Bench(10, request(0, [9], **held), request(1, [9], temperature=0))
    assert bench.table.any_prompt_logprobs and bench.table.prompt_logprobs(0) == (1, 1)
    assert bench.next(favourite, 1) == 1
    bench.admit(request(0, [9], temperature=0))
    assert not bench.table.any_prompt_logprobs and bench.table.prompt_logprobs(0) == (None, 1)
    sampled = bench.sample(favourite.expand(2, -1), [0, 1], [1, 1])
    assert sampled.tokens.tolist() == [9, 9] and sampled.logprobs is None
    bench.admit(request(0, [9], **held))
    bench.table.release(0)
    assert not bench.table.any_prompt_logprobs
    for part in (bench.table.edits, bench.table.allowed, bench.table.bad_words):
        assert part._data.numel() == 0


def test_a_shorter_list_replaces_a_longer_one() -> None:
    favourite = torch.arange(10.0).expand(2, -1)
    lists = ([7, 8, 9], [2, 3, 4])
    bench = Bench(10, *(request(i, allowed_token_ids=ids) for i, ids in enumerate(lists)))
    bench.admit(request(0, allowed_token_ids=[1], temperature=0))
    bench.admit(request(1, allowed_token_ids=[5, 6], temperature=0))
    assert bench.sample(favourite, [0, 1], [1, 1]).tokens.tolist() == [1, 6]
    bench.admit(request(1, allowed_token_ids=[0, 1, 2], temperature=0))
    assert bench.sample(favourite, [0, 1], [1, 1]).tokens.tolist() == [1, 2]


# ---- failures ----


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_cannot_be_sampled_fails_alone(dtype: torch.dtype, device: str) -> None:
    vocab = 2000
    kinds = [k for k in KINDS if "allowed_token_ids" not in k]
    for kind in [*kinds, {"allowed_token_ids": [1, 2], "bad_words": [[1]]}]:
        bench = Bench(vocab, request(0, [0, 1], seed=4, **kind), device=device)
        good = torch.randn(6, vocab, generator=torch.Generator().manual_seed(3)).to(dtype)
        good[:, 100:1900] = -INF  # which is no fault
        x = good.clone()
        x[1, 1234] = NAN
        x[2, 70] = -torch.tensor(NAN)
        x[3, 1999] = INF
        x[4] = -INF
        zeros, positions = np.zeros(6), np.arange(2, 8)
        sampled = bench.sample(x, zeros, positions)
        assert sampled.failed.tolist() == [False, True, True, True, True, False]
        tokens, wanted = sampled.tokens, bench.sample(good, zeros, positions).tokens
        assert tokens[1:5].tolist() == [0] * 4 and tokens[[0, 5]].equal(wanted[[0, 5]])
        if host := sampled.to_host().logprobs:
            assert all(t.ids.min() >= 0 and t.ids.max() < vocab for t in host.values())


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}])
def test_no_token_left_is_a_failure(params: dict[str, Any]) -> None:
    bench = Bench(10, request(0, allowed_token_ids=[3], bad_words=[[3]], **params))
    sampled = bench.sample(torch.zeros(1, 10), [0], [1])
    assert sampled.failed.tolist() == [True] and sampled.tokens.tolist() == [0]


# ---- log-probabilities ----


def check_logprobs(found: TokenLogprobs, logits: Tensor, token: int, k: int) -> None:
    exact = logits.double().log_softmax(-1).numpy()
    order = np.argsort(-exact, kind="stable")[:k]
    assert found.ids.tolist() == [token, *order]
    assert found.ids.dtype == found.ranks.dtype == np.int32
    assert found.logprobs.dtype == np.float32
    np.testing.assert_allclose(found.logprobs, exact[found.ids], atol=2e-6, rtol=2e-6)
    assert found.ranks.tolist() == [1 + (exact > exact[i]).sum() for i in found.ids]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits(dtype: torch.dtype, device: str) -> None:
    asked = [None, 0, 1, 5, -1, 20]
    odd: dict[str, Any] = {"temperature": 3.0, "top_k": 50, "repetition_penalty": 2.0}
    bench = Bench(VOCAB, *(request(i, logprobs=k, **odd) for i, k in enumerate(asked)),
                  device=device)  # fmt: skip
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(8)).to(dtype) * 4
    logits[3, :40] = logits[3].max()  # equals among the top
    host = bench.sample(logits, np.arange(6), np.full(6, 1)).to_host()
    assert sorted(host.logprobs) == [1, 2, 3, 4, 5]
    for i, found in host.logprobs.items():
        k = VOCAB if asked[i] == -1 else asked[i] or 0
        check_logprobs(found, logits[i], int(host.tokens[i]), k)


@on_devices
@pytest.mark.parametrize("k", [0, 3, -1])
def test_prompt_logprobs(k: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "PROMPT_ELEMENTS", 4 * VOCAB)  # several pieces
    bench = Bench(VOCAB, request(), device=device)
    logits = torch.randn(10, VOCAB, generator=torch.Generator().manual_seed(8)).to(device)
    targets = torch.arange(10, device=device) * 29
    found = bench.sampler.prompt_logprobs(logits, targets, k)
    assert len(found) == 10
    for i, one in enumerate(found):
        check_logprobs(one, logits[i].cpu(), 29 * i, VOCAB if k < 0 else k)
