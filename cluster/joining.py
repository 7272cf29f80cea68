"""Being part of a Ray cluster. It loads no torch, as drivers and routers have no use for it."""

import atexit
import contextlib
import logging
import os
import resource
import secrets
import shutil
import socket
from collections.abc import Iterator
from typing import Any

import ray

from cluster.processes import descendants, end, runs
from engine.errors import ConfigError, EngineError
from engine.folders import TOKEN, RunFolder
from engine.log import get_logger, waiting_for

log = get_logger("cluster")

ADDRESS = "RAY_ADDRESS"
LOOPBACK = "127.0.0.1"
ANSWER_TIMEOUT = 5.0  # seconds in which a cluster's store (the GCS) must answer
OBJECT_STORE_BYTES = 100 << 20  # nothing of ours passes through Ray's object store
LEAST_FILES = 1024  # open files that Ray's processes, HAProxy and a model's workers get by with
_AGENTS_PATIENCE = 1.0  # seconds that Ray's agents have to end after it
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


def connect_ray() -> None:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one for this process.

    Raises ConfigError for a RAY_ADDRESS that is no address, EngineError if nobody answers there or
    Ray does not start.
    """
    if ray.is_initialized():
        return
    address = cluster_address()
    if address is None:
        atexit.register(OwnRay().stop)  # before the one of Ray, which was registered earlier
    else:
        join_ray(address)


def own_host() -> str:
    """This node's address, as others reach it."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return host


def cluster_address() -> str | None:
    """Where the cluster is that RAY_ADDRESS names or `ray start` made on this machine.

    None if there is neither. Raises ConfigError or EngineError as ``connect_ray`` does.
    """
    named = os.environ.get(ADDRESS)
    if named == "local":
        return None
    if named and named != "auto":
        return named
    from ray._private import services

    try:
        found: str | None = services.get_ray_address_from_environment(named or None, None)  # type: ignore[arg-type]
    except ConnectionError as error:
        raise EngineError(f"{ADDRESS}={named}: {error}") from None
    if found is not None and not named and _answers(found) is not None:
        log.warning("The Ray of this machine, %s, does not answer: `ray stop` forgets it", found)
        return None
    return found


def join_ray(address: str, **options: Any) -> None:
    """Join a cluster; ``options`` are those of ``ray.init``.

    Raises ConfigError if the address is none, EngineError if nobody answers there.
    """
    named = f"{ADDRESS}={os.environ.get(ADDRESS) or address}"
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    known = scheme in ("", "ray") and host and port.isdecimal()
    if not known or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"{ADDRESS} must be HOST:PORT of a Ray cluster (of its GCS, 6379 by default), auto or"
            f" local, got {address[:200]!r}"
        )
    with waiting_for(log, f"the Ray cluster at {address}"):
        if (cause := _answers(address)) is not None:
            raise EngineError(f"{named}: no Ray answers there: {cause}")
        try:
            with _on_loopback() if _keeps_to_loopback(host, port) else contextlib.nullcontext():
                ray.init(logging_level=logging.WARNING, **options)
        except Exception as error:  # Ray raises many kinds
            reason = str(error).strip().splitlines()[0]
            raise EngineError(
                f"{named}: {reason}; one that asks for a token needs RAY_AUTH_MODE=token"
            ) from error


def _keeps_to_loopback(host: str, port: str) -> bool:
    """Whether a Ray has its ports on loopback alone, as ``OwnRay`` does. Ray would look for it at
    this machine's own address, and wait there."""
    return host in (LOOPBACK, "localhost") and _answers(f"{own_host()}:{port}") is not None


def _answers(address: str) -> str | None:
    """None if a Ray answers there, else why not."""
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT).close()
    except OSError as error:
        return error.strerror or str(error)
    if scheme:
        return None  # Ray's client has a protocol and limits of its own
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    channel = init_grpc_channel(place)
    try:
        grpc.channel_ready_future(channel).result(ANSWER_TIMEOUT)
    except grpc.FutureTimeoutError:
        return f"nothing that speaks gRPC within {ANSWER_TIMEOUT:g} s (is it the GCS's port?)"
    finally:
        channel.close()
    return None


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started meanwhile has its ports, and those of its processes, on loopback: no
    other machine has a part in it. Ray has this setting for systems that ask about open ports."""
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    given, os.environ[name] = os.environ.get(name), "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


class OwnRay:
    """A Ray on this machine that is this process's own, from here to ``stop``.

    Its files are in a folder that nobody else may read, ``folder``, and go with it; so does the
    token that its ports ask for, unless the environment names one. ``options`` are those of
    ``ray.init``. Raises ConfigError if this machine has no place for it, EngineError if it does
    not start.
    """

    def __init__(self, files: RunFolder | None = None, **options: Any) -> None:
        _check_machine()
        self._files = RunFolder() if files is None else files
        self.folder = self._files.path
        self._set_token()
        if shutil.disk_usage("/dev/shm").free < OBJECT_STORE_BYTES:
            options["_plasma_directory"] = str(self.folder)
        inner = self.folder / "ray"  # Ray lets everybody into the one that it is given
        try:
            with waiting_for(log, "Ray to start"), _on_loopback():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.WARNING,
                    _temp_dir=str(inner),
                    **options,
                )
        except BaseException as error:  # Ray raises many kinds, and a signal may come
            failed = isinstance(error, Exception)
            self.stop(keep=failed)
            if not failed:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(
                f"Ray does not start: {reason}"
                f" (its logs are in {self.folder}, until the next start)"
            ) from error

    @property
    def address(self) -> str:
        """Of its GCS."""
        found: str = ray.get_runtime_context().gcs_address
        return found

    def ended(self) -> str | None:
        """Which of the processes that it cannot go on without has ended, if one has.

        Such a one stays a zombie: Ray's workers end once their raylet's id is gone, and they are
        to finish what runs.
        """
        for name in ("raylet", "gcs_server"):
            for info in _own_processes().get(name, ()):
                if not runs(info.process.pid):
                    return name
        return None

    def stop(self, keep: bool = False) -> None:
        """End it with all its processes, and remove its files, unless they are to be kept."""
        ours = [info.process.pid for found in _own_processes().values() for info in found]
        inner = descendants(ours)
        ray.shutdown()
        end(inner, _AGENTS_PATIENCE)
        if os.environ.get(_TOKEN_PATH) == str(self.folder / TOKEN):
            del os.environ[_TOKEN_PATH]
        if keep:
            self._files.leave()
        else:
            self._files.remove()

    def _set_token(self) -> None:
        """A token of its own: that of Ray is in the home, where everybody may read it."""
        if os.environ.get("RAY_AUTH_MODE", "token") != "token":
            return
        if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", _TOKEN_PATH)):
            return
        path = self.folder / TOKEN
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        os.environ[_TOKEN_PATH] = str(path)
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


def _own_processes() -> dict[str, list[Any]]:
    """The processes by kind that Ray has started for this one."""
    node = ray._private.worker._global_node
    return {} if node is None else node.all_processes


def _check_machine() -> None:
    """Raises ConfigError for what Ray itself would take half a minute to fail of, or not name.

    It takes as many open files as it may.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            raise ConfigError(
                f"Ray needs 127.0.0.1, which this machine has not ({error.strerror}):"
                " ip address add 127.0.0.1/8 dev lo"
            ) from None
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < LEAST_FILES:
        raise ConfigError(
            f"this process may have {most} files open, and Ray needs {LEAST_FILES}:"
            f" raise the limit (ulimit -Hn {LEAST_FILES})"
        )
