"""Grammars: what is refused, and that what is allowed is what the grammar says."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from engine.errors import RequestError
from engine.grammar import Grammar
from engine.grammar_trial import GrammarTrial
from engine.matcher import Grammars
from engine.structured_outputs import StructuredOutputsParams
from engine.tokenizer import Tokenizer
from tests.support.grammar_walks import allowed, copy_of, walk
from tests.support.schemas import SchemaGenerator
from tests.support.tiny_tokenizer import save_byte_tokenizer, save_tokenizer
from tests.unit import text_checkpoints

VOCAB = 128


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Tokenizer.load(save_byte_tokenizer(folder, request.param == "sentencepiece"))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB)


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return tokenizer.backend.byte_decoder.all


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return GrammarTrial(str(save_byte_tokenizer(tmp_path_factory.mktemp("tried"))), None, VOCAB)


def grammar(**params):
    return Grammar.of(StructuredOutputsParams(**params))


# ---- what is allowed ----


@pytest.mark.parametrize(
    "choices", [["a"], ["ab", "abc", "b"], ['{"', "12", "", "1"], ["a\nb/", 'q"\\', "a\n"]], ids=str
)
def test_a_choice_allows_its_prefixes_and_nothing_else(grammars, pieces, choices):
    start = grammars.matcher(grammar(choice=choices))
    wanted = [choice.encode() for choice in choices]
    seen, found = [(start, b"")], set()
    while seen:
        matcher, text = seen.pop()
        ids = allowed(grammars, matcher)
        assert (grammars.end in ids) == matcher.accepting == (text in wanted)
        assert len(ids)
        for token in ids[ids != grammars.end].tolist():
            longer = text + pieces[token]
            assert any(choice.startswith(longer) for choice in wanted), (text, pieces[token])
            following = copy_of(matcher)
            assert following.consume([token])
            seen.append((following, longer))
        found |= {text} & set(wanted)
    assert found == set(wanted)


@pytest.mark.parametrize(
    "regex",
    [
        "[a-c]{2,5}x?", r"\d{3}-\d{4}", "(a|b)*c/d", "^(yes|no)$", r"a\/b[/]", '"[^"\n]{0,9}"',
        "(?i)true|FALSE", r"(?P<x>1+)\.\s?\w", "x{0}", ".{3}",
    ],
)  # fmt: skip
def test_what_a_regex_allows_it_matches(grammars, pieces, tokenizer, regex):
    start = grammars.matcher(grammar(regex=regex))
    rng = np.random.default_rng(0)
    outputs = [walk(grammars, copy_of(start), pieces, rng) for _ in range(20)]
    assert None not in outputs
    for output in outputs:
        assert re.fullmatch(regex, tokenizer.decode(output))


def test_what_a_schema_allows_is_valid(grammars, pieces, tokenizer):
    rng, draws = np.random.default_rng(0), SchemaGenerator(random.Random(0))
    whole = refused = 0
    for _ in range(300):
        schema = draws.draw()
        try:
            start = grammars.matcher(grammar(json=schema))
        except RequestError as error:
            refused += 1
            assert str(error).startswith("structured_outputs.json: ")
            continue
        for _ in range(2):
            output = walk(grammars, copy_of(start), pieces, rng)
            if output is not None:
                check_schema(schema, tokenizer.decode(output))
                whole += 1
    assert refused < 100 and whole > 400


def check_schema(schema, text):
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))


def test_a_key_cannot_be_written_in_another_way(grammars, tokenizer):
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    start = grammars.matcher(grammar(json={"type": "object", **schema}))
    for text, ok in [
        ('{"a":1}', True), ('{"b":"x"}', True), ('{"a":"x"}', False), ('{"\\u0061":"x"}', False)
    ]:  # fmt: skip
        assert copy_of(start).consume(tokenizer.encode(text, False)) == ok, text


def test_grammars_in_both_notations(grammars, pieces, tokenizer):
    for text in (
        'start: "a" rest*\nrest: "b" | "(" start ")"',
        'root ::= "a" ("b" | "(" root ")")*',
    ):
        start = grammars.matcher(grammar(grammar=text))
        rng = np.random.default_rng(1)
        outputs = [walk(grammars, copy_of(start), pieces, rng) for _ in range(20)]
        texts = {tokenizer.decode(output) for output in outputs if output is not None}
        assert len(texts) > 3
        for one in texts:
            while one != (one := re.sub(r"\(ab*\)", "b", one)):
                pass
            assert re.fullmatch("ab*", one)


TAG = {
    "structures": [
        {"begin": "<f=a>", "schema": {"const": 12}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
    ],
    "triggers": ["<f"],
}


FORMAT: dict = {
    "type": "sequence",
    "elements": [
        {"type": "tag", "begin": "", "end": "</t>",
         "content": {"type": "any_text", "excludes": ["no"]}},
        {"type": "or", "elements": [
            {"type": "const_string", "value": "yes"}, {"type": "regex", "pattern": "[0-9]{2}"},
            {"type": "grammar", "grammar": 'start: "(" start? ")"'},
        ]},
        {"type": "tags_with_separator", "separator": ";", "tags": [
            {"begin": "<", "end": ">", "content": {"type": "json_schema",
                                                   "json_schema": {"const": 1}}},
        ]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "text, ok",
    [
        ("any <thing</t>yes", True), ("</t>07<1>;<1>", True), ("a</t>((()))<1>", True),
        ("a</t>maybe", False), ("a no</t>yes", False), ("a</t>yes</t>", False),
        ("</t>07<1><1>", False), ("</t>7", False), ("a</t>(()", False),
    ],
)  # fmt: skip
def test_formats_are_made_of_each_other(grammars, tokenizer, text, ok):
    matcher = grammars.matcher(grammar(structural_tag={"format": FORMAT}))
    assert (matcher.consume(tokenizer.encode(text, False)) and matcher.accepting) == ok


def test_a_trigger_begins_a_structure(grammars, tokenizer):
    start = grammars.matcher(grammar(structural_tag=TAG))
    for text, ok, ends in [
        ("free text: < f", True, True), ("x<f", True, False), ("<f=c", False, False),
        ("x<f=a>12</f> <f=b>true</f>.", True, True),
        ("<f=a>true", False, False), ("<f=a>12<f", False, False),
    ]:  # fmt: skip
        matcher = copy_of(start)
        assert matcher.consume(tokenizer.encode(text, False)) == ok, text
        assert not ok or matcher.accepting == ends, text


def test_a_trigger_may_be_a_token_that_is_no_text():
    tokenizer = Tokenizer.load(text_checkpoints.byte_level())
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    for begin in ("<tool call>", "<|im_start|>"):  # one is not special, but llguidance has it so
        tag = {"structures": [{"begin": begin + "(", "schema": {}, "end": "<|im_end|>"}]}
        start = grammars.matcher(grammar(structural_tag={**tag, "triggers": [begin]}))
        token, end = (
            tokenizer.backend.token_to_id(begin),
            tokenizer.backend.token_to_id("<|im_end|>"),
        )
        matcher = copy_of(start)
        assert matcher.consume([token]) and not matcher.accepting
        assert matcher.consume(tokenizer.encode("(1", False)) and not matcher.accepting
        assert matcher.consume([end]) and matcher.accepting
        assert not copy_of(start).consume([token, *tokenizer.encode("1", False)])


def test_a_rebuilt_matcher_goes_on_as_the_first(grammars, pieces):
    start = grammars.matcher(grammar(json={"type": "object", "properties": {"a": {"items": {}}}}))
    output = walk(grammars, copy_of(start), pieces, np.random.default_rng(3))
    first = copy_of(start)
    for number, token in enumerate(output):
        first.consume([token])
        again = copy_of(start)
        again.consume(output[: number + 1])
        assert allowed(grammars, first).tolist() == allowed(grammars, again).tolist()


def test_forced_tokens_are_those_of_the_tokenizer(grammars, tokenizer):
    schema = {"type": "object", "properties": {"name": {"const": "abc"}}, "required": ["name"]}
    matcher = grammars.matcher(
        grammar(json={**schema, "additionalProperties": False}, disable_any_whitespace=True)
    )
    text = '{"name":"abc"}'
    forced = matcher.forced_tokens()
    while forced:
        assert matcher.consume(forced)
        text = text.removeprefix(tokenizer.decode(forced))
        forced = matcher.forced_tokens()
    assert text == "" and matcher.accepting


def test_several_masks_are_those_of_each(grammars):
    starts = [grammars.matcher(grammar(regex=one)) for one in ("a+", "[0-9]", ".*", "(b|c)d")]
    together = grammars.masks(starts)
    assert together.shape == (4, grammars.end // 32 + 1) and together.any(1).all()
    for row, matcher in enumerate(starts):
        assert together[row].tolist() == grammars.masks([matcher])[0].tolist()
    assert grammars.masks([]).shape[0] == 0


def test_what_a_matcher_cannot_take_is_an_error_and_allows_nothing(grammars, tokenizer):
    matcher = grammars.matcher(grammar(regex="ab"))
    assert not matcher.error
    assert not matcher.consume(tokenizer.encode("x", False)) and matcher.error
    assert not grammars.masks([matcher]).any()


def test_models_with_more_tokens_than_their_tokenizer_and_with_fewer(tokenizer):
    for vocab in (100, tokenizer.vocab_size, 200):
        grammars = Grammars(tokenizer, vocab)
        ids = allowed(grammars, grammars.matcher(grammar(regex=".*")))
        assert ids[-1] == grammars.end >= vocab
        assert ids[-2] < tokenizer.vocab_size


# ---- what is refused ----


@pytest.mark.parametrize(
    "params, message",
    [
        ({}, "must have one of json, regex, .*; got none"),
        ({"json_object": False}, "got none"),
        ({"regex": "a", "choice": ["a"]}, "got regex and choice"),
        ({"choice": []}, "choice must be a list of strings"),
        ({"choice": "abc"}, "choice must be a list of strings"),
        ({"choice": ["a", 1]}, "choice must be a list of strings"),
        ({"regex": 5}, "regex must be a string"),
        ({"json": 5}, "json must be a JSON object, or one as a string"),
        ({"json_object": 1}, "json_object must be true or false"),
        ({"regex": "a", "disable_additional_properties": True}, "additional_properties is not"),
    ],
)
def test_wrong_parameters_are_refused(params, message):
    with pytest.raises(RequestError, match=f"structured_outputs.*{message}"):
        StructuredOutputsParams(**params)


def test_parameters_as_a_mapping():
    assert StructuredOutputsParams.of({"regex": "a", "json": None}).regex == "a"
    assert StructuredOutputsParams.of({}) is StructuredOutputsParams.of(None) is None
    with pytest.raises(RequestError, match="structured_outputs has no 'regexp'; it has choice"):
        StructuredOutputsParams.of({"regexp": "a"})


@pytest.mark.parametrize(
    "schema, named",
    [
        ({"items": {"uniqueItems": True}}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"contains": {}}, "contains"),
        ({"if": {}, "then": {}}, "if"),
        ({"propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"dependencies": {"a": ["b"]}}, "dependencies"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"oneOf": [{}, {"type": "string"}]}, "oneOf"),
        ({"type": "string", "format": "iri"}, "format: iri"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-around"),
        ({"patternProperties": {"^a": {}, "b$": {"type": "null"}}}, "disjoint"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"allOf": [{"required": ["a"], "minProperties": 3}]}, "minProperties"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "x-guidance"),
        ({"properties": {"a": {"disallow": "string"}}}, "disallow"),
        ({"const": "\x01"}, "const"),
        ({"properties": {"\x1f": {}}}, "properties"),
        ({"type": "strong"}, "strong"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"$ref": "http://example.org/x.json"}, "example.org"),
        ({"minLength": 5, "maxLength": 2, "type": "string"}, "minLength"),
        ('{"type": ', "cannot be read"),
        ("[1]", "must be an object"),
        ("false", "allows nothing"),
        ('{"const": NaN}', "cannot be read"),
        ("[" * 100_000, "too deep"),
        (" " * (1 << 19), "characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_schemas_that_nobody_could_enforce_are_refused_by_name(grammars, schema, named):
    with pytest.raises(RequestError) as error:
        grammars.matcher(grammar(json=schema))
    assert str(error.value).startswith("structured_outputs.json") and named in str(error.value)


@pytest.mark.parametrize(
    "schema",
    [{"uniqueItems": False}, {"title": "uniqueItems", "properties": {"not": {"type": "string"}}},
     {"enum": ["not", {"if": 1}]}, {"default": {"uniqueItems": True}}, True, {}, "true",
     {"oneOf": [{"type": "string"}, {"type": "null"}]}, {"required": ["a"], "minProperties": 2}],
    ids=str,
)  # fmt: skip
def test_what_asks_for_nothing_passes(grammars, schema):
    if schema is True:
        schema = "true"
    assert not grammars.matcher(grammar(json=schema)).error


@pytest.mark.parametrize(
    "params, message",
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": r"\bfoo"}, "lookarounds"),
        ({"regex": "a\ud800"}, "cannot be read"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": 'root ::= ("a"'}, "no GBNF"),
        ({"grammar": 'start: "a" <nope>'}, "unknown special token"),
        ({"grammar": "start: x\nx[temperature=0.5]: /a/"}, "attribute temperature"),
        ({"structural_tag": "[]"}, "structures and triggers"),
        ({"structural_tag": {"format": {}}}, "format must have a type of const_string"),
        ({"structural_tag": {"format": {"type": "regex"}}}, "format.pattern must be a string"),
        ({"structural_tag": {"format": {"type": "any_text", "x": 1}}}, "any_text has no 'x'"),
        ({"structural_tag": {"format": {"type": "or", "elements": []}}}, "elements must be a list"),
        (
            {
                "structural_tag": {
                    "format": {
                        "type": "sequence",
                        "elements": [{"type": "any_text"}, {"type": "const_string", "value": "a"}],
                    }
                }
            },
            r"elements\[0\]: any_text must be what is last",
        ),
        (
            {
                "structural_tag": {
                    "format": {"type": "grammar", "grammar": "start: x\nx[stop=1]: /a/"}
                }
            },
            "attribute stop",
        ),
        ({"structural_tag": {**TAG, "triggers": []}}, "triggers must be"),
        ({"structural_tag": {**TAG, "triggers": ["<g"]}}, "begin must start with"),
        ({"structural_tag": {**TAG, "structures": [{"begin": "<f", "x": 1}]}}, "no more"),
        ({"json": {}, "whitespace_pattern": "(?=a)"}, "look-around"),
    ],
    ids=str,
)
def test_grammars_that_are_wrong_are_refused(grammars, params, message):
    with pytest.raises(RequestError, match=f"structured_outputs.*{message}"):
        grammars.matcher(grammar(**params))


def test_tokenizers_whose_tokens_are_no_bytes_are_refused(tmp_path):
    words = Grammars(Tokenizer.load(save_tokenizer(tmp_path, 50)), 50)
    with pytest.raises(RequestError, match="tokens that are not bytes"):
        words.matcher(grammar(regex="a"))


# ---- the trial ----


def chain(link, last):
    return (
        "start: r0\n" + "\n".join(link.format(i, i + 1) for i in range(4000)) + f"\nr4000: {last}"
    )


HOSTILE = {
    "deep rules": {"grammar": chain('r{}: "x" r{} "y"', '"a"')},  # these two overflow the stack
    "deep references": {
        "json": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(4000)},
                 "$ref": "#/$defs/d0"},
    },
    "doubling": {"grammar": "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(60))
                 + '\nT60: "a"'},
    "intersections": {"json": {"allOf": [{"type": "string", "pattern": f"(a{{{i}}}|b)"}
                                         for i in range(40)]}},
    "multiples": {"json": {"allOf": [{"type": "integer", "multipleOf": n}
                                     for n in (301, 307, 13)]}},
    "overlaps": {"json": {"patternProperties": {f"^a{i}[a-z]*$": {} for i in range(300)}}},
    "ambiguity": {"grammar": "start: e\ne: " + " | ".join("e " * (i % 5 + 2) for i in range(300))
                  + ' | "a"'},
    "optional": {"regex": "a?" * 20_000},
    "options": {"json": {"properties": {f"p{i}": {} for i in range(2000)}}},
    "forced": {"grammar": 'start: x{300}\nx: y{300}\ny: "a"{300}'},
    "expression": {"regex": "(a?){1000}a{1000}"},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_in_time(trial, name):
    params = StructuredOutputsParams(**HOSTILE[name])
    for _ in range(2):  # the verdict is kept
        with pytest.raises(RequestError, match="structured_outputs.*(too complex|too big|fuel)"):
            trial.check(params)
    trial.check(StructuredOutputsParams(regex="a"))


def test_what_passes_a_trial_has_room_to_spare(trial, grammars):
    """The trial's stack is smaller than any other: what this one takes it does not."""
    chained = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(300)} | {"d300": {}}
    params = StructuredOutputsParams(json={"$defs": chained, "$ref": "#/$defs/d0"})
    grammars.matcher(Grammar.of(params))
    with pytest.raises(RequestError, match="too complex: it is too deep"):
        trial.check(params)


def test_a_trial_says_what_a_grammar_is_refused_for(trial):
    trial.check(StructuredOutputsParams(json={"type": "object"}))
    with pytest.raises(RequestError, match="structured_outputs.json: .*uniqueItems"):
        trial.check(StructuredOutputsParams(json={"uniqueItems": True}))
    with pytest.raises(RequestError, match="structured_outputs.regex is too complex: .*forced"):
        trial.check(StructuredOutputsParams(regex="aé"))  # the vocabulary has no such bytes
