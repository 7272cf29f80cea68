"""The command line: ``manta generate``, ``serve``, ``chat``, ``bench``, ``replay`` and so on.

Engine options are made from the fields of ``EngineConfig``, so that the command line, ``LLM`` and
the server cannot differ.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from deploy import bench_serve, chat, control, doctor, replay, run_batch, serve_command
from deploy.options import (
    Declared,
    add_model_option,
    add_options,
    flag,
    given,
    given_model,
    with_dashes,
)
from engine.config import EMBEDDED_MODEL, declared_options
from engine.errors import ConfigError, MantaError
from engine.sampling_params import SamplingParams
from manta import __version__

SAMPLING_OPTIONS: dict[str, tuple[type, str]] = {
    "n": (int, "completions of each prompt"),
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the likeliest tokens that together have this probability"),
    "top_k": (int, "keep this many of the likeliest tokens; 0 keeps all"),
    "min_p": (float, "least probability relative to the likeliest token's"),
    "repetition_penalty": (float, "over 1 discourages tokens of prompt and output"),
    "presence_penalty": (float, "from -2 to 2, over the output"),
    "frequency_penalty": (float, "from -2 to 2, over the output"),
    "max_tokens": (int, "most tokens of output for each prompt"),
    "min_tokens": (int, "no end before this many tokens of output"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. 2 for what the user did wrong, 130 for an interrupt."""
    try:
        args = _parse(argv)
        return int(args.run(args) or 0)
    except MantaError as error:
        print(f"manta: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Options in full only, and an error of one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with options anywhere between them, which argparse alone does not allow."""
    words = with_dashes(sys.argv[1:] if argv is None else argv)
    args, rest = _parser().parse_known_args(words)
    at = rest.index("--") if "--" in rest else len(rest)
    for word in rest[:at]:
        if word.startswith("-"):
            name = word.split("=")[0]
            known = re.findall(r"--[a-z][\w-]+", args.parser.format_help())
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown option {name}{hint}")
    words = rest[:at] + rest[at + 1 :]
    if words and "words" not in args:
        raise ConfigError(f"unexpected argument {words[0]!r}")
    if words:
        args.words += words
    return args


@cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="manta", description="Serve large language models.")
    parser.add_argument("--version", action="version", version=f"manta {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="complete prompts, or answer chat messages, offline",
        usage="manta generate [OPTION ...] [MODEL] PROMPT [PROMPT ...]",
        description="Complete prompts. With one argument it is a prompt for the embedded model;"
        " with more the first is the model. No prompt: each line of standard input is one.",
    )
    generate.add_argument("words", nargs="*", metavar="MODEL PROMPT", help=argparse.SUPPRESS)
    generate.add_argument("--chat", action="store_true", help="prompts are messages of a user")
    generate.add_argument("--system", help="a system message, with --chat")
    generate.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="abort each prompt that takes longer"
    )
    sampling = generate.add_argument_group("sampling")
    for name, (kind, text) in SAMPLING_OPTIONS.items():
        sampling.add_argument(flag(name), type=kind, default=None, help=text)
    sampling.add_argument("--stop", action="append", help="a string that ends the output")
    sampling.add_argument("--ignore-eos", action="store_true", help="the model's end does not end")
    add_model_option(generate)
    add_options(generate, _engine_options())
    generate.set_defaults(run=_generate, parser=generate)

    serve_command.add_command(commands)
    run_batch.add_command(commands)
    control.add_commands(commands)
    chat.add_commands(commands)

    bench = commands.add_parser("bench", help="measure speed")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    throughput = benches.add_parser(
        "throughput",
        help="offline throughput",
        usage="manta bench throughput [OPTION ...] [MODEL]",
        description="Measure offline throughput on random prompts.",
    )
    throughput.add_argument("model", nargs="?")
    add_model_option(throughput)
    throughput.add_argument("--num-prompts", type=int, default=32)
    throughput.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    throughput.add_argument("--output-len", type=int, default=64, help="tokens of each output")
    throughput.add_argument("--warmup", type=int, default=1, help="runs that are not measured")
    throughput.add_argument("--repeat", type=int, default=1, help="measured runs; their median")
    throughput.add_argument("--temperature", type=float, default=0.0)
    throughput.add_argument("--output-json", metavar="FILE", help="write the figures here")
    add_options(throughput, _engine_options())
    throughput.set_defaults(run=_bench_throughput, parser=throughput)

    bench_serve.add_command(benches)
    replay.add_command(commands)
    doctor.add_command(commands)

    environment = commands.add_parser("collect-env", help="print what a bug report needs")
    environment.set_defaults(run=_collect_env, parser=environment)
    return parser


def _engine_options() -> Declared:
    return ((f"engine: {group}", f) for group, f in declared_options())


def _generate(args: argparse.Namespace) -> None:
    model, prompts = _model_and_prompts(args.words, args.model_option)
    if args.system is not None and not args.chat:
        raise ConfigError("--system needs --chat")
    from cluster.llm import LLM  # imports torch, which takes a second

    llm = LLM(model, **given(args, _engine_options()))
    params = _sampling(args, llm.get_default_sampling_params())
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        messages = [[*system, {"role": "user", "content": p}] for p in prompts]
        outputs = llm.chat(messages, params, timeout=args.timeout)
    else:
        outputs = llm.generate(prompts, params, timeout=args.timeout)
    for prompt, output in zip(prompts, outputs, strict=True):
        for completion in output.outputs:
            print(f"Prompt: {prompt!r}, Generated text: {completion.text!r}", flush=True)


def _model_and_prompts(words: list[str], option: str | None = None) -> tuple[str, list[str]]:
    model, prompts = option or EMBEDDED_MODEL, words
    if option is None and len(words) > 1:
        model, *prompts = words
    if not prompts:
        if sys.stdin.isatty():
            raise ConfigError("PROMPT is missing: give one, or one a line on standard input")
        prompts = [line for line in sys.stdin.read().splitlines() if line]
    return model, prompts


def _sampling(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The checkpoint's default sampling with what the command line says instead."""
    given: dict[str, Any] = {
        name: value for name in SAMPLING_OPTIONS if (value := getattr(args, name)) is not None
    }
    if args.stop:
        given["stop"] = args.stop
    if args.ignore_eos:
        given["ignore_eos"] = True
    import dataclasses

    return dataclasses.replace(defaults, **given)


def _bench_throughput(args: argparse.Namespace) -> None:
    from deploy.bench import throughput

    args.model = given_model(args) or EMBEDDED_MODEL
    throughput(args, given(args, _engine_options()))


def _collect_env(args: argparse.Namespace) -> None:
    from deploy.environment import report

    print(report())


if __name__ == "__main__":
    sys.exit(main())
