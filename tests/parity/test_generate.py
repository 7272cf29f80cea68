"""Greedy generation through the whole engine equals transformers', in any mix of steps."""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from engine.continuation import begin
from engine.sampling_params import SamplingParams
from manta import LLM
from tests.parity.tiny_models import TINY_MODELS
from tests.support.tiny_llm import assert_idle
from tests.support.tiny_tokenizer import save_tokenizer

GENERATING = [tiny for tiny in TINY_MODELS if tiny.generates != "no"]
NEW_TOKENS = 64
NUM_PROMPTS = 33
GREEDY = SamplingParams(
    temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=3
)


@dataclass
class Reference:
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: torch.Tensor  # [prompts, new tokens, vocabulary]


def make_prompts(vocab_size: int, longest: int) -> list[list[int]]:
    """Ragged, some with common beginnings, from 1 token up."""
    rng = random.Random(0)

    def draw(length: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    stems = [draw(40), draw(longest // 2)]
    prompts = [draw(1), draw(2), draw(16), draw(17), draw(longest)]
    while len(prompts) < NUM_PROMPTS:
        stem = rng.choice(stems) if rng.random() < 0.5 else []
        prompts.append((stem + draw(rng.randint(1, longest)))[:longest])
    return prompts


def refer(model, prompts: list[list[int]]) -> Reference:
    """What transformers' generate gives, on one padded batch; but prompt by prompt for dynamic
    RoPE, where transformers lets a row's frequencies depend on the longest of its batch."""
    if getattr(model.config, "rope_parameters", {}).get("rope_type") != "dynamic":
        return generate(model, prompts)
    alone = [generate(model, [prompt]) for prompt in prompts]
    logprobs = torch.cat([reference.logprobs for reference in alone])
    return Reference(prompts, [reference.tokens[0] for reference in alone], logprobs)


@torch.inference_mode()
def generate(model, prompts: list[list[int]]) -> Reference:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logprobs = torch.stack(out.logits, 1).float().log_softmax(-1)
    return Reference(prompts, out.sequences[:, longest:].tolist(), logprobs)


def check(reference: Reference, which: list[int], outputs) -> None:
    for number, output in zip(which, outputs, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == reference.tokens[number], f"prompt {number}"
        expected = reference.logprobs[number]
        for step, entry in enumerate(completion.logprobs):
            for token, logprob in entry.items():
                assert abs(logprob.logprob - expected[step, token].item()) < 1e-3
            chosen = entry[completion.token_ids[step]]
            assert chosen.rank == 1


BASE = {
    "dtype": "float32",
    "max_num_seqs": 40,
    "kv_cache_memory_bytes": 64 << 20,
    "swap_space": 0.01,
    "use_tqdm_on_load": False,
}


def start(path, tokenizer, **options) -> LLM:
    return LLM(str(path), tokenizer=str(tokenizer), **(BASE | options))


def ask(llm: LLM, reference: Reference, which: list[int]):
    return llm.generate([reference.prompts[i] for i in which], GREEDY, use_tqdm=False)


def run_staggered(llm: LLM, reference: Reference, rng: random.Random) -> None:
    """Requests arrive at any step, and some are cancelled."""
    engine, waiting = llm.engine, list(range(NUM_PROMPTS))
    rng.shuffle(waiting)
    tokens: dict[str, list[int]] = {}
    cancelled = set()
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            number = waiting.pop()
            tokens[str(number)] = []
            engine.add(
                begin(
                    request_id=str(number),
                    prompt_token_ids=reference.prompts[number],
                    sampling=GREEDY,
                )
            )
            if rng.random() < 0.1:
                cancelled.add(str(number))
        for name, outcome in engine.step():
            tokens[name] += outcome.tokens
            if name in cancelled and rng.random() < 0.1:
                engine.abort(name)
    for request_id, got in tokens.items():
        expected = reference.tokens[int(request_id)]
        assert got == (expected[: len(got)] if request_id in cancelled else expected)


def check_model(path, model, tokenizer, preemption: str, longest: int = 100, **base) -> None:
    """All the ways to run a model give transformers' tokens. ``base`` are options of every run."""
    reference = refer(model, make_prompts(model.config.vocab_size, longest))
    check_batches(path, tokenizer, reference, **base)
    check_pressed(path, tokenizer, reference, preemption, longest, **base)


def check_batches(path, tokenizer, reference: Reference, **base) -> None:
    """Batches of any size, from the prefix cache, and in chunks."""
    rng = random.Random(1)
    everything = list(range(NUM_PROMPTS))
    llm = start(path, tokenizer, **base)
    for size in (1, 2, 7, NUM_PROMPTS):
        which = rng.sample(everything, size)
        check(reference, which, ask(llm, reference, which))
    again = ask(llm, reference, everything)  # from the prefix cache
    check(reference, everything, again)
    assert sum(o.num_cached_tokens for o in again) > 500
    assert_idle(llm)

    # Prompts in chunks of a few tokens among the decodes, blocks of another size, no cache.
    options = {"max_num_seqs": 11, "max_num_batched_tokens": 13, "block_size": 32}
    llm = start(path, tokenizer, **base, **options, enable_prefix_caching=False)
    check(reference, everything, ask(llm, reference, everything))


def check_pressed(
    path, tokenizer, reference: Reference, preemption: str, longest: int = 100, **base
) -> None:
    """Too few blocks, and requests that come and go at any step."""
    few = {"num_gpu_blocks_override": 40, "kv_cache_memory_bytes": None}
    llm = start(path, tokenizer, **(base | few), max_num_batched_tokens=64,
                preemption_mode=preemption, max_model_len=longest + NEW_TOKENS + 1,
                attention_backend="gather" if preemption == "swap" else "auto")  # fmt: skip
    run_staggered(llm, reference, random.Random(1))
    stats = llm.engine.scheduler.stats
    assert stats.preemptions_swap + stats.preemptions_recompute > 0
    assert_idle(llm)


@pytest.mark.parametrize("number", range(len(GENERATING)), ids=[t.name for t in GENERATING])
def test_every_family_generates_what_transformers_does(number: int, tmp_path) -> None:
    tiny = GENERATING[number]
    if tiny.name == "llama-dynamic":  # prompts within the original length, outputs beyond
        tiny = replace(tiny, config=tiny.config | {"max_position_embeddings": 104})
    model = tiny.build()
    path = tiny.save(tmp_path)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", model.config.vocab_size)
    preemption = ("swap", "recompute")[number % 2]
    if tiny.generates == "every way":
        check_model(path, model, tokenizer, preemption)
    else:
        reference = refer(model, make_prompts(model.config.vocab_size, 100))
        check_pressed(path, tokenizer, reference, preemption)
