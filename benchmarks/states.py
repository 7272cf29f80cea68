"""How the memory of a hybrid is best split between blocks and states: hits, without a model.

    python benchmarks/states.py [--share 0.25 0.5 0.75]

64 conversations of 20 turns with a system prompt in common take turns, 32 at a time, in the memory
that a Qwen 3.5 27B in bf16 leaves on a card of 141 GB: 75 GiB of blocks of 1 MiB and states of
144 MiB. Given are the tokens found in the cache, of those that an endless one would have, and the
tokens that had to be computed.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.planning import NoModel  # noqa: E402
from engine.config import EngineConfig  # noqa: E402
from engine.continuation import begin  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.executor import Capacity, ModelFacts  # noqa: E402
from engine.preempt import MeasuredCosts  # noqa: E402
from engine.sampling_params import SamplingParams  # noqa: E402

MEMORY, STATE, BLOCK_SIZE = 75 << 10, 144, 16  # MiB; a block has 1
CONVERSATIONS, TURNS, AT_ONCE = 64, 20, 32
SYSTEM, USER, ANSWER = 2000, 150, 250  # tokens
LONGEST = SYSTEM + TURNS * (USER + ANSWER)


def start(share: float) -> Engine:
    states = int(MEMORY * share) // STATE
    blocks = MEMORY - states * STATE
    config = EngineConfig.from_options(max_num_seqs=AT_ONCE, max_num_batched_tokens=8192)
    facts = ModelFacts("None", 30_000, LONGEST + 1, 0, 0, 0.0, "none", "none")
    costs = MeasuredCosts(1e-4, 1e-4, 5e-5)
    capacity = Capacity(
        blocks, 0, BLOCK_SIZE, 1, "none", costs, num_states=states, state_bytes=STATE
    )
    executor: Any = NoModel()
    return Engine(config, executor, facts, capacity, LONGEST + 1)


def run(share: float) -> tuple[float, int]:
    """(share of what could be found, tokens computed)."""
    engine, rng = start(share), random.Random(0)
    sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True, seed=0)
    system = [rng.randrange(30_000) for _ in range(SYSTEM)]
    histories = [list(system) for _ in range(CONVERSATIONS)]
    possible = 0
    for turn in range(TURNS):
        for number, history in enumerate(histories):
            first = turn == number == 0
            possible += 0 if first else (len(history) - (turn > 0)) // BLOCK_SIZE * BLOCK_SIZE
            history += [rng.randrange(30_000) for _ in range(USER)]
            engine.add(begin(str(number), history, sampling))
        while engine.has_work:
            for name, outcome in engine.step():
                histories[int(name)] += outcome.tokens
    scheduler = engine.scheduler
    return scheduler.kv.stats.prefix_hits / possible, scheduler.stats.planned_tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75])
    for share in parser.parse_args().share:
        found, computed = run(share)
        print(f"states {share:.0%} of the memory: found {found:.1%}, computed {computed:,}")


if __name__ == "__main__":
    main()
