"""What a card has to show, in rounds: each command's output becomes a file, and none stops another.

    python -m benchmarks.gpu_round FOLDER tests kernels [--minutes 9]
    python -m benchmarks.gpu_round FOLDER dense mixtures hybrids quantized --vllm-python PYTHON
    python -m benchmarks.gpu_round FOLDER two-cards --vllm-python PYTHON

FOLDER gets the shapes and NAME.txt for each command. When the minutes are over, what is left of the
rounds is named and not begun, so that machines lent by the hour may be used to the end.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

DENSE = {
    "llama-8b": [],
    "qwen3-0.6b": ["--work", "decode-1", "decode-64", "decode-256", "mixed"],
    "opt-125m": ["--work", "seed", "decode-1", "decode-64"],
}
SOME = ["--work", "decode-1", "decode-8", "decode-64", "prefill", "--repeat", "2"]
COMPARED = {  # shapes beside vLLM, and what is asked of them
    "dense": DENSE,
    "mixtures": dict.fromkeys(("qwen3-30b-a3b", "gpt-oss-20b", "gemma-4-26b-a4b"), SOME),
    "hybrids": dict.fromkeys(("qwen3.5-35b-a3b", "qwen3.5-27b"), SOME),
    "quantized": {"llama-8b": [*SOME, "--quantization", "fp8"]},
    "two-cards": dict.fromkeys(("llama-8b", "llama-70b"), [*SOME, "--tensor-parallel-size", "2"]),
}
KERNELS = ("gpu_experts", "gpu_recurrent", "gpu_coded")
# What was rewritten last comes first.
TESTS = (
    "kv_copies",
    "loading",
    "experts",
    "recurrent",
    "quantized",
    "fp8_cache",
    "cuda",
    "parallel",
    "serving",
)


def commands(round_: str, folder: Path, vllm: str | None) -> dict[str, list[str]]:
    """The commands of a round, by the names of their files."""
    python = sys.executable
    if round_ == "tests":
        pytest = [python, "-m", "pytest", "-x", "-q", "--durations=5"]
        paths = {name: f"tests/gpu/test_{name}.py" for name in TESTS}
        found = {f"test-{name}": [*pytest, path] for name, path in paths.items()}
        units = sorted(str(path) for path in Path("tests/unit").glob("test_gpu_*.py"))
        return {**found, "test-kernels": [*pytest, *units]}
    if round_ == "kernels":
        return {name: [python, "-m", f"benchmarks.{name}"] for name in KERNELS}
    found = {}
    for shape, options in COMPARED[round_].items():
        end = [str(folder / shape), *options]
        found[f"{round_}-{shape}-manta"] = [python, "-m", "benchmarks.gpu", "manta", *end]
        if vllm is not None:
            found[f"{round_}-{shape}-vllm"] = [vllm, "benchmarks/gpu.py", "vllm", *end]
    return found


def run(command: list[str], file: Path, seconds: float) -> str:
    """How it ended, its output in ``file``. Nothing that it started is left."""
    with file.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "its time was over"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return "done" if status == 0 else f"failed with {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rounds", nargs="+", choices=["tests", "kernels", *COMPARED])
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", "shapes", args.folder], check=True)
    for round_ in args.rounds:
        for name, command in commands(round_, args.folder, args.vllm_python).items():
            began = time.monotonic()
            how = "not begun"
            if began < end:
                how = run(command, args.folder / f"{name}.txt", end - began)
            print(f"{name}: {how}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
