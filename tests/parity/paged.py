"""Runs a model on a paged cache without an engine: blocks in a scrambled order, any chunking."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from workers.attention import AttentionBackend, Backend, choose_backends
from workers.attention.several import SeveralAttention
from workers.batch import Batch
from workers.checkpoint import load_config
from workers.models import Model, attention_shapes, build_model, read_traits
from workers.parallel import Group, Place, Stage
from workers.weights import load

CPU = torch.device("cpu")
# oneDNN's AMX kernels cut sums according to the number of rows; all others keep every bit.
_AMX = "amx_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
BIT_STABLE = [torch.float32] if _AMX else [torch.float32, torch.bfloat16]
MAX_LENGTH = 96
BLOCK_SIZE = 16


def build(
    path: Path,
    *,
    group: Group | None = None,
    stage: Stage | None = None,
    backend: type[AttentionBackend] | None = None,
    dtype: torch.dtype = torch.float32,
    block_size: int = BLOCK_SIZE,
    load_format: str = "auto",
    expert_parallel: bool = False,
    fp8: bool = False,
) -> tuple[Model, Backend]:
    """A loaded model and its backend (the one that manta would choose, unless given)."""
    config = load_config(path)
    traits = read_traits(config)
    place = Place(CPU, dtype, group or Group(), expert_parallel)
    shapes = attention_shapes(traits, place, block_size, fp8)
    attention = choose_backends(shapes)
    if backend is not None:
        given = [backend(shape) for shape in shapes]
        attention = given[0] if len(given) == 1 else SeveralAttention(given)
    stage = stage or Stage.whole(traits.num_layers)
    model = build_model(config, place, stage, attention, MAX_LENGTH)
    load(model, path, load_format)
    return model, attention


def make_batch(sequences: list[list[int]], rows: list[tuple[int, int, int]], size: int) -> Batch:
    """A step of ``rows`` (sequence, start, count); each sequence has its own scattered blocks."""
    per_sequence = -(-MAX_LENGTH // size)
    tables = torch.randperm(
        len(sequences) * per_sequence, generator=torch.Generator().manual_seed(7)
    ).view(len(sequences), per_sequence)
    tokens, positions, cells, starts = [], [], [], [0]
    for sequence, start, count in rows:
        for p in range(start, start + count):
            tokens.append(sequences[sequence][p])
            positions.append(p)
            cells.append(int(tables[sequence, p // size]) * size + p % size)
        starts.append(len(tokens))
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        slots=torch.arange(len(rows)),
        context_lens=torch.tensor([s + c for _, s, c in rows], dtype=torch.int32),
        block_tables=tables[[sequence for sequence, _, _ in rows]].int(),
        cells=torch.tensor(cells),
        max_context_len=max(s + c for _, s, c in rows),
        states=torch.tensor([sequence for sequence, _, _ in rows]),
    )


@dataclass
class Paged:
    """Pipeline stages of one rank run one after the other, keeping the caches between steps."""

    stages: list[tuple[Model, Backend]]
    sequences: list[list[int]]
    block_size: int = BLOCK_SIZE
    caches: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        blocks = len(self.sequences) * -(-MAX_LENGTH // self.block_size)
        self.caches = [
            [m.allocate(len(self.sequences) if m.state else blocks) for m in model.memories]
            for model, _ in self.stages
        ]

    def step(self, rows: list[tuple[int, int, int]], outputs: Tensor | None = None) -> Tensor:
        """Logits [n, vocab_size] of the step's tokens ``outputs`` [n], or of every token."""
        batch = make_batch(self.sequences, rows, self.block_size)
        batch = replace(batch, outputs=outputs)
        hidden = None
        for (model, backend), caches in zip(self.stages, self.caches, strict=True):
            begun = replace(batch, attention=backend.begin(batch, ()))
            hidden = model.forward(begun, caches, hidden)
        assert hidden is not None
        return self.stages[-1][0].logits(hidden)

    def logits(self, steps: list[list[tuple[int, int, int]]]) -> list[Tensor]:
        """Logits of each sequence at every position, computed in ``steps``."""
        out = [torch.full((len(s), 0), torch.nan) for s in self.sequences]
        for rows in steps:
            y, at = self.step(rows), 0
            for sequence, start, count in rows:
                if not out[sequence].shape[1]:
                    out[sequence] = torch.full(
                        (len(self.sequences[sequence]), y.shape[1]), torch.nan
                    )
                out[sequence][start : start + count] = y[at : at + count]
                at += count
        return out
