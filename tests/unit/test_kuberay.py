"""--print-kuberay and deploy/kubernetes: KubeRay's own schema takes them, and they say the same as
``manta serve`` with these options."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.cli import main
from deploy.settings import Settings
from manta import __version__

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "kubernetes"
SCHEMA = json.loads((Path(__file__).parent / "kuberay" / "rayservice.json").read_text())
EXAMPLES = {
    "cpu": ["manta-demo", "--device", "cpu"],
    "one-gpu": ["Qwen/Qwen3-8B"],
    "eight-gpus": ["Qwen/Qwen3-32B", "-tp", "8", "--api-key", "sk-never-shown"],
    "two-nodes": ["meta-llama/Llama-3.1-405B-Instruct", "-tp", "8", "-pp", "2"]
    + ["--num-ingress-replicas", "4"],
}
GPU = "nvidia.com/gpu"
PACKAGES = ("manta", "engine", "workers", "cluster", "router", "deploy")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", *words, "--print-kuberay"]) == 0
    return capsys.readouterr().out


def group(manifest: dict[str, Any]) -> tuple[int, int, str | None]:
    """Engines, pods of each and GPUs in a pod."""
    (found,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = container(found)["resources"]["limits"]
    assert found["rayStartParams"] == ({"num-gpus": limits[GPU]} if GPU in limits else {})
    assert found["replicas"] == found["minReplicas"] == found["maxReplicas"]
    return found["replicas"], found["numOfHosts"], limits.get(GPU)


def container(of: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = of["template"]["spec"]["containers"][0]
    return found


def check(manifest: dict[str, Any]) -> None:
    """By KubeRay's schema, and each pod by Kubernetes' own."""
    jsonschema.validate(manifest, SCHEMA)
    cluster = manifest["spec"]["rayClusterConfig"]
    for template in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **template["template"]}
        pod["metadata"] = {"name": "x", **pod["metadata"]}
        kubernetes_validate.validate(pod, "1.30", strict=True)


def test_the_schema_refuses_what_kuberay_would() -> None:
    for path, value in (("spec.x", 1), ("spec.rayClusterConfig.headGroupSpec.template", None)):
        made = yaml.safe_load((SHIPPED / "one-gpu.yaml").read_text())
        *parents, last = path.split(".")
        place = made
        for name in parents:
            place = place[name]
        place[last] = value
        with pytest.raises(jsonschema.ValidationError):
            check(made)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_the_command_writes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, *EXAMPLES[name])
    assert text == (SHIPPED / f"{name}.yaml").read_text()
    assert "sk-never-shown" not in text
    check(yaml.safe_load(text))


def test_the_application_is_that_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["org/model", "--num-replicas", "3", "--max-num-seqs", "7", "--shutdown-timeout", "90"]
    words += ["--port", "9000", "--host", "127.0.0.1", "--api-key", "a", "b"]
    words += ["--max-connections-per-client", "12", "--log-format", "json"]
    made = yaml.safe_load(printed(capsys, *words))
    check(made)
    serve = yaml.safe_load(made["spec"]["serveConfigV2"])
    assert serve["http_options"] == {"host": "0.0.0.0", "port": 9000}
    (application,) = serve["applications"]
    keys = application["args"].pop("api_key_file")
    settings = Settings.from_options(application["args"])
    assert (settings.router.num_replicas, settings.engine.scheduler.max_num_seqs) == (3, 7)
    cluster = made["spec"]["rayClusterConfig"]
    for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod, inner = one["template"]["spec"], container(one)
        # What was asked for may finish: longer than a drain, and than Serve waits for a replica.
        assert pod["terminationGracePeriodSeconds"] > 90 + 10
        assert {"containerPort": 9000, "name": "serve"} in inner["ports"]
        variables = {v["name"]: v.get("value") for v in inner["env"]}
        assert variables["MANTA_CLIENT_CONNECTIONS"] == "12"
        assert variables["MANTA_LOG_FORMAT"] == "json"
        (mount,) = [m for m in inner["volumeMounts"] if m["name"] == "keys"]
        assert keys.startswith(mount["mountPath"]) and mount["readOnly"]
    assert container(cluster["workerGroupSpecs"][0])["readinessProbe"]["httpGet"]["port"] == 9000
    assert made["spec"]["rayClusterDeletionDelaySeconds"] > 90 + 10
    needed = (ROOT / "deploy" / "serve_config.py").read_text()
    assert set(re.findall(r"RAY_SERVE_\w+", needed)) <= set(variables)


@pytest.mark.parametrize(
    ("words", "engines", "pods", "gpus"),
    [
        ("", 1, 1, "1"),
        ("--num-replicas 4", 4, 1, "1"),
        ("-tp 4 -pp 2", 1, 1, "8"),
        ("-tp 4 -pp 3", 1, 3, "4"),  # two stages fit a node, and would leave one with half of it
        ("-tp 4 -pp 4 --num-replicas 2", 2, 2, "8"),
        ("-tp 2 -pp 2 --gpus-per-node 2", 1, 2, "2"),
        ("-tp 2 --worker-gpus 0.5", 1, 1, "1"),
        ("-tp 2 --device cpu", 1, 1, None),
    ],
)
def test_pods_follow_from_the_shards(
    words: str, engines: int, pods: int, gpus: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    made = yaml.safe_load(printed(capsys, "org/model", *words.split()))
    check(made)
    assert group(made) == (engines, pods, gpus)


MODELS = """\
port: 9000
api-key: sk-never-shown
models:
- {model: org/Large_Model, tensor-parallel-size: 8, pipeline-parallel-size: 2}
- {model: org/large-model, served-model-name: [small, alias], max-replicas: 3}
- {model: manta-demo, device: cpu, served-model-name: Small}
"""


def test_each_of_several_models_has_pods_that_no_other_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(MODELS)
    text = printed(capsys, "--config", str(file))
    assert "sk-never-shown" not in text
    made = yaml.safe_load(text)
    check(made)
    cluster = made["spec"]["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    serve = yaml.safe_load(made["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(serve)
    ingress, *engines = serve["applications"]
    assert (ingress["import_path"], ingress["route_prefix"]) == ("deploy.serve:build_ingress", "/")
    assert ingress["args"] == {"api_key_file": "/etc/manta/keys"}
    settings = [Settings.from_options(one["args"]) for one in engines]
    assert [one.names for one in settings] == [
        ("org/Large_Model",), ("small", "alias"), ("Small",)
    ]  # fmt: skip
    assert [one["name"] for one in engines] == [
        "manta-engines-org-large-model", "manta-engines-small", "manta-engines-small-2"
    ]  # fmt: skip
    shapes = []
    for group, one in zip(groups, settings, strict=True):
        given = group["rayStartParams"]
        (resource,) = json.loads(json.loads(given["resources"])).items()
        # As many as there are workers in a pod: all of an engine's are where they belong.
        workers = one.engine.parallel.world_size // group["numOfHosts"]
        assert resource == (one.engine.parallel.worker_resource, workers)
        assert container(group)["image"].endswith("-cuda")
        shapes.append((group["numOfHosts"], given.get("num-gpus"), group["maxReplicas"]))
    assert shapes == [(2, "8", 1), (1, "1", 3), (1, None, 1)]
    assert len({group["groupName"] for group in groups}) == 3
    assert cluster["enableInTreeAutoscaling"] is True


def test_pods_come_with_engines_that_the_load_asks_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = yaml.safe_load(
        printed(capsys, "org/model", "--min-replicas", "2", "--max-replicas", "5")
    )
    check(made)
    cluster = made["spec"]["rayClusterConfig"]
    (engines,) = cluster["workerGroupSpecs"]
    assert (engines["replicas"], engines["minReplicas"], engines["maxReplicas"]) == (2, 2, 5)
    assert cluster["enableInTreeAutoscaling"] is True


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("-tp 16 --print-kuberay", "tensor_parallel_size=16 does not fit a node of 8 GPUs"),
        ("--gpus-per-node 0 --print-kuberay", "--gpus-per-node must be at least 1, got 0"),
        ("--gpus-per-node 4", "--gpus-per-node needs --print-kuberay"),
        ("--print-kuberay --ssl-certfile c --ssl-keyfile k", "ssl_certfile"),
    ],
)
def test_what_cannot_be_is_refused(
    words: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "org/model", *words.split()]) == 2
    assert error in capsys.readouterr().err


def test_a_file_of_this_machine_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"# {tmp_path} must be in the image" in printed(capsys, str(tmp_path))


def test_the_spot_example_changes_what_is_there() -> None:
    made = yaml.safe_load((SHIPPED / "one-gpu.yaml").read_text())
    custom = yaml.safe_load((SHIPPED / "kustomization.yaml").read_text())
    for name in custom["resources"]:
        assert (SHIPPED / name).is_file()
    (patch,) = custom["patches"]
    for change in yaml.safe_load(patch["patch"]):  # RFC 6902
        *parents, last = change["path"].strip("/").split("/")
        place = made
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        assert (last in place) == (change["op"] == "replace")
        place[last] = change["value"]
    check(made)
    assert group(made) == (2, 1, "1")


def test_monitors_find_the_pods() -> None:
    service, monitor, pods = yaml.safe_load_all((SHIPPED / "monitoring.yaml").read_text())
    kubernetes_validate.validate(service, "1.30", strict=True)
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    made = yaml.safe_load((SHIPPED / "one-gpu.yaml").read_text())
    cluster = made["spec"]["rayClusterConfig"]
    for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        labels = one["template"]["metadata"]["labels"]
        assert pods["spec"]["selector"]["matchLabels"] == labels
        names = {port["name"] for port in container(one)["ports"]}
        assert {"serve", "metrics"} <= names
    assert service["spec"]["selector"] == labels | {"ray.io/node-type": "head"}


def test_ray_serve_takes_the_application(capsys: pytest.CaptureFixture[str]) -> None:
    made = yaml.safe_load(printed(capsys, "org/model", "-tp", "2"))
    serve = ServeDeploySchema.model_validate(yaml.safe_load(made["spec"]["serveConfigV2"]))
    assert serve.applications[0].import_path == "deploy.serve:build"
    assert serve.http_options.port == 8000


DOCKERFILE = (SHIPPED / "Dockerfile").read_text()


def docker_steps() -> list[str]:
    """The commands of the Dockerfile's RUN steps: system packages, PyTorch, manta, the user."""
    found = re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKERFILE, re.M)
    assert len(found) == 4
    return [step.replace("\\\n", "") for step in found]


def test_what_the_image_installs_is_whole(tmp_path: Path) -> None:
    """manta's step is run, with what .dockerignore lets through, in an environment of its own. What
    other packages it needs are not fetched (gigabytes): they are those of the tests."""
    source, environment, home = (tmp_path / name for name in ("src", "environment", "home"))
    ignored = (ROOT / ".dockerignore").read_text().split()
    names = shutil.ignore_patterns(*(name.removeprefix("**/") for name in ignored))
    shutil.copytree(ROOT, source, ignore=names)
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    pip = environment / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {environment}/bin/python -m pip "$@"\n')
    pip.chmod(0o755)
    home.mkdir()
    variables = {
        "PATH": f"{environment}/bin:{os.environ['PATH']}",
        "HOME": str(home),
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which switches it off
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }

    def run(command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", command], cwd=home, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    step = docker_steps()[2]
    assert "/src" in step
    run(step.replace("/src", str(source)))
    assert not source.exists()  # nothing of what runs below is the checkout's
    assert run("manta --version").split()[-1] == __version__
    assert "--tensor-parallel-size" in run("manta serve --help")
    where = run("python -c 'import deploy.haproxy; print(deploy.haproxy.__file__)'")
    assert Path(where).is_relative_to(site)
    assert "HAProxy version" in run("manta-haproxy -v")
    assert "deploy.serve:build" in run("manta serve --print-serve-config")  # the embedded model
    # What is no Python is there too: kernels' sources, the page, the embedded model.
    shipped = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in shipped.stdout.split():
        assert (site / name).is_file(), name


def test_the_image_is_of_this_version() -> None:
    """Its other steps are not run here (they fetch gigabytes): they are good shell, and agree with
    what ``make`` installs and the manifests name."""
    text, steps = DOCKERFILE, docker_steps()
    for step in steps:
        subprocess.run(["sh", "-n", "-c", step], check=True)
    (torch,) = re.findall(r"torch==(\S+)", text)
    assert f"\ntorch={torch}\n" in (ROOT / "tools" / "setup_venv.sh").read_text()
    assert f"-t manta:{__version__} ." in text and f"-t manta:{__version__}-cuda " in text
    assert "wget" in steps[0] and "g++" in steps[0]  # KubeRay's own probes; kernels
