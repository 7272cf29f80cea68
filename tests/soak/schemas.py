"""A soak of structured output: random JSON schemas on a model with random weights, short of blocks.

    python -m tests.soak.schemas [--schemas 2000] [--seed 0]

Every finished answer must be valid, with and without neighbours that nothing constrains, with n of
1 to 3, while requests are preempted; what is refused is counted by its keyword.
"""

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import jsonschema

from engine.errors import RequestError
from manta import SamplingParams, StructuredOutputsParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.schemas import SchemaGenerator
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_byte_tokenizer

CLOSING = ['"', "}", "]", "</s>"]
AT_ONCE = 100


def soak(schemas: int, seed: int) -> Counter[str]:
    """What became of the answers and of the schemas."""
    folder = Path(tempfile.mkdtemp(prefix="manta-soak-"))
    tokenizer = save_byte_tokenizer(folder / "tokenizer")
    llm = start_llm(TINY_MODELS[0].save(folder), tokenizer, num_gpu_blocks_override=22,
                    block_size=8, max_num_seqs=40)  # fmt: skip
    bias = dict.fromkeys([llm.tokenizer.backend.token_to_id(token) for token in CLOSING], 3)
    draws, found = SchemaGenerator(random.Random(seed)), Counter[str]()
    for first in range(0, schemas, AT_ONCE):
        asked, params = [], []
        for number in range(first, min(first + AT_ONCE, schemas)):
            schema = draws.draw()
            outputs = StructuredOutputsParams(json=schema)
            try:
                llm._trial.check(outputs)
            except RequestError as error:
                found["refused"] += 1
                found["refused: " + re.sub(r"[\d'\"].*", "", str(error))[:70]] += 1
                continue
            for wanted in (outputs, None)[: 1 + (number % 5 == 0)]:
                asked.append(schema if wanted else None)
                params.append(SamplingParams(temperature=1.0, seed=number, n=1 + number % 3,
                                             max_tokens=150, logit_bias=bias,
                                             structured_outputs=wanted))  # fmt: skip
        rng = random.Random(first)
        prompts = [[rng.randrange(3, 120) for _ in range(rng.randint(1, 25))] for _ in params]
        outputs_of = llm.generate(prompts, params, use_tqdm=False)
        for schema, output in zip(asked, outputs_of, strict=True):
            for completion in output.outputs:
                kind = completion.finish_reason if schema else "free"
                found[str(kind)] += 1
                if kind == "stop":
                    checker = jsonschema.FormatChecker()
                    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
                    validator.validate(json.loads(completion.text))
        assert_idle(llm)
    stats = llm.engine.scheduler.stats
    found["preemptions"] = stats.preemptions_swap + stats.preemptions_recompute
    return found


def main() -> None:
    """Run it and say what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemas", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options, started = parser.parse_args(), time.monotonic()
    found = soak(options.schemas, options.seed)
    for name, count in found.most_common():
        print(f"{count:7d} {name}")
    assert not found["error"] and found["stop"] > options.schemas, found
    print(f"Every finished answer is valid ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
