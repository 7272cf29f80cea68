"""Models split over real processes generate what one process does: tensor parallel, pipeline
parallel, both, fewer key-value heads than ranks; every family, and what matters for splitting."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from cluster.replica import open_checkpoint, start_replica
from engine.config import EngineConfig
from engine.continuation import begin
from engine.engine import Engine
from engine.plan import TokenLogprobs
from engine.pooling import NO_SAMPLING
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.support.pool import Pool
from tests.support.tiny_tokenizer import save_tokenizer

NUM_PROMPTS = 10
LONGEST = 70
NEW_TOKENS = 28
OPTIONS = {
    "dtype": "float32",
    "max_num_seqs": 9,
    "max_num_batched_tokens": 32,  # so prompts are cut into chunks
    "max_model_len": LONGEST + NEW_TOKENS + 1,
    "num_gpu_blocks_override": 14,  # so running requests are preempted
    "preemption_mode": "swap",
    "pooling": "mean",
    "swap_space": 0.01,
    "use_tqdm_on_load": False,
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt"]
VARIATIONS = [
    "llama-mqa", "llama-tied", "llama-biases", "llama-odd", "qwen2-sliding", "qwen3-tied-biases",
    "opt-post-norm", "opt-untied-gelu", "opt-odd",
]  # fmt: skip
CASES = [
    *[(name, *shape) for name in FAMILIES for shape in ((2, 1), (1, 2), (2, 2), (4, 1))],
    *[(name, 2, 2) for name in VARIATIONS],
    ("llama-mqa", 4, 1),  # one key-value head, held four times; others hold each of two twice
    ("opt", 1, 3),
    ("olmo3", 2, 1),
    ("qwen3-moe", 2, 2),
    ("qwen3-5", 2, 1),
    ("qwen3-5", 1, 3),  # one stage has blocks, the others states
    ("nemotron-h", 1, 3),  # and here one has neither
]
EXPERT_PARALLEL = ["qwen3-moe"]
POOLS = [("llama", 2, 1), ("qwen3", 2, 2), ("opt", 1, 3)]  # where vectors are asked for, too
CANCELS = [("llama", 1, 2), ("qwen3", 2, 2), ("opt", 1, 3)]  # where requests come and go


@dataclass
class Collected:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: dict[int, TokenLogprobs] = field(default_factory=dict)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("words"), 128))


def make_prompts() -> list[list[int]]:
    """Ragged, some with a common beginning."""
    rng = random.Random(0)
    stem = [rng.randrange(3, 128) for _ in range(40)]
    lengths = [1, 2, 16, 17, LONGEST, *(rng.randint(1, LONGEST) for _ in range(NUM_PROMPTS - 5))]
    return [
        ((stem if i % 3 == 0 else []) + [rng.randrange(3, 128) for _ in range(n)])[:n]
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def one_process(checkpoint, tokenizer: Tokenizer) -> Callable[[str], Engine]:
    @cache
    def engine(name: str) -> Engine:
        config = EngineConfig.from_options(model=str(checkpoint(name)), **OPTIONS)
        return start_replica(config, open_checkpoint(config), tokenizer)

    return engine


@pytest.fixture(scope="module")
def alone(one_process) -> Callable[[str], list[Collected]]:
    """``alone(name)`` is what one process gives."""
    return cache(lambda name: run(one_process(name), make_prompts(), "one"))


@pytest.fixture(scope="module")
def long(one_process) -> Callable[[str], list[Collected]]:
    """The same of ``long_prompts``, without penalties."""
    return cache(lambda name: run(one_process(name), long_prompts(), "long", penalty=1.0))


def run(
    engine: Engine, prompts: list[list[int]], name: str, penalty: float = 1.3
) -> list[Collected]:
    """Greedy completions; every third has a prompt's logprobs, every fourth a penalty."""
    collected: dict[str, Collected] = {}
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=1 if number % 3 == 1 else None,
            repetition_penalty=penalty if number % 4 == 1 else 1.0,
        )
        request_id = f"{name}-{number}"
        engine.add(begin(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
        collected[request_id] = Collected()
    while engine.has_work:
        for name, outcome in engine.step():
            record = collected[name]
            record.tokens += outcome.tokens
            record.logprobs += outcome.logprobs or ()
            for first, entries in outcome.prompt_logprobs or ():
                record.prompt.update(enumerate(entries, first))
    return list(collected.values())


def long_prompts() -> list[list[int]]:
    """Long and with nothing in common, so that each takes several steps to compute."""
    rng = random.Random(3)
    return [[rng.randrange(3, 128) for _ in range(rng.randint(40, LONGEST))] for _ in range(60)]


def run_with_cancels(engine: Engine, expected: list[Collected]) -> None:
    """Requests come and go at any step, so slots change hands while their rows are in flight."""
    rng = random.Random(2)
    prompts, tokens = deque(enumerate(long_prompts())), {}
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    running: list[str] = []
    while prompts or engine.has_work:
        while prompts and engine.num_unfinished < 12:
            number, prompt = prompts.popleft()
            running.append(str(number))
            tokens[str(number)] = []
            engine.add(begin(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
        for name, outcome in engine.step():
            tokens[name] += outcome.tokens
        started = [name for name in running if 0 < len(tokens[name]) < NEW_TOKENS]
        if prompts and started and rng.random() < 0.3:
            cancelled = rng.choice(started)
            running.remove(cancelled)
            engine.abort(cancelled)
    for name, got in tokens.items():
        assert got == expected[int(name)].tokens[: len(got)]
        assert len(got) == NEW_TOKENS or name not in running


def vectors_of(engine: Engine) -> dict[str, Any]:
    """The vectors of the prompts, made while others generate."""
    vectors: dict[str, Any] = {}
    for number, prompt in enumerate(make_prompts()):
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        engine.add(begin(f"tokens-{number}", prompt, sampling))
        engine.add(begin(f"vector-{number}", prompt, NO_SAMPLING, pools=True))
    while engine.has_work:
        for name, outcome in engine.step():
            if outcome.vector is not None:
                vectors[name] = outcome.vector
    assert len(vectors) == NUM_PROMPTS
    return vectors


def assert_same(many: list[Collected], one: list[Collected]) -> None:
    for ours, expected in zip(many, one, strict=True):
        assert ours.tokens == expected.tokens
        assert ours.prompt.keys() == expected.prompt.keys()
        pairs = [*zip(ours.logprobs, expected.logprobs, strict=True)]
        pairs += [(ours.prompt[at], expected.prompt[at]) for at in expected.prompt]
        for mine, theirs in pairs:
            assert abs(mine.logprobs - theirs.logprobs).max() < 1e-3
            assert mine.ids[0] == theirs.ids[0]


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"), CASES, ids=[f"{n}-tp{t}-pp{p}" for n, t, p in CASES]
)
def test_ranks_generate_what_one_process_does(
    name: str,
    tensor: int,
    pipeline: int,
    checkpoint,
    pool: Pool,
    tokenizer: Tokenizer,
    alone,
    long,
    one_process,
) -> None:
    expected, prompts = alone(name), make_prompts()
    config = EngineConfig.from_options(
        model=str(checkpoint(name)),
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        enable_expert_parallel=name in EXPERT_PARALLEL,
        **OPTIONS,
    )
    pool.size = tensor * pipeline
    engine = start_replica(config, open_checkpoint(config), tokenizer, pool)
    try:
        assert engine.capacity.num_device_blocks == OPTIONS["num_gpu_blocks_override"]
        assert_same(run(engine, prompts, "first"), expected)
        hits = engine.scheduler.kv.stats.prefix_hits
        assert_same(run(engine, prompts, "again"), expected)
        assert engine.scheduler.kv.stats.prefix_hits > hits
        assert engine.scheduler.stats.preemptions_swap > 0
        if (name, tensor, pipeline) in CANCELS:
            run_with_cancels(engine, long(name))
        if (name, tensor, pipeline) in POOLS:
            expected_vectors = vectors_of(one_process(name))
            for number, vector in vectors_of(engine).items():
                assert abs(vector - expected_vectors[number]).max() < 1e-4
    finally:
        engine.stop()
