"""Structured outputs on a real model with random weights: whatever it would rather say, every
finished answer is of the form that was asked for, and nobody else notices."""

import json
import random
import re

import jsonschema
import pytest

from deploy.cli import main
from engine.errors import RequestError
from manta import LLM, SamplingParams, StructuredOutputsParams
from tests.support.schemas import SchemaGenerator
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_byte_tokenizer, save_tokenizer
from workers import grammar_table
from workers.local import LocalExecutor

BLOCK_SIZE = 8
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"},
                   "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["name", "age", "tags"], "additionalProperties": False,
}  # fmt: skip
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<"]}
KINDS = {
    "json": {"json": SCHEMA},
    "json text": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True},
    "json_object": {"json_object": True},
    "regex": {"regex": r"(ab|c[0-9])+ \w{1,4}"},
    "choice": {"choice": ["yes", "no", "it depends"]},
    "grammar": {"grammar": 'start: item ("," item)*\nitem: /[0-9]{1,3}/ | "(" start ")"'},
    "structural_tag": {"structural_tag": TAG},
}
THINK, THOUGHT = "<think>", "</think>"
THINKS = "{{ messages[0].content }}" + THINK  # which makes it a model that thinks
THINKING = 8  # of the kinds in ``mixed``
# Random weights end nothing of themselves: closing what is open is made likelier.
CLOSING = ['"', "}", "]", ")", "<", "</s>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def start(checkpoint, tokenizer):
    def start(**options):
        options = {"block_size": BLOCK_SIZE, "chat_template": THINKS, **options}
        return start_llm(checkpoint("llama"), tokenizer, **options)

    return start


@pytest.fixture(scope="module")
def llm(start):
    return start(num_gpu_blocks_override=600)


def asked(llm, seed, max_tokens=120, **params):
    tokens = [llm.tokenizer.backend.token_to_id(token) for token in CLOSING]
    outputs = params and StructuredOutputsParams(**params)
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens,
                          logit_bias=dict.fromkeys(tokens, 3),
                          structured_outputs=outputs)  # fmt: skip


def check(kind, text):
    if kind in ("json", "json text"):
        jsonschema.validate(json.loads(text), SCHEMA)
        assert kind == "json" or not re.search(r"\s", re.sub('"[^"]*"', "", text))
    elif kind == "json_object":
        assert isinstance(json.loads(text), dict)
    elif kind == "regex":
        assert re.fullmatch(KINDS[kind]["regex"], text)
    elif kind == "choice":
        assert text in KINDS[kind]["choice"]
    elif kind == "grammar":
        assert text.count("(") == text.count(")") and re.fullmatch(r"[0-9,()]+", text)
    else:
        for tagged in text.split("<f>")[1:]:
            jsonschema.validate(json.loads(tagged.split("</f>")[0]), SCHEMA)
        assert "<" not in re.sub("<f>.*?</f>", "", text, flags=re.DOTALL)


def prompts(count):
    """Of random tokens; some begin the thinking."""
    rng = random.Random(0)
    made = [[rng.randrange(3, 120) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    for number in range(THINKING, count, 9):
        made[number] += [ord(letter) - 30 for letter in THINK]
    return made


def tokens(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_every_finished_answer_is_of_its_kind(llm, kind):
    params = [asked(llm, seed, **KINDS[kind]) for seed in range(12)]
    for one in params[:4]:
        one.n = 2
    outputs = llm.generate(prompts(12), params, use_tqdm=False)
    completions = [completion for output in outputs for completion in output.outputs]
    whole = [one.text for one in completions if one.finish_reason == "stop"]
    assert {one.finish_reason for one in completions} <= {"stop", "length"}
    assert len(whole) >= len(completions) // 2 and len(set(whole)) > 1
    for text in whole:
        check(kind, text)
    assert_idle(llm)


@pytest.fixture(scope="module")
def mixed(llm):
    """Prompts and parameters of every kind and none, thinking that is bounded among them, and what
    they bring one at a time."""
    params = []
    for number in range(24):
        kind = [*KINDS, None, None][number % 9]
        params.append(asked(llm, number, max_tokens=60, **KINDS.get(kind, {})))
        if number % 9 == THINKING:
            params[-1].thinking_token_budget, params[-1].min_tokens = number, 40
        params[-1].n = 1 + number % 3
        params[-1].logprobs = 2 if number % 4 == 0 else None
    alone = [
        llm.generate([prompt], one, use_tqdm=False)[0]
        for prompt, one in zip(prompts(24), params, strict=True)
    ]
    return params, tokens(alone)


def test_neighbours_change_nothing(llm, mixed):
    params, alone = mixed
    assert tokens(llm.generate(prompts(24), params, use_tqdm=False)) == alone
    closing = llm.tokenizer.encode(THOUGHT, False)
    for number in range(THINKING, 24, 9):
        assert all(one[number : number + len(closing)] == closing for one in alone[number])


def test_forced_tokens_are_those_that_would_be_sampled(start, mixed, monkeypatch):
    """With so few tokens for a step that they come in parts, and one by one."""
    params, alone = mixed
    steps = []
    for most in (grammar_table.MOST_FORCED, 0):
        monkeypatch.setattr(grammar_table, "MOST_FORCED", most)
        llm = start(num_gpu_blocks_override=600, max_num_seqs=50, max_num_batched_tokens=50)
        assert tokens(llm.generate(prompts(24), params, use_tqdm=False)) == alone
        fixed = asked(llm, 1, 150, regex="[ab]{20} is what a long beginning is for [01]" * 2)
        before = llm.engine.scheduler.stats.steps
        llm.generate(prompts(1), fixed, use_tqdm=False)
        steps.append(llm.engine.scheduler.stats.steps - before)
        assert_idle(llm)
    assert steps[0] < steps[1] - 50


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preemption_changes_nothing(start, mixed, mode):
    params, alone = mixed
    llm = start(num_gpu_blocks_override=20, preemption_mode=mode, max_num_seqs=40)
    assert tokens(llm.generate(prompts(24), params, use_tqdm=False)) == alone
    stats = llm.engine.scheduler.stats
    assert (stats.preemptions_swap if mode == "swap" else stats.preemptions_recompute) > 3
    assert_idle(llm)


def test_steps_ahead_of_their_results_change_nothing(start, mixed, monkeypatch):
    params, alone = mixed
    monkeypatch.setattr(LocalExecutor, "steps_ahead", 2)  # as on a GPU
    llm = start(num_gpu_blocks_override=600)
    assert tokens(llm.generate(prompts(24), params, use_tqdm=False)) == alone
    assert_idle(llm)


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
def test_a_split_model_gives_the_same(start, mixed, tensor, pipeline):
    params, alone = mixed
    llm = start(
        num_gpu_blocks_override=600, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline,
        distributed_executor_backend="mp", worker_cpus=1,
    )  # fmt: skip
    try:
        found = tokens(llm.generate(prompts(24), params, use_tqdm=False))
    finally:
        llm.engine.stop()
    assert found == alone


def test_thinking_is_what_it_would_be_up_to_its_bound(llm):
    """And then ends; where it ends before, or has not begun, nothing changes."""
    prompt = llm.tokenizer.encode("Why?" + THINK)
    free = SamplingParams(n=3, temperature=1, seed=3, max_tokens=40, ignore_eos=True)
    (whole,) = tokens(llm.generate(["Why?" + THINK], free, use_tqdm=False))
    closing = llm.tokenizer.encode(THOUGHT, False)
    for most in (0, 1, 17, 40):
        bounded = free.clone()
        bounded.thinking_token_budget = most
        (cut,) = tokens(llm.generate([{"prompt_token_ids": prompt}], bounded, use_tqdm=False))
        for one, other in zip(cut, whole, strict=True):
            assert one[: most + len(closing)] == (other[:most] + closing)[:40]
            assert len(one) == 40
    said = free.clone()
    said.thinking_token_budget = 0
    for prompt in ("Why?", f"Why?{THINK}Hm.{THOUGHT}"):
        found = [tokens(llm.generate([prompt], one, use_tqdm=False)) for one in (free, said)]
        assert found[0] == found[1]
    said.structured_outputs = StructuredOutputsParams(regex="a+")
    with pytest.raises(RequestError, match="thinking_token_budget must be None with structured"):
        llm.generate([prompt], said, use_tqdm=False)


def test_logprobs_are_those_of_what_is_allowed(llm):
    params = asked(llm, 0, choice=["a", "b"])
    params.logprobs = 3
    (output,) = llm.generate([[5, 6]], params, use_tqdm=False)
    first = {entry.decoded_token: entry for entry in output.outputs[0].logprobs[0].values()}
    assert {"a", "b"} <= first.keys()
    found = sum(2.718281828459045 ** first[one].logprob for one in "ab")
    assert found == pytest.approx(1, abs=1e-4)
    assert first.keys() - {"a", "b"} and all(
        entry.logprob == -float("inf") for name, entry in first.items() if name not in "ab"
    )


def test_random_schemas(llm):
    draws = SchemaGenerator(random.Random(7), refused=0)
    schemas, params = [], []
    while len(schemas) < 200:
        schema = draws.draw()
        try:
            one = asked(llm, len(schemas), json=schema)
            llm._trial.check(one.structured_outputs)
        except RequestError:
            continue
        schemas.append(schema)
        params.append(one)
    outputs = llm.generate([[3, 4]] * 200, params, use_tqdm=False)
    whole = 0
    for schema, output in zip(schemas, outputs, strict=True):
        completion = output.outputs[0]
        if completion.finish_reason == "stop":
            whole += 1
            kind = jsonschema.Draft202012Validator
            checker = kind(schema, format_checker=jsonschema.FormatChecker())
            checker.validate(json.loads(completion.text))
    assert whole > 150


# ---- what is refused ----


def test_what_cannot_be_enforced_is_refused_by_name_before_anything_runs(llm):
    good = asked(llm, 1, choice=["a"])
    bad = asked(llm, 1, json={"type": "array", "uniqueItems": True})
    with pytest.raises(RequestError, match="prompt 1: structured_outputs.json: .*uniqueItems"):
        llm.generate([[5], [6]], [good, bad], use_tqdm=False)
    assert_idle(llm)


def test_an_answer_must_have_a_token_to_end_with(llm):
    params = asked(llm, 1, choice=["ab"])
    params.ignore_eos = True
    with pytest.raises(RequestError, match="structured_outputs needs a token that ends the output"):
        llm.generate([[5]], params, use_tqdm=False)
    params.stop_token_ids = [llm.tokenizer.encode("c", False)[0]]
    (output,) = llm.generate([[5]], params, use_tqdm=False)
    assert output.outputs[0].text == "ab" and output.outputs[0].finish_reason == "stop"


def test_an_end_token_that_is_text_comes_at_the_end_only(llm):
    params = [asked(llm, seed, regex="[bc]{2,3}") for seed in range(12)]
    for one in params:
        one.stop_token_ids = [llm.tokenizer.backend.token_to_id("b")]
    for output in llm.generate([[5]] * 12, params, use_tqdm=False):
        assert re.fullmatch("c{2,3}", output.outputs[0].text)


def test_what_leaves_no_token_ends_with_an_error_alone(llm):
    params = asked(llm, 1, choice=["ab"])
    params.bad_words = ["a", "ab"]
    free = asked(llm, 1)
    first, second = llm.generate([[5], [6]], [params, free], use_tqdm=False)
    assert first.outputs[0].finish_reason == "error" and first.outputs[0].text == ""
    assert second.outputs[0].finish_reason in ("stop", "length")
    assert_idle(llm)


def test_a_grammar_that_turns_out_too_complex_ends_its_answer_alone(llm, monkeypatch, caplog):
    monkeypatch.setattr(llm._trial, "check", lambda params: None)
    for bad in ({"regex": "(a?){1000}a{1000}"}, {"grammar": "start: nothing"}):
        params = [asked(llm, 1, **bad), asked(llm, 2, choice=["a", "b"])]
        first, second = llm.generate([[5], [6]], params, use_tqdm=False)
        assert first.outputs[0].finish_reason == "error"
        assert second.outputs[0].text in ("a", "b")
    assert_idle(llm)


def test_a_tokenizer_of_words_has_none(checkpoint, tmp_path):
    llm = start_llm(checkpoint("llama"), save_tokenizer(tmp_path, 128))
    with pytest.raises(RequestError, match="tokens that are not bytes of text"):
        llm.generate([[5]], asked_of_words(), use_tqdm=False)


def asked_of_words():
    return SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))


# ---- what else there is ----


def test_the_embedded_model_answers_as_asked(monkeypatch):
    llm = LLM(use_tqdm_on_load=False)
    params = SamplingParams(
        temperature=0, max_tokens=200, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )
    (output,) = llm.generate(["About Ann, in JSON:"], params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    jsonschema.validate(json.loads(output.outputs[0].text), SCHEMA)
    params = SamplingParams(
        n=8, seed=1, max_tokens=200, structured_outputs=params.structured_outputs
    )
    forced = tokens(llm.generate(["Ann is"], params, use_tqdm=False))
    monkeypatch.setattr(grammar_table, "MOST_FORCED", 0)
    assert tokens(llm.generate(["Ann is"], params, use_tqdm=False)) == forced


def test_a_replay_has_the_same_tokens(start, mixed, tmp_path, capsys):
    params, alone = mixed
    llm = start(num_gpu_blocks_override=150, schedule_log=tmp_path / "log")
    assert tokens(llm.generate(prompts(24), params, use_tqdm=False)) == alone
    llm.engine.stop()
    assert main(["replay", str(tmp_path / "log")]) == 0
    assert "all as logged" in capsys.readouterr().out
