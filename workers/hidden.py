"""What looks at hidden states themselves: log-probabilities of prompts, and pooling.

A step with either carries all of its tokens to the network's end, and makes logits of those alone
that something is to be sampled after.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from engine.plan import StepPlan, TokenLogprobs
from workers.models import Model
from workers.pooling_table import PooledRow, PoolingTable, Vectors
from workers.sampler import Sampler, SamplingTable
from workers.slots import Slots


class PromptRow(NamedTuple):
    """A row that prompt_logprobs are asked of: at the step's tokens ``at : at + num``, of each next
    token and the ``asked`` likeliest ones."""

    row: int
    at: int
    num: int
    asked: int


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """The rows of a plan whose hidden states are looked at; false if there are none."""

    prompts: list[PromptRow]
    pooled: list[PooledRow]

    def __bool__(self) -> bool:
        return bool(self.prompts or self.pooled)


@dataclass(slots=True)
class Seen:
    """What was made of them, by row of the plan: log-probabilities of positions start + 1 of the
    prompt on, on the rank that samples; and vectors."""

    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    vectors: Vectors | None = None


class HiddenReader:
    """On the ranks of the last stage; the others know the rows as well.

    pools: None for a model that makes no vectors. tokens: those of whose logits a score is made, if
    it is made so (``Pooling.tokens``).
    """

    def __init__(
        self,
        model: Model,
        slots: Slots,
        table: SamplingTable,
        sampler: Sampler | None,
        pools: PoolingTable | None,
        tokens: tuple[int, ...],
    ) -> None:
        self._model = model
        self._slots = slots
        self._table = table
        self._sampler = sampler
        self._pools = pools
        self._tokens = tokens

    def rows(self, plan: StepPlan) -> HiddenRows:
        """The rows of ``plan`` that are looked at; the same on every rank."""
        pooled = [] if self._pools is None else self._pools.rows(plan)
        return HiddenRows(self._prompt_rows(plan), pooled)

    def read(self, plan: StepPlan, hidden: Tensor, rows: HiddenRows) -> Seen:
        """Look at the hidden states [T, H] of a whole step."""
        seen = Seen(self._prompt_logprobs(plan, hidden, rows.prompts))
        if self._pools is not None and rows.pooled:
            seen.vectors = self._pools.pool(rows.pooled, hidden)
            if seen.vectors is not None:
                seen.vectors = Vectors(seen.vectors.rows, self._finished(seen.vectors.values))
        return seen

    def _finished(self, pooled: Tensor) -> Tensor:
        """What the model makes of pooled rows [m, H]: [m, V], float32."""
        if not self._tokens:
            return self._model.pooled(pooled)
        logits = self._model.logits(pooled.to(self._model.place.dtype))
        if self._sampler is None:
            return pooled  # this rank has a part of the logits, and nobody asks it
        true, *false = (logits[:, token, None].float() for token in self._tokens)
        return true - false[0] if false else true

    def _prompt_rows(self, plan: StepPlan) -> list[PromptRow]:
        found: list[PromptRow] = []
        if not self._table.any_prompt_logprobs:
            return found
        at = 0
        for row, (slot, start, count) in enumerate(
            zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True)
        ):
            asked, prompt_len = self._table.prompt_logprobs(slot)
            num = min(count, prompt_len - 1 - start)
            if asked is not None and num > 0:
                found.append(PromptRow(row, at, num, asked))
            at += count
        return found

    def _prompt_logprobs(
        self, plan: StepPlan, hidden: Tensor, rows: list[PromptRow]
    ) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        for row, at, num, asked in rows:
            logits = self._model.logits(hidden[at : at + num])
            if self._sampler is not None:
                slot, start = int(plan.slots[row]), int(plan.starts[row])
                targets = self._slots.tokens[slot, start + 1 : start + 1 + num].long()
                found[row] = self._sampler.prompt_logprobs(logits, targets, asked)
        return found
