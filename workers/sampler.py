"""Tokens from logits: one call for all rows of a step.

**Noise.** All randomness is a pure function of (seed, position, index), so that a request's tokens
do not depend on its batch, on preemption or on where it runs. SplitMix64 (Steele, Lea and Flood
2014, "Fast splittable pseudorandom number generators"; it passes BigCrush) is used twice: the
stream that starts at mix(seed) gives each position a 64-bit key, and the stream that starts at
the key gives the noise. That is integer arithmetic, hence the same on every device; 52 bits go
into a uniform in (0, 1) of float64, so that neither tail is cut short.

**Draws** are exponential races (Gumbel-max): with independent E_i ~ Exp(1), argmax p_i / E_i has
distribution p. One uniform and the inverse of the cumulative sum would need less noise, but there
a change in any logit shifts every boundary after it: with N likely tokens, a relative change of d
flips up to d * sqrt(N) of the draws, in a race only about d. Logits do change in their last bits
with the batch's shape and the device, so races it is.

- With ``top_k`` the race is among the k candidates; a token's noise has its id as index.
- Else the vocabulary is dealt into classes of about sqrt(V) tokens. The classes race by their
  mass, then the tokens of the winning class by theirs: P(class) * P(token | class) is exact
  ("top-down" Gumbel sampling: Maddison, Tarlow and Minka 2014, "A* sampling"), as steady as the
  race of all, and needs 2 sqrt(V) noise instead of V.
- ``top_p`` without ``top_k`` is by rejection, as in FlashInfer (2025, "Sorting-free GPU kernels
  for LLM sampling"): a token is drawn from all; if the mass of what is likelier already reaches
  top_p, it was outside: draw again among just those likelier ones. Nothing is ever sorted.

**Ties.** Tokens are ordered by logit, equal ones by id, so that exactly k remain under ``top_k``
and the fewest under ``top_p``, and top_k=1 is greedy whatever the rounding of the logits.

Order and meaning of the steps are vLLM's (V1): process (see SamplingTable), greedy; temperature,
min_p, top_k, top_p, draw. Log-probabilities are of the raw logits.

All this is here twice: in PyTorch, for CPUs and where Triton cannot be had, and as the kernels of
``workers.kernels.gpu.sampling``, with the same noise and so the same tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Admit, Ints, TokenLogprobs, ints
from engine.sampling_params import SamplingParams
from workers.kernels import argmax_lse
from workers.sampling_table import NO_LOGPROBS, SamplingTable, on_device

if TYPE_CHECKING:
    from workers.kernels.gpu.sampling import Needs, SamplingKernels

__all__ = [
    "HostCopy",
    "HostSampled",
    "RowLogprobs",
    "Sampled",
    "Sampler",
    "SamplingTable",
    "start_copies",
]

GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step; the other two are its mixers
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BLOCK = 32  # tokens whose maximum is taken first when looking for the top k
PROMPT_ELEMENTS = 2**23  # of logits whose log-probabilities are computed at a time
CPU_ELEMENTS = 3 * 2**18  # of logits that a CPU draws from at a time, to stay in its caches

Array = NDArray[Any]
T = TypeVar("T")


class HostCopy(Generic[T]):
    """What is on its way to the host. Keeps the device's tensors until it is there."""

    def __init__(self, source: object, arrived: Callable[[], T],
                 event: torch.cuda.Event | None = None) -> None:  # fmt: skip
        self._source, self._arrived, self._event = source, arrived, event

    def result(self) -> T:
        """Waits for the copy, and for nothing that was started after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._arrived()


def start_copies(
    tensors: tuple[Tensor, ...], stream: torch.cuda.Stream
) -> tuple[list[Tensor], torch.cuda.Event]:
    """The tensors in pinned memory, once the event has come: copied on ``stream`` after what the
    current one has been given so far."""
    stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
    with torch.cuda.stream(stream):
        pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for host, tensor in zip(pinned, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    return pinned, event


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of the rows that asked: the chosen token's, then the top k's."""

    rows: Array  # [m], indices into the step's rows
    tops: Array  # [m], how many top ones each row asked for
    ids: Tensor  # [m, 1 + k]
    values: Tensor  # [m, 1 + k] float32
    ranks: Tensor  # [m, 1 + k]

    def to_host(self) -> dict[int, TokenLogprobs]:
        """By row. Waits for the device."""
        ids, ranks = (t.to(torch.int32).cpu().numpy() for t in (self.ids, self.ranks))
        values = self.values.cpu().numpy()
        return {
            int(row): TokenLogprobs(ids[i, : k + 1], values[i, : k + 1], ranks[i, : k + 1])
            for i, (row, k) in enumerate(zip(self.rows, self.tops, strict=True))
        }

    def start_copy(
        self, stream: torch.cuda.Stream | None = None
    ) -> HostCopy[dict[int, TokenLogprobs]]:
        """``to_host`` without waiting: on CUDA copies on ``stream``, which is needed there."""
        if stream is None:
            return HostCopy(self, self.to_host)
        tensors, event = start_copies((self.ids, self.values, self.ranks), stream)
        return HostCopy(self, RowLogprobs(self.rows, self.tops, *tensors).to_host, event)


@dataclass(frozen=True, slots=True)
class HostSampled:
    """``Sampled`` as StepResult has it."""

    tokens: Ints  # [n]
    failed: NDArray[np.bool_]  # [n]
    logprobs: dict[int, TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was sampled for each row, on the device.

    A row has ``failed`` if its logits held NaN or +inf, or if its sampling parameters leave no
    token with a finite logit; its token is then 0 and means nothing.
    """

    tokens: Tensor  # [n] int32
    failed: Tensor  # [n] bool
    logprobs: RowLogprobs | None  # of the rows that asked, if any

    def to_host(self) -> HostSampled:
        """Waits for the device."""
        logprobs = self.logprobs.to_host() if self.logprobs else {}
        return HostSampled(self.tokens.cpu().numpy(), self.failed.cpu().numpy(), logprobs)

    def start_copy(self, stream: torch.cuda.Stream | None = None) -> HostCopy[HostSampled]:
        """``to_host`` without waiting: on CUDA copies on ``stream``, which is needed there."""
        if stream is None:
            return HostCopy(self, self.to_host)
        logprobs = self.logprobs
        rest = () if logprobs is None else (logprobs.ids, logprobs.values, logprobs.ranks)
        (tokens, failed, *copied), event = start_copies((self.tokens, self.failed, *rest), stream)
        if logprobs is not None:
            logprobs = RowLogprobs(logprobs.rows, logprobs.tops, *copied)
        return HostCopy(self, Sampled(tokens, failed, logprobs).to_host, event)


class Sampler:
    """Samples a token for each row of a step. Keeps no state but its table's."""

    def __init__(self, table: SamplingTable) -> None:
        self.table = table
        self._kernels: SamplingKernels | None = None
        if table.records is not None:
            from workers.kernels.gpu import sampling

            self._kernels = sampling.SamplingKernels(
                table.records, table.tokens, table.vocab_size, _num_classes(table.vocab_size)
            )

    def sample(
        self,
        logits: Tensor,
        slots: Ints,
        positions: Ints,
        rows: tuple[Tensor, Tensor] | None = None,
        keep: bool = False,
    ) -> Sampled:
        """A token for each row of ``logits`` [n, V], which are left as they are.

        slots: [n], the slot of each row. positions: [n], the index in its sequence of the token
        to be sampled (tokens so far, the prompt's included). rows: both once more, as int32 on
        the device, if they are there already. keep: also write the tokens to the table's
        ``tokens``, for the steps to come. Does not wait for the device, if Triton samples there.
        """
        table = self.table
        assert logits.shape == (len(slots), table.vocab_size)
        if self._kernels is not None:
            return self._by_kernels(self._kernels, logits, slots, positions, rows, keep)
        logits = logits.contiguous()
        x, unusable = table.process(logits, slots, positions)
        greedy, some_k = table.greedy[slots], table.top_k[slots] > 0
        n = len(slots)
        tokens = torch.empty(n, dtype=torch.int64, device=x.device)
        finite = torch.empty(n, dtype=torch.bool, device=x.device)
        piece = max(1, CPU_ELEMENTS // x.shape[1]) if x.is_cpu else n
        for draw, mine, most in (
            (_greedy, greedy, n),
            (self._among_top_k, ~greedy & some_k, piece),
            (self._among_all, ~greedy & ~some_k, piece),
        ):
            these = np.flatnonzero(mine)
            for some in (these[i : i + most] for i in range(0, len(these), most)):
                at = on_device(some, x.device)
                part = x if len(some) == n else x.index_select(0, at)
                token, ok = draw(part, slots[some], positions[some])
                tokens.index_copy_(0, at, token)
                finite.index_copy_(0, at, ok)
        if unusable is not None:
            finite &= ~unusable
        tokens = tokens * finite
        if keep:
            at_slots, at_positions = rows or self._upload(slots, positions)
            table.tokens[at_slots.long(), at_positions.long()] = tokens.int()
        return Sampled(tokens.int(), ~finite, self._logprobs(logits, tokens, slots))

    def _by_kernels(self, kernels: "SamplingKernels", logits: Tensor, slots: Ints, positions: Ints,
                    rows: tuple[Tensor, Tensor] | None, keep: bool) -> Sampled:  # fmt: skip
        table = self.table
        assert table.records is not None
        table.records.flush()
        logits, rows = _readable(logits), rows or self._upload(slots, positions)
        tokens, failed = kernels.sample(logits, *rows, self._needs(slots, positions), keep)
        return Sampled(tokens, failed, self._logprobs(logits, tokens, slots))

    def _upload(self, slots: Ints, positions: Ints) -> tuple[Tensor, Tensor]:
        both = on_device(np.stack((slots, positions)).astype(np.int32), self.table.device)
        return both[0], both[1]

    def _needs(self, slots: Ints, positions: Ints) -> "Needs":
        from workers.kernels.gpu import sampling

        table = self.table
        top_k = np.where(table.greedy[slots], -1, table.top_k[slots])
        return sampling.Needs(
            edited=bool((positions < table.changed_until[slots]).any()),
            penalties=bool(table.penalized[slots].any()),
            from_all=bool((top_k == 0).any()),
            top_k=max(0, int(top_k.max())),
        )

    def warm_up(self, logits: Tensor) -> None:
        """Samples from ``logits`` [n, V] in every way there is, on slot 0, which must be free: the
        kernels are compiled then, and the memory that a step may need has been taken once."""
        slots, k = np.zeros(len(logits), np.int32), self.table.vocab_size
        kinds = SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=k)
        for params in kinds:
            more = replace(params, logit_bias={0: 1.0}, presence_penalty=1.0, logprobs=1)
            for wanted in (params, more):
                self.table.admit(Admit(0, ints([0]), 1, wanted, seed=0))
                self.sample(logits, slots, slots + 1, keep=True)
        self.table.release(0)

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, k: int) -> list[TokenLogprobs]:
        """Log-probabilities of ``targets`` [n] int64 under ``logits`` [n, V] and of the k likeliest
        tokens; k = -1 is the whole vocabulary. Waits for the device."""
        found: list[TokenLogprobs] = []
        for piece in self.logprob_pieces(logits, targets, k):
            found += piece.to_host().values()
        return found

    def logprob_pieces(self, logits: Tensor, targets: Tensor, k: int) -> Iterator[RowLogprobs]:
        """``prompt_logprobs`` on the device, without waiting: some rows at a time, counted from 0
        in each piece, so that what is needed on the way stays small."""
        k = self.table.vocab_size if k < 0 else k
        elements = PROMPT_ELEMENTS
        if self._kernels is not None and k <= self._kernels.most_top:
            elements *= 16  # for the kernels' scratch is a sixteenth of the logits
        step = max(1, elements // self.table.vocab_size)
        for at in range(0, len(targets), step):
            some = targets[at : at + step]
            rows = np.arange(len(some), dtype=np.int32)
            parts = self._logprobs_of(logits[at : at + step], rows, some, k)
            yield RowLogprobs(rows, np.full_like(rows, k), *parts)

    def _logprobs(self, logits: Tensor, tokens: Tensor, slots: Ints) -> RowLogprobs | None:
        asked = self.table.logprobs[slots]
        rows = np.flatnonzero(asked != NO_LOGPROBS).astype(np.int32)
        if not len(rows):
            return None
        tops = np.where(asked[rows] < 0, self.table.vocab_size, asked[rows])
        return RowLogprobs(rows, tops, *self._logprobs_of(logits, rows, tokens, int(tops.max())))

    def _logprobs_of(
        self, logits: Tensor, rows: Ints, tokens: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids, log-probabilities and ranks [m, 1 + k] of rows [m]: of tokens [n] and of the top k.

        A rank is one more than the number of strictly likelier tokens.
        """
        kernels, device = self._kernels, logits.device
        if len(rows) == len(logits):
            at = torch.arange(len(rows), dtype=torch.int32, device=device)
        else:
            at = on_device(rows, device)
            tokens = tokens.index_select(0, at)
        if kernels is None:
            some = logits if len(rows) == len(logits) else logits.index_select(0, at)
            return _logprobs_of(some.contiguous(), tokens, k)
        logits, tokens = _readable(logits), tokens.int()
        if k <= kernels.most_top:
            return kernels.logprobs(logits, at, tokens, k)[:3]
        *chosen, lse = kernels.logprobs(logits, at, tokens, 0)
        top, ids = _top(logits.index_select(0, at).float(), k)
        ranks = torch.searchsorted(-top, -top) + 1
        others = ids.clamp_(max=logits.shape[1] - 1), top - lse[:, None], ranks
        ids, values, ranks = (torch.cat(both, dim=1) for both in zip(chosen, others, strict=True))
        return ids, values, ranks

    def _among_top_k(self, x: Tensor, slots: Ints, positions: Ints) -> tuple[Tensor, Tensor]:
        """Draws from x [n, V] where every row has a top_k: among [n, largest k] candidates."""
        table, device = self.table, x.device
        top_k, top_p = table.top_k[slots], table.top_p[slots]
        x = x.float()
        most = int(top_k.max())
        value, ids = _top(x, most)
        scale = on_device(1 / table.temperature[slots], device)[:, None]
        value = (value - value[:, :1]) * scale
        keep = torch.arange(most, device=device) < on_device(top_k, device)[:, None]
        if table.min_p[slots].any():
            least = np.log(np.maximum(table.min_p[slots], 1e-45))  # below any exp(value)
            keep &= value >= on_device(least, device)[:, None]
        if (top_p < 1).any():
            p = value.exp() * keep
            # Running sums, since these do not depend on how many candidates follow.
            upto = p.cumsum(-1)
            limit = on_device(np.where(top_p < 1, top_p, 2), device)[:, None] * upto[:, -1:]
            keep &= upto - p < limit
        race = value - _exponential(self._keys(slots, positions, device), ids).log()
        winner = torch.where(keep, race, -torch.inf).argmax(-1, keepdim=True)
        return ids.gather(1, winner)[:, 0], x.amax(-1).isfinite()

    def _among_all(self, x: Tensor, slots: Ints, positions: Ints) -> tuple[Tensor, Tensor]:
        """Draws from x [n, V] where no row has a top_k."""
        table, device = self.table, x.device
        n, vocab = x.shape
        classes = _num_classes(vocab)
        size = -(-vocab // classes)  # tokens of a class: those equal modulo ``classes``
        p = torch.empty((n, size * classes), dtype=torch.float32, device=device)
        p[:, vocab:] = -torch.inf
        p[:, :vocab] = x
        if (table.temperature[slots] != 1).any():
            p *= on_device(1 / table.temperature[slots], device)[:, None]
        p = p.softmax(-1)
        if table.min_p[slots].any():
            least = p.amax(-1, keepdim=True) * on_device(table.min_p[slots], device)[:, None]
            # Comparing into float is several times faster than into bool on a CPU.
            p *= torch.ge(p, least, out=torch.empty_like(p))
        keys = self._keys(slots, positions, device)
        mass = p.view(n, size, classes).sum(1)
        token = _race(p, mass, keys, 0)
        finite = mass.sum(-1).isfinite()
        if (table.top_p[slots] < 1).any():
            limit = on_device(np.where(table.top_p[slots] < 1, table.top_p[slots], 2), device)
            self._reject(p, mass, token, keys, limit * mass.sum(-1))
        return token, finite

    def _reject(self, p: Tensor, mass: Tensor, token: Tensor, keys: Tensor, limit: Tensor) -> None:
        """Draws again, into ``token`` [n], until the mass of what is likelier than each token is
        below ``limit`` [n]. p: [n, size * classes], their sums by class: mass [n, classes].

        The only part of ``sample`` that waits for the device: how many turns it takes is chance.
        """
        classes, size = mass.shape[1], p.shape[1] // mass.shape[1]
        line = torch.arange(size, device=p.device)[:, None]  # of ``classes`` successive tokens
        column = torch.arange(classes, device=p.device)
        rows = torch.arange(len(p), device=p.device)
        total = mass.sum(-1)
        turn = 0
        while True:
            drawn = token[rows]
            chance = p.gather(1, drawn[:, None])
            # What is likelier is at most all the others, which settles most draws of a sharp
            # distribution. NaN compares false, so rows without a distribution end here.
            open_ = (total - chance[:, 0] >= limit).nonzero()[:, 0]
            if not len(open_):
                return
            if len(open_) < len(rows):
                rows, p, keys, limit, chance, drawn = (
                    t.index_select(0, open_) for t in (rows, p, keys, limit, chance, drawn)
                )
            # 1 for the likelier tokens; of those as likely as the one drawn, the ones before it.
            lines, chance = p.view(-1, size, classes), chance[..., None]
            at = (torch.arange(len(p), device=p.device), drawn // classes)
            least = torch.where(line < at[1][:, None, None], _just_below(chance), chance)
            likelier = torch.gt(lines, least, out=torch.empty_like(lines))
            likelier[at] += (lines[at] == chance[:, 0]) & (column < (drawn % classes)[:, None])
            mass = likelier.mul_(lines).sum(1)
            total = mass.sum(-1)
            open_ = (total >= limit).nonzero()[:, 0]
            rows, p, mass, keys, limit, total = (
                t.index_select(0, open_)
                for t in (rows, likelier.view_as(p), mass, keys, limit, total)
            )
            turn += 1
            token[rows] = _race(p, mass, keys, turn)

    def _keys(self, slots: Ints, positions: Ints, device: torch.device) -> Tensor:
        """[n, 1] int64: a key for the noise of each (seed, position)."""
        with np.errstate(over="ignore"):
            start = _mix64(self.table.seed[slots] + np.uint64(GOLDEN))
            keys = _mix64(start + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
        return on_device(keys.view(np.int64), device)[:, None]


def _readable(logits: Tensor) -> Tensor:
    """``logits`` as the kernels take them, which are then compiled in one way only: each row's
    tokens next to each other, the first of all at a multiple of 16 bytes."""
    if logits.stride(1) == 1 and logits.data_ptr() % 16 == 0:
        return logits
    return logits.clone(memory_format=torch.contiguous_format)


def _num_classes(vocab: int) -> int:
    """How many classes a vocabulary is dealt into."""
    return int(1 << round(np.log2(vocab) / 2))


def _greedy(x: Tensor, _slots: Ints, _positions: Ints) -> tuple[Tensor, Tensor]:
    index, _, finite = argmax_lse(x)
    return index, finite


def _race(p: Tensor, mass: Tensor, keys: Tensor, turn: int) -> Tensor:
    """A token [n] for each row of p [n, size * classes] with sums by class mass [n, classes]."""
    (n, classes), size = mass.shape, p.shape[1] // mass.shape[1]
    first = turn * (classes + size)
    index = torch.arange(first, first + classes + size, device=p.device)
    noise = _exponential(keys, index)
    chosen = (mass / noise[:, :classes]).argmax(-1)
    inside = p.view(n, size, classes)[torch.arange(n, device=p.device), :, chosen]
    return (inside / noise[:, classes:]).argmax(-1) * classes + chosen


def _just_below(x: Tensor) -> Tensor:
    return x.nextafter(torch.zeros_like(x))


def _mix64(z: Array) -> Array:
    """SplitMix64's finalizer of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    z ^= z >> np.uint64(31)
    return z


def _exponential(keys: Tensor, index: Tensor) -> Tensor:
    """Exp(1) noise, float64 [n, k], number ``index`` [k] or [n, k] of the stream of each of
    ``keys`` [n, 1] int64."""
    # _mix64 on int64, whose >> is arithmetic; products wrap alike.
    z = keys + (index + 1) * _signed(GOLDEN)
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(MIX_1)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(MIX_2)
    z = z ^ ((z >> 31) & (2**33 - 1))
    uniform = (((z >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52
    return uniform.log().neg_()


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids [n, k] of the k largest of each row of x [n, V] float32, in order; of equal
    ones the lower id comes first."""
    n, vocab = x.shape
    if k * BLOCK * 2 > vocab:
        return _decode(_sortable(x, torch.arange(vocab, device=x.device)).topk(k)[0])
    # The k largest lie in the k blocks with the largest maxima.
    if vocab % BLOCK:
        x = F.pad(x, (0, -vocab % BLOCK), value=-torch.inf)
    blocks = x.view(n, -1, BLOCK)
    count = blocks.shape[1]
    _, best = _decode(
        _sortable(blocks.amax(-1), torch.arange(count, device=x.device)).topk(k, sorted=False)[0]
    )
    rows = torch.arange(0, n * count, count, device=x.device)[:, None]
    pool = blocks.view(-1, BLOCK).index_select(0, (rows + best).view(-1)).view(n, -1)
    ids = (best[..., None] * BLOCK + torch.arange(BLOCK, device=x.device)).view(n, -1)
    return _decode(_sortable(pool, ids).topk(k)[0])


def _sortable(x: Tensor, ids: Tensor) -> Tensor:
    """int64 that order as float32 x does, and equal ones by descending id."""
    bits = (x + 0.0).view(torch.int32)  # -0 becomes +0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) + (0x7FFFFFFF - ids)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """x and ids of ``_sortable``."""
    bits = (keys >> 32).int()
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def _logprobs_of(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log-probabilities and ranks [n, 1 + k] of ``tokens`` [n] and of the top k.

    A rank is one more than the number of strictly likelier tokens.
    """
    lse = argmax_lse(logits)[1][:, None]
    x = logits.float()
    tokens = tokens[:, None]
    value = x.gather(1, tokens)
    rank = torch.gt(x, value, out=torch.empty_like(x)).sum(-1, keepdim=True).long() + 1
    if k:
        top, ids = _top(x, k)
        ids = ids.clamp(max=x.shape[1] - 1)  # padding can only come up among NaN
        ranks = torch.searchsorted(-top, -top) + 1
        tokens, value, rank = (
            torch.cat(both, dim=1) for both in ((tokens, ids), (value, top), (rank, ranks))
        )
    return tokens, value - lse, rank
