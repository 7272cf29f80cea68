"""Folders of this machine: for what is kept between starts, and for what a process has open.

They work for a user without a home, without an entry among the system's users, and with a
temporary folder of any length.
"""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.errors import ConfigError

# Linux has 107 bytes for a socket's path (sun_path). The longest in a run folder is HAProxy's:
# Serve's folder for a node (56 digits), the name, and what HAProxy adds while it binds.
_LONGEST_SOCKET = f"/{'0' * 56}/admin.sock.4194304.tmp"
MOST_CHARACTERS = 107 - len(_LONGEST_SOCKET)
_PREFIX = "manta-"
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_LOCK = "lock"
_NOTE = "note.json"
TOKEN = "auth_token"  # the file with the token of a Ray that a process has in its folder
_HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


def cache_folders(kind: str) -> Iterator[Path]:
    """Where files of a kind may be kept between starts, the best first. They need not exist.

    The user's cache comes first ($XDG_CACHE_HOME, ~/.cache); where it cannot be written to, the
    next is a folder under the temporary one that only this user may touch.
    """
    with contextlib.suppress(RuntimeError):  # no HOME, and no entry among the system's users
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        yield base / "manta" / kind
        if _can_be_made(base):
            return
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"{_PREFIX}cache-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # anybody may have made it, to put a program of theirs there
        if stat.S_ISDIR(found.st_mode) and _is_private(found):
            yield folder / kind


def cache_folder(kind: str) -> Path:
    """The first of ``cache_folders`` that can be written to. Raises OSError if none can."""
    cause: OSError = FileNotFoundError("there is no folder for caches")
    for folder in cache_folders(kind):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
        except OSError as error:
            cause = error
    raise cause


def settle_hub_cache() -> None:
    """Have huggingface_hub, once it is imported, keep its files where this user may write.

    Without a home that would be a folder called ``~``. One that has files already is left.
    """
    if any(os.environ.get(name) for name in _HUB_VARIABLES):
        return
    with contextlib.suppress(OSError, RuntimeError):
        base = Path.home() / ".cache"
        if (base / "huggingface").exists() or _can_be_made(base):
            return
    with contextlib.suppress(OSError):  # else the hub's own error says why it cannot fetch
        os.environ["HF_HOME"] = str(cache_folder("huggingface"))


def _can_be_made(folder: Path) -> bool:
    """Whether this user may write there, once what is missing of it has been made."""
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError:
        return False
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _is_private(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o077


class RunFolder:
    """A folder of this process alone, whose ``path`` leaves room for the names of sockets.

    It is made in the temporary folder ($RAY_TMPDIR, $TMPDIR or the system's). If that has a long
    path, ``path`` is a link to it from a short one. What processes that were killed have left is
    removed when the next one is made.

    Raises ConfigError if there is no place for it.
    """

    def __init__(self) -> None:
        base = _temporary()
        for place in {base, *map(Path, _SHORT)}:
            _sweep(place)
        self._lock: int | None = None
        self.path = self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        try:
            self._hold()
            if len(os.fsencode(self._folder)) > MOST_CHARACTERS:
                self.path = _link(self._folder)
        except BaseException:  # a signal's too: nobody would sweep away what has no lock yet
            self.remove()
            raise

    def _hold(self) -> None:
        """Whoever finds a lock that nobody holds removes the folder, so it appears held."""
        new = self._folder / "new"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(new, self._folder / _LOCK)

    def note(self, values: Mapping[str, str]) -> None:
        """Say of this process what others of this user may want to know."""
        path = self._folder / _NOTE
        path.touch(mode=0o600)
        path.write_text(json.dumps(dict(values)))

    @staticmethod
    def notes() -> dict[Path, dict[str, str]]:
        """What the processes that run have said, by their folders."""
        found = {}
        for path in sorted(_temporary().glob(f"{_PREFIX}*/{_NOTE}")):
            with contextlib.suppress(OSError, ValueError):
                if path.stat().st_uid == os.geteuid():
                    found[path.parent] = json.loads(path.read_text())
        return found

    def remove(self) -> None:
        """Remove it with all that it holds."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self.path != self._folder:
            self.path.unlink(missing_ok=True)
        self.leave()

    def leave(self) -> None:
        """Leave it for somebody to read, until the next one is made."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def _temporary() -> Path:
    given = os.environ.get("RAY_TMPDIR")
    if given:
        if not os.access(given, os.W_OK | os.X_OK):
            raise ConfigError(f"RAY_TMPDIR: {given} is no folder that can be written to")
        return Path(os.path.abspath(given))
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise ConfigError(
            "there is no temporary folder that can be written to: name one with TMPDIR"
        ) from None


def _link(folder: Path) -> Path:
    """A short path to a folder."""
    for place in _SHORT:
        path = Path(place) / folder.name
        with contextlib.suppress(OSError):
            path.symlink_to(folder)
            return path
    raise ConfigError(
        f"{folder.parent} has too long a path for sockets (more than"
        f" {MOST_CHARACTERS - len(folder.name) - 1} characters), and none of {', '.join(_SHORT)}"
        " can be written to: name a folder with RAY_TMPDIR"
    )


def _sweep(place: Path) -> None:
    """Remove the run folders of this user that no process holds any longer."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, another kind of folder, or held
            if path.lstat().st_uid != os.geteuid():
                continue
            if path.is_symlink() and not path.exists():
                path.unlink()
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    shutil.rmtree(path.resolve(), ignore_errors=True)
    if path.is_symlink():
        path.unlink()
