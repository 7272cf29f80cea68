"""What a worker knows of each slot's sampling, and what that does to the logits before the draw.

Nothing here is as wide as the vocabulary times the slots: every processor touches the few tokens
it names. Counts for the penalties are not kept but taken each step from the worker's token table,
which costs a few operations on [rows, tokens so far]; so a resumed request needs nothing more
than its tokens, and there is nothing that could go out of step with them.

Where the kernels for GPUs sample, a slot's parameters are a record on the device, and its lists
lie beside it; else they are arrays of the host, and ``process`` does their work in PyTorch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Admit, Ints, ints
from workers.kernels import has_triton

if TYPE_CHECKING:
    from workers.kernels.gpu.sampling_slots import SlotRecords

FOREVER = 2**31 - 1  # later than any position
NO_LOGPROBS = -2
HOTTEST = 1e30  # float32 holds its inverse; draws are uniform long before
# What is nothing in 32 bits would leave no token, and rejection would go on for ever.
LEAST_TOP_P = 1e-30


def on_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """``values`` on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _backwards(bad_words: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """[words, longest]: each word's last token, the one before, ..., padded with -1."""
    longest = max(map(len, bad_words), default=0)
    words = np.full((len(bad_words), longest), -1, np.int32)
    for i, word in enumerate(bad_words):
        words[i, : len(word)] = word[::-1]
    return words


class Ragged:
    """An array of unequal shape for each slot, in one padded tensor [slots, ...] on the device."""

    def __init__(self, num_slots: int, dims: int, pad: float, dtype: torch.dtype,
                 device: torch.device) -> None:  # fmt: skip
        self.pad = pad
        self.lengths = np.zeros(num_slots, np.int32)  # along dimension 1
        self._data = torch.full((num_slots, *[0] * dims), pad, dtype=dtype, device=device)

    def put(self, slot: int, values: NDArray[Any]) -> None:
        """Slot ``slot``'s array, in place of the one it had."""
        self.clear(slot)
        if not len(values):
            return
        self.lengths[slot] = len(values)
        had = self._data.shape
        shape = (had[0], *map(max, had[1:], values.shape))
        if shape != had:
            grown = self._data.new_full(shape, self.pad)
            grown[tuple(map(slice, had))] = self._data
            self._data = grown
        self._data[slot] = self.pad
        part = self._data[slot][tuple(map(slice, values.shape))]
        part.copy_(on_device(values, part.device), non_blocking=True)

    def clear(self, slot: int) -> None:
        """Forgets the slot's array; the last one to go takes the memory along."""
        self.lengths[slot] = 0
        if not self.lengths.any():
            self._data = self._data.new_empty((len(self.lengths), *[0] * (self._data.dim() - 1)))

    def of(self, slots: Ints) -> Tensor:
        """The arrays of ``slots``, padded to the longest of them."""
        rows = self._data.index_select(0, on_device(slots, self._data.device))
        return rows[:, : int(self.lengths[slots].max())]


class SamplingTable:
    """The sampling parameters of every slot.

    tokens: [num_slots, max_model_len] int32 on the device, the worker's. When a token is sampled
        at position p of a slot, entries 0 .. p - 1 of its row must hold its tokens so far: the
        worker writes a step's sampled tokens there before it samples the next.
    kernels: whether Triton's kernels sample; None: if they can.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, tokens: Tensor, kernels: bool | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.tokens = tokens
        self.device = device = tokens.device
        floats, integers = np.float32, np.int32
        self.seed = np.zeros(num_slots, np.uint64)
        self.prompt_len = np.zeros(num_slots, integers)
        self.greedy = np.ones(num_slots, np.bool_)
        self.temperature = np.ones(num_slots, floats)
        self.top_k = np.zeros(num_slots, integers)  # 0 is off
        self.top_p = np.ones(num_slots, floats)
        self.min_p = np.zeros(num_slots, floats)
        self.logprobs = np.full(num_slots, NO_LOGPROBS, integers)
        self._prompt_logprobs = np.full(num_slots, NO_LOGPROBS, integers)
        self.penalties = np.zeros((num_slots, 3), floats)  # repetition, frequency, presence
        self.penalized = np.zeros(num_slots, np.bool_)
        self.changed_until = np.zeros(num_slots, integers)  # logits before this position are
        self.edited_until = np.zeros(num_slots, integers)  # past this position no edit is left
        # Added to logits: (token, value, until which position).
        self.edits = Ragged(num_slots, 2, 0, torch.float64, device)
        self.allowed = Ragged(num_slots, 1, -1, torch.int64, device)
        # Bad words backwards: (last token, the one before, ...).
        self.bad_words = Ragged(num_slots, 2, -1, torch.int32, device)
        self._counts = torch.zeros((0, vocab_size), dtype=torch.float32, device=device)
        self.records: SlotRecords | None = None
        if kernels is None:
            kernels = has_triton(device)
        if kernels:
            from workers.kernels.gpu import sampling_slots

            self.records = sampling_slots.SlotRecords(num_slots, device)

    def admit(self, admit: Admit) -> None:
        """Fills the slot's row; what the slot held before is gone."""
        slot, sampling = admit.slot, admit.sampling
        self.seed[slot] = admit.seed & (2**64 - 1)
        self.prompt_len[slot] = admit.prompt_len
        self.greedy[slot] = sampling.greedy
        self.temperature[slot] = 1.0 if sampling.greedy else min(sampling.temperature, HOTTEST)
        self.top_k[slot] = min(sampling.top_k, self.vocab_size)
        self.top_p[slot] = max(sampling.top_p, LEAST_TOP_P)
        self.min_p[slot] = sampling.min_p
        for asked, kept in ((sampling.logprobs, self.logprobs),
                            (sampling.prompt_logprobs, self._prompt_logprobs)):  # fmt: skip
            kept[slot] = NO_LOGPROBS if asked is None else asked
        self.penalized[slot] = sampling.has_penalties
        self.penalties[slot] = (sampling.repetition_penalty, sampling.frequency_penalty,
                                sampling.presence_penalty)  # fmt: skip

        ends = sampling.min_tokens and admit.stop_ids  # which must not come too soon
        stops_until = admit.prompt_len + sampling.min_tokens if ends else 0
        always = (sampling.logit_bias or sampling.allowed_token_ids or admit.bad_words
                  or sampling.has_penalties)  # fmt: skip
        self.changed_until[slot] = FOREVER if always else stops_until
        if self.records is None:
            self._put_lists(admit, stops_until)
        else:
            self._put_record(admit, stops_until)

    def _put_lists(self, admit: Admit, stops_until: int) -> None:
        slot, sampling = admit.slot, admit.sampling
        edits = [(token, value, FOREVER) for token, value in (sampling.logit_bias or {}).items()]
        if stops_until:
            edits += [(stop, -np.inf, stops_until) for stop in admit.stop_ids]
        self.edited_until[slot] = max((until for _, _, until in edits), default=0)
        self.edits.put(slot, np.asarray(edits, np.float64))
        self.allowed.put(slot, np.asarray(sampling.allowed_token_ids or (), np.int64))
        self.bad_words.put(slot, _backwards(admit.bad_words))

    def _put_record(self, admit: Admit, stops_until: int) -> None:
        slot, sampling, biases = admit.slot, admit.sampling, admit.sampling.logit_bias or {}
        allowed, stops = ints(sampling.allowed_token_ids or ()), ints(admit.stop_ids)
        words, min_p = _backwards(admit.bad_words), self.min_p[slot]
        repetition, frequency, presence = self.penalties[slot]
        fields = {
            "seed": self.seed[slot],
            "num_allowed": len(allowed),
            "num_stops": len(stops),
            "num_biases": len(biases),
            "num_words": words.shape[0],
            "longest": words.shape[1],
            "edited_until": self.changed_until[slot],
            "stops_until": stops_until,
            "prompt_len": admit.prompt_len,
            "penalized": self.penalized[slot],
            "repetition": repetition,
            "frequency": frequency,
            "presence": presence,
            "greedy": self.greedy[slot],
            "inverse_temperature": 1 / self.temperature[slot],
            "top_k": self.top_k[slot],
            "top_p": self.top_p[slot],
            "min_p": min_p,
            "log_min_p": np.log(min_p) if min_p else -np.inf,
        }
        values = np.fromiter(biases.values(), np.float32, len(biases)).view(np.int32)
        parts = allowed, stops, ints(list(biases)), values, words.reshape(-1)
        assert self.records is not None
        self.records.put(slot, fields, np.concatenate(parts))

    def release(self, slot: int) -> None:
        """Forgets the slot's row."""
        self._prompt_logprobs[slot] = NO_LOGPROBS
        if self.records is not None:
            return self.records.clear(slot)
        for part in (self.edits, self.allowed, self.bad_words):
            part.clear(slot)

    @property
    def any_prompt_logprobs(self) -> bool:
        return bool((self._prompt_logprobs != NO_LOGPROBS).any())

    def prompt_logprobs(self, slot: int) -> tuple[int | None, int]:
        """How many prompt_logprobs the slot's request asks for (None: none), and the length of
        its prompt."""
        asked = int(self._prompt_logprobs[slot])
        return None if asked == NO_LOGPROBS else asked, int(self.prompt_len[slot])

    def process(self, logits: Tensor, slots: Ints, positions: Ints) -> tuple[Tensor, Tensor | None]:
        """Logits [n, V] after allowed_token_ids, bad_words, min_tokens, logit_bias and penalties,
        in vLLM's order (its V1 sampler); and [n] bool where the ones given were unusable, unless
        the result shows that itself.

        Returns ``logits`` itself if no row has any of these, else a float32 copy.
        """
        if not (positions < self.changed_until[slots]).any():
            return logits, None
        stages = (
            (self._keep_allowed, self.allowed.lengths[slots] > 0),
            (self._ban_words, self.bad_words.lengths[slots] > 0),
            (self._edit, positions < self.edited_until[slots]),
            (self._penalize, self.penalized[slots]),
        )
        unusable = None
        if stages[0][1].any():  # a NaN among tokens that are not allowed would go unseen
            unusable = ~logits.float().amax(-1).isfinite()
        x = logits.to(torch.float32, copy=True)
        for stage, some in stages:
            if some.any():
                rows = np.flatnonzero(some)
                stage(x, rows, slots[rows], positions[rows])
        return x, unusable

    def _at(self, rows: NDArray[Any], tokens: Tensor) -> Tensor:
        """Where ``tokens`` [m, k] of ``rows`` [m] lie in the logits laid end to end."""
        return on_device(rows * self.vocab_size, self.device)[:, None] + tokens

    def _keep_allowed(self, x: Tensor, rows: NDArray[Any], slots: Ints, _: Ints) -> None:
        allowed = self.allowed.of(slots)
        at = self._at(rows, torch.where(allowed < 0, allowed[:, :1], allowed))
        kept = x.take(at)
        x.index_fill_(0, on_device(rows, self.device), -torch.inf)
        x.put_(at, kept)

    def _ban_words(self, x: Tensor, rows: NDArray[Any], slots: Ints, positions: Ints) -> None:
        words = self.bad_words.of(slots)  # [m, words, longest]
        last, before = words[..., 0].long(), words[..., 1:]
        back = positions[:, None] - 1 - np.arange(before.shape[-1], dtype=np.int64)
        at = np.maximum(back, 0) + slots[:, None].astype(np.int64) * self.tokens.shape[1]
        recent = self.tokens.take(on_device(at, self.device))  # [m, longest - 1]
        matches = ((before == recent[:, None]) | (before < 0)).all(-1)
        # Only output completes a word, so no word may reach back into the prompt.
        written = on_device(positions - self.prompt_len[slots], self.device)
        matches &= ((before >= 0).sum(-1) <= written[:, None]) & (last >= 0)
        banned = torch.where(matches, -torch.inf, 0.0)
        x.put_(self._at(rows, last.clamp_(min=0)), banned, accumulate=True)

    def _edit(self, x: Tensor, rows: NDArray[Any], slots: Ints, positions: Ints) -> None:
        token, value, until = self.edits.of(slots).unbind(-1)  # each [m, edits]
        active = on_device(positions, self.device)[:, None] < until
        value = torch.where(active, value, 0.0).float()
        x.put_(self._at(rows, token.long()), value, accumulate=True)

    def _penalize(self, x: Tensor, rows: NDArray[Any], slots: Ints, positions: Ints) -> None:
        """Repetition (Keskar et al. 2019, CTRL) over prompt and output, frequency and presence
        over the output as the OpenAI API defines them."""
        device, most = self.device, int(positions.max())
        past = self.tokens[:, :most].index_select(0, on_device(slots, device)).long()  # [m, most]
        index = torch.arange(most, device=device)
        known = index < on_device(positions, device)[:, None]
        past = torch.where(known, past, past[:, :1])  # as good as the first token once more
        output = known & (index >= on_device(self.prompt_len[slots], device)[:, None])
        if len(rows) > len(self._counts):
            self._counts = self._counts.new_zeros((len(rows), self.vocab_size))
        scratch = self._counts[: len(rows)]  # zero between calls
        counts = scratch.scatter_add_(1, past, output.float()).gather(1, past)
        scratch.scatter_(1, past, 0.0)
        strengths = on_device(self.penalties[slots], device)[..., None]
        repetition, frequency, presence = strengths.unbind(1)  # each [m, 1]
        at = self._at(rows, past)
        value = x.take(at)
        value = torch.where(value > 0, value / repetition, value * repetition)
        value -= frequency * counts + presence * (counts > 0)
        x.put_(at, value)  # a token's places in the past all write the same
