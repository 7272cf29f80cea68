"""The tokens that the text for the user came of, however an answer comes."""

import random

import pytest

from engine.outputs import CompletionOutput, Logprob, Piece
from engine.parsing.formats import answer_format
from engine.parsing.parser import Parser
from engine.parsing.parts import Content, Folded
from engine.parsing.source import NO_TAGS, Tags
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from router.text_logprobs import SpelledParts
from tests.support.tiny_tokenizer import save_byte_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look"}}]
CALL = '<tool_call>{"name": "look", "arguments": {"at": "a t"}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def spelled(
    tokenizer: Tokenizer, parses: bool, ids: list[int], cuts: list[int], reason: str
) -> tuple[Folded, str, list[float]]:
    """The parts of an answer that comes in pieces; its text as its tokens have it, and which they
    are: the log-probability of a token is its number."""
    hidden = Tags(["<pad>"]) if parses else NO_TAGS
    form = answer_format("hermes", "qwen3", "", True)
    parser = Parser(form, TOOLS, hidden=hidden) if parses and form else None
    sampling = SamplingParams(logprobs=0, skip_special_tokens=False)
    parts = SpelledParts(tokenizer, sampling, (), parser, hidden)
    output, folded, text, found = CompletionOutput(0, logprobs=[]), Folded(), "", []
    assert output.logprobs is not None
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        for number in range(start, end):
            entry = Logprob(float(number), 1, tokenizer.decode([ids[number]]))
            output.logprobs.append({ids[number]: entry})
        piece = Piece(0, "", ids[start:end], reason if end == len(ids) else None)
        for part, entries in parts.read(output, piece):
            folded.add([part])
            assert isinstance(part, Content) or not entries
            text += "".join(entry.token for entry in entries)
            found += [entry.logprob for entry in entries]
    return folded, text, found


@pytest.mark.parametrize("parses", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        "Hello,  you <b>there</b> <th",
        "<think>\nI think a t.\n</think>\n\nt is <pad>what I say. ",
        "<think>at</think>Let me look.\n" + CALL + "\n",
        CALL + "\nThat is a t.",
    ],
)
def test_the_tokens_of_a_text(tokenizer: Tokenizer, said: str, parses: bool) -> None:
    ids = [*tokenizer.encode(said, False), 2]
    seen = []
    rng = random.Random(said)
    for cuts in [[], list(range(1, len(ids)))] + [
        sorted(rng.sample(range(1, len(ids)), 5)) for _ in range(10)
    ]:
        folded, text, numbers = spelled(tokenizer, parses, ids, cuts, "stop")
        assert text == folded.content
        assert len(set(numbers)) == len(numbers)
        seen.append(numbers)
    assert seen == [seen[0]] * len(seen)
    if parses:  # where it stands, and nowhere else
        begin = said.rfind(folded.content.strip()[:4])
        before = len(tokenizer.encode(said[:begin], False))
        assert seen[0][0] == before
