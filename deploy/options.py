"""Declared options (``engine.config.option``) and vLLM's as arguments of the command line."""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from engine.config import allowed, option_type
from engine.errors import ConfigError
from engine.vllm_options import ALIASES, FOREIGN, SHORT, check

Declared = Iterable[tuple[str, dataclasses.Field[Any]]]  # (title of a group, field)

_NONE = ("None", "")  # words for None, where an option may be that
_UNITS = {
    **dict(zip("kmgt", (10**3, 10**6, 10**9, 10**12), strict=True)),
    **dict(zip("KMGT", (2**10, 2**20, 2**30, 2**40), strict=True)),
}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def with_dashes(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the names of options spelt as ``flag`` does:
    ``--max_model_len=5``. Those after ``--`` stay.

    Raises ConfigError for a part of an option of vLLM's, ``--compilation-config.level``, that
    manta has not.
    """
    spelt: list[str] = []
    for number, word in enumerate(words):
        if word == "--":
            return [*spelt, *words[number:]]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            whole, dot, _ = name[2:].replace("-", "_").partition(".")
            if dot and whole in FOREIGN:
                check(whole, word)
            word = name.replace("_", "-") + equals + value
        spelt.append(word)
    return spelt


def add_options(parser: argparse.ArgumentParser, declared: Declared) -> None:
    """Add an argument for each option but ``model``, which is an argument of its own, and for
    vLLM's other options, which the help does not show.

    What is not given is not in the namespace.
    """
    groups: dict[str, Any] = {}
    names = set()
    for title, f in declared:
        names.add(f.name)
        if f.name == "model":
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, _ = option_type(f)
        choices = f.metadata["choices"]
        text = f"{f.metadata['help']} (default: {_shown(f.default)})".replace("%", "%%")
        if kind is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"metavar": f"{{{','.join(choices)}}}" if choices else _KINDS[kind]}
            if kind is tuple:
                how |= {"action": _Words, "nargs": "+"}
            else:
                how |= {"type": _converter(f)}
        groups[title].add_argument(*_flags(f.name), default=argparse.SUPPRESS, help=text, **how)
    _add_vllm_options(parser, names)


def _add_vllm_options(parser: argparse.ArgumentParser, own: set[str]) -> None:
    parser.epilog = (
        "Names may have underscores, numbers units (1k is 1000, 1K is 1024). Of vLLM's other"
        " options those that ask for what is so anyway are accepted; the others say what there is"
        " instead."
    )
    for name in sorted({*FOREIGN, *ALIASES} - own):
        how: dict[str, Any] = {"action": _Foreign}
        if ALIASES.get(name) in own:
            how = {"type": _word}
        elif FOREIGN[name].flag:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(*_flags(name), default=argparse.SUPPRESS, help=argparse.SUPPRESS, **how)


def _flags(name: str) -> list[str]:
    return [flag(name), SHORT[name]] if name in SHORT else [flag(name)]


class _Words(argparse.Action):
    """One or more words, repeatable; or a list of them as JSON, as vLLM has it."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        words: list[str] = []
        for word in values:
            words += json.loads(word) if _is_list(word) else [word]
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *words])
        if len(values) > 1:
            namespace.several = f"{option} {' '.join(values)}"


def _is_list(word: str) -> bool:
    try:
        return word.startswith("[") and isinstance(json.loads(word), list)
    except ValueError:
        return False


class _Foreign(argparse.Action):
    """The value of an option of vLLM's, checked at once: it may have more words than one."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        check(self.dest, _word(value))


_KINDS = {int: "INT", float: "FLOAT", str: "STR", tuple: "STR"}


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, which is the argument MODEL under vLLM's older name."""
    parser.add_argument("--model", dest="model_option", metavar="MODEL", help="the same as MODEL")


def given_model(args: argparse.Namespace) -> str | None:
    """The model that the command line gave, as an argument or as the option; None if it gave none.

    Raises ConfigError if it gave two, or if the last of several words of another option could be
    meant as the model.
    """
    argument, option = getattr(args, "model", None), args.model_option
    if argument is not None and option is not None:
        raise ConfigError(f"give the model once: it is {argument} and --model {option}")
    model: str | None = option if argument is None else argument
    if model is None and "several" in args:
        raise ConfigError(
            f"{args.several}: which is the model? Give it first: manta serve MODEL {args.several}"
        )
    return model


def given(args: argparse.Namespace, declared: Declared) -> dict[str, Any]:
    """The options that the command line gave, under the names that it gave."""
    values = vars(args)
    names = [f.name for _, f in declared if f.name != "model"]
    return {name: values[name] for name in (*names, *FOREIGN, *ALIASES) if name in values}


def from_words(options: Mapping[str, Any], declared: Declared) -> dict[str, Any]:
    """Options of a file, with words for numbers (``16k``, ``auto``) as on the command line.

    Raises ConfigError.
    """
    fields = {f.name: f for _, f in declared}
    values = dict(options)
    for name, value in options.items():
        if name in fields and isinstance(value, str) and option_type(fields[name])[0] is int:
            try:
                values[name] = _converter(fields[name])(value)
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{name} {error}") from None
    return values


def _shown(default: Any) -> str:
    return (" ".join(default) or "none") if isinstance(default, tuple) else str(default)


def _word(word: str) -> Any:
    """A word as the value that it would be in a YAML file; None as Python writes it."""
    try:
        return None if word in _NONE else yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _integer(word: str) -> int:
    """An integer, or one with a unit as vLLM has them: 1k is 1000 and 1K is 1024."""
    match = re.fullmatch(r"(\d+)(\.\d+)?([kmgtKMGT])", word.strip())
    if match is None:
        return int(word)
    number, fraction, unit = match.groups()
    if fraction is None:
        return int(number) * _UNITS[unit]
    if unit.isupper():
        raise ValueError(f"{word}: a fraction of a power of two")
    return round(float(number + fraction) * _UNITS[unit])


def _converter(f: dataclasses.Field[Any]) -> Any:
    """From a command line's word to the option's value, with an error that says what is allowed."""
    kind, optional = option_type(f)
    parse = _integer if kind is int else kind

    def convert(word: str) -> Any:
        if optional and word in _NONE or word in map(str, f.metadata["unset"]):
            return None
        try:
            return parse(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {allowed(f)}, got {word!r}") from None

    return convert
