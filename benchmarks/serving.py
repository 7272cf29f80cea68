"""``manta serve`` beside ``vllm serve``: the same checkpoint, the same load, in turns.

    python -m benchmarks.serving round MODEL FILE --vllm-python VENV/bin/python --seed 1
    python -m benchmarks.serving lost MODEL FILE
    python -m benchmarks.serving table FILE

``round`` starts each server on an idle machine (which of them first depends on the seed), waits
until it answers a request, loads it with benchmarks/load_generator.py at 1, 8 and 32 streams (or
``--streams``), ``--turns`` times, and stops it: random prompts of 128 tokens, 64 tokens of output,
greedy, bf16. It appends a line of JSON for each server and number of streams to FILE, with the CPU
time of the server's processes by name. ``lost`` has the offline engine compute such prompts, 32 at
a time, in turns of some seconds with a server at 32 streams; whichever has not the turn is stopped
(SIGSTOP), so both meet the same machine. ``table`` prints medians over the rounds or turns, and
ratios.

vLLM is told to use all cores: its default on a CPU leaves one out.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.processes import cpu_seconds, tree
from deploy.ports import free_ports

HERE = Path(__file__).resolve().parent
STREAMS = {1: 16, 8: 32, 32: 96}  # number of streams: requests in a run (else 8 a stream)
MAX_MODEL_LEN = 2048
INPUT_LEN, OUTPUT_LEN = 128, 64


class Server:
    """A server in processes of its own, from its start to its end."""

    def __init__(self, name: str, model: str, vllm_python: str | None, options: list[str]) -> None:
        (port,) = free_ports(1)
        self.name, self.model = name, model
        self.url = f"http://127.0.0.1:{port}"
        common = ["--port", str(port), "--dtype", "bfloat16"]
        common += ["--max-model-len", str(MAX_MODEL_LEN)]
        environment = dict(os.environ)
        if name == "manta":
            command = [sys.executable, "-m", "deploy.cli", "serve", model, *common, *options]
        else:
            assert vllm_python
            environment["VLLM_CPU_KVCACHE_SPACE"] = "4"
            environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
            module = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs
            command = [vllm_python, "-m", module, "--model", model, *common, *options]
        self._log = open(f"/tmp/serving-{name}.log", "w")  # noqa: SIM115  # closed by stop
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, cwd=HERE.parent, env=environment, stdout=self._log, stderr=self._log
        )
        self.pid = self._process.pid
        self._wait()
        self.ready_seconds = time.perf_counter() - started

    def _wait(self) -> None:
        """Until a request of one token is answered."""
        body = {"model": self.model, "prompt": [11, 12], "max_tokens": 1}
        while self._process.poll() is None:
            request = urllib.request.Request(
                f"{self.url}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    json.load(answer)
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"{self.name} ended: see {self._log.name}")

    def load(self, streams: int, requests: int, seed: int) -> dict[str, Any]:
        """One run of the load generator, with the CPU time that the server spent on it."""
        before = cpu_seconds(self.pid)
        command = [
            sys.executable, str(HERE / "load_generator.py"), "--url", self.url, "--model",
            self.model, "--streams", str(streams), "--requests", str(requests), "--seed",
            str(seed), "--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.name}, {streams} streams: {done.stderr}")
        figures: dict[str, Any] = json.loads(done.stdout)
        after = cpu_seconds(self.pid)
        spent = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
        figures["cpu_us_per_token"] = {
            name: round(1e6 * seconds / figures["tokens"], 1)
            for name, seconds in sorted(spent.items(), key=lambda item: -item[1])
            if seconds > 0
        }
        return figures

    def stop(self) -> None:
        """End it, and wait until all that came with it is gone."""
        self._process.send_signal(signal.SIGINT if self.name == "vllm" else signal.SIGTERM)
        self._process.wait(60)
        self._log.close()


# ---- what is measured ----


def one_round(args: argparse.Namespace) -> None:
    names = ["manta", "vllm"] if args.vllm_python else ["manta"]
    if args.only:
        names = [args.only]
    both = (args.both or "").split()
    for name in names if args.seed % 2 else names[::-1]:
        own = (args.options or "").split() if name == "manta" else []
        server = Server(name, args.model, args.vllm_python, [*both, *own])
        try:
            server.load(max(args.streams), max(args.streams), 10**6)  # warms up
            for turn, streams in itertools.product(range(args.turns), args.streams):
                time.sleep(1)
                seed = args.seed * args.turns + turn
                figures = server.load(streams, STREAMS.get(streams, 8 * streams), 1000 * seed)
                figures |= {"server": name, "model": args.model, "round": seed}
                append(args.file, figures | {"ready_seconds": server.ready_seconds})
        finally:
            server.stop()
        time.sleep(2)


def lost(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    offline = context.Process(target=_offline, args=(args.model, there), daemon=True)
    offline.start()
    here.recv()
    assert offline.pid
    with _stopped(offline.pid):
        server = Server("manta", args.model, None, (args.options or "").split())
    streams, requests = max(STREAMS), STREAMS[max(STREAMS)]

    def computed(turn: int) -> Any:
        here.send(turn)
        return here.recv()

    def served(turn: int) -> Any:
        return server.load(streams, requests, turn)["output_tok_s"]

    sides = [("served", served, offline.pid), ("offline", computed, server.pid)]
    try:
        with _stopped(offline.pid):
            server.load(8, 8, 10**6)  # warms up
            time.sleep(15)  # until its memory is taken
        for turn in range(args.turns):
            figures: dict[str, Any] = {"server": "lost", "model": args.model, "round": turn}
            for side, run, other in sides:
                with _stopped(other):
                    figures[side] = run(turn)
            append(args.file, figures)
            sides.reverse()
    finally:
        server.stop()
        offline.kill()


@contextlib.contextmanager
def _stopped(root: int) -> Iterator[None]:
    """Stop a process and all that descend from it for a while."""
    pids = tree(root)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        time.sleep(1.5)  # what waited for a timer has had it


def _offline(model: str, turns: Connection) -> None:
    """Output tokens per second of the offline engine, for each number that comes."""
    from benchmarks.offline import make_prompts
    from manta import LLM, SamplingParams

    streams = max(STREAMS)
    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=streams,
        prefault_kv_cache=True,  # as servers do
        use_tqdm_on_load=False,
    )
    time.sleep(15)  # until it is taken
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)

    def speed(seed: int, requests: int) -> float:
        prompts = make_prompts(seed, requests, INPUT_LEN)
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return len(prompts) * OUTPUT_LEN / (time.perf_counter() - started)

    turns.send(speed(10**6, streams))  # warms up
    while True:
        turns.send(speed(turns.recv(), STREAMS[streams]))


def append(file: str, figures: dict[str, Any]) -> None:
    line = json.dumps(figures)
    print(line, flush=True)
    with open(file, "a", encoding="utf-8") as out:
        out.write(line + "\n")


# ---- the table ----

COLUMNS = ["output_tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"]


def table(args: argparse.Namespace) -> None:
    lines = [json.loads(line) for line in Path(args.file).read_text().splitlines()]
    print("| streams | figure | manta | vLLM | ratio |\n| --- | --- | --- | --- | --- |")
    for streams in sorted({line["streams"] for line in lines if "streams" in line}):
        for column in COLUMNS:
            mine, theirs = (
                {x["round"]: x[column] for x in lines
                 if x["server"] == name and x.get("streams") == streams}
                for name in ("manta", "vllm")
            )  # fmt: skip
            cells = [f"{statistics.median(v.values()):.1f}" if v else "" for v in (mine, theirs)]
            shared = mine.keys() & theirs.keys()
            ratio = statistics.median(mine[r] / theirs[r] for r in shared) if shared else 0
            print(f"| {streams} | {column} | {cells[0]} | {cells[1]} | {ratio:.2f} |")
    ready = {
        name: {x["round"]: x["ready_seconds"] for x in lines if x["server"] == name}
        for name in ("manta", "vllm")
    }
    print("start to ready, s:", {n: round(statistics.median(v.values()), 2)
                                 for n, v in ready.items() if v})  # fmt: skip
    if turns := [x for x in lines if x["server"] == "lost"]:
        alone, served = (
            statistics.median(x[side] for x in turns) for side in ("offline", "served")
        )
        shares = sorted(1 - x["served"] / x["offline"] for x in turns)
        print(
            f"32 at a time: offline {alone:.1f}, served {served:.1f} tok/s; lost"
            f" {statistics.median(shares):.3f} ({shares[0]:.3f} to {shares[-1]:.3f})"
        )
    for name in ("manta", "vllm"):
        spent: dict[str, list[float]] = defaultdict(list)
        for line in lines:
            if line["server"] == name and line.get("streams") == 32:
                for title_, cost in line["cpu_us_per_token"].items():
                    spent[title_].append(cost)
        print(f"{name}: CPU µs per token at 32 streams:")
        for title_, costs in sorted(spent.items(), key=lambda item: -statistics.median(item[1])):
            if statistics.median(costs) >= 1:
                print(f"  {title_:<50} {statistics.median(costs):10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    for name, run in (("round", one_round), ("lost", lost), ("table", table)):
        command = commands.add_parser(name)
        if name != "table":
            command.add_argument("model")
        command.add_argument("file")
        if name == "round":
            command.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
            command.add_argument("--seed", type=int, default=1)
            command.add_argument("--only", choices=["manta", "vllm"])
            command.add_argument("--streams", type=int, nargs="*", default=list(STREAMS))
            command.add_argument("--turns", type=int, default=1)
            command.add_argument("--both", help="options for both servers, in one word")
        if name == "lost":
            command.add_argument("--turns", type=int, default=6)
        if name != "table":
            command.add_argument("--options", help="further ones of manta serve, in one word")
        command.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
