"""Two hosts with addresses of their own: network namespaces, joined by a virtual cable.

python -m tests.soak.hosts (as root). Each host runs a Ray node; the driver, on the first, runs a
replica with a stage on each, compares its tokens with one process's, then does it again with a
stage's ranks on both hosts, and at last kills the second host's node under a running replica.
"""

import workers  # noqa: F401, I001  # before torch

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from engine.errors import EngineError
from manta import LLM, SamplingParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.faults import BASE, add_requests, leftovers, worker_pids
from tests.support.tiny_tokenizer import save_tokenizer

HOSTS = {"manta-a": "10.77.0.1", "manta-b": "10.77.0.2"}
PORT = 6399
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
PROMPTS = [[3 + i, 4, 5 + i] * (i + 1) for i in range(10)]


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True)


def lay_cable() -> None:
    for name in HOSTS:
        sh(f"ip netns add {name}")
    sh("ip link add eth-a netns manta-a type veth peer name eth-b netns manta-b")
    for (name, address), link in zip(HOSTS.items(), ("eth-a", "eth-b"), strict=True):
        for words in (f"addr add {address}/24 dev {link}", f"link set {link} up", "link set lo up"):
            sh(f"ip -n {name} {words}")


def start_node(name: str, head: bool, folder: str) -> subprocess.Popen[bytes]:
    role = f"--head --port={PORT}" if head else f"--address={HOSTS['manta-a']}:{PORT}"
    command = (
        f"ip netns exec {name} {Path(sys.executable).parent}/ray start {role} --block --num-cpus=2"
        f" --node-ip-address={HOSTS[name]}"
    )
    if head:
        command += f" --temp-dir={folder} --include-dashboard=false"
    return subprocess.Popen(
        command.split(), start_new_session=True, stdout=subprocess.DEVNULL, env=environment()
    )


def environment() -> dict[str, str]:
    path = str(Path(__file__).resolve().parents[2])
    address = f"{HOSTS['manta-a']}:{PORT}"
    own = {"PYTHONPATH": path, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    return os.environ | own


def drive(folder: Path) -> None:
    """What the driver does, on the first host."""
    path = next(t for t in TINY_MODELS if t.name == "llama").save(folder)
    tokenizer = save_tokenizer(folder / "words", 128)

    def start(**options: Any) -> LLM:
        return LLM(path, tokenizer=tokenizer, **(BASE | options))

    def tokens(llm: LLM) -> list[list[int]]:
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]

    expected = tokens(start())
    ray.init(log_to_driver=False)
    while sum(node["Alive"] for node in ray.nodes()) < 2:
        time.sleep(0.2)
    for shape in ((2, 2), (4, 1)):
        llm = start(tensor_parallel_size=shape[0], pipeline_parallel_size=shape[1])
        found = llm.engine.executor._workers._workers
        print(f"TP {shape[0]} × PP {shape[1]}:", [w.hello.host for w in found], end=" ")
        assert [w.hello.host for w in found] == sorted([*HOSTS.values()] * 2)
        assert [w.steps is None for w in found] == [True, True, False, False]  # ring, socket
        assert tokens(llm) == expected
        print("tokens are those of one process")
        llm.engine.stop()
    llm = start(tensor_parallel_size=2, pipeline_parallel_size=2)
    pids = worker_pids(llm.engine)
    add_requests(llm.engine, 8, 10, 200)
    for _ in range(10):
        llm.engine.step()
    os.kill(int(os.environ["NODE_B"]), signal.SIGTERM)
    begun = time.monotonic()
    try:
        while True:
            llm.engine.step()
    except EngineError as error:
        print(f"told {time.monotonic() - begun:.2f} s after the end of the second host's node:")
        print("  ", str(error).splitlines()[0])
    time.sleep(1)
    print("left behind:", leftovers(pids) or "nothing")


def main() -> None:
    if len(sys.argv) > 1:
        drive(Path(sys.argv[1]))
        return
    nodes = []
    with tempfile.TemporaryDirectory(prefix="mh") as folder:
        try:
            lay_cable()
            nodes.append(start_node("manta-a", True, f"{folder}/ray"))
            knock = f"until (echo > /dev/tcp/{HOSTS['manta-a']}/{PORT}); do sleep 0.2; done"
            wait = ["ip", "netns", "exec", "manta-a", "timeout", "60", "bash", "-c", knock]
            subprocess.run(wait, stderr=subprocess.DEVNULL, check=True)
            time.sleep(3)  # it listens before it serves
            nodes.append(start_node("manta-b", False, f"{folder}/ray"))
            command = f"ip netns exec manta-a {sys.executable} -m tests.soak.hosts {folder}"
            environ = environment() | {"NODE_B": str(nodes[1].pid)}
            done = subprocess.run(command.split(), env=environ, check=False)
        finally:
            for node in nodes:
                node.terminate()
                node.wait(20)
            for name in HOSTS:
                subprocess.run(f"ip netns delete {name}".split(), check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
