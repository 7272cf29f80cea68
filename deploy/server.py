"""The process of ``manta serve``: from start to ready, to drained, to nothing left behind."""

import asyncio
import contextlib
import dataclasses
import http.client
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from deploy import haproxy
from deploy.ports import free_ports
from deploy.settings import Settings
from engine.errors import ConfigError, EngineError
from engine.log import get_logger

log = get_logger("serve")

OBJECT_STORE_BYTES = 100 << 20  # nothing of ours passes through Ray's object store
LONGEST_STREAM = 24 * 3600  # seconds that an HAProxy which was replaced goes on with its streams


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    Raises ConfigError for a port that is taken, and EngineError if the application does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="manta-"))
    server = _Server(settings, folder)
    try:
        with contextlib.suppress(_StoppedEarly):
            server.start()
            server.wait_for_signal()
        server.drain()
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


class _StoppedEarly(BaseException):
    """A signal came while the server was starting."""


class _Server:
    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._started = time.monotonic()
        self._signalled = threading.Event()
        self._ready = False
        self._own_ray = not os.environ.get("RAY_ADDRESS")
        if not self._own_ray and settings.router.ssl_certfile is not None:
            raise ConfigError(
                "ssl_certfile and ssl_keyfile need a Ray that manta starts itself; on a cluster"
                " (RAY_ADDRESS) put a proxy that has the certificate before it"
            )
        self._own_serve = False
        self._deployed = False

    def start(self) -> None:
        router = self._settings.router
        self._catch_signals()
        self._start_ray()
        self._catch_signals()  # Ray has set handlers of its own
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        from cluster.joining import LOOPBACK
        from deploy.serve import APPLICATION, build

        there = _serve_port()
        self._own_serve = there is None
        if there is not None and there != router.port:
            raise ConfigError(f"Serve runs on this cluster already, at port {there}: give --port")
        if not self._own_serve:
            log.warning("Serve runs on this cluster already: HAProxy keeps the settings it has")
        serve.start(
            # Serve's own processes listen there too; clients only come to HAProxy.
            http_options={"host": LOOPBACK if self._own_ray else router.host, "port": router.port},
            proxy_location="EveryNode",
        )
        self._deployed = True
        try:
            serve.run(build(self._settings.options), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            deployments = serve.status().applications[APPLICATION].deployments
            causes = [d.message for d in deployments.values() if d.message]
            raise EngineError("\n".join(["the server did not start", *causes])) from error
        self._wait_until_healthy()
        self._ready = True
        scheme = "https" if router.ssl_certfile else "http"
        host = "localhost" if router.host in ("0.0.0.0", "::") else router.host
        seconds = time.monotonic() - self._started
        log.info("Ready at %s://%s:%d in %.1f s", scheme, host, router.port, seconds)

    def wait_for_signal(self) -> None:
        while not self._signalled.wait(1.0):
            pass

    def drain(self) -> None:
        """Admit nothing any longer and wait for what runs, up to ``--shutdown-timeout``.

        Also where the signal came before ``start`` had seen the server ready: clients may have.
        """
        if not self._ready:
            log.info("Stopped before it was ready")
        if self._deployed:
            timeout = self._settings.router.shutdown_timeout
            log.info("Stopping: no further requests; what runs has %g s to finish", timeout)
            deadline = time.monotonic() + timeout
            asyncio.run(_drain_engines(deadline))
            while haproxy.requests(self._folder) and time.monotonic() < deadline:
                time.sleep(0.02)  # answers that clients have not taken to the end

    def stop(self) -> None:
        """Take down what was started, and only that."""
        with contextlib.suppress(ImportError):
            import ray

            if ray.is_initialized():
                from ray import serve

                from cluster.directory import Directory
                from deploy.serve import APPLICATION

                if self._own_serve:
                    serve.shutdown()  # type: ignore[no-untyped-call]
                elif self._deployed:
                    serve.delete(APPLICATION)
                if self._deployed:
                    Directory(APPLICATION).clear()
                ray.shutdown()

    # ---- inside ----

    def _start_ray(self) -> None:
        """Start Ray on this machine, or join the cluster of RAY_ADDRESS."""
        common = {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM),
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(haproxy.CLIENT_TIMEOUT),
            "RAY_SERVE_HAPROXY_MAXCONN": str(haproxy.MOST_CONNECTIONS),
            # Serve's controller looks around ten times a second: 3 % of a core, for nothing.
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
            # Statistics of every event that its processes handle: an eighth of what they take.
            "RAY_event_stats": "0",
            # Else a replica whose host vanished is sent requests for 5 s more.
            "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
            # ``drain`` does this better.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        }
        if (each := self._settings.router.max_connections_per_client) is not None:
            common[haproxy.CLIENT_CONNECTIONS] = str(each)
        os.environ.update(common)
        if not self._own_ray:
            import ray

            try:
                ray.init(
                    logging_level=logging.WARNING,
                    runtime_env={
                        "env_vars": common,
                        "worker_process_setup_hook": "deploy.haproxy.set_up_process",
                    },
                )
            except (ConnectionError, RuntimeError) as error:
                raise EngineError(
                    f"RAY_ADDRESS: {error}; one that asks for a token needs RAY_AUTH_MODE=token"
                ) from error
            return
        _check_port(self._settings.router.host, self._settings.router.port)
        os.environ.update(self._environment())
        import ray

        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )
        _check_room(self._settings, ray.cluster_resources())  # type: ignore[no-untyped-call]

    def _environment(self) -> dict[str, str]:
        """What Ray's processes on this machine are to find in their environment."""
        router = self._settings.router
        folder = self._folder
        metrics, stats, fallback = free_ports(3, besides=router.port)
        variables = {
            # This machine is all there is: Ray, engines and ingress replicas listen on loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            haproxy.HOST: router.host,
            haproxy.RUN_BY_SERVE: str(haproxy.program(folder)),
            # Several servers on one machine must not share these.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / haproxy.ADMIN_SOCKET),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        }
        if router.ssl_certfile is not None and router.ssl_keyfile is not None:
            pem = folder / "tls.pem"
            pem.touch(mode=0o600)
            pem.write_bytes(
                Path(router.ssl_certfile).read_bytes()
                + b"\n"
                + Path(router.ssl_keyfile).read_bytes()
            )
            variables[haproxy.TLS_PEM] = str(pem)
        return variables

    def _wait_until_healthy(self) -> None:
        """Serve says that the application runs; wait until the way through HAProxy is open too."""
        router = self._settings.router
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(router.host, router.host)
        while True:
            connection: http.client.HTTPConnection
            if router.ssl_certfile is not None:
                context = ssl._create_unverified_context()
                connection = http.client.HTTPSConnection(
                    host, router.port, timeout=5, context=context
                )
            else:
                connection = http.client.HTTPConnection(host, router.port, timeout=5)
            with (
                contextlib.closing(connection),
                contextlib.suppress(OSError, http.client.HTTPException),
            ):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.02)

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled.is_set():
            _kill_descendants()
            if self._own_ray and "ray" in sys.modules:
                from ray._common.utils import reset_ray_address

                reset_ray_address()  # else programs would look for this Ray for minutes
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(128 + number)
        self._signalled.set()
        if not self._ready:
            raise _StoppedEarly


async def _drain_engines(deadline: float) -> None:
    from cluster.engines import Engines
    from deploy.serve import APPLICATION

    def at_work() -> bool:
        loads = [engine.load for engine in engines if engine.healthy]
        return any(load.running or load.waiting or not load.draining for load in loads)

    engines = Engines(APPLICATION)
    await engines.open()
    looking: asyncio.Task[None] | None = None
    try:
        while True:
            engines.drain()
            if at_work():
                looking = None
                await asyncio.sleep(0.02)
            elif looking is None or not looking.done():
                # One may have come meanwhile, that is to drain too, and at once.
                looking = looking or asyncio.create_task(engines.look())
                await asyncio.wait((looking,), timeout=0.02)
            else:
                return
            if time.monotonic() > deadline:
                log.warning("Requests are still in flight; they end now")
                return
    finally:
        if looking is not None:
            looking.cancel()
        await engines.close()


def _serve_port() -> int | None:
    """The port of the Serve that runs on the cluster; None if none does."""
    from ray.serve import context
    from ray.serve.exceptions import RayServeException

    try:
        client = context._get_global_client()
    except RayServeException:
        return None
    return None if client is None else int(client.http_config.port)


def _check_room(settings: Settings, there: dict[str, float]) -> None:
    """Raises ConfigError if this machine has not what the engines ask for: Serve would wait."""
    from cluster.engine_actor import needed

    parallel, router = settings.engine.parallel, settings.router
    need = needed(settings.engine)
    if parallel.world_size > 1:  # its workers ask, not the engine; see RayLauncher
        alone = dataclasses.replace(parallel, tensor_parallel_size=1, pipeline_parallel_size=1)
        need = needed(dataclasses.replace(settings.engine, parallel=alone))
    count = router.num_replicas * parallel.world_size
    for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        if need.get(key, 0) * count > there.get(name, 0):
            raise ConfigError(
                f"{router.num_replicas} engines of {parallel.world_size} workers need"
                f" {need[key] * count:g} {name}; this machine has {there.get(name, 0):g}"
                " (--worker-cpus and --worker-gpus say what a worker asks for)"
            )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def _kill_descendants() -> None:
    """Kill every process that this one started, and those that they started."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                parent = int(stat.rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry))
    queue = [os.getpid()]
    while queue:
        for child in children.get(queue.pop(), ()):
            queue.append(child)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
