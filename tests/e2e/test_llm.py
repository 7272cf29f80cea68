"""``LLM`` from end to end on tiny checkpoints: what goes in, what comes out, and how."""

import gc
import json
import os
import random
import shutil
import signal
import threading
import weakref

import pytest
import torch

from engine.continuation import child_seed
from engine.errors import CheckpointError, ConfigError, EngineError, RequestError
from manta import SamplingParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

VOCAB = 128
EOS = 2
PROMPT = [3, 4, 5]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}{{ 'w7' if m['role'] == 'user' else 'w8' }} {{ m['content'] }}"
    " {% endfor %}w9"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words"), VOCAB)


@pytest.fixture(scope="module")
def start(checkpoint, tokenizer):
    """``start(**options)`` is a new LLM on the tiny Llama."""

    def start(**options):
        return start_llm(checkpoint("llama"), tokenizer, **options)

    return start


@pytest.fixture(scope="module")
def shared(start):
    return start(max_logprobs=-1)


@pytest.fixture
def llm(shared):
    """The module's LLM, which every test leaves without a request or a block."""
    yield shared
    assert_idle(shared)


@pytest.fixture(scope="module")
def reference():
    """The same model in transformers: token ids to log-probabilities [tokens, vocabulary]."""
    model = next(tiny for tiny in TINY_MODELS if tiny.name == "llama").build()

    @torch.inference_mode()
    def logprobs(ids):
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    return logprobs


def tokens(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def generate(llm, prompts, params=None, **options):
    return llm.generate(prompts, params, use_tqdm=False, **options)


def draw_prompt(rng, length):
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def words(ids):
    return "".join(f" w{i}" for i in ids)


# ---- prompts and results ----


def test_prompts_may_be_text_ids_or_dicts_of_either(llm):
    forms = ["w3 w4 w5", PROMPT, {"prompt": "w3 w4 w5"}, {"prompt_token_ids": PROMPT}, (3, 4, 5)]
    outputs = generate(llm, forms, GREEDY)
    assert [output.prompt for output in outputs] == ["w3 w4 w5", None, "w3 w4 w5", None, None]
    for form, output in zip(forms, outputs, strict=True):
        (alone,) = generate(llm, form, GREEDY)  # one prompt needs no list around it
        for each in (output, alone):
            assert each.prompt_token_ids == PROMPT
            assert each.finished and len(each.outputs) == 1
            assert each.outputs[0].token_ids == outputs[0].outputs[0].token_ids
            assert each.outputs[0].text == words(each.outputs[0].token_ids)
    assert len({output.request_id for output in outputs}) == len(forms)
    assert generate(llm, []) == []


def test_results_are_in_the_order_of_the_prompts(llm):
    prompts = [[3 + i, 4, 5] for i in range(25)]  # more than run at once
    params = [SamplingParams(temperature=0, max_tokens=30 - i, ignore_eos=True) for i in range(25)]
    outputs = generate(llm, prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(30, 5, -1))
    assert outputs[24].metrics.finished_time < outputs[0].metrics.finished_time


def test_sampling_params_are_one_for_all_or_one_for_each(llm):
    prompts = [PROMPT, [9, 8]]
    short, long = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5))
    a, b = generate(llm, prompts, [short, long])
    longer = tokens(generate(llm, prompts, long))
    assert [[ids[0][:2]] for ids in longer[:1]] == tokens([a])
    assert longer[1:] == tokens([b]) and len(b.outputs[0].token_ids) == 5
    (default,) = generate(llm, PROMPT)
    assert len(default.outputs[0].token_ids) <= 16
    assert llm.get_default_sampling_params() == SamplingParams()


# ---- seeds ----

SEEDED = [
    SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=2.0, top_p=0.9, seed=2, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.7, top_k=20, min_p=0.01, seed=3, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5,
                   frequency_penalty=-0.5, seed=4, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, logit_bias={5: 3.0}, bad_words=["w7", "w5 w6"], seed=5,
                   max_tokens=40, min_tokens=10, stop_token_ids=[11], logprobs=2),
    SamplingParams(temperature=1.0, n=3, seed=6, max_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0, seed=7, max_tokens=40, ignore_eos=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def seeded(shared):
    """Prompts of the requests ``SEEDED`` and what each brings alone."""
    rng = random.Random(5)
    prompts = [draw_prompt(rng, length) for length in (1, 17, 40, 16, 33, 20, 90)]
    alone = [
        tokens(generate(shared, prompt, params))[0]
        for prompt, params in zip(prompts, SEEDED, strict=True)
    ]
    return prompts, alone


def test_completions_differ_and_can_be_made_again(llm):
    params = SamplingParams(temperature=1.0, n=4, seed=7, max_tokens=12, ignore_eos=True)
    (output,) = generate(llm, PROMPT, params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    children = [tuple(completion.token_ids) for completion in output.outputs]
    assert len(set(children)) == 4
    assert tokens(generate(llm, PROMPT, params)) == [list(map(list, children))]
    for index, child in enumerate(children):
        one = SamplingParams(
            temperature=1.0, seed=child_seed(7, index), max_tokens=12, ignore_eos=True
        )
        assert tokens(generate(llm, PROMPT, one)) == [[list(child)]]
    assert child_seed(7, 0) == 7


def test_without_a_seed_each_request_has_its_own(llm):
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    outputs = generate(llm, [PROMPT] * 4, params)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 4


def test_the_engines_seed_makes_unseeded_requests_repeatable(start):
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    runs = [tokens(generate(start(seed=seed), [PROMPT] * 3, params)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "options, pressure",
    [
        ({}, False),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 5}, False),
        ({"enable_prefix_caching": False, "block_size": 32}, False),
        ({"attention_backend": "gather", "block_size": 4}, False),
        ({"num_gpu_blocks_override": 12, "max_model_len": 180, "preemption_mode": "swap"}, True),
        ({"num_gpu_blocks_override": 12, "max_model_len": 180, "preemption_mode": "recompute"},
         True),
    ],
    ids=["batch", "chunks", "no cache", "gather", "swap", "recompute"],
)  # fmt: skip
def test_a_seeded_request_gives_the_same_tokens_in_any_company(start, seeded, options, pressure):
    prompts, alone = seeded
    llm = start(**options)
    rng = random.Random(1)
    for _ in range(2):
        others = [(draw_prompt(rng, rng.randint(1, 60)), None) for _ in range(10)]
        batch = [(prompt, i) for i, prompt in enumerate(prompts)] + others
        rng.shuffle(batch)
        params = [
            SamplingParams(temperature=1.5, max_tokens=rng.randint(1, 40)) if i is None
            else SEEDED[i]
            for _, i in batch
        ]  # fmt: skip
        outputs = tokens(generate(llm, [prompt for prompt, _ in batch], params))
        for (_, i), output in zip(batch, outputs, strict=True):
            assert i is None or output == alone[i], f"request {i}"
    stats = llm.engine.scheduler.stats
    preempted = stats.preemptions_swap + stats.preemptions_recompute
    assert (preempted > 0) == pressure
    assert_idle(llm)


# ---- ends ----


def greedy_tokens(llm, **values):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | values)
    (output,) = generate(llm, PROMPT, params)
    return output.outputs[0]


def test_stop_strings_end_a_completion(llm):
    full = greedy_tokens(llm)
    text = full.text
    assert (full.finish_reason, full.stop_reason) == ("length", None)
    for stop in (f"w{full.token_ids[4]}", f"{full.token_ids[2]} w{full.token_ids[3]}", text[9:14]):
        for include in (False, True):
            got = greedy_tokens(llm, stop=["nowhere", stop], include_stop_str_in_output=include)
            end = text.index(stop)
            needed = next(
                n for n in range(len(full.token_ids)) if stop in words(full.token_ids[:n])
            )
            assert got.text == text[: end + len(stop) * include]
            assert got.token_ids == full.token_ids[:needed]
            assert (got.finish_reason, got.stop_reason) == ("stop", stop)
    assert greedy_tokens(llm, stop="nowhere").text == text
    first = f"w{full.token_ids[0]}"
    assert greedy_tokens(llm, stop=first, min_tokens=5).text.startswith(f" {first}")


def test_one_completion_stops_and_the_others_go_on(llm):
    params = SamplingParams(temperature=1.0, n=3, seed=3, max_tokens=12, ignore_eos=True)
    (full,) = generate(llm, PROMPT, params)
    stop = f" w{full.outputs[1].token_ids[3]} "
    (got,) = generate(
        llm, PROMPT,
        SamplingParams(temperature=1.0, n=3, seed=3, max_tokens=12, ignore_eos=True, stop=stop),
    )  # fmt: skip
    for whole, cut in zip(full.outputs, got.outputs, strict=True):
        stopped = stop in whole.text
        assert cut.finish_reason == ("stop" if stopped else "length")
        assert cut.text == (whole.text[: whole.text.index(stop)] if stopped else whole.text)
    assert got.outputs[1].finish_reason == "stop"


def test_stop_tokens_end_a_completion(llm):
    ids = greedy_tokens(llm).token_ids
    stop = ids[3]
    at = ids.index(stop)
    got = greedy_tokens(llm, stop_token_ids=[stop])
    assert got.token_ids == ids[: at + 1]
    assert got.text == words(ids[:at])
    assert (got.finish_reason, got.stop_reason) == ("stop", stop)
    got = greedy_tokens(llm, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert got.text == words(ids[: at + 1])


def test_the_models_own_end_ends_a_completion_unless_ignored(llm):
    assert llm.engine.eos_token_ids == (EOS,)
    bias = {EOS: 100.0}
    got = greedy_tokens(llm, logit_bias=bias, ignore_eos=False)
    assert (got.token_ids, got.text, got.finish_reason, got.stop_reason) == (
        [EOS], "", "stop", None
    )  # fmt: skip
    got = greedy_tokens(llm, logit_bias=bias, ignore_eos=True)
    assert (got.token_ids, got.finish_reason) == ([EOS] * 12, "length")
    got = greedy_tokens(llm, logit_bias=bias, ignore_eos=False, min_tokens=5)
    assert EOS not in got.token_ids[:5]
    assert (got.token_ids[5:], got.finish_reason) == ([EOS], "stop")


def test_the_models_length_ends_a_completion(llm):
    most = llm.engine.max_model_len
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = generate(llm, [PROMPT[0]] * (most - 5), params)
    assert len(output.outputs[0].token_ids) == 5
    assert output.outputs[0].finish_reason == "length"


# ---- what may be chosen ----


def test_bad_words_and_bias_and_allowed_tokens(llm):
    ids = greedy_tokens(llm).token_ids
    got = greedy_tokens(llm, bad_words=[f"w{ids[2]}"]).token_ids
    assert ids[2] not in got and got[:2] == [i for i in ids[:2] if i != ids[2]]
    pair = ids[2:4]
    got = greedy_tokens(llm, bad_words=[f"w{pair[0]} w{pair[1]}"]).token_ids
    assert got[:3] == ids[:3] and pair not in [got[i : i + 2] for i in range(len(got))]
    assert ids[0] not in greedy_tokens(llm, logit_bias={ids[0]: -100}).token_ids
    assert greedy_tokens(llm, logit_bias={77: 100}).token_ids == [77] * 12
    assert set(greedy_tokens(llm, allowed_token_ids=[7, 8, 9]).token_ids) <= {7, 8, 9}
    repeated = greedy_tokens(llm, repetition_penalty=100.0).token_ids
    assert len(set(repeated)) == len(repeated) and not set(repeated) & set(PROMPT)


# ---- log-probabilities ----


def check_logprobs(reference, output, asked):
    """Those of prompt and output are those of transformers' forward."""
    for completion in output.outputs:
        ids = output.prompt_token_ids + completion.token_ids
        expected = reference(ids)
        total = 0.0
        assert len(completion.logprobs) == len(completion.token_ids)
        start = len(output.prompt_token_ids)
        for position, entry in enumerate(completion.logprobs, start):
            check_position(expected[position - 1], ids[position], entry, asked)
            total += entry[ids[position]].logprob
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == start
            for position in range(1, start):
                entry = output.prompt_logprobs[position]
                check_position(expected[position - 1], ids[position], entry, asked)


def check_position(expected, chosen, entry, asked):
    top = expected.topk(asked).indices.tolist()
    assert set(entry) == {chosen, *top} or margin(expected, asked) < 1e-4
    for token, logprob in entry.items():
        assert abs(logprob.logprob - expected[token].item()) < 1e-3
        above = int((expected > expected[token]).sum())
        near = int(((expected - expected[token]).abs() < 1e-4).sum()) - 1
        assert above + 1 - near <= logprob.rank <= above + 1 + near
        assert logprob.decoded_token.strip() == f"w{token}"


def margin(expected, asked):
    """Between the last of the likeliest and the next."""
    values = expected.sort(descending=True).values
    return (values[asked - 1] - values[asked]).item() if 0 < asked < VOCAB else 1.0


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_logprobs_are_those_of_transformers(llm, reference, asked):
    rng = random.Random(2)
    prompts = [draw_prompt(rng, length) for length in (1, 2, 16, 150, 40)]  # 150: in chunks
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True, n=2,
                            logprobs=asked, prompt_logprobs=asked)  # fmt: skip
    outputs = generate(llm, prompts, params)
    for output in outputs:
        check_logprobs(reference, output, asked)
    # The prompts are cached now, but their log-probabilities are wanted nevertheless.
    again = generate(llm, prompts, params)
    for output in again:
        check_logprobs(reference, output, asked)
        assert output.num_cached_tokens == 0
    assert tokens(again) == tokens(outputs)
    only_output = SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True,
                                 logprobs=asked)  # fmt: skip
    for output in generate(llm, prompts, only_output):
        assert output.prompt_logprobs is None
        assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // 16 * 16
        check_logprobs(reference, output, asked)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_logprobs_survive_preemption_and_small_chunks(start, reference, mode):
    llm = start(num_gpu_blocks_override=10, max_model_len=150, max_num_batched_tokens=17,
                preemption_mode=mode)  # fmt: skip
    rng = random.Random(3)
    prompts = [draw_prompt(rng, length) for length in (5, 30, 60, 45, 20)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True, logprobs=2,
                            prompt_logprobs=2)  # fmt: skip
    outputs = generate(llm, prompts, params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output in outputs:
        check_logprobs(reference, output, 2)
    assert_idle(llm)


def test_all_logprobs(llm, reference):
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    (output,) = generate(llm, PROMPT, params)
    assert {len(entry) for entry in output.outputs[0].logprobs} == {VOCAB}
    check_logprobs(reference, output, VOCAB)


def test_no_logprobs_unless_asked_for(llm):
    (output,) = generate(llm, PROMPT, GREEDY)
    completion = output.outputs[0]
    assert completion.logprobs is completion.cumulative_logprob is output.prompt_logprobs is None


# ---- metrics ----


def forget(llm):
    """Every cached prefix."""
    kv = llm.engine.scheduler.kv
    kv.device.forget_all()
    kv.cpu.forget_all()


def test_metrics(llm):
    forget(llm)
    prompt = draw_prompt(random.Random(4), 50)
    first, second = (generate(llm, prompt, GREEDY)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    for metrics in (first.metrics, second.metrics):
        times = [
            metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time,
            metrics.finished_time,
        ]  # fmt: skip
        assert times == sorted(times) and times[2] < times[3]
        assert metrics.time_to_first_token == times[2] - times[0] > 0
        assert metrics.time_in_queue == times[1] - times[0] >= 0
        assert metrics.num_preemptions == 0
    assert first.metrics.finished_time < second.metrics.arrival_time
    forget(llm)
    assert generate(llm, prompt, GREEDY)[0].num_cached_tokens == 0


def test_requests_that_wait_are_scheduled_later(start):
    llm = start(max_num_seqs=1)
    a, b = generate(llm, [PROMPT, PROMPT], GREEDY)
    assert b.metrics.first_scheduled_time >= a.metrics.finished_time
    assert b.metrics.time_in_queue > a.metrics.time_in_queue


# ---- chat, priority, defaults ----


def test_chat_applies_the_template(llm, tmp_path):
    one = [{"role": "user", "content": "w3 w4"}]
    more = [*one, {"role": "assistant", "content": "w5"}, {"role": "user", "content": "w6"}]
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    for template in (TEMPLATE, str(file)):
        outputs = llm.chat([one, more], GREEDY, chat_template=template, use_tqdm=False)
        prompts = ["w7 w3 w4 w9", "w7 w3 w4 w8 w5 w7 w6 w9"]
        assert [output.prompt for output in outputs] == prompts
        assert outputs[1].prompt_token_ids == [7, 3, 4, 8, 5, 7, 6, 9]
        assert tokens(outputs) == tokens(generate(llm, prompts, GREEDY))
        (alone,) = llm.chat(one, GREEDY, chat_template=template, use_tqdm=False)
        assert tokens([alone]) == tokens(outputs[:1])
    with pytest.raises(RequestError, match="no chat template: give one with chat_template"):
        llm.chat(one, GREEDY, use_tqdm=False)
    with pytest.raises(ConfigError, match="chat_template must be a file that can be read"):
        llm.chat(one, GREEDY, chat_template=str(tmp_path / "none"), use_tqdm=False)
    for wrong in ("hello", [], {}, None, [5], [["w3"]]):
        with pytest.raises(RequestError, match="messages"):
            llm.chat(wrong, GREEDY, chat_template=TEMPLATE, use_tqdm=False)


def test_the_chat_template_is_an_option_and_may_come_with_the_checkpoint(
    checkpoint, tokenizer, start, tmp_path
):
    message = [{"role": "user", "content": "w3 w4"}]
    (output,) = start(chat_template=TEMPLATE).chat(message, GREEDY, use_tqdm=False)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (own,) = start_llm(folder).chat(message, GREEDY, use_tqdm=False)
    assert own.prompt == output.prompt == "w7 w3 w4 w9"
    assert tokens([own]) == tokens([output])


def test_priority_runs_the_lowest_first(start):
    llm = start(max_num_seqs=1, scheduling_policy="priority")
    outputs = generate(llm, [PROMPT] * 4, GREEDY, priority=[3, -1, 2, 0])
    finished = [output.metrics.finished_time for output in outputs]
    assert sorted(range(4), key=finished.__getitem__) == [1, 3, 2, 0]
    assert tokens(outputs) == tokens(outputs[:1]) * 4


def test_generation_config_gives_the_defaults(checkpoint, tokenizer, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    file = folder / "generation_config.json"
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "max_new_tokens": 3, "do_sample": True,
              "eos_token_id": [9, 8]}  # fmt: skip
    file.write_text(json.dumps(values))
    llm = start_llm(folder, tokenizer)
    expected = SamplingParams(temperature=0.6, top_p=0.9, top_k=5, max_tokens=3)
    assert llm.get_default_sampling_params() == expected
    assert len(generate(llm, PROMPT)[0].outputs[0].token_ids) <= 3
    assert llm.engine.eos_token_ids == (8, 9)
    llm = start_llm(folder, tokenizer, generation_config="vllm")
    assert llm.get_default_sampling_params() == SamplingParams()
    assert llm.engine.eos_token_ids == (8, 9)  # the end of the model is no recommendation
    file.write_text(json.dumps(values | {"top_p": 1.5}))
    with pytest.raises(CheckpointError, match="generation_config.json: top_p must be over 0"):
        start_llm(folder, tokenizer)


# ---- what is shown ----


def test_progress_bars_and_start_up_lines(start, capsys, caplog):
    with caplog.at_level("INFO", "manta"):
        llm = start(use_tqdm_on_load=True)
    shown = capsys.readouterr().err
    assert "Loading weights: 100%" in shown
    capacity = llm.engine.capacity
    lines = "\n".join(record.getMessage() for record in caplog.records)
    assert "LlamaForCausalLM, 109.0k parameters, float32 on cpu" in lines
    assert "of weights read in" in lines and "Ready in" in lines
    assert f"{capacity.num_device_blocks:,} device blocks" in lines
    assert f"{capacity.num_cpu_blocks:,} CPU blocks" in lines
    times = capacity.num_device_blocks * capacity.block_size / 256
    assert f"Maximum concurrency for 256 tokens per request: {times:.2f}x" in lines

    llm.generate([PROMPT] * 3, GREEDY)
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown and "3/3" in shown
    speeds = [part for part in shown.split("\r") if "est. speed input: " in part][-1]
    given = float(speeds.split("input: ")[1].split(" toks/s")[0])
    made = float(speeds.split("output: ")[1].split(" toks/s")[0])
    assert made / given == pytest.approx(36 / 9, rel=0.01)

    llm.generate([PROMPT], GREEDY, use_tqdm=False)
    start()
    assert capsys.readouterr().err == ""


# ---- interrupts and failures ----


class Press:
    """Presses Ctrl-C in the given step, before or after the executor runs it."""

    def __init__(self, executor, step, after=False):
        self.run = executor.run
        self.step, self.after = step, after

    def __call__(self, plan):
        self.step -= 1
        if self.step == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGINT)
        pending = self.run(plan)
        if self.step == 0 and self.after:
            os.kill(os.getpid(), signal.SIGINT)
        return pending


@pytest.fixture
def python_handles_ctrl_c():
    """As in a terminal; a job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [1, 2, 9])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_leaves_nothing_behind(llm, monkeypatch, python_handles_ctrl_c, step, after):
    prompts = [draw_prompt(random.Random(i), 20 + i) for i in range(20)]
    expected = tokens(generate(llm, prompts, GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor, "run", Press(llm.engine.executor, step, after))
        with pytest.raises(KeyboardInterrupt):
            generate(llm, prompts, GREEDY)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_idle(llm)
    assert tokens(generate(llm, prompts, GREEDY)) == expected


def test_the_memory_of_an_engine_is_free_when_nobody_has_it(start):
    """At once, not when Python looks for cycles next: the memory of several would not fit."""
    gc.disable()
    try:
        llm = start()
        generate(llm, [PROMPT], GREEDY)
        worker = llm.engine.executor._worker
        held = [weakref.ref(worker), weakref.ref(worker.kv)]
        del worker, llm
        assert [kept() for kept in held] == [None, None]
    finally:
        gc.enable()


def test_generate_works_in_another_thread(llm):
    expected = tokens(generate(llm, PROMPT, GREEDY))
    got = []
    thread = threading.Thread(target=lambda: got.extend(tokens(generate(llm, PROMPT, GREEDY))))
    thread.start()
    thread.join()
    assert got == expected


def test_an_engine_that_failed_says_so(start, monkeypatch):
    llm = start(max_failovers=0)

    def fail(plan):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llm.engine.executor, "run", fail)
    with pytest.raises(EngineError, match="the engine failed: RuntimeError: out of memory"):
        generate(llm, PROMPT, GREEDY)
    with pytest.raises(EngineError, match="failed earlier: RuntimeError: out of memory"):
        generate(llm, PROMPT, GREEDY)
    assert llm.engine.num_unfinished == 0
