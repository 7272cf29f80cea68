"""Two hosts with addresses of their own: network namespaces, joined by a virtual cable.

Each runs a Ray node. Needs root.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOSTS = {"manta-a": "10.77.0.1", "manta-b": "10.77.0.2"}  # the head's first
HEAD, OTHER = HOSTS
PORT = 6399


def sh(command: str, check: bool = True) -> None:
    """Run a command."""
    subprocess.run(command.split(), check=check)


def pull_cable(out: bool = True) -> None:
    """Take the second host off the network, or put it back."""
    sh(f"ip -n {OTHER} link set eth-b {'down' if out else 'up'}")


def start_node(name: str, folder: str) -> "subprocess.Popen[bytes]":
    """A Ray node on a host, of 2 CPUs; the head's files are in ``folder``."""
    role = f"--head --port={PORT}" if name == HEAD else f"--address={HOSTS[HEAD]}:{PORT}"
    command = (
        f"ip netns exec {name} {Path(sys.executable).parent}/ray start {role} --block --num-cpus=2"
        f" --node-ip-address={HOSTS[name]}"
    )
    if name == HEAD:
        command += f" --temp-dir={folder}/ray --include-dashboard=false"
    return subprocess.Popen(
        command.split(), start_new_session=True, stdout=subprocess.DEVNULL, env=environment()
    )


def environment() -> dict[str, str]:
    """For programs on the hosts."""
    own = {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "RAY_ADDRESS": f"{HOSTS[HEAD]}:{PORT}",
        "RAY_AUTH_MODE": "disabled",
    }
    return os.environ | own


def run_on_head(module: str) -> int:
    """``python -m module FOLDER`` on the first host, with both nodes running; its status.

    ``NODE_B`` is the process id of the second node, in its environment.
    """
    with hosts() as folder, nodes(folder) as second:
        command = f"ip netns exec {HEAD} {sys.executable} -m {module} {folder}"
        environ = environment() | {"NODE_B": str(second.pid)}
        return subprocess.run(command.split(), env=environ, check=False).returncode


@contextmanager
def hosts() -> Iterator[str]:
    """The hosts and a folder; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="mh") as folder:
        try:
            for name in HOSTS:
                sh(f"ip netns add {name}")
            sh(f"ip link add eth-a netns {HEAD} type veth peer name eth-b netns {OTHER}")
            for (name, address), link in zip(HOSTS.items(), ("eth-a", "eth-b"), strict=True):
                sh(f"ip -n {name} addr add {address}/24 dev {link}")
                sh(f"ip -n {name} link set {link} up")
                sh(f"ip -n {name} link set lo up")
            yield folder
        finally:
            for name in HOSTS:
                sh(f"ip netns delete {name}", check=False)


@contextmanager
def nodes(folder: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A Ray node on each host; gives the second one's process."""
    running = [start_node(HEAD, folder)]
    try:
        knock = f"until (echo > /dev/tcp/{HOSTS[HEAD]}/{PORT}); do sleep 0.2; done"
        wait = ["ip", "netns", "exec", HEAD, "timeout", "60", "bash", "-c", knock]
        subprocess.run(wait, stderr=subprocess.DEVNULL, check=True)
        time.sleep(3)  # it listens before it serves
        running.append(start_node(OTHER, folder))
        yield running[1]
    finally:
        for node in running[::-1]:
            node.terminate()
            node.wait(20)
