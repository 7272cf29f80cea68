"""What the engine counts adds up to what its requests got."""

import contextlib
import random

from engine.continuation import begin
from engine.errors import PromptTooLong
from engine.sampling_params import SamplingParams
from engine.sequence import FinishReason
from engine.stats import TOKEN_SECONDS, Histogram, token_counts
from tests.support.simulator import VOCAB
from tests.unit.test_engine import make_engine


def by_name(engine):
    metrics = engine.metrics()
    names = [metric.name for metric in metrics]
    assert len(set(names)) == len(names)
    for metric in metrics:
        assert metric.help and metric.samples
        for sample in metric.samples:
            assert len(sample.labels) == len(metric.labels)
            assert len(sample.counts) == (len(metric.bounds) + 1 if metric.bounds else 0)
    return {metric.name: metric for metric in metrics}


def value(metrics, name, *labels):
    return next(s.value for s in metrics[name].samples if s.labels == labels)


def total(metrics, name):
    return sum(metrics[name].samples[0].counts)


def test_counters_add_up_under_pressure():
    rng = random.Random(0)
    engine = make_engine(
        num_blocks=24, num_cpu_blocks=20, preemption_mode="swap", scheduling_policy="priority"
    )
    prompts = {}
    for i in range(20):
        prompts[f"r{i}"] = prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
        sampling = SamplingParams(temperature=1, seed=i, max_tokens=rng.randint(1, 40), n=1 + i % 2)
        engine.add(
            begin(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling, priority=i % 3)
        )
    with contextlib.suppress(PromptTooLong):
        engine.add(begin(request_id="x", prompt_token_ids=[1] * 500, sampling=SamplingParams()))
    tokens = finished = steps = 0
    firsts = set()
    while engine.has_work:
        outcomes = list(engine.step())
        steps += 1
        tokens += sum(len(outcome.tokens) for _, outcome in outcomes)
        finished += sum(outcome.finish_reason is FinishReason.LENGTH for _, outcome in outcomes)
        firsts |= {(name, outcome.index) for name, outcome in outcomes if outcome.tokens}
        if steps == 20:
            engine.abort("r19")
    metrics = by_name(engine)
    assert value(metrics, "generation_tokens") == tokens
    assert value(metrics, "request_success", "length") == finished
    assert value(metrics, "request_success", "abort") == 30 - finished
    assert value(metrics, "admission_rejections", "PromptTooLong") == 1
    started = {request_id for request_id, _ in firsts}
    assert value(metrics, "prompt_tokens") == sum(len(prompts[i]) for i in started)
    stats = engine.scheduler.stats
    computed = metrics["iteration_tokens_total"].samples[0].value
    assert computed == stats.planned_tokens + len(firsts)
    assert total(metrics, "time_to_first_token_seconds") == len(firsts)
    assert total(metrics, "inter_token_latency_seconds") == tokens - len(firsts)
    assert total(metrics, "e2e_request_latency_seconds") == 30
    assert total(metrics, "request_queue_time_seconds") == len(firsts)
    assert total(metrics, "step_time_seconds") == steps == value(metrics, "steps")
    assert metrics["request_generation_tokens"].samples[0].value == tokens
    kinds = metrics["preemptions_by_kind"].samples
    assert sum(sample.value for sample in kinds) == value(metrics, "num_preemptions") > 0
    assert {sample.labels[1] for sample in kinds} <= {"0", "1", "2"}
    assert value(metrics, "swapped_out_bytes") >= value(metrics, "swapped_in_bytes") > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(metrics, name) == 0
    assert value(metrics, "cpu_kv_blocks_used") == 0


def test_tokens_of_steps_are_all_that_requests_took():
    """The last token of an output, which nothing is computed of, too."""
    engine = make_engine(num_blocks=64)
    for i, (length, most) in enumerate(((40, 1), (3, 9), (17, 30))):
        prompt = list(range(i, i + length))
        sampling = SamplingParams(max_tokens=most, seed=i)
        engine.add(begin(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work:
        engine.step()
    metrics = by_name(engine)
    assert metrics["iteration_tokens_total"].samples[0].value == 40 + 1 + 3 + 9 + 17 + 30
    assert value(metrics, "prompt_tokens") + value(metrics, "generation_tokens") == 100


def test_gauges_say_what_is_now():
    engine = make_engine(num_blocks=64, max_num_seqs=2)
    for i in range(3):
        engine.add(
            begin(
                request_id=str(i), prompt_token_ids=[1] * 8, sampling=SamplingParams(max_tokens=9)
            )
        )
    engine.step()
    metrics = by_name(engine)
    assert value(metrics, "num_requests_running") == 2
    assert value(metrics, "num_requests_waiting") == 1
    assert value(metrics, "kv_blocks_used") == engine.scheduler.kv.device.num_held > 0


def test_how_the_cache_was_set_up():
    metric = by_name(make_engine(num_blocks=40, block_size=8, max_model_len=128))
    facts = dict(zip(
        metric["cache_config_info"].labels, metric["cache_config_info"].samples[0].labels,
        strict=True,
    ))  # fmt: skip
    assert facts["num_gpu_blocks"] == "40" and facts["block_size"] == "8"
    assert facts["kv_cache_size_tokens"] == "320" and facts["kv_cache_max_concurrency"] == "2.5"


def test_a_client_cannot_make_labels_without_end():
    engine = make_engine()
    for priority in range(1000):
        engine.scheduler.stats.preemption("swap", priority)
    samples = by_name(engine)["preemptions_by_kind"].samples
    assert len(samples) < 100 and sum(sample.value for sample in samples) == 1000


def test_a_histogram_counts_up_to_and_with_its_bounds():
    histogram = Histogram((1, 2, 5))
    for observed in (0, 1, 1.5, 2, 5, 6):
        histogram.observe(observed)
    assert histogram.counts == [2, 2, 1, 1] and histogram.sum == 15.5
    assert token_counts(100) == (1, 2, 5, 10, 20, 50, 100)
    assert sum(bound <= 0.002 for bound in TOKEN_SECONDS) >= 5  # 1 ms can be told from 1.5 ms
