"""The process of ``manta serve``: from start to ready, to drained, to nothing left behind."""

import asyncio
import contextlib
import ctypes
import http.client
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from deploy import haproxy, serve_environment, worker_logs
from deploy.settings import Settings
from engine.addresses import address_family, host_port
from engine.errors import ConfigError, EngineError
from engine.folders import RunFolder
from engine.log import get_logger, waiting_for

if TYPE_CHECKING:
    from cluster.engines import Engines
    from cluster.joining import OwnRay

log = get_logger("serve")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_EVERY = 0.25  # seconds between two looks at Ray's processes
GCS_PATIENCE = 30.0  # seconds that what runs has at most once Ray has failed: it ends after 60
LAST_WORDS = 5.0  # seconds in which clients take what a request that was ended says
FLUSH = 0.5  # and those of an HAProxy that was replaced, which does not say whether they have
CONTROLLER_TIMEOUT = 30.0  # seconds in which Serve must have ended
_PR_SET_CHILD_SUBREAPER = 36


def run(models: Sequence[Settings]) -> int:
    """Serve models until SIGTERM, SIGINT or SIGHUP; the exit status: 1 if Ray failed meanwhile. The
    server's options are in those of each model.

    Raises ConfigError for a port that is taken, and EngineError if the application does not start.
    """
    # What Ray's processes leave behind when they are killed stays below this one, to be found.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    server = _Server(models)
    try:
        try:
            server.start()
        except BaseException:
            # What a handler raises may be anything once it has come through C++ and Cython.
            if not server.signalled:
                raise
            server.end_early()
        # Where a signal came while Ray's own C++ had a handler, that one aborts in three seconds.
        signal.alarm(0)
        asyncio.run(server.serve())
    except EngineError:
        server.stop(keep_logs=True)
        raise
    finally:
        server.stop()
    return 0


class _StoppedEarly(BaseException):
    """A signal came while the server was starting."""


class _Server:
    def __init__(self, models: Sequence[Settings]) -> None:
        self._models = models
        self._settings = models[0]  # those of the server are in each
        self._started = time.monotonic()
        self.signalled = False
        self._ready = False
        self._wake: Callable[[], object] | None = None  # has ``serve`` see a signal at once
        self._address: str | None = None  # of a cluster that is joined
        self._files: RunFolder | None = None
        self._ray: OwnRay | None = None
        self._own_serve = False
        self._deployed = False  # or nearly: Serve was asked to
        self._waiting = False  # or has, for the application: it looks at ``signalled`` itself
        self._may_serve = False  # the application runs: clients may be answered from now on
        self._stopped = False

    def start(self) -> None:
        router = self._settings.router
        self._catch_signals()
        if router.log_format == "json":
            worker_logs.as_json_only()
        try:
            self._start_ray()
        except SystemExit as exit:  # a signal that came while Ray's own handler was there
            self.signalled |= exit.code == signal.SIGTERM
            raise
        if router.access_log or router.log_format == "json":
            worker_logs.forward(router.log_format == "json")
        self._catch_signals()  # Ray has set handlers of its own
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._start_serve()
        with waiting_for(log, "Serve to take the application"):
            from deploy.engine_set import EngineSet
            from deploy.serve import APPLICATION, ingress_application

            self._deployed = True
            engine_sets = EngineSet.first(self._models)
            ingress = ingress_application(self._settings)
            for engines in engine_sets:
                engines.save()  # a request that comes at once is told that its model starts
            serve.run_many(
                [
                    serve.RunTarget(ingress, APPLICATION, route_prefix="/"),
                    *(engines.target() for engines in engine_sets),
                ],
                wait_for_applications_running=False,
            )
        self._waiting = True
        self._wait_until_ready()
        self._ready = True
        scheme = "https" if router.ssl_certfile else "http"
        host = "localhost" if router.host in ("0.0.0.0", "::") else router.host
        seconds = time.monotonic() - self._started
        log.info("Ready at %s://%s in %.1f s", scheme, host_port(host, router.port), seconds)

    def end_early(self) -> None:
        """A signal came before ``start`` had returned. Where Ray is ours, and nobody can have been
        served, this process ends here with all that it started: Ray's C++ may have been in the
        middle of anything."""
        if self._address is None and not self._may_serve:
            log.info("Stopped before it was ready")
            self._end_at_once(0)

    async def serve(self) -> None:
        """Until a signal comes, and then until what runs has ended, or ``--shutdown-timeout``.

        A Ray that fails is one that mends nothing any longer: then the process ends too, for
        whoever runs it to start it again.
        """
        if not self._ready:
            log.info("Stopped before it was ready")
        if not self._deployed:
            return
        from cluster.engines import Engines
        from deploy.serve import APPLICATION

        engines = Engines(APPLICATION)
        await engines.open()
        failed = None
        stop = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set)
        while not self.signalled and failed is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_EVERY)
            failed = self._ray.ended() if self._ray is not None else None
        timeout = self._settings.router.shutdown_timeout
        if failed is not None:
            timeout = min(timeout, GCS_PATIENCE)
            log.error(
                "Ray's %s has ended: nothing that fails would be mended, so this ends", failed
            )
        log.info("Stopping: no further requests; what runs has %g s to finish", timeout)
        await self._drain(engines, time.monotonic() + timeout, failed is None)
        if failed is not None:
            self._end_at_once(1)  # neither Serve nor this process could end in order
        await engines.close()

    def stop(self, keep_logs: bool = False) -> None:
        """Take down what was started, and only that."""
        from cluster.processes import descendants, end

        if self._stopped:
            return
        self._stopped = True
        try:
            self._stop_serve()
        finally:
            if self._ray is not None:
                self._ray.stop(keep_logs)
                if keep_logs:
                    log.info("The logs of Ray stay in %s until the next start", self._ray.folder)
            if self._address is None:
                end(descendants([os.getpid()]))  # what Ray had begun to start
                if self._files is not None and not keep_logs:
                    self._files.remove()  # with what those wrote in the end
            else:
                import ray

                ray.shutdown()

    # ---- inside ----

    def _start_ray(self) -> None:
        """Start Ray on this machine, or join the cluster of RAY_ADDRESS."""
        from cluster.joining import ADDRESS, OwnRay, cluster_address, join_ray

        router = self._settings.router
        self._address = cluster_address() if os.environ.get(ADDRESS) else None
        if self._address is not None and router.ssl_certfile is not None:
            raise ConfigError(
                "ssl_certfile and ssl_keyfile need a Ray that manta starts itself; on a cluster"
                f" ({ADDRESS}) put a proxy that has the certificate before it"
            )
        variables = serve_environment.everywhere(router)
        os.environ.update(variables)
        if self._address is not None:
            join_ray(
                self._address,
                runtime_env={
                    "env_vars": variables,
                    "worker_process_setup_hook": "deploy.haproxy.set_up_process",
                },
            )
            return
        _check_port(router.host, router.port)
        self._files = RunFolder()
        pem = _tls_pem(router.ssl_certfile, router.ssl_keyfile)
        os.environ.update(serve_environment.on_this_machine(router, self._files, pem))
        self._ray = OwnRay(self._files)
        self._files.note({"ray": self._ray.address, "port": str(router.port)})
        from deploy.engine_set import check_room

        check_room(*self._models)

    def _start_serve(self) -> None:
        from ray import serve

        from cluster.joining import LOOPBACK

        router = self._settings.router
        there = _serve_port()
        self._own_serve = there is None
        if there is not None and there != router.port:
            raise ConfigError(f"Serve runs on this cluster already, at port {there}: give --port")
        if not self._own_serve:
            log.warning("Serve runs on this cluster already: HAProxy keeps the settings it has")
        try:
            # Serve waits for a minute at most. ``_wait_until_ready`` has the user's patience.
            with (
                waiting_for(log, "Serve and HAProxy to start"),
                contextlib.suppress(TimeoutError),
            ):
                serve.start(
                    # Serve's own processes listen there too; clients only come to HAProxy.
                    http_options={
                        "host": router.host if self._ray is None else LOOPBACK,
                        "port": router.port,
                    },
                    proxy_location="EveryNode",
                )
        except Exception as error:  # Serve raises many kinds
            # A failed task's error is its whole traceback, the cause at its end.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise EngineError(
                f"Serve does not start: {self._haproxys_words() or reason}"
            ) from error

    def _haproxys_words(self) -> str:
        """What HAProxy complained of last, if it did."""
        logs = self._files.path.glob("*/*.stderr.log") if self._files is not None else ()
        for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
            lines = path.read_text(errors="replace").splitlines()
            if alerts := [line for line in lines if "[ALERT]" in line]:
                return f"HAProxy says {alerts[0]}"
        return ""

    def _wait_until_ready(self) -> None:
        """Until Serve says that the application runs, and the way through HAProxy is open too.

        Raises EngineError if it fails, or ``--startup-timeout`` is over.
        """
        from deploy.engine_set import EngineSet, running
        from deploy.serve import APPLICATION

        timeout = self._settings.router.startup_timeout
        deadline = self._started + timeout
        names = [APPLICATION, *(engines.application for engines in EngineSet.all())]
        with waiting_for(log, "the engines to be ready"):
            while not self._may_serve:
                if self.signalled:
                    self._may_serve = self._is_healthy()  # though Serve has not said so yet
                    raise _StoppedEarly
                self._may_serve = bool(running(*names))
                if time.monotonic() > deadline:
                    raise EngineError(f"no engine is ready within startup_timeout ({timeout:g} s)")
                if not self._may_serve:
                    time.sleep(0.1)
        where = host_port(self._settings.router.host, self._settings.router.port)
        with waiting_for(log, f"an answer through HAProxy at {where}"):
            while not self._is_healthy():
                if self.signalled:
                    raise _StoppedEarly
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"no answer at {where} within startup_timeout ({timeout:g} s)"
                        f" {self._haproxys_words()}"
                    )
                time.sleep(0.02)

    def _is_healthy(self) -> bool:
        """Whether /health says so, through HAProxy."""
        router = self._settings.router
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(router.host, router.host)
        connection: http.client.HTTPConnection
        if router.ssl_certfile is not None:
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(host, router.port, timeout=5, context=context)
        else:
            connection = http.client.HTTPConnection(host, router.port, timeout=5)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    async def _drain(self, engines: "Engines", deadline: float, ray_lives: bool) -> None:
        """Have the engines admit nothing any longer, and wait for what runs.

        Whatever still runs at the deadline is ended with an error that its client gets to see.
        """
        idle = await _drain_engines(engines, deadline, look=ray_lives)
        if idle and await self._answers_taken(deadline):
            return
        log.warning("Requests are still in flight; they end now")
        engines.end_requests("the server was shut down before the request had finished")
        await asyncio.sleep(FLUSH)
        await self._answers_taken(time.monotonic() + LAST_WORDS)

    async def _answers_taken(self, deadline: float) -> bool:
        """Whether clients have taken all answers to the end before the deadline."""
        while self._files is not None and haproxy.has_requests(self._files.path):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def _stop_serve(self) -> None:
        if not (self._own_serve or self._deployed):
            return
        from ray import serve

        from cluster.directory import Directory
        from deploy.engine_set import EngineSet
        from deploy.serve import APPLICATION

        if self._own_serve:
            _end_serve()
        elif self._deployed:
            serve.delete(APPLICATION)
            for engines in EngineSet.all():
                serve.delete(engines.application)
        if self._deployed:
            Directory(APPLICATION).clear()

    def _catch_signals(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._on_signal)  # else it runs under nohup

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            self._end_at_once(128 + number)
        self.signalled = True
        if self._wake is not None:
            self._wake()
        if not self._waiting:
            raise _StoppedEarly

    def _end_at_once(self, status: int) -> None:
        """End this process with all that it started."""
        from cluster.processes import descendants, end

        if self._address is None:
            end(descendants([os.getpid()]))
        if self._files is not None:
            self._files.remove()
        os._exit(status)


async def _drain_engines(engines: "Engines", deadline: float, look: bool) -> bool:
    """Have engines admit nothing any longer; whether all have nothing left to do before the
    deadline. ``look``: whether those that come meanwhile can be found."""

    def at_work() -> bool:
        loads = [engine.load for engine in engines if engine.healthy]
        return any(load.running or load.waiting or not load.draining for load in loads)

    looking: asyncio.Task[None] | None = None
    try:
        while time.monotonic() <= deadline:
            engines.drain()
            if at_work():
                looking = None
                await asyncio.sleep(0.02)
            elif look and (looking is None or not looking.done()):
                # One may have come meanwhile, that is to drain too, and at once.
                looking = looking or asyncio.create_task(engines.look())
                await asyncio.wait((looking,), timeout=0.02)
            else:
                return True
        return False
    finally:
        if looking is not None:
            looking.cancel()


def _end_serve() -> None:
    """As ``serve.shutdown``, which has Ray say that a task of it failed and will be retried."""
    import ray
    from ray import serve
    from ray.exceptions import GetTimeoutError, RayActorError
    from ray.serve import context

    client = context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()  # type: ignore[no-untyped-call]
    ending = client._controller.graceful_shutdown.options(max_task_retries=0).remote()
    with contextlib.suppress(RayActorError):  # the controller has ended
        try:
            ray.get(ending, timeout=CONTROLLER_TIMEOUT)
        except GetTimeoutError:
            log.warning("Serve has not ended within %g s", CONTROLLER_TIMEOUT)
    client._shutdown = True
    serve.shutdown()  # type: ignore[no-untyped-call]


def _tls_pem(certificate: str | None, key: str | None) -> str | None:
    """A file with both, in memory: however this process ends, no key is left on a disk."""
    if certificate is None or key is None:
        return None
    file = os.memfd_create("manta-tls")
    for name in (certificate, key):
        os.write(file, Path(name).read_bytes() + b"\n")
    return f"/proc/{os.getpid()}/fd/{file}"


def _serve_port() -> int | None:
    """The port of the Serve that runs on the cluster; None if none does."""
    from ray.serve import context
    from ray.serve.exceptions import RayServeException

    try:
        client = context._get_global_client()
    except RayServeException:
        return None
    return None if client is None else int(client.http_config.port)


def _check_port(host: str, port: int) -> None:
    with socket.socket(address_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            where = host_port(host, port)
            raise ConfigError(f"cannot listen on {where}: {error.strerror}") from None
