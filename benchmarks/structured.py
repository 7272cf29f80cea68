"""What forced tokens save, and what grammars cost those beside them.

    python -m benchmarks.structured [MODEL]

First JSON with fixed keys, by 1 and by 8 sequences at once, with forced tokens and without; the
tokens must be the same. Then 8 sequences that nothing constrains, beside 8 more of that kind, and
beside 8 that a grammar constrains, which forces nothing. Medians of 7 alternating runs each.
"""

import statistics
import sys
import time

from manta import LLM, SamplingParams, StructuredOutputsParams
from workers import grammar_table

RUNS = 7
NAMES = ("customer_name", "delivery_address", "postal_code", "phone_number", "order_number")
VALUES = {"type": "string", "pattern": "^[a-z]{3}$"}
FIXED = {
    "type": "object", "properties": dict.fromkeys(NAMES, VALUES), "required": NAMES,
    "additionalProperties": False,
}  # fmt: skip
LONG = r"([a-z]{1,9} ){500,1000}"


def seconds(llm: LLM, params: list[SamplingParams]) -> tuple[float, list[list[int]]]:
    """What it takes to generate, and the tokens."""
    begun = time.perf_counter()
    outputs = llm.generate(["The order:"] * len(params), params, use_tqdm=False)
    return time.perf_counter() - begun, [output.outputs[0].token_ids for output in outputs]


def fixed_keys(llm: LLM, batch: int) -> None:
    """Print a line of the first table."""
    outputs = StructuredOutputsParams(json=FIXED, disable_any_whitespace=True)
    params = [
        SamplingParams(seed=seed, max_tokens=300, structured_outputs=outputs)
        for seed in range(batch)
    ]
    taken: dict[int, list[float]] = {grammar_table.MOST_FORCED: [], 0: []}
    most, steps, found = grammar_table.MOST_FORCED, {}, []
    for _ in range(RUNS):
        for grammar_table.MOST_FORCED, times in taken.items():
            before = llm.engine.scheduler.stats.steps
            took, tokens = seconds(llm, params)
            times.append(took)
            found.append(tokens)
            steps[grammar_table.MOST_FORCED] = llm.engine.scheduler.stats.steps - before
    grammar_table.MOST_FORCED = most
    assert all(tokens == found[0] for tokens in found)
    with_, without = (statistics.median(times) for times in taken.values())
    total = sum(map(len, found[0]))
    print(
        f"batch {batch}: {total} tokens, {steps[most]} steps with forced tokens and {steps[0]}"
        f" without: {total / with_:.0f} and {total / without:.0f} tokens/s, {without / with_:.2f}"
        " times as fast"
    )


def neighbours(llm: LLM) -> None:
    """Print the second table."""
    free = SamplingParams(max_tokens=100, ignore_eos=True, seed=1)
    outputs = StructuredOutputsParams(regex=LONG)
    bound = SamplingParams(max_tokens=100, seed=1, structured_outputs=outputs)
    taken: dict[str, list[float]] = {"free": [], "constrained": []}
    for _ in range(RUNS):
        for (_, times), others in zip(taken.items(), (free, bound), strict=True):
            took, tokens = seconds(llm, [free] * 8 + [others] * 8)
            assert all(len(one) == 100 for one in tokens)
            times.append(took)
    alone, beside = (statistics.median(times) for times in taken.values())
    print(
        f"8 free sequences get {800 / alone:.0f} tokens/s beside 8 free ones, {800 / beside:.0f}"
        f" beside 8 constrained ones: {(1 - alone / beside) * 100:.1f} % less"
    )


def main() -> None:
    """Print both."""
    llm = LLM(*sys.argv[1:], use_tqdm_on_load=False, enable_prefix_caching=False)
    seconds(llm, [SamplingParams(max_tokens=8)])
    for batch in (1, 8):
        fixed_keys(llm, batch)
    neighbours(llm)


if __name__ == "__main__":
    main()
