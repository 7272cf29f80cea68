"""Running a schedule log again: the same batches, on an executor that is loaded and reserved."""

from dataclasses import dataclass

from engine.executor import Executor
from engine.plan import StepPlan, StepResult
from engine.schedule_log import ScheduleLog


@dataclass(frozen=True)
class Difference:
    """The first token that came out otherwise. None stands for logits that were not finite."""

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
            names = [requests[slot] for slot in record.slots[record.wants == 1].tolist()]
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
    rows = expected.rows.tolist()
    positions = (plan.starts + plan.counts)[plan.wants == 1].tolist()
    theirs, mine = _values(expected), _values(got)
    for i, (a, b) in enumerate(zip(theirs, mine, strict=True)):
        if a != b:
            return Difference(plan.step, int(plan.slots[rows[i]]), names[i], positions[i], a, b)
    return None


def _values(result: StepResult) -> list[int | None]:
    tokens, failed = result.tokens.tolist(), result.failed.tolist()
    return [None if bad else token for token, bad in zip(tokens, failed, strict=True)]
