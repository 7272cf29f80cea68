"""The scheduler under a random load: a small instance of ``make soak-scheduler``, and what it
promises of single decisions."""

import random
from dataclasses import replace

import pytest

from engine.continuation import begin
from engine.plan import CopyTimes
from engine.preempt import MeasuredCosts
from engine.sampling_params import SamplingParams
from engine.scheduler import _Draft
from engine.shares import FairShares
from tests.soak.scheduler import Load
from tests.support.simulator import foretell
from tests.unit.test_engine import assert_empty, drain, make_engine, random_prompt


@pytest.mark.parametrize("seed", range(12))  # each number of stages in each preemption mode
def test_random_load(seed):
    tally = Load(1000 + seed, 300).run()
    assert tally.requests == 300 and tally.finished > 100 and tally.forced_tokens > 100


@pytest.mark.parametrize("seed", range(6))
def test_random_load_with_results_that_are_not_finite(seed):
    tally = Load(2000 + 5 * seed, 300, spoilt=0.01).run()
    assert tally.requests == 300 and tally.finished > 100 and tally.failed > 10


@pytest.mark.parametrize("seed", range(6))
def test_random_load_with_deaths_and_moves(seed):
    tally = Load(3000 + 5 * seed, 300, deaths=0.02, moves=0.05).run()
    assert tally.requests == 300 and tally.finished > 100
    assert tally.deaths > 3 and tally.moves > 30 and tally.moved_tokens > 1000


@pytest.mark.parametrize("seed", range(9))
def test_random_load_of_a_model_with_states(seed):
    """Each kind of trouble in turn: slots for states are few, results are not finite, the workers
    die and requests move."""
    trouble = [{"spoilt": 0.05}, {"deaths": 0.02, "moves": 0.05}, {}][seed % 3]
    tally = Load(4000 + seed, 150, states=True, **trouble).run()
    assert tally.requests == 150 and tally.finished > 40
    assert tally.kept_states > 100 or not tally.prefix_hits


def add(engine, request_id, prompt, max_tokens, **options):
    n, moves = options.pop("n", 1), options.pop("moves", 0)
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, n=n)
    request = begin(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **options)
    engine.add(replace(request, moves=moves))


def test_who_gives_way_loses_the_least_work():
    """Of those behind the needy one, first the one with the fewest tokens that nobody else keeps;
    under priorities, of those of the lowest priority."""
    rng = random.Random(0)
    stem = random_prompt(rng, 16)
    prompts = {
        "needy": random_prompt(rng, 8),
        "long": random_prompt(rng, 20),
        "shared": [*stem, 1, 2],  # the longest but for one, but most of it is shared
        "other": [*stem, 3, 4, 5],
        "middle": random_prompt(rng, 12),
        "short": random_prompt(rng, 6),
    }
    order = {"fcfs": ["shared", "other", "short", "middle", "long"],
             "priority": ["middle", "long", "shared", "other", "short"]}  # fmt: skip
    for policy, expected in order.items():
        engine = make_engine(num_blocks=64, max_num_batched_tokens=128, scheduling_policy=policy)
        for name, prompt in prompts.items():
            priority = int(name in ("middle", "long")) if policy == "priority" else 0
            add(engine, name, prompt, 40, priority=priority)
        engine.step()
        scheduler = engine.scheduler
        draft, running = _Draft(99, 128), sorted(scheduler.running, key=lambda seq: seq.order)
        (needy,) = (seq for seq in running if seq.request_id == "needy")
        found = []
        while (victim := scheduler._victim(draft, needy)) is not needy:
            found.append(victim.request_id)
            scheduler._preempt(draft, victim)
        assert found == expected, policy
        drain(engine)
        assert_empty(engine)


def test_a_shared_prefix_is_swapped_out_once():
    """Six completions of one prompt all give way: the prompt's blocks go to the CPU once, and
    come back once."""
    engine = make_engine(
        num_blocks=80, num_cpu_blocks=80, preemption_mode="swap", max_num_batched_tokens=64
    )
    prompt = random_prompt(random.Random(0), 41)
    add(engine, "a", prompt, 30, n=6)
    engine.step()
    engine.step()
    scheduler, kv = engine.scheduler, engine.scheduler.kv
    assert len(scheduler.running) == 6
    private = sum(len(seq.blocks) - 10 for seq in scheduler.running)
    for seq in scheduler.running:
        assert kv.swap_out(seq)
        scheduler._leave(seq)
        scheduler._enqueue(seq)
    assert kv.stats.swapped_out_blocks == 10 + private
    kv.device.forget_all()
    outputs = drain(engine)
    assert kv.stats.swapped_in_blocks == 10 + private
    assert len({tuple(tokens) for tokens, _ in outputs.values()}) == 6
    assert outputs["a", 0][0] == foretell(prompt, 0, 30)[2:]
    assert_empty(engine)


def test_what_is_cached_is_not_recomputed():
    """A victim whose prefix another still holds computes only the rest of it again."""
    engine = make_engine(num_blocks=40, preemption_mode="recompute", max_num_batched_tokens=64)
    prompt = random_prompt(random.Random(0), 41)
    add(engine, "a", prompt, 30, n=2)
    engine.step()
    engine.step()
    scheduler = engine.scheduler
    scheduler._preempt(_Draft(99, 64), scheduler.running[1])
    before = scheduler.stats.planned_tokens
    engine.step()
    assert scheduler.stats.planned_tokens - before == 1 + 3  # one decodes; 40 of 43 are there
    assert scheduler.stats.recomputed_tokens == 2
    drain(engine)
    assert_empty(engine)


def test_a_swapped_sequence_takes_the_cpu_blocks_of_cached_prefixes():
    """Prefixes that were demoted fill the CPU blocks; who gives way is copied there all the same,
    and nothing that is swapped out is given up for a prefix."""
    rng = random.Random(0)
    engine = make_engine(num_blocks=24, num_cpu_blocks=24, preemption_mode="swap",
                         max_num_batched_tokens=64)  # fmt: skip
    for number in range(8):
        add(engine, f"old{number}", random_prompt(rng, 40), 2)
        drain(engine)
    kv = engine.scheduler.kv
    assert len(kv.cpu._cached) == 24 and kv.cpu.num_held == 0, "prefixes fill the CPU blocks"
    prompts = [random_prompt(rng, 9) for _ in range(6)]
    for number, prompt in enumerate(prompts):
        add(engine, f"{number}", prompt, 40)
    held, outputs = 0, {}
    while engine.has_work:
        for name, outcome in engine.step():
            outputs.setdefault(name, []).extend(outcome.tokens)
        swapped = {block for seq in engine.scheduler.waiting() for block in seq.swapped}
        assert len(swapped) == kv.cpu.num_held
        held = max(held, len(swapped))
    stats = engine.scheduler.stats
    assert stats.preemptions_swap > 0 and stats.preemptions_recompute == 0 and held > 3
    assert outputs == {str(i): foretell(p, 0, 40) for i, p in enumerate(prompts)}
    assert_empty(engine)


def test_costs_follow_what_is_seen():
    """Copies that turn out slow make auto recompute, where at first it swaps."""
    engine = make_engine(num_blocks=64, num_cpu_blocks=64, costs=MeasuredCosts(1e-6, 1e-6, 1e-3))
    add(engine, "a", random_prompt(random.Random(0), 40), 9)
    engine.step()
    scheduler = engine.scheduler
    (seq,) = scheduler.running
    assert scheduler._swap_pays(seq) and scheduler.kv.promote
    for _ in range(100):
        scheduler.costs.observe_copies(CopyTimes(8, 8 * 0.5, 8, 8 * 0.25))
    assert scheduler.costs.block_out == pytest.approx(0.5, rel=0.01)
    assert scheduler.costs.block_in == pytest.approx(0.25, rel=0.01)
    scheduler.costs.observe_copies(CopyTimes(1, 9.0, 1, 9.0))  # one block says nothing
    assert scheduler.costs.block_in == pytest.approx(0.25, rel=0.01)
    assert not scheduler._swap_pays(seq)
    engine.step()
    assert not scheduler.kv.promote, "copying in is dearer than computing"
    drain(engine)


def first_tokens(policy, requests, max_num_seqs=2):
    """The requests (name, prompt's length, further fields) in the order of their first tokens."""
    engine = make_engine(
        num_blocks=256, max_num_batched_tokens=32, max_num_seqs=max_num_seqs,
        scheduling_policy=policy,
    )  # fmt: skip
    rng, order = random.Random(0), []
    for name, length, options in requests:
        add(engine, name, random_prompt(rng, length), 4, **options)
    while engine.has_work:
        for name, _ in engine.step():
            if name not in order:
                order.append(name)
    assert_empty(engine)
    return order


def test_under_fair_shares_a_client_waits_behind_itself():
    """A client with 50 long prompts, and two that come after it with a short one each."""
    hog = [(f"hog-{i}", 60, {"client": "hog"}) for i in range(50)]
    late = [("a", 8, {"client": "a"}), ("b", 8, {"client": "b"}), ("a-2", 8, {"client": "a"})]
    assert first_tokens("fcfs", hog + late)[-3:] == ["a", "b", "a-2"]
    order = first_tokens("fair", hog + late)
    assert max(order.index(name) for name in ("a", "b", "a-2")) < 6
    assert [name for name in order if "hog" in name] == [name for name, _, _ in hog]


def test_under_fair_shares_clients_get_as_many_tokens_each():
    """One asks for prompts four times as long as the other: a quarter as many are served."""
    many = [(f"long-{i}", 64, {"client": "long"}) for i in range(20)]
    many += [(f"short-{i}", 13, {"client": "short"}) for i in range(20)]
    order = first_tokens("fair", many, max_num_seqs=1)
    half = order[:20]
    assert 3 <= sum("long" in name for name in half) <= 6


def test_under_fair_shares_a_request_that_moves_does_not_wait_behind_its_client_again():
    hog = [(f"hog-{i}", 60, {"client": "hog"}) for i in range(20)]
    moved = [("moved", 60, {"client": "hog", "moves": 1})]
    assert first_tokens("fair", hog + moved).index("moved") < 6


def test_fair_shares_charge_for_what_a_client_got_and_forget_who_is_idle():
    shares = FairShares()
    assert shares.arrive("a", 1000) == 0 and shares.arrive("b", 10) == 0
    shares.give_back("a", 990)  # it asked for much and took little
    assert shares.arrive("a", 10) == shares.arrive("b", 10) == 10
    shares.serve(10)
    assert shares.arrive("c", 5) == 10  # who comes anew is neither before the others nor behind
    shares.serve(20)
    shares.serve(25)
    assert not shares._ends
