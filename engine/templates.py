"""Chat templates: Jinja as transformers sets it up for them, in a sandbox.

Templates come with checkpoints, so what they see and may call is what transformers gives them
(``transformers.utils.chat_template_utils``), and no more.
"""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

from engine.errors import RequestError


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The compiled template and the variables that it reads.

    Raises RequestError for one that is no valid Jinja.
    """
    try:
        environment = _environment()
        variables = jinja2.meta.find_undeclared_variables(environment.parse(template))
        return environment.from_string(template), frozenset(variables)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"chat_template, line {error.lineno}: {error.message}") from None


@functools.lru_cache(maxsize=64)
def literal_text(template: str) -> str:
    """What the template writes itself: its text and its strings, with NUL between them."""
    tree = _environment().parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    constants = (node.value for node in tree.find_all(jinja2.nodes.Const))
    return "\0".join(texts | {value for value in constants if isinstance(value, str)})


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _Dict()
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training. Here it is its body, in a scope of
    its own as there: what is set in it is not seen after it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Attributes that begin with an underscore lead out of the sandbox."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        attributes = dict(*given, **values)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace's attributes must not begin with an underscore, got {name!r}"
        )


class _Dict:
    """``dict`` without what hangs on the class."""

    fromkeys: Callable[..., dict[Any, Any]] = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would write < and > for pages of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
