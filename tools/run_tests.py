"""All tests, in three lanes side by side: servers and clusters in two of them, the others in one.

    python tools/run_tests.py [PYTEST OPTION ...]

Servers that start, end and wait leave half of a core idle, which the others use. The first lane's
output comes as it runs, that of the others when all have ended. With a GPU, which they would have
to share, all tests run one after the other.
"""

import contextlib
import os
import subprocess
import sys
import tempfile

import torch

SERVERS = ["tests/servers", "tests/gpu"]
SECOND = [
    f"tests/servers/test_{name}.py" for name in ("prometheus", "several_models", "soak", "starts")
]
OTHERS = ["tests/house", "tests/unit", "tests/parity", "tests/e2e"]
# One thread each: a parallel region ends when its last thread has had a core, which may be a while.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def main(options: list[str]) -> int:
    """The exit status: 0 if all tests passed."""
    command = [sys.executable, "-m", "pytest", *options]
    if torch.cuda.is_available() or (os.cpu_count() or 1) < 2:
        return subprocess.call(command)
    first = [*SERVERS, *(f"--ignore={path}" for path in SECOND)]
    with contextlib.ExitStack() as stack:
        beside = []
        for lane in (SECOND, OTHERS):
            print(f"{' '.join(lane)} run beside these: see below", flush=True)
            output = stack.enter_context(tempfile.TemporaryFile())
            environment = os.environ | (ONE_THREAD if lane is OTHERS else {})
            process = subprocess.Popen(
                [*command, *lane], stdout=output, stderr=output, env=environment
            )
            stack.callback(process.kill)
            beside.append((process, output))
        status = subprocess.call([*command, *first])
        for process, output in beside:
            status = process.wait() or status
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
