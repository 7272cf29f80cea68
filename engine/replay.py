"""Running a schedule log again: the same batches, on an executor that is loaded and reserved."""

from dataclasses import dataclass

from engine.executor import Executor
from engine.plan import StepPlan, StepResult
from engine.schedule_log import ScheduleLog


@dataclass(frozen=True)
class Difference:
    """The first token that came out otherwise. None stands for logits that were not finite, or for
    a token that came in another step."""

    step: int
    slot: int
    request: str  # its id and the completion's index
    position: int  # in prompt and output together
    expected: int | None
    got: int | None


@dataclass
class Replay:
    """What a replay found."""

    steps: int = 0
    tokens: int = 0
    unanswered: int = 0  # plans at the end that have no result in the log
    difference: Difference | None = None


def replay(schedule: ScheduleLog, executor: Executor) -> Replay:
    """Run every plan and compare every result, up to the first difference."""
    done = Replay()
    requests: dict[int, str] = {}  # by slot
    ours: dict[int, tuple[StepPlan, StepResult, list[str]]] = {}  # by step, until theirs is read
    for record in schedule.records():
        if isinstance(record, StepPlan):
            requests.update((admit.slot, admit.name) for admit in record.admits)
            names = [requests[slot] for slot in record.slots.tolist()]
            ours[record.step] = record, executor.run(record).result(), names
            continue
        plan, got, names = ours.pop(record.step)
        done.difference = _compare(plan, record, got, names)
        if done.difference is not None:
            break
        done.steps += 1
        done.tokens += len(record.tokens)
    done.unanswered = len(ours)
    return done


def _compare(
    plan: StepPlan, expected: StepResult, got: StepResult, names: list[str]
) -> Difference | None:
    theirs, mine = _values(plan, expected), _values(plan, got)
    for row, position in sorted(theirs.keys() | mine.keys()):
        a, b = theirs.get((row, position)), mine.get((row, position))
        if a != b:
            return Difference(plan.step, int(plan.slots[row]), names[row], position, a, b)
    return None


def _values(plan: StepPlan, result: StepResult) -> dict[tuple[int, int], int | None]:
    """What each row got, by row and position."""
    found: dict[tuple[int, int], int | None] = {}
    for i, (row, token) in enumerate(
        zip(result.rows.tolist(), result.tokens.tolist(), strict=True)
    ):
        position = int(plan.starts[row] + plan.counts[row])
        found[row, position] = None if result.failed[i] else token
        for further in result.forced.get(i, ()):
            position += 1
            found[row, position] = further
    return found
