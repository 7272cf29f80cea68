"""``manta replay``: run the batches of a schedule log again and compare every token."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.replay import Difference

# Engine options that a replay may change.
OVERRIDES = ("device", "dtype", "kv_cache_dtype", "attention_backend")


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "replay",
        help="run a schedule log again and find the first difference",
        usage="manta replay [OPTION ...] FILE",
        description="Run the batches of a file that --schedule-log wrote, on the same model, and"
        " report the first token that differs. Exit status: 0 all the same, 1 a difference.",
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--model", help="another checkpoint than the one that was logged")
    for name in OVERRIDES:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, help="instead of what was logged")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The exit status: 0 if every token is the same, 1 if one is not.

    Raises ConfigError for a file that is no log, or a machine that does not hold its blocks.
    """
    from engine.replay import replay  # these import numpy
    from engine.schedule_log import ScheduleLog

    schedule = ScheduleLog(Path(args.file))
    header = schedule.header
    from cluster import recording  # imports torch, which takes a second
    from cluster.replica import open_checkpoint, start_replica
    from engine.tokenizer import Tokenizer

    overrides: dict[str, Any] = {
        name: value for name in OVERRIDES if (value := getattr(args, name)) is not None
    }
    if args.model is not None:
        overrides["model"] = args.model
    config = recording.replay_config(header, overrides)
    checkpoint = open_checkpoint(config)
    for line in recording.differences(header, checkpoint.path):
        print(f"note: {line}")
    tokenizer = Tokenizer.load(config.model.tokenizer or checkpoint.path, config.model.revision)
    engine = start_replica(config, checkpoint, tokenizer)
    try:
        recording.check_room(header, engine.capacity)
        started = time.perf_counter()
        done = replay(schedule, engine.executor)
        seconds = time.perf_counter() - started
    finally:
        engine.stop()
    if schedule.truncated:
        print("note: the last record is cut off: the engine ended while it wrote it")
    if done.difference is not None:
        print(describe(done.difference))
        return 1
    if done.unanswered:
        print(f"note: the last {done.unanswered} steps have no result in the log")
    print(f"{done.steps:,} steps, {done.tokens:,} tokens: all as logged ({seconds:.1f} s)")
    return 0


def describe(found: "Difference") -> str:
    """A difference in one line."""

    def value(token: int | None) -> str:
        return "logits that are not finite" if token is None else f"token {token}"

    return (
        f"step {found.step}, slot {found.slot}, request {found.request}, position"
        f" {found.position}: expected {value(found.expected)}, got {value(found.got)}"
    )
