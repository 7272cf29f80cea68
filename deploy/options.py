"""Declared options (``engine.config.option``) as arguments of the command line."""

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from engine.config import allowed, option_type

Declared = Iterable[tuple[str, dataclasses.Field[Any]]]  # (title of a group, field)


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, declared: Declared) -> None:
    """Add an argument for each option but ``model``, which is an argument of its own.

    What is not given is not in the namespace.
    """
    groups: dict[str, Any] = {}
    for title, f in declared:
        if f.name == "model":
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, _ = option_type(f)
        choices = f.metadata["choices"]
        text = f"{f.metadata['help']} (default: {_shown(f.default)})".replace("%", "%%")
        if kind is bool:
            groups[title].add_argument(
                flag(f.name),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            groups[title].add_argument(
                flag(f.name),
                action="append" if kind is tuple else "store",
                type=str if kind is tuple else _converter(f, kind),
                default=argparse.SUPPRESS,
                metavar=f"{{{','.join(choices)}}}" if choices else _KINDS[kind],
                help=text,
            )


_KINDS = {int: "INT", float: "FLOAT", str: "STR", tuple: "STR"}


def given(args: argparse.Namespace, declared: Declared) -> dict[str, Any]:
    """The options that the command line gave."""
    values = vars(args)
    return {f.name: values[f.name] for _, f in declared if f.name != "model" and f.name in values}


def _shown(default: Any) -> str:
    return (" ".join(default) or "none") if isinstance(default, tuple) else str(default)


def _converter(f: dataclasses.Field[Any], kind: type) -> Any:
    """From a command line's word to the option's value, with an error that says what is allowed."""

    def convert(word: str) -> Any:
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {allowed(f)}, got {word!r}") from None

    return convert
