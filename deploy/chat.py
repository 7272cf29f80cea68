"""``manta chat`` and ``manta complete``: talk to a running server from a terminal or a pipe."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.server_client import DEFAULT_URL, ServerClient
from engine.errors import ConfigError, MantaError

SAMPLING = {
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the likeliest tokens that together have this probability"),
    "top_k": (int, "keep this many of the likeliest tokens"),
    "min_p": (float, "least probability relative to the likeliest token's"),
    "repetition_penalty": (float, "over 1 discourages tokens of prompt and output"),
    "presence_penalty": (float, "from -2 to 2, over the output"),
    "frequency_penalty": (float, "from -2 to 2, over the output"),
    "max_tokens": (int, "most tokens of each answer"),
    "seed": (int, "the same answer every time"),
}


def add_commands(commands: Any) -> None:
    """Add ``chat`` and ``complete`` to the command line's subparsers."""
    chat = commands.add_parser(
        "chat",
        help="talk to a running server",
        usage="manta chat [OPTION ...]",
        description="Talk to a running server. /help in the chat lists its commands. Without a"
        " terminal, each line of standard input is a message.",
    )
    chat.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    _add_options(chat, "MESSAGE")
    chat.set_defaults(run=_chat, parser=chat)
    complete = commands.add_parser(
        "complete",
        help="complete prompts on a running server",
        usage="manta complete [OPTION ...]",
        description="Complete prompts on a running server, each on its own. Without a terminal,"
        " each line of standard input is a prompt.",
    )
    _add_options(complete, "PROMPT")
    complete.set_defaults(run=_complete, parser=complete)


def _add_options(parser: argparse.ArgumentParser, word: str) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the server (default {DEFAULT_URL})")
    parser.add_argument(
        "--api-key", metavar="KEY", help="default: $MANTA_API_KEY, then $OPENAI_API_KEY"
    )
    parser.add_argument(
        "--model", "--model-name", metavar="NAME", help="default: the server's first"
    )
    parser.add_argument("-q", "--quick", metavar=word, help="answer this one, and end")
    parser.add_argument("--stats", action="store_true", help="time and speed after each answer")
    sampling = parser.add_argument_group("sampling (default: the server's)")
    for name, (kind, text) in SAMPLING.items():
        sampling.add_argument("--" + name.replace("_", "-"), type=kind, help=text)


@dataclass
class Session:
    """A server, what it is asked with, and how its answers are shown."""

    client: ServerClient
    model: str
    sampling: dict[str, Any]
    stats: bool
    interactive: bool  # a person at a terminal: errors and Ctrl-C end an answer, not the program

    def answer(self, path: str, body: dict[str, Any]) -> str:
        """Print a streamed answer; its text, or what had come of it when Ctrl-C ended it.

        Raises ServerError.
        """
        body = {"model": self.model, **self.sampling, **body}
        if self.stats:
            body["stream_options"] = {"include_usage": True}
        parts: list[str] = []
        started = time.perf_counter()
        first: float | None = None
        thinks = False  # what the model thinks is shown, but is no part of the answer
        usage: dict[str, Any] = {}
        events = self.client.stream(path, body)
        try:
            for event in events:
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    delta = choice.get("delta", {})
                    if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                        first, thinks = first or time.perf_counter(), True
                        print(thought, end="", file=sys.stderr, flush=True)
                    if text := choice.get("text") or delta.get("content"):
                        if thinks:
                            print("\n", file=sys.stderr, flush=True)
                            thinks = False
                        first = first or time.perf_counter()
                        parts.append(text)
                        print(text, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print(" [stopped]", end="\n" if not parts else "")
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator: closes the connection
            if parts:
                print(flush=True)
        if self.stats and first is not None:
            seconds = time.perf_counter() - started
            tokens = usage.get("completion_tokens", 0)
            print(
                f"[first token after {(first - started) * 1000:.0f} ms; {tokens} tokens in"
                f" {seconds:.2f} s, {tokens / seconds:.1f} tok/s]",
                flush=True,
            )
        return "".join(parts)


def _session(args: argparse.Namespace) -> Session:
    client = ServerClient(args.url, args.api_key)
    sampling = {n: value for n in SAMPLING if (value := getattr(args, n)) is not None}
    interactive = args.quick is None and sys.stdin.isatty()
    model = args.model or client.first_model()
    return Session(client, model, sampling, args.stats, interactive)


def _repl(
    args: argparse.Namespace, session: Session, hint: str, act: Callable[[str], None]
) -> None:
    """Call ``act`` with each thing that the user writes; EOFError ends it.

    At a terminal an error is shown and the program goes on; in a pipe it ends the program.
    """
    if args.quick is not None:
        act(args.quick)
        return
    if session.interactive:
        print(f"{session.model} at {session.client.url}. {hint}")
    try:
        for text in _inputs(session.interactive):
            try:
                act(text)
            except KeyboardInterrupt:  # before there was an answer to stop
                if not session.interactive:
                    raise
                print("\n[stopped]")
            except MantaError as error:
                if not session.interactive:
                    raise
                print(f"error: {error}")
    except EOFError:
        return


def _inputs(interactive: bool) -> Iterator[str]:
    """What the user writes; a line that ends in a backslash goes on in the next.

    At a terminal Ctrl-C throws away what is being written, and Ctrl-D ends.
    """
    if interactive:
        import readline  # noqa: F401  # lines can be edited, and earlier ones recalled
    parts: list[str] = []
    while True:
        try:
            line = input((". " if parts else "> ") if interactive else "")
        except EOFError:
            if interactive:
                print()
            if any(parts):
                yield "\n".join(parts)
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/exit or Ctrl-D leaves)")
            parts = []
            continue
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            text = "\n".join(parts)
            parts = []
            if text.strip():
                yield text


def _complete(args: argparse.Namespace) -> None:
    session = _session(args)

    def complete(prompt: str) -> None:
        session.answer("/completions", {"prompt": prompt})

    _repl(args, session, "Ctrl-C stops an answer, Ctrl-D leaves.", complete)


# ---- the chat ----


@dataclass
class Chat:
    """A conversation and the commands that change it."""

    session: Session
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the server is sent it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def say(self, text: str) -> None:
        """Add a message and its answer. If there is none, the message is taken back."""
        self.turns.append({"role": "user", "content": text})
        try:
            answer = self.session.answer("/chat/completions", {"messages": self.messages()})
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer})

    # Each command takes the words after its name, and returns whether the chat goes on.

    def help(self, rest: str) -> None:
        """this list"""
        for name, method in COMMANDS.items():
            print(f"  /{name:<16} {method.__doc__}")
        print("  A line that ends in \\ goes on in the next. Ctrl-C stops an answer.")

    def clear(self, rest: str) -> None:
        """forget the conversation (the system prompt stays)"""
        self.turns.clear()
        print("(forgotten)")

    def set_system(self, rest: str) -> None:
        """TEXT: what the model is told first; alone: show it; off: none"""
        if rest:
            self.system = None if rest == "off" else rest
        print(f"(system prompt: {self.system or 'none'})")

    def undo(self, rest: str) -> None:
        """take the last message and its answer back"""
        if self.turns:
            del self.turns[-2:]
        print(f"({len(self.turns) // 2} messages)")

    def retry(self, rest: str) -> None:
        """answer the last message anew"""
        if not self.turns:
            raise ConfigError("there is nothing to answer anew yet")
        before = self.turns[-2:]
        del self.turns[-2:]
        try:
            self.say(before[0]["content"])
        except BaseException:
            self.turns += before
            raise

    def set_temperature(self, rest: str) -> None:
        """NUMBER: the temperature; alone: show it; off: the server's"""
        if rest == "off":
            self.session.sampling.pop("temperature", None)
        elif rest:
            try:
                value = float(rest)
            except ValueError:
                value = -1
            if not value >= 0:
                raise ConfigError(f"/temp takes a number of at least 0, got {rest!r}")
            self.session.sampling["temperature"] = value
        print(f"(temperature: {self.session.sampling.get('temperature', 'the server’s')})")

    def set_model(self, rest: str) -> None:
        """NAME: another of the server's models; alone: show it"""
        if rest:
            self.session.model = rest
        print(f"(model: {self.session.model})")

    def save(self, rest: str) -> None:
        """FILE: write the conversation as JSON, ready for messages="""
        if not rest:
            raise ConfigError("/save takes the name of a file")
        try:
            text = json.dumps(self.messages(), indent=2, ensure_ascii=False) + "\n"
            Path(rest).expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"/save cannot write {rest!r}: {error.strerror}") from None
        print(f"(saved to {rest})")

    def load(self, rest: str) -> None:
        """FILE: go on with a conversation that /save wrote"""
        try:
            messages = json.loads(Path(rest).expanduser().read_text(encoding="utf-8"))
            turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"/load cannot read {rest!r}: {error}") from None
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise ConfigError(f"/load: {rest!r} has no user and assistant in turn")
        self.system, self.turns = system, turns
        print(f"({len(turns) // 2} messages)")

    def stats(self, rest: str) -> None:
        """time and speed after each answer, on or off"""
        self.session.stats = not self.session.stats
        print(f"(stats {'on' if self.session.stats else 'off'})")

    def exit(self, rest: str) -> None:
        """leave (so does Ctrl-D)"""
        raise EOFError

    def command(self, line: str) -> None:
        """Run a line that starts with a slash. Raises ConfigError, EOFError at the end."""
        name, _, rest = line[1:].strip().partition(" ")
        method = COMMANDS.get({"temperature": "temp", "quit": "exit"}.get(name, name))
        if method is None:
            known = " ".join("/" + name for name in COMMANDS)
            raise ConfigError(f"there is no command /{name}; there are {known}")
        method(self, rest.strip())


COMMANDS = {
    "help": Chat.help,
    "clear": Chat.clear,
    "system": Chat.set_system,
    "undo": Chat.undo,
    "retry": Chat.retry,
    "temp": Chat.set_temperature,
    "model": Chat.set_model,
    "save": Chat.save,
    "load": Chat.load,
    "stats": Chat.stats,
    "exit": Chat.exit,
}


def _chat(args: argparse.Namespace) -> None:
    session = _session(args)
    chat = Chat(session, args.system_prompt)

    def act(text: str) -> None:
        if text.startswith("/") and args.quick is None:
            chat.command(text)
        else:
            chat.say(text)

    _repl(args, session, "/help lists the commands.", act)
