"""Sampling by Triton's kernels against the same in PyTorch: by Triton's interpreter where there is
no GPU (tests/conftest.py), compiled where there is one."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.plan import Admit
from tests.support.triton_launches import launches, where_triton_compiles
from tests.unit.test_sampler import (
    INF,
    NAN,
    Bench,
    bench_of_all_kinds,
    check_logprobs,
    from_strategy,
    ints,
    naive,
    params_strategy,
    request,
    same,
)
from workers.sampler import Sampled, Sampler, SamplingTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits_of(n: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def check_same(found: Sampled, expected: Sampled) -> None:
    a, b = found.to_host(), expected.to_host()
    assert a.failed.tolist() == b.failed.tolist()
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.logprobs.keys() == b.logprobs.keys()
    for row, logprobs in a.logprobs.items():
        assert b.failed[row] or same(logprobs, b.logprobs[row])


def check_requests(
    logits: Tensor, requests: list[Admit], positions: Any = None, length: int = 64
) -> Sampled:
    """Samples a row for each request by both ways, which must agree."""
    slots = np.arange(len(requests))
    positions = [len(r.tokens) for r in requests] if positions is None else positions
    found, expected = (
        Bench(logits.shape[1], *requests, device=device, length=length, kernels=kernels).sample(
            logits, slots, positions
        )
        for device, kernels in ((DEVICE, True), ("cpu", False))
    )
    check_same(found, expected)
    return found


def test_kernels_give_the_tokens_of_pytorch() -> None:
    vocab = 5000
    benches = [bench_of_all_kinds(1, vocab, DEVICE, True), bench_of_all_kinds(1, vocab, "cpu")]
    num = len(benches[0].tokens)
    logits, positions = logits_of(num, vocab), np.random.default_rng(1).integers(1, 24, size=num)
    logits[3, 17], logits[5, 1], logits[7], logits[12, 9] = NAN, INF, -INF, -torch.tensor(NAN)
    logits[13, : vocab // 2] = -INF
    check_same(*(bench.sample(logits, np.arange(num), positions) for bench in benches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_read_what_models_compute_in(dtype: torch.dtype) -> None:
    """Narrow types have many equal logits, of which the lowest id is the largest."""
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"top_p": 0.7}, {"top_k": 5, "logprobs": 2}]
    kinds += [{"logit_bias": {7: 1.0}}]
    wide = torch.cat((logits_of(4, 300, 4), torch.full((4, 20), INF)), 1).to(dtype)
    part = wide[:, :300]  # rows need not touch
    check_requests(part, [request(i, seed=i, **kind) for i, kind in enumerate(kinds)])


@pytest.mark.parametrize("vocab", [1, 2, 3, 33])
def test_small_vocabularies(vocab: int) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.6},
                                   {"logprobs": 1, "top_k": vocab}]  # fmt: skip
    requests = [request(i, seed=i, **kind) for i, kind in enumerate(kinds * 3)]
    check_requests(torch.linspace(0, 2, vocab).expand(len(requests), -1), requests)


def test_the_tokens_of_a_seed_are_those_of_other_devices() -> None:
    logits = (torch.arange(1000) * 37 % 101).float() / 20
    kinds: list[dict[str, Any]] = [{}, {"min_p": 0.1}, {"top_k": 20}, {"top_p": 0.5}]
    requests = [request(i, seed=42 + i, **kind) for i, kind in enumerate(kinds)]
    bench = Bench(1000, *requests, device=DEVICE, kernels=True)
    slots, positions = np.indices((4, 5)).reshape(2, -1)
    tokens = bench.sample(logits.expand(20, -1).contiguous(), slots, positions + 10).tokens
    assert tokens.view(4, 5).tolist() == [
        [999, 272, 79, 543, 862],
        [109, 215, 633, 70, 370],
        [838, 363, 434, 565, 363],
        [262, 128, 393, 390, 767],
    ]


@pytest.mark.parametrize("shape", ["flat", "sharp", "equal", "few", "one"])
def test_top_k_finds_the_k_likeliest(shape: str) -> None:
    """Through all the ways: k over the number of blocks, over a chunk, over what is possible; ties
    at the k-th, also of whole blocks."""
    vocab = 3000
    logits = logits_of(1, vocab, 2, 0.5 if shape == "flat" else 3.0)[0]
    if shape == "equal":
        logits = (logits * 0.4).round()
    if shape == "few":
        logits[torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[30:]] = -INF
    if shape == "one":
        logits[:] = 0.25
    kinds: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_k": 50, "top_p": 0.7},
        {"top_k": 95, "min_p": 0.3, "top_p": 0.95, "temperature": 1.3},
        {"top_k": 1500, "temperature": 1.3},
        {"top_k": 3000, "top_p": 0.9},
    ]
    requests = [request(i, seed=i, **kind) for i, kind in enumerate(kinds)]
    check_requests(logits.expand(len(requests), -1), requests)


@pytest.mark.parametrize("top_p, top_k", [(0.5, 80), (1.0, 20), (1.0, 1), (0.3, 0)])
def test_of_equal_tokens_the_lower_ids_are_kept(top_p: float, top_k: int) -> None:
    """5 tokens are e times as likely as 45 others, some of which are cut off."""
    logits = torch.full((200,), -5.0)
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    logits[ids[:45]], logits[ids[45:50]] = 0.0, 1.0
    requests = [request(i, seed=i, top_p=top_p, top_k=top_k) for i in range(12)]
    found = check_requests(logits.expand(12, -1), requests).tokens.tolist()
    assert (logits[found] >= 0).all()


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_top_p_rejects_until_it_is_inside(spread: float) -> None:
    """Small ones take many turns."""
    tops = [1e-9, 0.01, 0.1, 0.5, 0.9, 0.999]
    requests = [request(i, seed=i, top_p=p, temperature=0.9) for i, p in enumerate(tops)]
    found = check_requests(logits_of(6, 1500, 3, spread), requests)
    assert not found.failed.any()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(params_strategy, st.integers(0, 99)), min_size=1, max_size=4),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_any_mix_of_parameters(drawn: list[tuple[dict[str, Any], int]], seed: int) -> None:
    requests = [from_strategy(i, *d) for i, d in enumerate(drawn)]
    check_requests(logits_of(len(requests), 90, seed, 3.0), requests)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(params_strategy, st.integers(0, 99)), min_size=1, max_size=4),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_edits_match_their_definitions(drawn: list[tuple[dict[str, Any], int]], seed: int) -> None:
    requests = [from_strategy(i, *d) for i, d in enumerate(drawn)]
    bench = Bench(90, *requests, device=DEVICE, kernels=True)
    logits = logits_of(len(requests), 90, seed, 3.0)
    slots, positions = ints(range(len(requests))), ints([len(r.tokens) for r in requests])
    changed = positions < bench.table.changed_until[slots]
    assert bench.table.records is not None and bench.sampler._kernels is not None
    bench.table.records.flush()
    rows = (torch.from_numpy(v).to(DEVICE) for v in (slots, positions))
    edited, _ = bench.sampler._kernels._edit(logits.to(DEVICE), *rows, penalties=True)
    for row, r, got, is_ in zip(logits, requests, edited.cpu().numpy(), changed, strict=True):
        if is_:
            np.testing.assert_allclose(got, naive(row, r), rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(row.double().numpy(), naive(row, r))


def test_words_and_ends_are_banned_where_they_should_be() -> None:
    """A word's beginning counts only in the output; ends are free after ``min_tokens``."""
    favourite = torch.arange(10.0)
    words = request(0, [5, 9, 9], 3, temperature=0, bad_words=[[9, 9], [8], [9, 7, 9]])
    ends: dict[str, Any] = {"temperature": 0, "min_tokens": 3, "stop_ids": [9, 8]}
    stays = {0: 0.5}  # a bias, which is there as long as the request
    both = request(1, [1, 2], **ends), request(2, [1, 2], logit_bias=stays, **ends)
    bench = Bench(10, words, *both, device=DEVICE, kernels=True)
    assert [bench.next(favourite, p) for p in range(3, 9)] == [9, 7, 7, 9, 7, 7]
    for slot in (1, 2):
        assert [bench.next(favourite, p, slot) for p in range(2, 7)] == [7, 7, 7, 9, 9]


def test_long_histories_and_lists() -> None:
    """Of more than one block of each loop."""
    vocab, rng = 3000, np.random.default_rng(5)
    history = rng.integers(0, 700, size=1300)
    allowed = [int(t) for t in rng.permutation(vocab)[:1500]]
    words = [[int(t)] for t in rng.permutation(vocab)[:90]] + [[int(history[-1]), 5]]
    bias = {int(t): float(rng.normal()) for t in rng.permutation(vocab)[:1100]}
    penalties: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.1,
                                 "repetition_penalty": 1.2}  # fmt: skip
    kinds: list[dict[str, Any]] = [
        penalties,
        {"allowed_token_ids": allowed, "bad_words": words, "logit_bias": bias, **penalties},
        {"min_tokens": 2000, "max_tokens": None, "stop_ids": allowed, "top_k": 30},
    ]
    requests = [request(i, history, 500, seed=i, **kind) for i, kind in enumerate(kinds)]
    check_requests(logits_of(3, vocab, 6), requests, length=1500)


def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    vocab = 500
    bench = bench_of_all_kinds(1, vocab, DEVICE, True)
    num, rng = len(bench.tokens), np.random.default_rng(2)
    logits, positions = logits_of(num, vocab, 7), rng.integers(1, 24, size=num)
    alone = [bench.sample(logits[i : i + 1], [i], positions[i : i + 1]) for i in range(num)]
    rows = rng.permutation(num)
    together = bench.sample(logits[rows], rows, positions[rows]).to_host()
    assert together.tokens.tolist() == [int(alone[i].tokens[0]) for i in rows]
    for at, i in enumerate(rows):
        single = alone[i].to_host().logprobs
        assert (at in together.logprobs) == bool(single)
        if single:
            a, b = together.logprobs[at], single[0]
            assert np.array_equal(a.logprobs, b.logprobs)
            assert np.array_equal(a.ids, b.ids) and np.array_equal(a.ranks, b.ranks)


@pytest.mark.parametrize("kernels", [True, False])
def test_tokens_are_kept_in_the_table(kernels: bool) -> None:
    """In both ways, with rows given on the device too, and of a slot that nobody was given."""
    device = DEVICE if kernels else "cpu"
    requests = [request(0, [1, 2]), request(1, [3], temperature=0), request(2, [4], top_k=9)]
    bench = Bench(100, *requests, request(4), device=device, kernels=kernels)
    slots, positions = ints([2, 0, 1, 3]), ints([1, 2, 1, 0])
    logits = logits_of(4, 100).to(device)
    rows = torch.from_numpy(slots).to(device), torch.from_numpy(positions).to(device)
    before = bench.tokens.clone()
    sampled = bench.sampler.sample(logits, slots, positions, rows)
    assert torch.equal(bench.tokens, before)
    again = bench.sampler.sample(logits, slots, positions, rows, keep=True)
    assert again.tokens.tolist() == sampled.tokens.tolist()
    before[rows[0].long(), rows[1].long()] = sampled.tokens
    assert torch.equal(bench.tokens, before)


def test_a_slot_forgets_what_it_held() -> None:
    favourite = torch.arange(10.0)
    held: dict[str, Any] = {"logit_bias": {1: 100.0}, "bad_words": [[9]], "min_tokens": 5,
                            "allowed_token_ids": [1, 2], "stop_ids": [8], "top_k": 3}  # fmt: skip
    bench = Bench(10, request(0, [9], **held), request(1, [9], **held), device=DEVICE, kernels=True)
    assert bench.next(favourite, 1) == bench.next(favourite, 1, slot=1) == 1
    assert bench.table.records is not None
    assert all(kept is not None for kept in bench.table.records._lists)
    bench.admit(request(0, [9], temperature=0))
    bench.table.release(1)
    assert bench.next(favourite, 1) == 9 and bench.next(favourite, 2) == 9
    assert bench.table.records._lists == [None, None]
    bench.admit(request(1, [9], **held))
    bench.table.release(1)  # before it was ever sent
    bench.admit(request(1, [9], temperature=0))
    assert bench.next(favourite, 2, slot=1) == 9


@pytest.mark.parametrize(
    "k, dtype",
    [(0, torch.float32), (3, torch.bfloat16), (128, torch.float32), (-1, torch.bfloat16)],
    ids=str,
)
def test_logprobs(k: int, dtype: torch.dtype) -> None:
    vocab = 300
    bench = Bench(vocab, request(logprobs=k, temperature=0), device=DEVICE, kernels=True)
    logits = logits_of(4, vocab, 8, 4.0).to(dtype)
    logits[1, :140] = logits[1].max()  # equals among the top
    logits[2, 20:] = -INF
    targets = torch.arange(4) * 29
    found = bench.sampler.prompt_logprobs(logits.to(DEVICE), targets.to(DEVICE), k)
    sampled = bench.sample(logits, np.zeros(4), np.ones(4)).to_host()
    for row, one in enumerate(found):
        most = vocab if k < 0 else k
        check_logprobs(one, logits[row], 29 * row, most)
        check_logprobs(sampled.logprobs[row], logits[row], int(sampled.tokens[row]), most)


def test_logprobs_of_equal_tokens_far_apart() -> None:
    """The k-th is one of many equals, in more than one chunk of the candidates."""
    logits = logits_of(1, 3000, 9).round()
    bench = Bench(3000, request(), device=DEVICE, kernels=True)
    targets = torch.tensor([7], device=DEVICE)
    found = bench.sampler.prompt_logprobs(logits.to(DEVICE), targets, 100)
    check_logprobs(found[0], logits[0], 7, 100)


def test_copies_to_the_host_come_without_waiting() -> None:
    stream = torch.cuda.Stream() if DEVICE == "cuda" else None
    asked: list[int | None] = [None, 2, 0, -1]
    requests = [request(i, temperature=0, logprobs=k) for i, k in enumerate(asked)]
    bench = Bench(300, *requests, device=DEVICE, kernels=True)
    first, second = (bench.sample(logits_of(4, 300, i), range(4), [1] * 4) for i in (1, 2))
    copies = [sampled.start_copy(stream) for sampled in (first, second)]
    for copy, sampled in zip(copies, (first, second), strict=True):
        host, expected = copy.result(), sampled.to_host()
        assert host.tokens.tolist() == expected.tokens.tolist()
        assert host.failed.tolist() == expected.failed.tolist()
        assert host.logprobs.keys() == {1, 2, 3}
        assert all(same(host.logprobs[i], expected.logprobs[i]) for i in (1, 2, 3))
    logits, targets = logits_of(5, 300).to(DEVICE), torch.arange(5, device=DEVICE)
    pieces = [p.start_copy(stream) for p in bench.sampler.logprob_pieces(logits, targets, 2)]
    found = [one for piece in pieces for one in piece.result().values()]
    expected_ = bench.sampler.prompt_logprobs(logits, targets, 2)
    assert all(same(a, b) for a, b in zip(found, expected_, strict=True))


# ---- what is launched ----


class Operations(TorchDispatchMode):
    """The names of PyTorch's operations that run, but for those that make memory or views of it."""

    FREE = {"empty", "view", "select", "slice", "detach", "alias"}

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operations(*kinds: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of a step without admits: its launches, and what else PyTorch is asked to do."""
    requests = [request(i, **kind) for i, kind in enumerate(kinds)]
    bench = Bench(300, *requests, kernels=True)
    slots, positions = ints(range(len(kinds))), ints([1] * len(kinds))
    rows = torch.from_numpy(slots), torch.from_numpy(positions)
    logits = torch.zeros(len(kinds), 300)
    with launches():
        bench.sampler.sample(logits, slots, positions, rows, keep=True)
    with launches() as found, Operations() as others:
        bench.sampler.sample(logits, slots, positions, rows, keep=True)
    return [launch.kernel.__name__ for launch in found], others.names


@pytest.fixture(scope="module")
def compiling() -> Iterator[Callable[..., Any]]:
    with where_triton_compiles() as call:
        yield call


GREEDY = ["piece_maxima", "row_maxima"]
EDITS = ["copy_edited", "edit_rows"]
ALL, AMONG = ["class_masses", "draw_from_all"], ["draw_from_top_k"]


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ([{"temperature": 0}] * 3, GREEDY),
        ([{"temperature": 0}, {}, {"top_p": 0.5}], GREEDY + ALL),
        ([{"top_k": 5}, {"temperature": 0, "top_k": 50}], GREEDY + AMONG),
        ([{"temperature": 0, "frequency_penalty": 1.0}, {"min_p": 0.1}], EDITS + GREEDY + ALL),
        ([{"top_k": 5}, {"allowed_token_ids": [3]}, {}], EDITS + GREEDY + ALL + AMONG),
    ],
    ids=str,
)
def test_a_step_without_admits_sends_nothing_and_launches_what_it_needs(
    kinds: list[dict[str, Any]], expected: list[str], compiling: Callable[..., Any]
) -> None:
    assert compiling(operations, *kinds) == (expected, [])


def compile_all(arch: int, dtype: torch.dtype, vocab: int) -> dict[str, int]:
    """Every kernel as a model's steps need it, and the bytes of shared memory that it takes."""
    tokens = torch.zeros(2, 4096, dtype=torch.int32)
    sampler = Sampler(SamplingTable(2, vocab, tokens, kernels=True))
    with launches() as found:
        sampler.warm_up(torch.zeros(2, vocab, dtype=dtype))
        variants = {launch.variant: launch for launch in found}
        count = len(variants)
        wanted: tuple[dict[str, Any], ...] = (
            {}, {"top_p": 0.3}, {"top_k": 7, "bad_words": [[1]], "logprobs": 5}
        )  # fmt: skip
        for kind in wanted:
            sampler.table.admit(request(1, **kind))
            sampler.sample(torch.zeros(1, vocab, dtype=dtype), ints([1]), ints([1]), keep=True)
        rows = torch.zeros(3, vocab, dtype=dtype)[1:], torch.zeros(2, dtype=torch.int64)
        assert len(list(sampler.logprob_pieces(*rows, 2))) == 1
    assert len({launch.variant for launch in found} | variants.keys()) == count
    return {name: variant.compile(arch).metadata.shared for name, variant in variants.items()}


@pytest.mark.parametrize(
    "arch, dtype, vocab", [(80, torch.float16, 50257), (90, torch.bfloat16, 128256)], ids=str
)
def test_every_kernel_compiles_and_none_is_left_for_the_first_request(
    arch: int, dtype: torch.dtype, vocab: int, compiling: Callable[..., Any]
) -> None:
    compiled = compiling(compile_all, arch, dtype, vocab)
    assert len(compiled) == 13
    assert max(compiled.values()) < 48 << 10  # shared memory that every card has
