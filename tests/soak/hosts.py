"""Workers on two hosts with addresses of their own (tests/support/hosts.py).

python -m tests.soak.hosts (as root). The driver, on the first host, runs a replica with a stage on
each, compares its tokens with one process's, then does it again with a stage's ranks on both hosts,
and at last kills the second host's node under a running replica.
"""

import workers  # noqa: F401, I001  # before torch

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray

from engine.errors import EngineError
from manta import LLM, SamplingParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.faults import BASE, add_requests, leftovers, worker_pids
from tests.support.hosts import HOSTS, run_on_head
from tests.support.tiny_tokenizer import save_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
PROMPTS = [[3 + i, 4, 5 + i] * (i + 1) for i in range(10)]


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


if __name__ == "__main__":
    if len(sys.argv) > 1:
        drive(Path(sys.argv[1]))
    else:
        sys.exit(run_on_head("tests.soak.hosts"))
