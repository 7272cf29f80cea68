"""Which engine a request goes to. The engines here are only their figures: a balancer sees no
more of them."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.client import EngineLoad
from router.balance import Balancer, Ticket

BLOCK = 16


@dataclass
class Info:
    engine_id: str
    block_size: int = BLOCK


@dataclass
class Engine:
    """An engine's figures. ``cache`` is what a real one would have: used to count hits."""

    info: Info
    load: EngineLoad = EngineLoad(0, 0, 0, 10_000)
    cache: set[tuple[int, ...]] = field(default_factory=set)

    def compute(self, prompt: list[int]) -> int:
        """Tokens of the prompt that were cached; from now on all are."""
        hits = 0
        for end in range(BLOCK, len(prompt) + 1, BLOCK):
            key = tuple(prompt[:end])
            if key in self.cache:
                hits = end
            self.cache.add(key)
        return hits


def engines(*ids: str) -> list[Any]:
    return [Engine(Info(id)) for id in ids]


def tokens(seed: object, length: int) -> list[int]:
    return random.Random(str(seed)).choices(range(50_000), k=length)


def pick(balancer: Balancer, prompt: list[int], among: list[Any]) -> str:
    """Where a request goes that is over before the next comes."""
    ticket = balancer.choose(prompt, 1, among)
    ticket.ended()
    return ticket.client.info.engine_id


def test_a_conversation_stays_where_it_is() -> None:
    balancer, among = Balancer(), engines("a", "b", "c")
    for number in range(50):
        prompt = tokens(number, 100)
        first = pick(balancer, prompt, among)
        for turn in range(5):
            prompt = prompt + tokens((number, turn), 60)
            assert pick(balancer, prompt, among) == first


def test_first_sights_spread_evenly_and_processes_agree() -> None:
    among = engines("a", "b", "c", "d")
    prompts = [tokens(n, 10 + n % 200) for n in range(2000)]
    one, other = Balancer(), Balancer()
    chosen = [pick(one, prompt, among) for prompt in prompts]
    shuffled = [among[2], among[0], among[3], among[1]]
    assert chosen == [pick(other, prompt, shuffled) for prompt in prompts]
    assert all(400 < count < 600 for count in Counter(chosen).values())


def test_shared_beginnings_meet_though_their_ends_differ() -> None:
    """Each of two processes sees half of the requests; a beginning has one home for both."""
    among = engines("a", "b", "c")
    processes = [Balancer(), Balancer()]
    for number in range(30):
        system = tokens(number, 200)
        homes = {
            pick(processes[user % 2], system + tokens((number, user), 50), among)
            for user in range(10)
        }
        assert len(homes) == 1


def test_processes_agree_though_each_has_work_that_the_other_does_not_see() -> None:
    among = engines("a", "b", "c", "d")
    processes = [Balancer(), Balancer()]
    held = [
        process.choose(tokens(seed, 40), 3, among)
        for seed, process in zip((0, 2), processes, strict=True)
    ]
    assert held[0].client is not held[1].client
    for ticket in held:
        ticket.started()
    prompts = [tokens(("new", n), 100) for n in range(300)]
    one, other = ([pick(process, prompt, among) for prompt in prompts] for process in processes)
    assert sum(x == y for x, y in zip(one, other, strict=True)) == 300


def test_few_move_when_an_engine_comes_or_goes() -> None:
    prompts = [tokens(n, 100) for n in range(1000)]
    three, four = engines("a", "b", "c"), engines("a", "b", "c", "d")
    fresh = [pick(Balancer(), prompt, three) for prompt in prompts]
    grown = [pick(Balancer(), prompt, four) for prompt in prompts]
    moved = [(old, new) for old, new in zip(fresh, grown, strict=True) if old != new]
    assert {new for _, new in moved} == {"d"} and 180 < len(moved) < 320
    # Those that were served before stay, wherever a newcomer would have them.
    balancer = Balancer()
    for prompt in prompts:
        pick(balancer, prompt, three)
    assert [pick(balancer, prompt, four) for prompt in prompts] == fresh
    # And when c goes, only what it had moves, to all who are left.
    left = [pick(balancer, prompt, three[:2]) for prompt in prompts]
    for old, new in zip(fresh, left, strict=True):
        assert new == old or (old == "c" and new in "ab")
    orphans = Counter(new for old, new in zip(fresh, left, strict=True) if old == "c")
    assert min(orphans.values()) > 0.3 * orphans.total()


def test_one_popular_beginning_is_not_one_busy_engine() -> None:
    """All requests share a prefix, and none ends: both engines get their part, and the second
    costs one prefill of the prefix, not many."""
    balancer, among = Balancer(), engines("a", "b")
    system = tokens("system", 1000)
    held = [balancer.choose(system + tokens(n, 20), 1, among) for n in range(64)]
    counts = Counter(ticket.client.info.engine_id for ticket in held)
    assert min(counts.values()) >= 20
    uncached = 0
    for n, ticket in enumerate(held):
        prompt = system + tokens(n, 20)
        uncached += len(prompt) - ticket.client.compute(prompt)  # type: ignore[attr-defined]
    assert uncached < 2 * 1000 + 64 * 40


def test_balance_and_hits_under_skew() -> None:
    """Zipf-like popularity of 40 prefixes, sequences that last: no engine has twice another's
    work, and nearly all that can be found in a cache is."""
    chance = random.Random(1)
    balancer, among = Balancer(), engines("a", "b", "c", "d")
    prefixes = [tokens(("p", n), 512) for n in range(40)]
    weights = [1 / (rank + 1) for rank in range(40)]
    under_way: list[Ticket] = []
    work: Counter[str] = Counter()
    hits = total = 0
    for number in range(1500):
        prompt = chance.choices(prefixes, weights)[0] + tokens(number, 32)
        ticket = balancer.choose(prompt, 1, among)
        cached = ticket.client.compute(prompt)  # type: ignore[attr-defined]
        ticket.started()
        hits, total = hits + cached, total + 512
        work[ticket.client.info.engine_id] += len(prompt) - cached + 64
        under_way.append(ticket)
        if len(under_way) > 32:
            under_way.pop(chance.randrange(len(under_way))).ended()
    assert max(work.values()) < 1.6 * min(work.values()), work
    assert hits / total > 0.9


def test_a_full_or_waiting_engine_is_passed_by() -> None:
    prompt = tokens("x", 640)
    for load in (
        EngineLoad(4, 30, 20_000, 5000),  # a queue
        EngineLoad(60, 0, 0, 0),  # no free block
    ):
        balancer, among = Balancer(), engines("a", "b")
        home = pick(balancer, prompt, among)
        away = "b" if home == "a" else "a"
        assert pick(balancer, prompt, among) == home
        next(e for e in among if e.info.engine_id == home).load = load
        assert pick(balancer, prompt, among) == away


def test_a_burst_within_a_step_is_spread() -> None:
    """The engines' own figures do not change meanwhile; what was sent counts at once."""
    balancer, among = Balancer(), engines("a", "b", "c", "d")
    tickets = [balancer.choose(tokens(n, 200), 1, among) for n in range(80)]
    counts = Counter(ticket.client.info.engine_id for ticket in tickets)
    assert max(counts.values()) - min(counts.values()) <= 8
    for ticket in tickets:
        ticket.started()
        ticket.ended()
        ticket.ended()
    assert all((own.sequences, own.queued_tokens) == (0, 0) for own in balancer._engines.values())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1023, 1024, 1025, 30_000])
def test_prompts_of_every_length(length: int) -> None:
    balancer, among = Balancer(remembered=5000), engines("a", "b", "c")
    prompt = tokens("p", length)
    home = pick(balancer, prompt, among)
    assert all(pick(balancer, prompt, among) == home for _ in range(3))
    assert pick(balancer, [*prompt[:-1], prompt[-1] + 1], among) in "abc"


def test_memory_is_bounded() -> None:
    balancer, among = Balancer(remembered=100), engines("a", "b")
    for n in range(50):
        pick(balancer, tokens(n, 160), among)
    assert len(balancer._holders) == 100
