"""The dashboard's arithmetic, in Node: percentiles as Prometheus has them, and counters that begin
anew."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "router" / "page"
BOUNDS = [0.001, 0.01, 0.1, 1.0, 10.0]


def in_node(program: str, *values: Any) -> Any:
    """What a program returns that has the page's functions, and these as ``v``."""
    script = f"""
        import * as c from {json.dumps((PAGE / "counters.js").as_uri())};
        import * as f from {json.dumps((PAGE / "format.js").as_uri())};
        const v = {json.dumps(values)};
        console.log(JSON.stringify((() => {{ {program} }})()));
    """
    command = ["node", "--input-type=module", "-e", script]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def answer(source: str, **values: float | list[int]) -> dict[str, Any]:
    """An answer of /dashboard/data with counters and histograms of one engine."""
    metrics = []
    for name, value in values.items():
        counts = value if isinstance(value, list) else []
        total = 0.0 if isinstance(value, list) else value
        sample = {"labels": [], "value": total, "counts": counts}
        metrics.append({"name": name, "labels": [], "samples": [sample], "bounds": BOUNDS})
    return {"engines": [], "sources": [{"labels": {"engine": source}, "metrics": metrics}]}


def by_prometheus(q: float, counts: list[int]) -> float:
    """histogram_quantile: linear within the bucket; the last bound beyond all of them."""
    rank, seen = q * sum(counts), 0
    for i, bound in enumerate(BOUNDS):
        if seen + counts[i] >= rank:
            low = BOUNDS[i - 1] if i else 0.0
            return low + (bound - low) * (rank - seen) / counts[i] if counts[i] else bound
        seen += counts[i]
    return BOUNDS[-1]


def test_percentiles_are_those_of_prometheus() -> None:
    draw = random.Random(1)
    cases = []
    for _ in range(200):
        before = [draw.randrange(50) for _ in range(6)]
        new = [draw.choice([0, 0, 1, draw.randrange(100)]) for _ in range(6)]
        if sum(new):
            cases.append((draw.choice([0.5, 0.9, 0.99]), before, new))
    data = [
        (q, answer("e", h=before), answer("e", h=[a + b for a, b in zip(before, new, strict=True)]))
        for q, before, new in cases
    ]
    found = in_node(
        "return v[0].map(([q, then, now]) =>"
        " c.quantile(c.read(now, 2), c.read(then, 0), q, 'h'));", data
    )  # fmt: skip
    assert found == pytest.approx([by_prometheus(q, new) for q, _, new in cases])
    assert in_node("return c.quantile(c.read(v[0], 2), c.read(v[0], 0), 0.5, 'h')",
                   answer("e", h=[1, 2, 3, 0, 0, 0])) is None  # fmt: skip


def test_an_engine_that_begins_anew_counts_from_nothing() -> None:
    then, same, again = answer("a", n=100), answer("a", n=130), answer("a", n=20)
    other = answer("b", n=7)
    both = {"engines": [], "sources": same["sources"] + other["sources"]}
    program = "return v[1].map((now) => c.rate(c.read(now, 12), c.read(v[0], 2), 'n'));"
    assert in_node(program, then, [then, same, again, other, both]) == [0, 3, 2, 0.7, 3.7]
    assert in_node("return c.sum(c.read(v[0], 0), 'n', 'b')", both) == 7
    assert in_node("return c.sum(c.read(v[0], 0), 'none')", both) is None


def test_numbers_are_short() -> None:
    assert in_node("return v[0].map(f.count)", [0, 7, 0.123, 12.34, 123.4, 9999, 12345, 2.5e6]) == [
        "0", "7", "0.12", "12.3", "123", "9999", "12.3k", "2.50M",
    ]  # fmt: skip
    shown = in_node("return v[0].map(f.seconds)", [0.0004, 0.0123, 0.999, 1.234, 61.23, None])
    assert shown == ["0.4 ms", "12 ms", "999 ms", "1.23 s", "61.2 s", "–"]
    assert in_node("return v[0].map(f.percent)", [0, 0.004, 0.5, 1]) == [
        "0%",
        "0.4%",
        "50%",
        "100%",
    ]
