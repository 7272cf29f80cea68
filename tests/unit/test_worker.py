"""The worker's step in three on a CPU: padded to fixed sizes, as CUDA graphs need it, it gives what
a step of its own size does."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from engine.plan import StepPlan, ints
from engine.sampling_params import SamplingParams
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer
from workers import worker
from workers.graphs import Graphs, Size, decode_sizes, mixed_sizes
from workers.slots import HostRows
from workers.staging import Staging

CPU = torch.device("cpu")
OPTIONS = {
    "max_num_seqs": 6, "max_num_batched_tokens": 40, "num_gpu_blocks_override": 60,
    "attention_backend": "gather",  # it keeps nothing of a step on the host
}  # fmt: skip


class Recomputed(Graphs):
    """Graphs without CUDA: a step is what computes it, from where the staged arrays lie."""

    used: set[Size] = set()

    def capture(self, sizes: Iterable[Size], run: Callable[[Size], Callable[[], Tensor]]) -> None:
        self.steps: dict[Size, Callable[[], Tensor]] = {}
        for size in sizes:
            self.steps[size] = run(size)
            self.steps[size]()
        self._graphs = dict.fromkeys(self.steps)  # type: ignore[arg-type]

    def replay(self, size: Size) -> Tensor:
        self.used.add(size)
        return self.steps[size]()


def params(number: int) -> SamplingParams:
    if number % 2:
        return SamplingParams(temperature=0.9, seed=number, max_tokens=12, ignore_eos=True)
    return SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "opt-post-norm"])
def test_padded_steps_give_what_exact_ones_do(
    name: str, checkpoint, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save_tokenizer(tmp_path, 128)
    prompts = [[3 + i, 4, 5 + i] * (1 + 4 * (i % 5)) for i in range(12)]
    wanted = [params(i) for i in range(12)]
    found = []
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(worker.Worker, "_make_graphs", make_graphs)
            Recomputed.used.clear()
        llm = start_llm(checkpoint(name), tokenizer, **OPTIONS)
        outputs = llm.generate(prompts, wanted, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
        assert_idle(llm)
    assert found[0] == found[1]
    # Of both kinds, of several sizes, and with rows that are padding.
    assert {size.decodes for size in Recomputed.used} == {True, False}
    assert len(Recomputed.used) >= 4


def make_graphs(self: worker.Worker) -> Graphs:
    shape = 24, self.traits.hidden_size
    self._hidden = torch.zeros(shape, dtype=self.place.dtype)
    self._results = torch.empty(0)
    return Recomputed(self.config.scheduler.max_num_seqs, 24)


def test_sizes_of_graphs() -> None:
    assert decode_sizes(6) == [1, 2, 4, 6] and decode_sizes(1) == [1]
    assert decode_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    sizes = mixed_sizes(512)
    assert sizes[0] == 16 and sizes[-1] == 512 and sizes == sorted(set(sizes))
    assert all(b - a <= max(16, a / 3) for a, b in zip(sizes, sizes[1:], strict=False))
    assert mixed_sizes(3) == [] and mixed_sizes(20) == [16, 20]


def test_a_plan_finds_the_smallest_graph_that_it_fits() -> None:
    graphs = Recomputed(8, 64)
    graphs.capture(graphs.sizes, lambda size: lambda: torch.zeros(1))

    def size_of(counts: list[int], wants: list[int]) -> Size | None:
        rows = ints(range(len(counts)))
        return graphs.size_of(StepPlan(0, rows, rows, ints(counts), ints(wants), cells=ints()))

    assert size_of([1, 1, 1], [1, 1, 1]) == Size(4, 4, True)
    assert size_of([1, 1, 1], [1, 0, 1]) == Size(8, 16, False)  # the end of nobody's prompt
    assert size_of([1, 16], [1, 1]) == Size(8, 32, False)
    assert size_of([1, 64], [1, 1]) is None


def test_padding_touches_the_spare_slot_alone() -> None:
    plan = StepPlan(0, ints([2, 0]), ints([5, 0]), ints([1, 3]), ints([1, 0]), cells=ints())
    rows = HostRows.of(plan)
    assert rows.starts.tolist() == [0, 1, 4] and rows.outputs.tolist() == [0]
    assert rows.token_slots.tolist() == [2, 0, 0, 0] and rows.positions.tolist() == [5, 0, 1, 2]
    padded = rows.padded(4, 6, spare=9)
    assert padded.slots.tolist() == [2, 0, 9, 9] and padded.contexts.tolist() == [6, 3, 1, 1]
    assert padded.starts.tolist() == [0, 1, 4, 4, 4], "rows that are added have no tokens"
    assert padded.token_slots.tolist() == [2, 0, 0, 0, 9, 9]


def test_arrays_of_the_same_room_lie_in_the_same_place() -> None:
    staging = Staging(Staging.needed((5, 3, 8)), CPU)
    first = staging.upload([ints([1, 2]), ints([3]), ints([[4, 5], [6, 7]])], (5, 3, 8))
    second = staging.upload([ints([8] * 5), ints([9] * 3), ints([[1, 1]])], (5, 3, 8))
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    assert first[0].tolist() == [8] * 5 and first[1].tolist() == [9] * 3
    assert first[2][0].tolist() == [1, 1] and first[2].shape == (4, 2)
