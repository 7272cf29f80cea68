"""What grammars cost a token: the masks, made beside the step, and what is done on it: applying
them, taking the token that was sampled, and asking what it forces.

    python -m benchmarks.grammar [TOKENIZER_FOLDER [VOCAB_SIZE]]

A schema of an address book is matched with the tokens of a text that it allows, by 1, 8 and 32
sequences at once. Times are of this thread's CPU, medians of 7: masks without the executor's other
threads, applying with one thread of PyTorch's.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch

from engine.grammar import Grammar
from engine.matcher import grammars_of
from engine.structured_outputs import StructuredOutputsParams
from engine.tokenizer import Tokenizer
from workers.checkpoint import EMBEDDED_PATH
from workers.kernels import mask_rows

STRING = {"type": "string"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": STRING, "age": {"type": "integer"}, "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": STRING},
        "address": {"type": "object", "properties": {"street": STRING, "city": STRING},
                    "required": ["street", "city"], "additionalProperties": False},
    },
    "required": ["name", "age", "tags", "address"], "additionalProperties": False,
}  # fmt: skip
VALUE = {
    "name": "Ann Smith of the Seine", "age": 41, "email": "ann@example.org",
    "tags": ["writer", "long distance runner"],
    "address": {"street": "12 Long Road, near the old station", "city": "Springfield"},
}  # fmt: skip


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    folder = sys.argv[1] if len(sys.argv) > 1 else str(EMBEDDED_PATH)
    tokenizer = Tokenizer.load(folder)
    vocab_size = int(sys.argv[2]) if len(sys.argv) > 2 else tokenizer.vocab_size
    begun, grammars = time.thread_time(), grammars_of(folder, None, vocab_size)
    assert grammars.tokens
    print(f"vocabulary of {vocab_size}, made ready in {time.thread_time() - begun:.2f} s")
    grammar = Grammar.of(StructuredOutputsParams(json=SCHEMA))
    begun = time.thread_time()
    grammars.matcher(grammar)
    print(f"compiled in {(time.thread_time() - begun) * 1e3:.1f} ms")
    ids = tokenizer.encode(json.dumps(VALUE), add_special_tokens=False)
    for batch in (1, 8, 32):
        rows, logits = torch.arange(batch, dtype=torch.int32), torch.zeros(batch, vocab_size)
        masked, applied = [], []
        for _ in range(7):
            matchers = [grammars.matcher(grammar) for _ in range(batch)]
            beside = on = 0.0
            for token in ids:
                start = time.thread_time()
                masks = np.concatenate([grammars.masks([matcher]) for matcher in matchers])
                made = time.thread_time()
                mask_rows(logits, rows, torch.from_numpy(masks))
                for matcher in matchers:
                    assert matcher.consume([token]), matcher.error
                    matcher.forced_tokens()
                beside += made - start
                on += time.thread_time() - made
            masked.append(beside / len(ids) / batch * 1e6)
            applied.append(on / len(ids) / batch * 1e6)
        print(
            f"batch {batch:2}: the mask {statistics.median(masked):6.1f} us a token beside"
            f" the step, {statistics.median(applied):6.1f} us on it"
        )


if __name__ == "__main__":
    main()
