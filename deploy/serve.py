"""The Ray Serve application: ingress replicas that speak HTTP, and engine replicas.

``build`` is what a Serve config file names (``import_path: deploy.serve:build``), and for several
models ``build_ingress`` and ``build_engines``; ``manta serve`` runs the same applications.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from cluster.engine_actor import EngineHost, needed
from cluster.engines import Engines
from cluster.joining import LOOPBACK, own_host
from cluster.peers import Peers
from cluster.ray_metrics import RayMetrics
from deploy.autoscaling import LOAD, LoadGauge, autoscaling
from deploy.settings import STOP_BUFFER, Settings, with_server_defaults
from engine.stats import Metric
from manta import __version__
from router.app import build_app
from router.config import RouterConfig

APPLICATION = "manta"
MOST_AT_ONCE = 1 << 20  # requests that Serve lets through: the engines' queues have their own limit
# Seconds after which Serve asks again, and which it waits: a replica that hangs, or whose host
# vanished, is replaced after three times the latter.
HEALTH_PERIOD, HEALTH_TIMEOUT = 2.0, 10.0
LAST_SPANS = 3.0  # seconds in which a replica that ends sends what it has traced


def _keep_to_loopback() -> None:
    """Have this replica's own port of Serve listen on loopback if this machine is all there is.

    Serve opens it to every machine, and unpickles whatever anybody sends there.
    """
    if own_host() == LOOPBACK:
        replica: Any = importlib.import_module("ray.serve._private.replica")
        add_port = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: add_port(
            server, address.replace("[::]", LOOPBACK)
        )


@serve.ingress()
class Router:
    """An ingress replica: validates, tokenizes, picks an engine, makes text, writes the stream."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: RouterConfig, application: str, engines: Any
    ) -> None:
        _keep_to_loopback()
        self._engines = Engines(application)
        self._declared: frozenset[str] = frozenset()
        self._peers = Peers(application, self._metrics)
        self._app = build_app(
            config,
            self._engines,
            __version__,
            self._peers.others,
            self._engines.look,
            lambda: self._engines.models or self._declared,
        )
        await self._engines.open()
        id = self._app.state.service.id
        await self._peers.open(id)
        self._ray_metrics = RayMetrics(self._metrics, {"ingress": id})
        self._ray_metrics.start()

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def reconfigure(self, told: Mapping[str, Any]) -> None:
        """Serve calls this with the ``user_config`` of a configuration, which names the models, and
        again when that changes."""
        self._declared = frozenset(told["models"])

    def _metrics(self) -> list[Metric]:
        metrics: list[Metric] = self._app.state.service.metrics()
        return metrics

    async def __del__(self) -> None:
        if hasattr(self, "_ray_metrics"):
            self._ray_metrics.stop()
        for part in (getattr(self, name, None) for name in ("_peers", "_engines")):
            if part is not None:
                await part.close()
        if (tracer := getattr(self._app.state, "tracer_provider", None)) is not None:
            with contextlib.suppress(TimeoutError):  # it would try for long where no collector is
                await asyncio.wait_for(asyncio.to_thread(tracer.shutdown), LAST_SPANS)


class EngineReplica:
    """An engine replica. Serve replaces it when it fails or hangs."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, options: Mapping[str, Any], application: str, beside: int
    ) -> None:
        _keep_to_loopback()
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = resources.get("GPU", 0)
        settings = Settings.from_options(with_server_defaults(options, gpus, beside))
        router = settings.router
        self._grace = router.shutdown_timeout
        share = router.replica_bounds[1] + beside
        self._host = await asyncio.to_thread(
            EngineHost, settings.engine, application, share, router.served
        )
        self._gauge = LoadGauge(self._host.loop)

    def check_health(self) -> None:
        """Serve asks this every few seconds."""
        self._host.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this where the number of engines follows their load."""
        return {LOAD: self._gauge.read()}

    async def __del__(self) -> None:
        host = getattr(self, "_host", None)
        if host is not None:
            await asyncio.to_thread(host.stop, self._grace)


def build(options: Mapping[str, Any]) -> serve.Application:
    """The application of a server's options, with names as ``manta serve`` has them.

    Raises ConfigError. It must run where the files that the options name are.
    """
    settings = _settings(options)
    return ingress_application(settings, engine_application(settings))


def build_ingress(options: Mapping[str, Any]) -> serve.Application:
    """The ingress of a server whose models are applications of their own. Raises ConfigError."""
    return ingress_application(_settings(options))


def build_engines(options: Mapping[str, Any]) -> serve.Application:
    """The engines of one of several models. ``beside`` may be among the options: see
    ``engine_application``. Raises ConfigError."""
    options = dict(options)
    beside = options.pop("beside", 0)
    return engine_application(_settings(options), beside=beside)


def _settings(options: Mapping[str, Any]) -> Settings:
    return Settings.from_options({k.replace("-", "_"): v for k, v in options.items()})


def engine_application(
    settings: Settings,
    options: Mapping[str, Any] | None = None,
    version: str | None = None,
    beside: int = 0,
) -> serve.Application:
    """The engines alone. ``options`` are those that each is told, those of the settings by default.
    ``version``: those that run of the same one and with the same options stay, where Serve would
    replace them for another number. ``beside``: engines that other models have."""
    router, (least, most) = settings.router, settings.router.replica_bounds
    number: dict[str, Any] = {"num_replicas": least}
    if least < most:
        number = {
            "autoscaling_config": autoscaling(
                (least, most), router.upscale_delay, router.downscale_delay
            )
        }
    engine = serve.deployment(
        name="Engine",
        max_constructor_retry_count=2,
        ray_actor_options=needed(settings.engine),
        **number,
        **_common(settings),
    )(EngineReplica)
    engine._version = version
    told = dict(settings.options if options is None else options)
    return engine.bind(told, APPLICATION, beside)


def ingress_application(
    settings: Settings, engines: serve.Application | None = None
) -> serve.Application:
    """The ingress, which finds engines wherever they are; and perhaps ``engines`` with it. Its
    replicas are spread over the nodes that there are: two on one host would end with it."""
    router = settings.router
    hosts = sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]
    spread: dict[str, Any] = {}
    if hosts > 1:
        spread["max_replicas_per_node"] = math.ceil(router.num_ingress_replicas / hosts)
    ingress = serve.deployment(
        name="Router",
        num_replicas=router.num_ingress_replicas,
        **spread,
        ray_actor_options={"num_cpus": 0},
        **_common(settings),
    )(Router)
    with_keys = dataclasses.replace(router, api_key=router.keys(), api_key_file=None)
    return ingress.bind(with_keys, APPLICATION, engines)


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "max_ongoing_requests": MOST_AT_ONCE,
        "graceful_shutdown_timeout_s": settings.router.shutdown_timeout + STOP_BUFFER,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": HEALTH_PERIOD,
        "health_check_timeout_s": HEALTH_TIMEOUT,
    }
