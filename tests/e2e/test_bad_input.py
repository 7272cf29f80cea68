"""Bad input gets a clear error, and the engine answers as before."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.continuation import begin
from engine.errors import CheckpointError, ConfigError, PromptTooLong, RequestError
from manta import LLM, SamplingParams
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

VOCAB = 128
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [[3, 4, 5], [9] * 30, [7]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words"), VOCAB)


@pytest.fixture(scope="module")
def shared(checkpoint, tokenizer):
    llm = start_llm(checkpoint("llama"), tokenizer)
    return llm, answers(llm)


@pytest.fixture
def llm(shared):
    """An LLM that after the test has nothing left to do and answers as before."""
    llm, expected = shared
    yield llm
    assert_idle(llm)
    assert answers(llm) == expected


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint to be spoilt."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


def answers(llm, prompts=PROMPTS):
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def edit_config(folder, **values):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# ---- checkpoints ----


def test_a_missing_folder(tmp_path, llm):
    missing = tmp_path / "no such model"
    with pytest.raises(CheckpointError, match=f"no folder {missing}"):
        LLM(missing)
    with pytest.raises(CheckpointError, match="has no config.json"):
        LLM(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        LLM(tmp_path / "file")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_safetensors(folder, tokenizer, llm, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        start_llm(folder, tokenizer)
    file.write_bytes(data)
    assert answers(start_llm(folder, tokenizer)) == answers(llm)


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], [], "LlamaForCausalLM", [7]])
def test_an_unknown_architecture(folder, tokenizer, llm, architectures):
    edit_config(folder, architectures=architectures)
    with pytest.raises(CheckpointError, match="architectures=.* none is supported; known: Llama"):
        start_llm(folder, tokenizer)


def test_broken_json(folder, tokenizer, llm):
    for name in ("config.json", "generation_config.json"):
        good = (folder / name).read_text()
        for text in (good[:-5], "[]", ""):
            (folder / name).write_text(text)
            with pytest.raises(CheckpointError, match=name):
                start_llm(folder, tokenizer)
        (folder / name).write_text(good)


def test_no_tokenizer(folder, llm):
    with pytest.raises(CheckpointError, match="cannot load a tokenizer from"):
        start_llm(folder)


# ---- prompts ----


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([1] * 256, "prompt has 256 tokens; with max_model_len 256 it may have at most 255"),
        (" ".join(["w3"] * 256), "prompt has 256 tokens; with max_model_len 256"),
        ([1, VOCAB], f"prompt has token id {VOCAB}; the model's go from 0 to {VOCAB - 1}"),
        ([1, -1], "prompt has token id -1"),
        ([2**40], f"prompt has token id {2**40}"),
        ("", "prompt must not be empty"),
        ("  ", "prompt must not be empty"),
        ({"prompt_token_ids": []}, "prompt must not be empty"),
    ],
)
def test_prompts_that_cannot_be_served(llm, prompt, message):
    for prompts, number in ((prompt, 0), ([[3], prompt], 1)):
        with pytest.raises(RequestError) as error:
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert str(error.value).startswith(f"prompt {number}: {message}")
    assert isinstance(error.value, PromptTooLong) == ("256 tokens" in message)


@pytest.mark.parametrize("prompt", [[], ()])
def test_an_empty_list_of_tokens(llm, prompt):
    with pytest.raises(RequestError, match="prompt 1: prompt must not be empty"):
        llm.generate([[3], prompt], GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    "prompt",
    [5.0, None, True, b"text", [1.0], [1, "a"], [True], ["a", ["b"]], {"text": "a"}, {},
     {"prompt": 5}, {"prompt": [1]}, {"prompt_token_ids": "a"}, {"prompt_token_ids": [1.5]},
     {"prompt_token_ids": b"a"}, {"prompt": "w1", "prompt_token_ids": [1]}, {1: 2},
     {"prompt": "w1", "multi_modal_data": {"image": 1}}, {"multi_modal_data": None}],
    ids=repr,
)  # fmt: skip
def test_prompts_of_a_wrong_type(llm, prompt):
    with pytest.raises(RequestError, match="^prompt 1 must be a string, a list of token ids"):
        llm.generate(["w3", prompt], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("prompts", [5, None, 1.5, b"text", iter("ab"), {3, 4}], ids=repr)
def test_what_is_no_list_of_prompts(llm, prompts):
    with pytest.raises(RequestError, match="prompts must be a prompt or a list of prompts"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


def test_an_error_shows_no_more_than_a_part_of_a_long_prompt(llm):
    with pytest.raises(RequestError) as error:
        llm.generate([[1.5] * 100_000], GREEDY)
    assert len(str(error.value)) < 300


def test_text_that_is_no_unicode(llm):
    with pytest.raises(RequestError, match="a prompt must be valid Unicode"):
        llm.generate("\ud800", GREEDY, use_tqdm=False)


# ---- sampling parameters ----


@pytest.mark.parametrize(
    "params, message",
    [
        ({"logit_bias": {VOCAB: 1}}, f"prompt 1: logit_bias has token id {VOCAB}"),
        ({"allowed_token_ids": [VOCAB]}, f"prompt 1: allowed_token_ids has token id {VOCAB}"),
        ({"stop_token_ids": [VOCAB]}, f"prompt 1: stop_token_ids has token id {VOCAB}"),
        ({"logprobs": 21}, "prompt 1: logprobs must be at most max_logprobs (20), got 21"),
        ({"prompt_logprobs": -1}, "prompt 1: prompt_logprobs must be at most max_logprobs (20)"),
        ({"bad_words": ["w3", " "]}, "prompt 1: bad_words has ' ', which is no token"),
        ({"min_tokens": 99}, "min_tokens (99) must not exceed max_tokens (16)"),
        ({"n": 2, "temperature": 0}, "n must be 1 when temperature is 0"),
        ({"stop": "a", "detokenize": False}, "stop needs detokenize=True"),
    ],
)
def test_contradictory_sampling_parameters(llm, params, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        llm.generate(["w3", "w4"], [GREEDY, SamplingParams(**params)], use_tqdm=False)


@pytest.mark.parametrize(
    "params", [5, "greedy", {"temperature": 0}, [GREEDY], [GREEDY] * 3, [GREEDY, None], iter([])],
    ids=lambda params: type(params).__name__,
)  # fmt: skip
def test_wrong_types_and_numbers_of_sampling_parameters(llm, params):
    with pytest.raises(RequestError, match="sampling_params must be one SamplingParams or 2"):
        llm.generate(["w3", "w4"], params, use_tqdm=False)


def test_wrong_priorities(llm, checkpoint, tokenizer):
    with pytest.raises(RequestError, match="priority needs scheduling_policy='priority'"):
        llm.generate("w3", GREEDY, priority=[1], use_tqdm=False)
    other = start_llm(checkpoint("llama"), tokenizer, scheduling_policy="priority")
    for wrong in ([1], "abc", 1.5, [1, 2, 3]):
        with pytest.raises(RequestError, match="priority must be an integer or a list of 2, one"):
            other.generate(["w3", "w4"], GREEDY, priority=wrong, use_tqdm=False)
    for wrong in ("a", 1.5, None, True):
        with pytest.raises(RequestError, match="prompt 1: priority must be an integer, got"):
            other.generate(["w3", "w4"], GREEDY, priority=[1, wrong], use_tqdm=False)
    for wrong in (5, [0, 5]):
        with pytest.raises(RequestError, match="priority needs scheduling_policy='priority'"):
            llm.generate(["w3", "w4"], GREEDY, priority=wrong, use_tqdm=False)
    assert_idle(other)
    assert answers(other) == answers(llm)


def test_arguments_of_vllms_that_ask_for_something(llm):
    for name, value in (
        ("lora_request", object()),
        ("lora_request", [None, object()]),
        ("tokenization_kwargs", {"truncation": True}),
        ("prompt_token_ids", [[3]]),
    ):
        with pytest.raises(RequestError, match=f"^{name} is not supported: "):
            llm.generate("w3", GREEDY, **{name: value})
    with pytest.raises(RequestError, match="^lora_request is not supported: there are no LoRA"):
        llm.chat([{"role": "user", "content": "w3"}], GREEDY, lora_request=object())
    with pytest.raises(TypeError, match="unexpected keyword argument 'samplng_params'"):
        llm.generate("w3", samplng_params=GREEDY)


# ---- options ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_model_lem": 5}, "unknown option max_model_lem; did you mean max_model_len?"),
        ({"max_model_len": 257}, "max_model_len must be at most 256, the model's own limit"),
        ({"num_gpu_blocks_override": 3, "max_model_len": 49},
         "max_model_len must be at most 48, which is what 3 device blocks hold, got 49"),
        ({"kv_cache_memory_bytes": 10}, "kv_cache_memory_bytes"),
        ({"gpu_memory_utilization": 0.01}, "gpu_memory_utilization"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"attention_backend": "cpu", "block_size": 3}, "block_size"),
        ({"dtype": "float16", "device": "cpu"}, "float16"),
        ({"enable_chunked_prefill": False},
         "max_num_batched_tokens (64) must be at least max_model_len (256)"),
        ({"model": None}, "model must be a string"),
        ({"model": 5}, "model must be a string"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_options(checkpoint, tokenizer, llm, options, message):
    with pytest.raises(ConfigError) as error:
        if "model" in options:
            LLM(**options)
        start_llm(checkpoint("llama"), tokenizer, **options)
    assert message in str(error.value)


def test_too_few_blocks_for_a_request(checkpoint, tokenizer, llm):
    """Without max_model_len the length shrinks to what the blocks hold; more is refused."""
    small = start_llm(checkpoint("llama"), tokenizer, num_gpu_blocks_override=3)
    assert small.engine.max_model_len == 48
    with pytest.raises(PromptTooLong, match="prompt has 48 tokens; with max_model_len 48"):
        small.generate([[3] * 48], GREEDY, use_tqdm=False)
    (full,) = small.generate(
        [[3]], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False
    )
    assert len(full.outputs[0].token_ids) == 47
    assert answers(small) == answers(llm)
    assert_idle(small)


# ---- not a number ----


@pytest.fixture(params=["auto", "gather"])
def poisoned(request, folder, tokenizer):
    """An LLM whose token 100 has an embedding that is not a number."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][100] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    # So few blocks that those of failed requests are soon given to others.
    return start_llm(folder, tokenizer, num_gpu_blocks_override=16, attention_backend=request.param)


def test_a_request_whose_logits_are_not_finite_fails_alone(poisoned, llm):
    bad = [[100], [3, 100, 5], [9] * 40 + [100], [100] * 70]
    good = [[i] * n for i, n in ((3, 1), (4, 20), (5, 40), (6, 90), (7, 16))]
    expected = answers(llm, good)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=1)
    for prompts in ([*bad, *good], [p for pair in zip(bad, good, strict=False) for p in pair]):
        outputs = poisoned.generate(prompts, params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            completion = output.outputs[0]
            assert output.finished
            if 100 in prompt:
                assert (completion.finish_reason, completion.token_ids) == ("error", [])
                assert completion.text == ""
            else:
                assert completion.finish_reason == "length"
                assert completion.token_ids == expected[good.index(prompt)]
        assert_idle(poisoned)
    assert answers(poisoned, good) == expected


def test_logits_that_become_not_finite_end_a_completion_that_has_begun(poisoned):
    """The tokens before are there, and of several completions only one fails."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logit_bias={100: 100})
    (output,) = poisoned.generate([[3, 4]], params, use_tqdm=False)
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.token_ids) == ("error", [100])
    assert completion.text == " w100"
    choice = SamplingParams(temperature=50.0, n=8, seed=1, max_tokens=3, ignore_eos=True,
                            allowed_token_ids=[7, 8, 100])  # fmt: skip
    (output,) = poisoned.generate([[3, 4]], choice, use_tqdm=False)
    reasons = {completion.finish_reason for completion in output.outputs}
    assert reasons == {"error", "length"}
    for completion in output.outputs:
        failed = 100 in completion.token_ids[:2]
        assert completion.finish_reason == ("error" if failed else "length")
    assert_idle(poisoned)


def test_the_engine_refuses_what_llm_would_not_send(llm):
    request = begin(request_id="twice", prompt_token_ids=[3], sampling=GREEDY)
    llm.engine.add(request)
    with pytest.raises(RequestError, match="request_id 'twice' is running already"):
        llm.engine.add(request)
    llm.engine.abort("twice")
    llm.engine.abort("nobody")
