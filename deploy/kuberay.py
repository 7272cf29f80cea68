"""``manta serve ... --print-kuberay``: the same server as a RayService for Kubernetes.

The pods of an engine follow from TP x PP and from what a node has: a stage is kept whole on one,
and as many stages as fit share it. Each of several models has a group of pods, which its engines
alone may use: else a small model could take the place of a large one. Keys are in Secrets, never in
the manifest.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import yaml

from deploy.serve_config import applications, labels
from deploy.serve_environment import CALLBACK, GUARD, OWN_DRAIN, everywhere
from deploy.settings import STOP_BUFFER, Settings, without_secrets
from engine.errors import ConfigError
from manta import __version__

NAME = "manta"
GPUS_PER_NODE = 8
KEYS = "/etc/manta/keys"  # the file with API keys, from the Secret manta-keys
CACHE = "/cache"  # what is fetched from the hub, and compiled kernels
LAST_WORDS = 30  # seconds beyond a drain until Kubernetes kills what has not ended
CPUS_PER_GPU = 8  # tokenizers, schedulers and loading want them
HEAD = """\
# Written by `manta serve --print-kuberay`. It needs KubeRay 1.4 or later, and the image, which is
# built from deploy/kubernetes/Dockerfile. See docs/operating.md.
"""
SECRET = """\
# Make the Secret with the API keys first, from a file with a key a line:
#   kubectl create secret generic manta-keys --from-file=keys=FILE
"""
Manifest = dict[str, Any]


def manifest(models: Sequence[Settings], gpus_per_node: int = GPUS_PER_NODE) -> str:
    """YAML of a RayService.

    Raises ConfigError for what Kubernetes' nodes cannot have, or only ``manta serve`` can honour.
    """
    keys = bool(models[0].router.keys())
    several = len(models) > 1
    names = [f"engines-{label}" for label in labels(models)] if several else ["engines"]
    models = [
        _for_pods(settings, keys, name if several else None)
        for settings, name in zip(models, names, strict=True)
    ]
    serve = applications(models, [0] * len(models))
    image = f"{NAME}:{__version__}" + ("-cuda" if any(map(_on_gpus, models)) else "")
    drain = int(models[0].router.shutdown_timeout + STOP_BUFFER)
    cluster: Manifest = {
        "rayVersion": importlib.metadata.version("ray"),
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
            "template": _pod(models[0], image, keys, head=True),
        },
        "workerGroupSpecs": [
            _group(name, settings, image, keys, gpus_per_node)
            for name, settings in zip(names, models, strict=True)
        ],
    }
    if any(settings.router.max_replicas is not None for settings in models):
        cluster["enableInTreeAutoscaling"] = True  # Ray asks for the pods of further engines
    made = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME, "labels": {"app": NAME}},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
            "excludeHeadPodFromServeSvc": True,
            # At an update the old cluster goes on for so long with the requests that it has.
            "rayClusterDeletionDelaySeconds": drain + LAST_WORDS,
            "rayClusterConfig": cluster,
        },
    }
    return HEAD + (SECRET if keys else "") + _files(models) + _dump(made)


def _for_pods(settings: Settings, keys: bool, group: str | None) -> Settings:
    """Those of a model whose engines run in pods, only in those of the ``group`` if that is given.

    Nobody but the cluster's network reaches a pod, and all of that has to.
    """
    options = {**without_secrets(settings.options), "host": "0.0.0.0"}
    if keys:
        options["api_key_file"] = KEYS
    if group is not None:
        options.setdefault("worker_resource", group)
    return Settings.from_options(options)


def _files(models: Sequence[Settings]) -> str:
    """A comment for each file of this machine that the options name."""
    options = ("model", "tokenizer", "chat_template")
    names = [settings.options.get(option) for settings in models for option in options]
    files = [name for name in names if isinstance(name, str) and os.path.isabs(name)]
    return "".join(
        f"# {name} must be in the image, or on a volume of every pod.\n"
        for name in dict.fromkeys(files)
    )


def _group(name: str, settings: Settings, image: str, keys: bool, gpus_per_node: int) -> Manifest:
    """The pods of all engines of a model."""
    parallel, (least, most) = settings.engine.parallel, settings.router.replica_bounds
    hosts, shards = _shape(settings, gpus_per_node)
    resources: Manifest = {}
    if _on_gpus(settings):
        gpus = max(1, math.ceil(shards * parallel.worker_gpus))
        resources["num-gpus"] = str(gpus)
    if parallel.worker_resource is not None:
        own = json.dumps({parallel.worker_resource: shards})
        resources["resources"] = json.dumps(own)  # it becomes a word of a shell's
    return {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "numOfHosts": hosts,
        "rayStartParams": resources,
        "template": _pod(settings, image, keys, shards=shards),
    }


def _shape(settings: Settings, gpus_per_node: int) -> tuple[int, int]:
    """(pods of an engine, shards in each).

    Raises ConfigError if a stage fits no node, or if the stages do not fill their nodes alike.
    """
    parallel = settings.engine.parallel
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node must be at least 1, got {gpus_per_node}")
    if not _on_gpus(settings):
        return 1, tensor * stages
    room = int(gpus_per_node / parallel.worker_gpus) if parallel.worker_gpus else tensor * stages
    if room < tensor:
        raise ConfigError(
            f"tensor_parallel_size={tensor} does not fit a node of {gpus_per_node} GPUs"
            " (--gpus-per-node): use --pipeline-parallel-size for more nodes"
        )
    together = next(n for n in range(min(stages, room // tensor), 0, -1) if stages % n == 0)
    return stages // together, together * tensor


def _on_gpus(settings: Settings) -> bool:
    return settings.engine.device.device != "cpu"


def _pod(
    settings: Settings, image: str, keys: bool, head: bool = False, shards: int = 0
) -> Manifest:
    """The template of a pod: of the head, or of one with so many shards of an engine."""
    gpus = not head and _on_gpus(settings)
    parallel, router = settings.engine.parallel, settings.router
    if head:
        limits = {"cpu": "4", "memory": "8Gi"}
    elif gpus:
        count = max(1, math.ceil(shards * parallel.worker_gpus))
        limits = {
            "cpu": str(CPUS_PER_GPU * count),
            "memory": f"{64 * count}Gi",
            "nvidia.com/gpu": str(count),
        }
    else:
        cpus = parallel.worker_cpus
        count = max(1, math.ceil(shards * (1 if cpus is None else cpus)))
        limits = {"cpu": str(count), "memory": f"{8 * count}Gi"}
    container: Manifest = {
        "name": "ray-head" if head else "ray-worker",
        "image": image,
        "env": _environment(settings),
        "resources": {"limits": limits, "requests": dict(limits)},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "cache", "mountPath": CACHE},
            *([{"name": "keys", "mountPath": "/etc/manta", "readOnly": True}] if keys else []),
        ],
        "ports": _ports(router.port, head),
    }
    if not head:
        # HAProxy of this node says so once it has a way to an ingress replica.
        ready = {"httpGet": {"path": "/-/healthz", "port": router.port}}
        container["readinessProbe"] = {**ready, "periodSeconds": 5, "failureThreshold": 2}
    return {
        "metadata": {"labels": {"app": NAME}},
        "spec": {
            "terminationGracePeriodSeconds": int(router.shutdown_timeout + STOP_BUFFER)
            + LAST_WORDS,
            "containers": [container],
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}},
                {"name": "cache", "emptyDir": {}},
                *([{"name": "keys", "secret": {"secretName": "manta-keys"}}] if keys else []),
            ],
        },
    }


def _ports(port: int, head: bool) -> list[Manifest]:
    named = {"gcs-server": 6379, "dashboard": 8265, "client": 10001} if head else {}
    named |= {"metrics": 8080, "serve": port}
    return [{"containerPort": number, "name": name} for name, number in named.items()]


def _environment(settings: Settings) -> list[Manifest]:
    """What the processes on every node are to find, and where files are kept."""
    variables = everywhere(settings.router)
    del variables[OWN_DRAIN]  # only ``manta serve`` drains by itself
    variables |= {
        "RAY_SERVE_HAPROXY_BINARY_PATH": "/usr/local/bin/manta-haproxy",
        CALLBACK: GUARD,
        "HF_HOME": f"{CACHE}/huggingface",
        "XDG_CACHE_HOME": CACHE,
    }
    token = {"secretKeyRef": {"name": "manta-hub", "key": "token", "optional": True}}
    plain = [{"name": name, "value": value} for name, value in variables.items()]
    return [*plain, {"name": "HF_TOKEN", "valueFrom": token}]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Nothing is written by reference."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else "")


_Dumper.add_representer(str, _text)


def _dump(value: Manifest) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)
