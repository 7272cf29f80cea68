"""All tests: those that start servers and clusters, and beside them, at a low priority, the others.

    python tools/run_tests.py [PYTEST OPTION ...]

Servers that start and end leave cores idle for half of the time, which the others use; as these end
earlier, some of the servers come after them. Their output comes when they have ended. With a GPU,
which they would have to share, all run one after the other.
"""

import os
import subprocess
import sys
import tempfile

import torch

SERVERS = ["tests/servers", "tests/gpu"]
LATE = [f"tests/servers/test_{name}.py" for name in ("several_models", "autoscaling")]
OTHERS = ["tests/house", "tests/unit", "tests/parity", "tests/e2e"]
# One thread each: a parallel region ends when its last thread has had a core, which may be a while.
BESIDE = ["env", "OMP_NUM_THREADS=1", "nice", "-n", "10"]


def main(options: list[str]) -> int:
    """The exit status: 0 if all tests passed."""
    command = [sys.executable, "-m", "pytest", *options]
    if torch.cuda.is_available() or (os.cpu_count() or 1) < 2:
        return subprocess.call(command)
    with tempfile.TemporaryFile() as output:
        beside = [*OTHERS, *LATE]
        print(f"{' '.join(beside)} run beside these: see below", flush=True)
        others = subprocess.Popen([*BESIDE, *command, *beside], stdout=output, stderr=output)
        try:
            status = subprocess.call([*command, *SERVERS, *(f"--ignore={path}" for path in LATE)])
            status = others.wait() or status
        finally:
            others.kill()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
