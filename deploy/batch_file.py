"""OpenAI's batch files: lines that ask for something, and lines with what came of them.

A line of the output is named by what it answers (``id``), so that a batch which was interrupted
goes on after what its output has.

Source: https://platform.openai.com/docs/api-reference/batch
"""

import codecs
import fcntl
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.errors import ConfigError

_PREFIX = b'{"id":"batch_req_'


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """A request, as a line of the input has it."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Response(msgspec.Struct):
    """What a server would have answered."""

    status_code: int
    request_id: str | None
    body: msgspec.Raw


class Problem(msgspec.Struct):
    """Why a line was not asked."""

    code: str
    message: str


class Answered(msgspec.Struct):
    """A line of the output: one of ``response`` and ``error`` is None."""

    id: str
    custom_id: str | None
    response: Response | None = None
    error: Problem | None = None


class _Named(msgspec.Struct):
    custom_id: str | None = None


class _Id(msgspec.Struct):
    id: str


@dataclass(frozen=True)
class Line:
    """A line of the input: its name in the output, and what it asks, or what is wrong with it."""

    id: str
    custom_id: str | None
    asked: Asked | Problem


def count(path: Path) -> int:
    """The lines of a file that are not blank. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(not line.isspace() for line in file)
    except OSError as error:
        raise ConfigError(f"--input-file: cannot read {path}: {error.strerror}") from None


def lines(path: Path) -> Iterator[Line]:
    """The lines of an input file that are not blank; it holds some tens of bytes for each that it
    has read. A ``custom_id`` that an earlier line has is wrong."""
    taken: set[int] = set()
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            text = text.removeprefix(codecs.BOM_UTF8).strip()
            if not text:
                continue
            asked, custom_id = _read(text)
            name = text
            if custom_id is not None and hash(custom_id) in taken:
                asked = Problem("duplicate_custom_id", "an earlier line has this custom_id")
                name = b"%d %b" % (number, text)  # the lines may be the same
            elif custom_id is not None:
                taken.add(hash(custom_id))
            digest = hashlib.blake2b(name, digest_size=8).hexdigest()
            yield Line(f"batch_req_{digest}", custom_id, asked)


def _read(text: bytes) -> tuple[Asked | Problem, str | None]:
    """What a line asks, and its ``custom_id`` if it can be read."""
    try:
        asked = msgspec.json.decode(text, type=Asked)
        return asked, asked.custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = Problem("invalid_line", str(error).replace("`", "'"))
    try:
        return problem, msgspec.json.decode(text, type=_Named).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return problem, None


class Output:
    """The output file, to which lines are added; each is in the file before the next one.

    Raises ConfigError if the file cannot be written, another batch writes it, or it has anything
    but a batch's output. A last line that is not complete is removed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._answered = self._read()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"--output-file: another batch writes {path}") from None
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, line: Line) -> bool:
        """Whether the file had the line's answer when it was opened."""
        return _number(line.id) in self._answered

    def __len__(self) -> int:
        """How many answers it had then."""
        return len(self._answered)

    def add(self, answered: Answered) -> None:
        """Write a line. Raises ConfigError if there is no room for it."""
        data = msgspec.json.encode(answered) + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"--output-file: cannot write {self._path}: {error.strerror}")

    def _read(self) -> set[int]:
        found: set[int] = set()
        with self._path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n") and text[: len(_PREFIX)] == _PREFIX[: len(text)]:
                    self._file.truncate(file.tell() - len(text))
                    break
                try:
                    found.add(_number(msgspec.json.decode(text, type=_Id).id))
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                    raise ConfigError(
                        f"--output-file: line {number} of {self._path} is no line of a batch's"
                        " output: give another file"
                    ) from None
        return found


def _number(id: str) -> int:
    """Raises ValueError if it is not the name of a line."""
    before, prefix, digits = id.partition("batch_req_")
    if before or not prefix:
        raise ValueError
    return int(digits, 16)
