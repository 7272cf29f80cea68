"""A log of decisions: every plan and result of an engine, and all that is needed to run it again.

The file is a line that names the format, then records: length (4 bytes, little endian), kind (1
byte), a value as ``engine.wire`` writes it. The first record is the header; plans and results
follow in the order in which they were made. Each record is one write, so that a crash of the
process loses none and a crash of the machine cuts off the last ones at most.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from engine import wire
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor import Capacity, Executor, ModelFacts, PendingResult
from engine.log import get_logger
from engine.plan import StepPlan, StepResult

FORMAT = b"manta schedule log 3\n"
_HEADER, _PLAN, _RESULT = 0, 1, 2
_frame = struct.Struct("<IB")
T = TypeVar("T")

log = get_logger("schedule_log")


@dataclass(frozen=True)
class Header:
    """What the engine was when the log was begun. ``checkpoint`` is a digest of its files."""

    versions: dict[str, str]  # of manta and of what computes
    config: EngineConfig
    checkpoint: str
    facts: ModelFacts
    capacity: Capacity  # with the costs that were measured


class RecordingExecutor:
    """Writes down what goes to another executor and what comes back."""

    def __init__(self, executor: Executor, path: Path, header: Header) -> None:
        self._executor = executor
        self._file: BinaryIO | None
        self.path, self._file = _create(path)
        self._write(_HEADER, header, FORMAT)

    @property
    def steps_ahead(self) -> int:
        return self._executor.steps_ahead

    @property
    def pipelined(self) -> bool:
        return self._executor.pipelined

    def load(self) -> ModelFacts:
        return self._executor.load()

    def reserve(self) -> Capacity:
        return self._executor.reserve()

    def run(self, plan: StepPlan) -> "PendingResult":
        self._write(_PLAN, plan)
        return _Recorded(self, self._executor.run(plan))

    def check(self) -> None:
        self._executor.check()

    def restart(self) -> None:
        self._executor.restart()

    def stop(self) -> None:
        self._executor.stop()
        if self._file is not None:
            self._file.close()
            self._file = None

    def record(self, result: StepResult) -> None:
        """Write down a result."""
        self._write(_RESULT, result)

    def _write(self, kind: int, value: object, before: bytes = b"") -> None:
        if self._file is None:
            return
        data = wire.encode(value)
        try:
            self._file.write(before + _frame.pack(len(data), kind) + data)
        except OSError as error:  # a full disk is no reason to stop serving
            log.error("%s: %s; nothing more is logged there", self.path, error)
            self._file.close()
            self._file = None


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A step whose result will be written down when it is taken."""

    recorder: RecordingExecutor
    pending: PendingResult

    def result(self) -> StepResult:
        result = self.pending.result()
        self.recorder.record(result)
        return result


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """A new file ``path``, or ``path.1``, ``path.2``, … : a log that is there is never lost."""
    number, candidate = 0, path
    while True:
        try:
            return candidate, open(candidate, "xb", buffering=0)
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}.{number}")
        except OSError as error:
            raise ConfigError(
                f"schedule_log must be a file that can be written: {error}"
            ) from error


class ScheduleLog:
    """A log that is read. Raises ConfigError if ``path`` is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.truncated = False  # whether the last record was found cut off
        try:
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"cannot read the schedule log: {error}") from error
        self._size = os.fstat(self._file.fileno()).st_size
        if self._file.read(len(FORMAT)) != FORMAT:
            raise ConfigError(f"{path} is no schedule log of this version of manta")
        kind, data = self._next() or (-1, b"")
        if kind != _HEADER:
            raise ConfigError(f"{path} has no header: nothing was logged")
        headers: wire.Decoder[Header] = wire.Decoder(Header)
        self.header = self._decode(headers, data)

    def records(self) -> Iterator[StepPlan | StepResult]:
        """Plans and results in order, up to the first that is cut off."""
        plans: wire.Decoder[StepPlan] = wire.Decoder(StepPlan)
        results: wire.Decoder[StepResult] = wire.Decoder(StepResult)
        while (record := self._next()) is not None:
            kind, data = record
            if kind == _PLAN:
                yield self._decode(plans, data)
            else:
                yield self._decode(results, data)

    def _next(self) -> tuple[int, bytes] | None:
        frame = self._file.read(_frame.size)
        if not frame:
            return None
        length, kind = _frame.unpack(frame) if len(frame) == _frame.size else (self._size, 0)
        if length > self._size - self._file.tell():
            self.truncated = True
            return None
        return kind, self._file.read(length)

    def _decode(self, decoder: wire.Decoder[T], data: bytes) -> T:
        try:
            return decoder.decode(data)
        except msgspec.MsgspecError as error:
            at = self._file.tell() - len(data)
            raise ConfigError(f"{self.path}: the record at byte {at} is damaged: {error}") from None
