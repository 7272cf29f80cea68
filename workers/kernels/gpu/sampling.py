"""The sampling kernels in their order: what is launched for a step, and the scratch between them.

A greedy step takes two launches; draws take one or two more, edits two more, and log-probabilities
two. Which are needed the host knows from its own copies of the parameters: nothing here looks at
the device, and no size depends on what is there.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from workers.kernels.gpu import sampling_draw as draw
from workers.kernels.gpu.sampling_argmax import BLOCK, PIECE, piece_maxima, row_maxima
from workers.kernels.gpu.sampling_edit import copy_edited, edit_rows
from workers.kernels.gpu.sampling_logprobs import MOST_TOP, row_logprobs
from workers.kernels.gpu.sampling_logprobs import ROW_PIECE as LOGPROBS_PIECE
from workers.kernels.gpu.sampling_slots import SlotRecords
from workers.kernels.gpu.sampling_top_k import draw_from_top_k

__all__ = ["Needs", "SamplingKernels"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What the rows of a step ask for; each says whether any row does."""

    edited: bool  # allowed_token_ids, bad_words, min_tokens, logit_bias or penalties
    penalties: bool
    from_all: bool  # a draw without top_k
    top_k: int  # the largest top_k among draws; 0 is none


class SamplingKernels:
    """Samples with Triton. tokens [num_slots, max_model_len] int32 is the worker's token table."""

    def __init__(
        self, records: SlotRecords, tokens: Tensor, vocab_size: int, num_classes: int
    ) -> None:
        self.records, self.tokens, self.vocab_size = records, tokens, vocab_size
        up = triton.next_power_of_2
        self.piece = max(BLOCK, min(PIECE, up(vocab_size)))
        self.pieces = -(-vocab_size // self.piece)
        self.blocks = -(-vocab_size // BLOCK)
        self.row_blocks = self.pieces * self.piece // BLOCK
        self.classes = num_classes
        self.class_size = -(-vocab_size // self.classes)
        self.lines = max(1, min(draw.MASS_PIECE // self.classes, up(self.class_size)))
        self.row_lines = max(1, min(draw.ROW_PIECE // self.classes, up(self.class_size)))
        self.most_top = MOST_TOP  # the largest k of ``logprobs``
        self._nothing = self._floats(1)

    def sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, needs: Needs, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """tokens [n] int32 and failed [n] bool, of logits [n, V] whose rows are contiguous.

        slots and positions: [n] int32 on the device. keep: also writes the tokens to the table.
        """
        n, stride, pieces = len(slots), logits.stride(0), self.pieces
        rows = slots, positions, self.records.table
        where, sampled = self._ints(n, pieces), self._ints(n)
        best, top = self._floats(n, pieces), self._floats(n)
        failed = torch.empty(n, dtype=torch.uint8, device=self.device)
        edited = bad = self._nothing
        if needs.edited:
            edited, bad = self._edit(logits, slots, positions, needs.penalties)
        tops = self._floats(n, self.row_blocks) if needs.top_k else self._nothing
        fixed = {"V": self.vocab_size, "STRIDE": stride}
        piece_maxima[pieces, n](
            logits, edited, slots, *rows, best, where, best, tops, PIECE=self.piece, BLOCK=BLOCK,
            EDITED=needs.edited, SUMS=False, TOPS=needs.top_k > 0, num_warps=4, **fixed,
        )  # fmt: skip
        ends: dict[str, Any] = {"MAX_LEN": self.tokens.stride(0), "KEEP": keep}
        row_maxima[n,](
            best, where, bad, *rows, top, sampled, failed, self.tokens, V=self.vocab_size,
            PIECES=pieces, WIDTH=triton.next_power_of_2(pieces), EDITED=needs.edited, num_warps=1,
            **ends,
        )  # fmt: skip
        if needs.from_all:
            parts = -(-self.class_size // self.lines)
            masses = self._floats(n, parts, self.classes)
            shared = logits, edited, *rows, top, masses
            draw.class_masses[parts, n](
                *shared, LINES=self.lines, CLASSES=self.classes, num_warps=4, **fixed
            )
            draw.draw_from_all[n,](
                *shared, sampled, self.tokens, PIECES=parts, LINES=self.row_lines,
                CLASSES=self.classes, WIDTH=triton.next_power_of_2(self.class_size),
                num_warps=16, **fixed, **ends,
            )  # fmt: skip
        if needs.top_k:
            blocks, listed, capacity = self._candidates(n, needs.top_k)
            draw_from_top_k[n,](
                logits, edited, *rows, top, tops, blocks, listed, sampled, self.tokens, capacity,
                **self._block_sizes(), num_warps=8, **fixed, **ends,
            )  # fmt: skip
        return sampled, failed.view(torch.bool)

    def logprobs(
        self, logits: Tensor, rows: Tensor, targets: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids int32, log-probabilities float32 and ranks int32 [m, 1 + k] of targets [m] int32 and
        of the k likeliest tokens, at most MOST_TOP, under the rows [m] int32 of logits [n, V]; and
        log(sum(exp)) [m] of these."""
        assert k <= MOST_TOP
        m = len(targets)
        best, sums = self._floats(m, self.pieces), self._floats(m, self.pieces)
        tops = self._floats(m, self.row_blocks)
        where, table = self._ints(m, self.pieces), self.records.table
        fixed = {"V": self.vocab_size, "STRIDE": logits.stride(0)}
        piece_maxima[self.pieces, m](
            logits, self._nothing, rows, table, table, table, best, where, sums, tops,
            PIECE=self.piece, BLOCK=BLOCK, EDITED=False, SUMS=True, TOPS=True, num_warps=4,
            **fixed,
        )  # fmt: skip
        ids, ranks, values = self._ints(m, 1 + k), self._ints(m, 1 + k), self._floats(m, 1 + k)
        blocks, listed, capacity = self._candidates(m, k)
        lse = self._floats(m)
        row_logprobs[m,](
            logits, rows, targets, best, sums, tops, blocks, listed, ids, values, ranks, lse,
            k, capacity, PIECES=self.pieces, PIECE_WIDTH=triton.next_power_of_2(self.pieces),
            ROW_PIECE=min(LOGPROBS_PIECE, triton.next_power_of_2(self.vocab_size)),
            MOST_TOP=MOST_TOP, **self._block_sizes(), num_warps=8, **fixed,
        )  # fmt: skip
        return ids, values, ranks, lse

    def _edit(
        self, logits: Tensor, slots: Tensor, positions: Tensor, penalties: bool
    ) -> tuple[Tensor, Tensor]:
        """Float32 logits of the rows that are edited, and where the ones given were not finite."""
        n, stride, table = len(slots), logits.stride(0), self.records.table
        edited, bad = self._floats(n, stride), self._ints(n, self.pieces)
        counts = self._ints(n, stride) if penalties else bad
        copy_edited[self.pieces, n](
            logits, edited, bad, slots, positions, table, V=self.vocab_size, STRIDE=stride,
            PIECE=self.piece, num_warps=4,
        )  # fmt: skip
        edit_rows[n,](
            logits, edited, counts, self.tokens, slots, positions, table,
            MAX_LEN=self.tokens.stride(0), STRIDE=stride, num_warps=8,
        )  # fmt: skip
        return edited, bad

    def _candidates(self, n: int, k: int) -> tuple[Tensor, Tensor, int]:
        """Scratch of ``list_candidates`` for n rows: blocks, tokens, and how many tokens a row."""
        capacity = min((BLOCK + 1) * k, self.vocab_size)
        capacity = -(-capacity // 16) * 16
        return self._ints(n, self.blocks), self._ints(n, capacity), capacity

    def _block_sizes(self) -> dict[str, int]:
        width = triton.next_power_of_2(self.blocks)
        return {"BLOCK": BLOCK, "BLOCKS": self.blocks, "ROW_BLOCKS": self.row_blocks,
                "WIDTH": width}  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _ints(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.device)
