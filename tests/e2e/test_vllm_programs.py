"""A program written for vLLM's ``LLM`` changes the word that it imports."""

import pytest
from transformers import PreTrainedTokenizerBase

from cluster.prompts import one_for_each
from engine.errors import CheckpointError, RequestError
from engine.tokenizer_files import load_transformers
from manta import SamplingParams
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

VOCAB = 128
PROMPT = [3, 4, 5]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}{{ 'w7' if m['role'] == 'user' else 'w8' }} {{ m['content'] }}"
    " {% endfor %}w9"
)


@pytest.fixture(scope="module")
def start(checkpoint, tmp_path_factory):
    """``start(**options)`` is a new LLM on the tiny Llama."""
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("words"), VOCAB)
    return lambda **options: start_llm(checkpoint("llama"), tokenizer, **options)


@pytest.fixture(scope="module")
def shared(start):
    return start()


@pytest.fixture
def llm(shared):
    """The module's LLM, which every test leaves without a request or a block."""
    yield shared
    assert_idle(shared)


def test_arguments_of_vllms_may_ask_for_nothing(llm, start):
    expected = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    nothing = {"lora_request": None, "tokenization_kwargs": {}, "prompt_token_ids": None}
    prompt = {"prompt_token_ids": PROMPT, "prompt": None, "multi_modal_data": {}}
    for priority in (0, None, [0]):
        (output,) = llm.generate(
            prompt, GREEDY, priority=priority, use_tqdm=False, lora_request=[None]
        )
        (other,) = llm.generate(prompt, GREEDY, priority=priority, use_tqdm=False, **nothing)
        assert output.outputs[0].token_ids == other.outputs[0].token_ids == expected
    messages = [{"role": "user", "content": "w3"}]
    same = [
        llm.chat(messages, GREEDY, False, chat_template=TEMPLATE, **more)[0].outputs[0]
        for more in ({}, {"priority": 0, "mm_processor_kwargs": None, "lora_request": None})
    ]
    assert same[0].token_ids == same[1].token_ids
    prioritized = start(scheduling_policy="priority")
    (output,) = prioritized.generate(PROMPT, GREEDY, priority=7, use_tqdm=False)
    assert output.outputs[0].token_ids == expected


def test_changed_parameters_change_no_request_and_no_default(llm):
    defaults = llm.get_default_sampling_params()
    defaults.max_tokens = 3
    assert llm.get_default_sampling_params().max_tokens != 3
    assert len(llm.generate(PROMPT, use_tqdm=False)[0].outputs[0].token_ids) != 3
    params = GREEDY.clone()
    given = one_for_each(params, GREEDY, 2) + one_for_each([params], GREEDY, 1)
    params.max_tokens = 1  # as another thread might, while they run
    assert given == [GREEDY] * 3


def test_the_tokenizer_is_transformers_own(llm, tmp_path):
    theirs = llm.get_tokenizer()
    assert theirs is llm.get_tokenizer() and isinstance(theirs, PreTrainedTokenizerBase)
    text = "w3 w4 w5"
    ids = theirs.encode(text)
    assert ids == theirs(text).input_ids == llm.tokenizer.encode(text)
    assert len(theirs) == len(theirs.get_vocab()) == VOCAB
    assert theirs.convert_tokens_to_ids("w9") == 9 and theirs.convert_ids_to_tokens([9]) == ["w9"]
    assert theirs.batch_decode([ids, [7]]) == [text, "w7"]
    messages = [{"role": "user", "content": "w3"}]
    prompt = theirs.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    assert prompt == llm.tokenizer.render_chat(messages, TEMPLATE) == "w7 w3 w9"
    with pytest.raises(
        CheckpointError, match=f"transformers cannot load a tokenizer from '{tmp_path}"
    ):
        load_transformers(tmp_path, None)


def test_all_logprobs_where_max_logprobs_is_the_vocabulary(start):
    everything = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    (output,) = start(max_logprobs=VOCAB).generate([PROMPT], everything, use_tqdm=False)
    assert [len(position) for position in output.outputs[0].logprobs] == [VOCAB] * 2
    assert [len(position) for position in output.prompt_logprobs[1:]] == [VOCAB] * 2
    with pytest.raises(
        RequestError, match=r"logprobs must be at most max_logprobs \(127\), got -1"
    ):
        start(max_logprobs=VOCAB - 1).generate([PROMPT], everything, use_tqdm=False)
