"""Grammars of the slots: what one comes to does nothing to the others of its step."""

from pathlib import Path

import torch

from engine.extras import Extras
from engine.grammar import Grammar
from engine.matcher import Grammars
from engine.plan import Admit, ints
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import save_byte_tokenizer
from workers.grammar_table import GrammarTable

VOCAB, END = 128, 1


def test_a_grammar_that_fails_stops_no_neighbour(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_byte_tokenizer(tmp_path))
    grammars = Grammars(tokenizer, VOCAB)
    table = GrammarTable(VOCAB, torch.device("cpu"), lambda: grammars)
    a, b, c = (tokenizer.encode(letter)[-1] for letter in "abc")

    def admit(slot: int, kind: str, text: str) -> None:
        table.admit(
            Admit(
                slot, ints([a]), 1, SamplingParams(logprobs=0), 0, stop_ids=(END,),
                extras=Extras(grammar=Grammar(kind, text)), name=f"{slot}",
            )
        )  # fmt: skip

    def allowed(slots: list[int], position: int, tokens: list[int]) -> list[list[int]]:
        logits = torch.zeros(len(slots), VOCAB)
        learn = table.on_logits(logits, ints(slots), ints([position] * len(slots)))
        assert learn is not None and learn(ints(tokens), {}) == {}
        return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]

    admit(0, "grammar", "start: nothing_of_this_name")
    admit(1, "regex", "bc")
    admit(2, "regex", "a")
    admit(3, "regex", "c(b|a)")
    # The first ends with an error, and the third with its end; the others go on.
    assert allowed([0, 1, 2, 3], 1, [7, b, a, c]) == [[], [b], [a], [c]]
    assert allowed([1, 2, 3], 2, [c, END, a]) == [[c], [END], sorted([a, b])]
    assert allowed([1, 3], 3, [END, END]) == [[END], [END]]
