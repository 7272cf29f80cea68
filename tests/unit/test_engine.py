"""The engine, scheduler and block bookkeeping, driven through the simulated executor."""

import random
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.continuation import begin, child_seed
from engine.engine import Engine
from engine.errors import EngineError, PromptTooLong, QueueFull, RequestError
from engine.preempt import MeasuredCosts
from engine.sampling_params import SamplingParams
from tests.support.simulator import VOCAB, SimulatedExecutor, foretell

GREEDY = SamplingParams(temperature=0, max_tokens=8, seed=0)


def make_engine(
    num_blocks=64,
    num_cpu_blocks=0,
    block_size=4,
    max_model_len=128,
    steps_ahead=0,
    pipelined=False,
    costs=None,
    **options,
):
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 32} | options
    config = EngineConfig.from_options(**options)
    executor = SimulatedExecutor(
        num_blocks, num_cpu_blocks, block_size, config.scheduler.max_num_seqs, max_model_len,
        costs, pipelined, steps_ahead,
    )  # fmt: skip
    return Engine(config, executor, executor.load(), executor.reserve(), max_model_len)


def drain(engine, outputs=None):
    """Step until nothing is left; (request id, index) to (tokens, finish reason)."""
    outputs = {} if outputs is None else outputs
    idle = 0
    while engine.has_work:
        deltas = engine.step()
        collect(deltas, outputs)
        idle = 0 if deltas else idle + 1
        assert idle < 1000, "no progress"
    return outputs


def collect(outcomes, outputs):
    for request_id, outcome in outcomes:
        tokens, _ = outputs.get((request_id, outcome.index), ([], None))
        tokens += outcome.tokens
        outputs[request_id, outcome.index] = (tokens, outcome.finish_reason)


def assert_empty(engine):
    kv = engine.scheduler.kv
    assert kv.device.num_held == 0 and kv.cpu.num_held == 0
    kv.device.check()
    kv.cpu.check()
    assert not engine.scheduler.running and engine.scheduler.num_waiting == 0


def random_prompt(rng, length):
    return [rng.randrange(VOCAB) for _ in range(length)]


# Steps ahead of a result, and whether they are those of a pipeline.
AHEAD = [(0, False), (1, False), (3, False), (1, True), (3, True)]


@pytest.mark.parametrize("steps_ahead, pipelined", AHEAD)
@pytest.mark.parametrize("mode", ["recompute", "swap", "auto"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_every_request_gets_its_own_tokens_under_pressure(
    steps_ahead, pipelined, mode, caching, chunked
):
    rng = random.Random(f"{steps_ahead}{mode}{caching}{chunked}")
    engine = make_engine(
        num_blocks=24,
        num_cpu_blocks=20,
        steps_ahead=steps_ahead,
        pipelined=pipelined,
        preemption_mode=mode,
        enable_prefix_caching=caching,
        enable_chunked_prefill=chunked,
        max_model_len=64,
        max_num_batched_tokens=64 if not chunked else 20,
        costs=MeasuredCosts(1e-5, 1e-5, 1e-5 * rng.uniform(0.1, 2)),
    )
    expected = {}
    stems = [random_prompt(rng, 17) for _ in range(3)]
    for number in range(60):
        prompt = rng.choice(stems)[: rng.randint(0, 17)] + random_prompt(rng, rng.randint(1, 20))
        num = rng.randint(1, 25)
        seed, n = rng.randrange(2**63), rng.choice([1, 1, 3])
        sampling = SamplingParams(max_tokens=num, seed=seed, n=n)
        engine.add(begin(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
        for index in range(n):
            out = foretell(prompt, child_seed(seed, index), num)
            expected[str(number), index] = (out, "length")
    assert drain(engine) == expected
    assert_empty(engine)
    stats = engine.scheduler.stats
    assert stats.preemptions_swap + stats.preemptions_recompute > 0, "there was no pressure"
    if mode == "recompute":
        assert stats.preemptions_swap == 0
    if mode == "swap":
        assert stats.preemptions_swap > 0


@pytest.mark.parametrize("steps_ahead, pipelined", AHEAD)
def test_cancelling_at_any_moment_frees_everything(steps_ahead, pipelined):
    rng = random.Random(steps_ahead)
    engine = make_engine(
        num_blocks=30, num_cpu_blocks=30, steps_ahead=steps_ahead, pipelined=pipelined
    )
    expected, outputs, alive, number = {}, {}, [], 0
    for _ in range(600):
        if rng.random() < 0.3 and len(alive) < 30:
            prompt, num = random_prompt(rng, rng.randint(1, 60)), rng.randint(1, 30)
            engine.add(
                begin(
                    request_id=str(number),
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(max_tokens=num, seed=number),
                )
            )
            expected[str(number)] = foretell(prompt, number, num)
            alive.append(str(number))
            number += 1
        if alive and rng.random() < 0.1:
            engine.abort(alive.pop(rng.randrange(len(alive))))
        collect(engine.step(), outputs)
    drain(engine, outputs)
    assert_empty(engine)
    finished = {key[0]: out for key, (out, reason) in outputs.items() if reason == "length"}
    assert len(finished) > 50
    for request_id, (out, _) in ((k[0], v) for k, v in outputs.items()):
        assert out == expected[request_id][: len(out)]
    assert all(out == expected[request_id] for request_id, out in finished.items())


def test_shared_prefixes_are_computed_once():
    engine = make_engine(num_blocks=64, max_num_batched_tokens=64)
    rng = random.Random(0)
    stem = random_prompt(rng, 40)
    first = begin(request_id="a", prompt_token_ids=[*stem, 1], sampling=GREEDY)
    engine.add(first)
    drain(engine)
    computed = engine.scheduler.stats.planned_tokens
    engine.add(replace(first, request_id="b", prompt_token_ids=[*stem, 2]))
    outputs = drain(engine)
    assert outputs["b", 0][0] == foretell([*stem, 2], 0, 8)
    assert engine.scheduler.stats.planned_tokens - computed == 1 + 7  # all but the stem


def test_completions_of_one_prompt_share_its_blocks():
    engine = make_engine(num_blocks=64, max_num_batched_tokens=64)
    prompt = random_prompt(random.Random(0), 33)
    sampling = SamplingParams(n=6, max_tokens=2, seed=5)
    engine.add(begin(request_id="a", prompt_token_ids=prompt, sampling=sampling))
    engine.step()
    assert engine.scheduler.stats.planned_tokens == 33 + 5  # the last token of each
    outputs = drain(engine)
    assert len({tuple(tokens) for tokens, _ in outputs.values()}) == 6  # each its own seed


def test_a_long_prompt_does_not_hold_up_decodes():
    engine = make_engine(num_blocks=64, max_num_batched_tokens=16, max_model_len=256)
    rng = random.Random(0)
    short = SamplingParams(temperature=0, max_tokens=20)
    engine.add(begin(request_id="s", prompt_token_ids=[1, 2, 3], sampling=short))
    engine.step()
    engine.add(begin(request_id="l", prompt_token_ids=random_prompt(rng, 150), sampling=GREEDY))
    for _ in range(8):  # while the long prompt is prefilled, a token comes at every step
        assert [request_id for request_id, _ in engine.step()] == ["s"]
    drain(engine)


def test_priority_runs_first_and_ageing_lets_nobody_starve():
    engine = make_engine(num_blocks=64, scheduling_policy="priority", max_num_seqs=1,
                         max_num_batched_tokens=8)  # fmt: skip
    for request_id, priority in (("low", 5), ("high", -5), ("middle", 0)):
        engine.add(
            begin(
                request_id=request_id,
                prompt_token_ids=[1, 2],
                sampling=GREEDY,
                priority=priority,
            )
        )
    finished = []
    while engine.has_work:
        finished += [name for name, outcome in engine.step() if outcome.finish_reason]
    assert finished == ["high", "middle", "low"]
    orders = []
    for priority, wait in ((5, 1000.0), (0, 0.0)):
        request = begin(
            request_id=str(priority), prompt_token_ids=[1], sampling=GREEDY, priority=priority
        )
        engine.add(request)
        seq = next(s for s in engine.scheduler.waiting() if s.request_id == str(priority))
        orders.append(seq.order - wait / 30.0)
    assert orders[0] < orders[1], "a thousand seconds outweigh five steps of priority"
    drain(engine)


def test_refusals_name_the_reason_and_leave_the_engine_alive():
    engine = make_engine(num_blocks=8, max_model_len=64, max_queued_requests=2, max_num_seqs=1,
                         max_queued_tokens=40)  # fmt: skip

    def add(request_id, prompt, sampling=GREEDY):
        engine.add(begin(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))

    with pytest.raises(RequestError, match="prompt must not be empty"):
        add("x", [])
    with pytest.raises(RequestError, match=f"token id {VOCAB}; the model's go from 0 to 49999"):
        add("x", [1, VOCAB])
    with pytest.raises(RequestError, match="token id -1"):
        add("x", [-1])
    with pytest.raises(PromptTooLong, match="64 tokens; with max_model_len 64"):
        add("x", [1] * 64)
    with pytest.raises(PromptTooLong, match="the KV cache holds 32"):
        add("x", [1] * 30)
    with pytest.raises(RequestError, match="logprobs must be at most max_logprobs"):
        add("x", [1], replace(GREEDY, logprobs=21))
    with pytest.raises(RequestError, match=f"stop_token_ids has token id {VOCAB}"):
        add("x", [1], replace(GREEDY, stop_token_ids=[VOCAB]))
    with pytest.raises(RequestError, match="min_tokens .1. puts off every token of allowed_token"):
        add("x", [1], replace(GREEDY, allowed_token_ids=[5], stop_token_ids=[5], min_tokens=1))
    outputs = {}
    add("a", [1] * 20)
    with pytest.raises(RequestError, match="'a' is running already"):
        add("a", [1])
    collect(engine.step(), outputs)
    add("b", [1] * 20)
    with pytest.raises(QueueFull, match="20 tokens wait; max_queued_tokens is 40"):
        add("c", [1] * 21)
    add("c", [1])
    with pytest.raises(QueueFull, match="2 sequences wait; max_queued_requests is 2"):
        add("d", [1])
    drain(engine, outputs)
    assert {key[0]: len(tokens) for key, (tokens, _) in outputs.items()} == {
        "a": 8, "b": 8, "c": 8
    }  # fmt: skip
    assert_empty(engine)


def test_a_request_past_its_deadline_is_aborted():
    engine = make_engine()
    engine.add(begin(request_id="a", prompt_token_ids=[1], sampling=GREEDY, timeout=0.0))
    engine.add(begin(request_id="b", prompt_token_ids=[1], sampling=GREEDY, timeout=1000.0))
    outputs = drain(engine)
    assert outputs["a", 0] == ([], "abort")
    assert outputs["b", 0] == (foretell([1], 0, 8), "length")
    assert_empty(engine)


def test_max_model_len_ends_a_request():
    engine = make_engine(max_model_len=16)
    sampling = SamplingParams(temperature=0, max_tokens=None, seed=0)
    engine.add(begin(request_id="a", prompt_token_ids=[1] * 10, sampling=sampling))
    assert drain(engine)["a", 0] == (foretell([1] * 10, 0, 6), "length")


@pytest.mark.parametrize("steps_ahead, pipelined", AHEAD)
def test_a_stop_token_ends_a_request_and_overrun_tokens_are_discarded(steps_ahead, pipelined):
    engine = make_engine(steps_ahead=steps_ahead, pipelined=pipelined)
    out = foretell([7, 7], 3, 8)
    sampling = SamplingParams(max_tokens=8, seed=3, stop_token_ids=[out[4]])
    engine.add(begin(request_id="a", prompt_token_ids=[7, 7], sampling=sampling))
    outcomes = []
    while engine.has_work:
        outcomes += [outcome for _, outcome in engine.step()]
    assert [token for outcome in outcomes for token in outcome.tokens] == out[:5]
    assert (outcomes[-1].finish_reason, outcomes[-1].stop_reason) == ("stop", out[4])
    assert_empty(engine)


def test_evicted_prefixes_come_back_from_cpu_blocks():
    rng = random.Random(1)
    engine = make_engine(num_blocks=16, num_cpu_blocks=64, max_num_batched_tokens=64)
    prompts = [random_prompt(rng, 40) for _ in range(4)]
    for turn in range(2):
        for number, prompt in enumerate(prompts):
            request_id = f"{turn}{number}"
            engine.add(begin(request_id=request_id, prompt_token_ids=prompt, sampling=GREEDY))
            assert drain(engine)[request_id, 0][0] == foretell(prompt, 0, 8)
    stats = engine.scheduler.kv.stats
    assert stats.demoted_blocks > 0 and stats.promoted_blocks >= 3 * 9
    assert stats.prefix_hits >= 4 * 36
    assert_empty(engine)


@pytest.mark.parametrize("steps_ahead, pipelined", AHEAD)
def test_what_a_failed_request_computed_is_not_shared(steps_ahead, pipelined):
    engine = make_engine(steps_ahead=steps_ahead, pipelined=pipelined, max_num_batched_tokens=16)
    prompt = random_prompt(random.Random(0), 41)
    sampling = SamplingParams(max_tokens=8, seed=0, n=2)
    request = begin(request_id="failed", prompt_token_ids=prompt, sampling=sampling)
    engine.executor.spoil = True
    engine.add(request)
    assert {reason for _, reason in drain(engine).values()} == {"error"}
    if steps_ahead == 3:  # the result is on its way, but nobody waits for it
        engine.add(replace(request, request_id="cancelled"))
        engine.step()
        engine.abort("cancelled")
        drain(engine)
    engine.executor.spoil = False
    metrics = engine.add(replace(request, request_id="next"))
    outputs = drain(engine)
    assert outputs["next", 0] == (foretell(prompt, 0, 8), "length")
    assert metrics.num_cached_tokens == 0
    assert_empty(engine)


def test_what_a_failed_request_had_from_cpu_blocks_is_not_shared():
    rng = random.Random(1)
    engine = make_engine(num_blocks=16, num_cpu_blocks=64, max_num_batched_tokens=64)
    prompts = [random_prompt(rng, 40) for _ in range(4)]
    for number, prompt in enumerate(prompts):
        engine.add(begin(request_id=str(number), prompt_token_ids=prompt, sampling=GREEDY))
        drain(engine)
    kv = engine.scheduler.kv
    assert kv.stats.demoted_blocks > 0
    request = begin(request_id="failed", prompt_token_ids=prompts[0], sampling=GREEDY)
    engine.executor.spoil = True
    metrics = engine.add(request)
    assert drain(engine)["failed", 0] == ([], "error")
    assert metrics.num_cached_tokens > 0 and kv.stats.promoted_blocks > 0
    engine.executor.spoil = False
    metrics = engine.add(replace(request, request_id="next"))
    assert drain(engine)["next", 0][0] == foretell(prompts[0], 0, 8)
    assert metrics.num_cached_tokens == 0
    assert_empty(engine)


# ---- pipelines ----


def recorded_plans(engine):
    """A list that every plan is added to."""
    plans, run = [], engine.executor.run
    engine.executor.run = lambda plan: plans.append(plan) or run(plan)
    return plans


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_pipeline_has_disjoint_batches_of_even_size(stages):
    engine = make_engine(
        num_blocks=400, steps_ahead=stages - 1, pipelined=True, max_num_seqs=32,
        max_num_batched_tokens=256,
    )  # fmt: skip
    plans, rng, expected = recorded_plans(engine), random.Random(stages), {}
    for number in range(30):
        prompt, num = random_prompt(rng, rng.randint(1, 20)), rng.randint(20, 60)
        sampling = SamplingParams(max_tokens=num, seed=number)
        engine.add(begin(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
        expected[str(number), 0] = (foretell(prompt, number, num), "length")
    outputs, sizes = {}, []
    while engine.has_work:
        collect(engine.step(), outputs)
        if 2 * stages < len(plans) < 20:  # all decode, none is near its end
            batches = [set(plan.slots.tolist()) for plan in plans[-stages:]]
            assert set().union(*batches) == set(range(30)) and sum(map(len, batches)) == 30
            sizes += map(len, batches)
    assert outputs == expected
    assert max(sizes) == -(-30 // stages), "a stage has more than its share"


def test_the_chunks_of_one_prompt_fill_a_pipeline():
    engine = make_engine(
        num_blocks=400, steps_ahead=3, pipelined=True, max_num_batched_tokens=2048,
        max_model_len=1200,
    )  # fmt: skip
    plans = recorded_plans(engine)
    prompt = random_prompt(random.Random(0), 1000)
    engine.add(begin(request_id="a", prompt_token_ids=prompt, sampling=GREEDY))
    engine.step()
    # None waits for another's result.
    assert [p.counts.tolist() for p in plans] == [[256], [256], [256], [232]]
    assert [p.wants.tolist() for p in plans] == [[0], [0], [0], [1]]
    assert drain(engine)["a", 0][0] == foretell(prompt, 0, 8)


def dies_of(engine, poison):
    """Have the executor die in each step that begins with a sequence that has this token."""
    run, executor = engine.executor.run, engine.executor

    def running(plan):
        result = run(plan)
        if any(poison in admit.tokens for admit in plan.admits):
            raise OSError("out of paper")
        return result

    executor.run = running


@pytest.mark.parametrize("steps_ahead, pipelined", AHEAD)
def test_a_request_that_ends_workers_ends_itself_and_no_other(steps_ahead, pipelined):
    rng = random.Random(0)
    engine = make_engine(steps_ahead=steps_ahead, pipelined=pipelined)
    dies_of(engine, 7)
    expected = {}
    for number in range(20):
        prompt = [8 + rng.randrange(VOCAB - 8) for _ in range(rng.randint(1, 30))]
        if number == 9:
            engine.add(begin("bad", [1, 7, 1], GREEDY))
        engine.add(begin(str(number), prompt, GREEDY))
        expected[str(number), 0] = (foretell(prompt, 0, 8), "length")
    outputs = drain(engine)
    assert outputs.pop(("bad", 0)) == ([], "error")
    assert outputs == expected
    assert_empty(engine)
    assert sum(engine.stats.restarts.counts) == 3


def test_workers_that_die_while_all_is_idle_are_started_again():
    engine = make_engine()
    engine.executor.check, check = (
        (lambda: (_ for _ in ()).throw(EngineError("gone"))),
        (engine.executor.check),
    )
    engine.check()
    assert engine.recovering and engine.has_work
    engine.executor.check = check
    assert not list(engine.step()) and not engine.has_work
    engine.add(begin("a", [1], GREEDY))
    assert drain(engine)["a", 0] == (foretell([1], 0, 8), "length")


def test_workers_that_do_not_start_again_end_the_engine():
    def restart():
        raise EngineError("no room for worker 1")

    engine = make_engine()
    dies_of(engine, 7)
    engine.executor.restart = restart
    engine.add(begin("a", [7], GREEDY))
    with pytest.raises(EngineError, match="out of paper; and they do not start .* worker 1"):
        for _ in range(3):
            engine.step()
    with pytest.raises(EngineError, match="failed earlier: OSError: out of paper"):
        engine.step()


def test_workers_that_fail_in_every_step_end_the_engine():
    engine = make_engine(max_num_seqs=1)  # so that one by one is to blame
    for number in range(30):
        engine.add(begin(str(number), [7], GREEDY))
    dies_of(engine, 7)
    with pytest.raises(EngineError, match="out of paper"):
        for _ in range(30):
            engine.step()
    assert engine.num_unfinished > 25


def test_a_continuation_that_says_nonsense_is_refused():
    engine = make_engine()
    request = begin("a", [1, 2], SamplingParams(n=2, max_tokens=8, seed=0))
    for outputs in (((1,),), (None, None), ((1, 2), (1,) * 8)):
        with pytest.raises(RequestError, match="outputs"):
            engine.add(replace(request, outputs=outputs))
    engine.add(replace(request, outputs=((), None)))
    assert list(drain(engine)) == [("a", 0)]
