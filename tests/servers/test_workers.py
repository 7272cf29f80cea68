"""Worker actors on a Ray cluster of two nodes: placed, right, and ended whole when one fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.replica import Checkpoint, start_replica
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.tokenizer import Tokenizer
from manta import LLM, SamplingParams
from tests.support.faults import BASE, leftovers, strike, worker_pids
from tests.support.pool import Pool
from tests.support.tiny_tokenizer import save_tokenizer
from tests.support.waiting import PATIENCE
from workers.checkpoint import load_config, load_generation_config

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
PROMPTS = [[3 + i, 4, 5 + i] * (i + 1) for i in range(10)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray.shutdown()  # of another module's cluster
    cluster = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("words"), 128))


@pytest.fixture
def start(cluster, checkpoint, tokenizer) -> Callable[..., LLM]:
    """``start(**options)`` is an LLM on the tiny Llama, its workers on the cluster."""

    def start(**options: Any) -> LLM:
        return LLM(checkpoint("llama"), tokenizer=tokenizer, **(BASE | options))

    return start


def tokens(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_stages_land_on_different_nodes_and_the_run_is_right(start) -> None:
    expected = tokens(start())
    llm = start(tensor_parallel_size=2, pipeline_parallel_size=2)
    pids = worker_pids(llm.engine)
    nodes = [node for node, _ in llm.engine.executor._workers._launcher._pids]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert tokens(llm) == expected
    del llm  # what nobody holds is ended
    assert not leftovers(pids)


def test_the_command_line_joins_the_cluster_of_ray_address(cluster, checkpoint, tokenizer) -> None:
    words = ["generate", "--device", "cpu", "--dtype", "float32", "--temperature", "0"]
    words += ["--max-tokens", "9", "--ignore-eos", "--tokenizer", tokenizer, "--swap-space", "0"]
    words += ["--kv-cache-memory-bytes", str(8 << 20)]
    printed = []
    for shape in ([], ["--tensor-parallel-size", "2"]):
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", *words, *shape, str(checkpoint("llama")), "w3 w4"],
            env=os.environ | {"RAY_ADDRESS": cluster.address},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        printed.append([line for line in done.stdout.splitlines() if line.startswith("Prompt:")])
        assert ("float32 on 2 × cpu" in done.stderr) == bool(shape)
    assert printed[0] == printed[1] and len(printed[0]) == 1


# A finalizer that was there before Ray makes all others run after Ray's own end.
PROGRAM = """
import atexit, sys, weakref
finalizer = weakref.finalize(type("Early", (), {}), id, 0)
import ray
from ray.util import placement_group_table
atexit.register(lambda: print({group["state"] for group in placement_group_table().values()}))
from manta import LLM
model, tokenizer = sys.argv[1:]
llm = LLM(model, tokenizer=tokenizer, tensor_parallel_size=2)
"""


def test_the_workers_end_before_ray_does_at_the_end_of_a_program(
    cluster, checkpoint, tokenizer
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, checkpoint("llama"), tokenizer],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (0, "{'REMOVED'}\n"), done.stderr
    assert "failed" not in done.stderr and "Traceback" not in done.stderr


def test_what_can_never_be_placed_is_refused_at_once(start) -> None:
    asked = r"tensor_parallel_size=2 × pipeline_parallel_size=3 asks for 6 workers of 1 CPU each"
    with pytest.raises(
        ConfigError, match=asked + r".* never has that: .*: \d of 2 CPU free; .*: \d"
    ):
        start(tensor_parallel_size=2, pipeline_parallel_size=3)


def test_what_has_no_room_now_is_waited_for_a_limited_time(start) -> None:
    group = ray.util.placement_group([{"CPU": 1}] * 3)
    assert group.wait(PATIENCE)
    with pytest.raises(EngineError, match=r"no room within placement_timeout \(0.5 s\): .* free"):
        start(tensor_parallel_size=2, pipeline_parallel_size=2, placement_timeout=0.5)
    threading.Timer(0.5, ray.util.remove_placement_group, (group,)).start()
    llm = start(tensor_parallel_size=2, pipeline_parallel_size=2, placement_timeout=PATIENCE)
    assert len(tokens(llm)) == len(PROMPTS)
    llm.engine.stop()


@pytest.mark.parametrize(
    ("phase", "rank", "number", "shape"),
    [
        ("prefill", 0, signal.SIGKILL, (2, 1)),
        ("decode", 1, signal.SIGKILL, (1, 2)),
        ("idle", 1, signal.SIGKILL, (2, 1)),
        ("decode", 0, signal.SIGSTOP, (1, 2)),
    ],
)
def test_a_worker_that_fails_ends_the_replica_and_nothing_is_left(
    phase: str, rank: int, number: signal.Signals, shape: tuple[int, int], start
) -> None:
    llm = start(tensor_parallel_size=shape[0], pipeline_parallel_size=shape[1])
    pid = worker_pids(llm.engine)[rank]
    outcome = strike(llm, rank, phase, number, delay=0.003)
    assert not outcome.left
    name = rf"worker {rank} \(stage \d, tensor rank \d, pid {pid} on "
    if number == signal.SIGKILL:
        assert re.match(f"the engine failed.*: {name}.* died", outcome.error), outcome.error
    else:
        hung = rf"no result within step_timeout \(3 s\); no answer from {name}"
        assert re.search(hung, outcome.error), outcome.error
    with pytest.raises(EngineError, match=name):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("number", "shape"),
    [(signal.SIGKILL, (2, 1)), (signal.SIGKILL, (1, 2)), (signal.SIGSTOP, (2, 1))],
)
def test_generate_goes_on_when_a_worker_fails(number: signal.Signals, shape, start) -> None:
    """With other workers, and the same tokens."""
    llm = start(tensor_parallel_size=shape[0], pipeline_parallel_size=shape[1], max_failovers=2)
    long = SamplingParams(temperature=1, seed=1, max_tokens=200, ignore_eos=True, logprobs=2)

    def answers() -> list[Any]:
        outputs = llm.generate(PROMPTS, long, use_tqdm=False)
        return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]

    expected = answers()
    pids = worker_pids(llm.engine)
    threading.Timer(0.05, os.kill, (pids[1], number)).start()
    while not sum(llm.engine.stats.restarts.counts):
        assert answers() == expected
    assert not set(pids) & set(worker_pids(llm.engine))
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    llm.engine.stop()
    assert not leftovers(pids)


def test_a_node_that_goes_takes_the_replica_along(start, cluster) -> None:
    node = cluster.add_node(num_cpus=3)
    llm = start(tensor_parallel_size=2, worker_cpus=1.5)  # only the new node has room
    pids = worker_pids(llm.engine)
    assert len(tokens(llm)) == len(PROMPTS)
    threading.Thread(target=cluster.remove_node, args=(node,)).start()
    with pytest.raises(EngineError, match=r"worker \d .* died"):
        while True:
            llm.engine.check()
            time.sleep(0.01)
    assert not leftovers(pids)


def test_an_occupied_port_is_named(start) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            EngineError, match=rf"rendezvous_port={port}: cannot listen at .*in use"
        ):
            start(tensor_parallel_size=2, rendezvous_port=port)
    llm = start(tensor_parallel_size=2, rendezvous_port=port)
    llm.engine.stop()
    start(tensor_parallel_size=2, rendezvous_port=port).engine.stop()  # free again at once


def test_a_weight_file_that_one_rank_cannot_read_is_named(checkpoint, tokenizer, tmp_path) -> None:
    """The file is a link into each process's working directory, and one of these lacks it."""
    folder, homes = tmp_path / "model", [tmp_path / "has", tmp_path / "lacks"]
    for made in (folder, *homes):
        made.mkdir()
    for file in Path(checkpoint("llama")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").rename(homes[0] / "weights")
    (folder / "model.safetensors").symlink_to("/proc/self/cwd/weights")
    config = EngineConfig.from_options(model=str(folder), **BASE, tensor_parallel_size=2)
    found = Checkpoint(folder, load_generation_config(folder, load_config(folder)), 0)
    pool = Pool(homes)
    pool.size = 2
    with pytest.raises(
        CheckpointError, match=r"has no weights.*\(worker 1 \(stage 0, tensor rank 1"
    ):
        start_replica(config, found, Tokenizer.load(tokenizer), pool)
    assert not leftovers([])


def test_a_workers_failure_to_start_comes_with_its_traceback(
    start, checkpoint, tokenizer, tmp_path
) -> None:
    with pytest.raises(EngineError, match=r"(?s)worker \d .* failed to start:.*Traceback.*mmap"):
        start(tensor_parallel_size=2, num_gpu_blocks_override=10**12, kv_cache_memory_bytes=None)
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(checkpoint("llama")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"damaged or truncated.*\(worker \d "):
        LLM(folder, **(BASE | {"tensor_parallel_size": 2}), tokenizer=tokenizer)
    assert not leftovers([])
