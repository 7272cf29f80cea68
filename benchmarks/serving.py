"""``manta serve`` beside ``vllm serve``: the same checkpoint, the same load, in turns.

    python -m benchmarks.serving round MODEL FILE --vllm-python VENV/bin/python --seed 1
    python -m benchmarks.serving offline MODEL FILE
    python -m benchmarks.serving table FILE

``round`` starts each server on an idle machine (which of them first depends on the seed), waits
until it answers a request, loads it with benchmarks/load_generator.py at 1, 8 and 32 streams, and
stops it: random prompts of 128 tokens, 64 tokens of output, greedy, bf16. It appends a line of
JSON for each server and number of streams to FILE, with the CPU time of the server's processes
by name. ``offline`` appends the engine's own speed with 32 sequences at a time on such prompts.
``table`` prints medians over the rounds, and ratios.

vLLM is told to use all cores: its default on a CPU leaves one out.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.processes import cpu_seconds
from deploy.ports import free_ports

HERE = Path(__file__).resolve().parent
STREAMS = {1: 16, 8: 32, 32: 96}  # number of streams: requests in a run
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
            command = [vllm_python, "-m", module, "--model", model, *common]
        self._log = open(f"/tmp/serving-{name}.log", "w")  # noqa: SIM115  # closed by stop
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, cwd=HERE.parent, env=environment, stdout=self._log, stderr=self._log
        )
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
        before = cpu_seconds(self._process.pid)
        command = [
            sys.executable, str(HERE / "load_generator.py"), "--url", self.url, "--model",
            self.model, "--streams", str(streams), "--requests", str(requests), "--seed",
            str(seed), "--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.name}, {streams} streams: {done.stderr}")
        figures: dict[str, Any] = json.loads(done.stdout)
        after = cpu_seconds(self._process.pid)
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
    for name in names if args.seed % 2 else names[::-1]:
        server = Server(name, args.model, args.vllm_python, (args.options or "").split())
        try:
            server.load(8, 8, 10**6)  # warms up
            for streams, requests in STREAMS.items():
                time.sleep(1)
                figures = server.load(streams, requests, 100 * args.seed + streams)
                figures |= {"server": name, "model": args.model, "round": args.seed}
                append(args.file, figures | {"ready_seconds": server.ready_seconds})
        finally:
            server.stop()
        time.sleep(2)


def offline(args: argparse.Namespace) -> None:
    from benchmarks.offline import make_prompts
    from manta import LLM, SamplingParams

    streams = max(STREAMS)
    llm = LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=streams,
        prefault_kv_cache=True,  # as servers do
        use_tqdm_on_load=False,
    )
    time.sleep(10)  # until it is taken
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    for turn in range(args.rounds + 1):
        prompts = make_prompts(turn, STREAMS[streams], INPUT_LEN)
        started, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        if turn:  # the first warms up
            tokens = len(prompts) * OUTPUT_LEN
            figures = {"output_tok_s": tokens / seconds, "cpu_us_per_token": 1e6 * cpu / tokens}
            append(args.file, {"server": "offline", "streams": streams, "round": turn} | figures)


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
    for streams in STREAMS:
        for column in COLUMNS:
            mine, theirs = (
                {x["round"]: x[column] for x in lines
                 if x["server"] == name and x["streams"] == streams}
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
    alone = [x["output_tok_s"] for x in lines if x["server"] == "offline"]
    served = [x["output_tok_s"] for x in lines if x["server"] == "manta" and x["streams"] == 32]
    if alone and served:
        kept = statistics.median(served) / statistics.median(alone)
        print(f"offline {statistics.median(alone):.1f} tok/s at 32; served is {kept:.2f} of it")
    for name in ("manta", "vllm"):
        spent: dict[str, list[float]] = defaultdict(list)
        for line in lines:
            if line["server"] == name and line["streams"] == 32:
                for title_, cost in line["cpu_us_per_token"].items():
                    spent[title_].append(cost)
        print(f"{name}: CPU µs per token at 32 streams:")
        for title_, costs in sorted(spent.items(), key=lambda item: -statistics.median(item[1])):
            if statistics.median(costs) >= 1:
                print(f"  {title_:<50} {statistics.median(costs):10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    for name, run in (("round", one_round), ("offline", offline), ("table", table)):
        command = commands.add_parser(name)
        if name != "table":
            command.add_argument("model")
        command.add_argument("file")
        if name == "round":
            command.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
            command.add_argument("--seed", type=int, default=1)
            command.add_argument("--only", choices=["manta", "vllm"])
            command.add_argument("--options", help="further ones of manta serve, in one word")
        if name == "offline":
            command.add_argument("--rounds", type=int, default=3)
        command.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
