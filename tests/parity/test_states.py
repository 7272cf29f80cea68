"""Prefix caching of a model with recurrent layers, through the whole engine: what is found, and
that no token depends on it."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.stats_scheduler import scheduler_metrics
from manta import LLM, SamplingParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

BLOCK = 16
TURNS, USER_TOKENS, NEW_TOKENS = 20, 9, 11  # of the conversation
LONG = 40  # tokens that follow each of the other requests


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 128) for _ in range(count)]


SYSTEM = draw(random.Random(0), 50)  # of which three blocks are full
REQUESTS = [SYSTEM + draw(random.Random(i), 1 + 17 * i % 40) for i in range(1, 65)]
TOLD = [draw(random.Random(i), USER_TOKENS) for i in range(100, 100 + TURNS)]
LONGEST = len(SYSTEM) + TURNS * (USER_TOKENS + NEW_TOKENS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("hybrid")
    tiny = next(model for model in TINY_MODELS if model.name == "qwen3-5")
    path = replace(tiny, config={"max_position_embeddings": LONGEST}).save(folder)
    return path, save_tokenizer(folder / "tokenizer", 128)


def ask(llm: LLM, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[int]]:
    """The ``count`` tokens that follow each prompt, and how many of it were found."""
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs]


def converse(llm: LLM) -> Iterator[tuple[int, int, list[int]]]:
    """Of each turn: the tokens before the user's, those found, and the answer."""
    history = SYSTEM
    for told in TOLD:
        (answer,), (found,) = ask(llm, [history + told], NEW_TOKENS)
        yield len(history), found, answer
        history = history + told + answer


@pytest.fixture(scope="module")
def expected(model: tuple[Path, Path]) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens without the cache, of the requests and of the turns."""
    llm = start_llm(*model, enable_prefix_caching=False)
    tokens, found = ask(llm, REQUESTS, LONG)
    turns = [answer for _, none, answer in converse(llm) if not none]
    assert not any(found) and len(turns) == TURNS
    return tokens, turns


def test_a_shared_prompt_is_computed_twice_and_a_conversation_goes_on(model, expected) -> None:
    llm = start_llm(*model, num_mamba_states=40)
    tokens, found = ask(llm, REQUESTS, LONG)
    assert tokens == expected[0]
    shared = len(SYSTEM) // BLOCK * BLOCK
    # The first had nobody before it; the second is where it shows where they branch off.
    assert found[:2] == [0, 0] and min(found[2:]) == shared
    for turn, (before, found_tokens, answer) in enumerate(converse(llm)):
        assert answer == expected[1][turn]
        # All full blocks before what the user says; of an answer the last token is not computed.
        assert found_tokens == (before - (turn > 0)) // BLOCK * BLOCK
    assert_idle(llm)


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_no_token_depends_on_the_cache_or_on_preemption(mode: str, model, expected) -> None:
    """Blocks and slots for states are few: requests give way, and snapshots are evicted."""
    llm = start_llm(
        *model, num_gpu_blocks_override=34, num_mamba_states=14, preemption_mode=mode,
        mamba_block_size=2 * BLOCK,
    )  # fmt: skip
    assert ask(llm, REQUESTS, LONG)[0] == expected[0]
    stats = llm.engine.scheduler.stats
    assert stats.preemptions_swap + stats.preemptions_recompute > 5
    assert mode == "auto" or bool(stats.preemptions_swap) == (mode == "swap")
    turns = list(converse(llm))
    assert [answer for _, _, answer in turns] == expected[1]
    assert sum(found for _, found, _ in turns) > sum(before for before, _, _ in turns) // 2
    states = llm.engine.scheduler.kv.states
    assert states is not None and states.kept > 50 and states.stats.demoted_blocks > 5
    assert_idle(llm)
    metrics = scheduler_metrics(llm.engine.scheduler, llm.engine.capacity)
    told = {metric.name: metric.samples[0].value for metric in metrics}
    assert (told["states"], told["states_used"], told["kept_states"]) == (14, 0, states.kept)
