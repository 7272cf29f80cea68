"""``manta serve`` on GPUs: engines die, and lose a rank, under load. Skipped without a GPU."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import httpx
import pytest
import torch

from tests.support.served import Served, gone, pids, serve
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

# Two engines, or the two ranks of one, have a GPU each where there are two, and else share one.
SHARE = () if torch.cuda.device_count() > 1 else ("--worker-gpus", "0.45")
OPTIONS = ("--device", "cuda", "--dtype", "bfloat16", "--num-gpu-blocks-override", "2000", *SHARE)


def used() -> int:
    """MiB that are in use on all GPUs together."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.check_output(query, text=True).split()))


def answers(served: Served, meanwhile: Callable[[], None] | None = None) -> list[str]:
    """The texts of 16 sampled streams; ``meanwhile`` happens when each has begun."""
    texts = [""] * 16

    def read(i: int) -> None:
        body = {
            "model": "manta-demo", "prompt": f"Story {i}:", "max_tokens": 800, "seed": i,
            "temperature": 1, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        url = f"{served.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    texts[i] += json.loads(line[6:])["choices"][0]["text"]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    if meanwhile is not None:
        until(lambda: all(texts))
        meanwhile()
    for thread in threads:
        thread.join(PATIENCE)
    return texts


def engines(served: Served) -> list[dict]:
    return httpx.get(f"{served.url}/load", timeout=PATIENCE).json()["engines"]


def healthy(served: Served) -> int:
    return sum(engine["healthy"] and not engine["draining"] for engine in engines(served))


def test_two_engines_of_which_one_dies_and_one_is_drained() -> None:
    session = f"gpu-{os.getpid()}"
    before = used()
    with serve("--num-replicas", "2", *OPTIONS, MANTA_TEST=session) as served:
        until(lambda: healthy(served) == 2)
        expected = answers(served)
        assert len(set(expected)) == len(expected)
        full = used()
        assert full > before
        victims = pids(session, ":Engine")
        assert len(victims) == 2
        assert answers(served, lambda: os.kill(victims[0], signal.SIGKILL)) == expected
        until(lambda: healthy(served) == 2)
        assert used() < full + 512, "the memory of the engine that was killed is in use still"

        def drain() -> None:
            leaving = engines(served)[0]["engine_id"]
            words = ["drain", leaving, "--timeout", "120", "--port", str(served.port)]
            subprocess.run([sys.executable, "-m", "deploy.cli", *words], check=True)

        assert answers(served, drain) == expected
        until(lambda: healthy(served) == 2)
        assert answers(served) == expected
    gone(session)
    until(lambda: used() < before + 64)


def test_an_engine_loses_one_of_two_tensor_parallel_ranks() -> None:
    session = f"gpu-ranks-{os.getpid()}"
    before = used()
    with serve("--tensor-parallel-size", "2", *OPTIONS, MANTA_TEST=session) as served:
        expected = answers(served)
        full = used()
        ranks = pids(session, "ray::RankActor")
        assert len(ranks) == 2
        assert answers(served, lambda: os.kill(ranks[1], signal.SIGKILL)) == expected
        assert not set(pids(session, "ray::RankActor")) & set(ranks)
        assert used() < full + 512, "the memory of the ranks that died is in use still"
    gone(session)
    until(lambda: used() < before + 64)
