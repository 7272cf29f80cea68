"""Load on an OpenAI-compatible server, and the times at which its tokens came."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deploy.http_stream import HttpClient
from deploy.server_client import error_text


@dataclass(frozen=True)
class Shot:
    """One request: when to send it (seconds from the start), and its body as JSON."""

    at: float
    body: bytes


@dataclass
class Outcome:
    """What became of a request. Times are of ``time.perf_counter``; ``due`` is when it was to go.

    times: when each event that brings tokens came. Several that came in one piece have the same
    time. prompt_tokens and output_tokens are the server's own counts.
    """

    due: float
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    text: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.times[0] - self.sent

    @property
    def latency(self) -> float:
        """Seconds from sending to the last token."""
        return self.times[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one event with tokens and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def time_per_token(self) -> float:
        """Seconds for each output token after the first."""
        return (
            (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0
        )


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode


async def fire(
    client: HttpClient,
    path: str,
    shots: Sequence[Shot],
    max_concurrency: int | None = None,
    keep_text: bool = False,
    finished: Callable[[Outcome], Any] | None = None,
) -> list[Outcome]:
    """Send each shot when it is due, at most ``max_concurrency`` at a time; what became of them.

    finished is called with each outcome as it ends.
    """
    limit = asyncio.Semaphore(max_concurrency or max(len(shots), 1))
    start = time.perf_counter()

    async def one(shot: Shot) -> Outcome:
        outcome = Outcome(due=start + shot.at)
        async with limit:
            await _send(client, path, shot.body, outcome, keep_text)
        if finished:
            finished(outcome)
        return outcome

    tasks = []
    async with asyncio.TaskGroup() as group:
        for shot in shots:
            delay = start + shot.at - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(group.create_task(one(shot)))
    return [task.result() for task in tasks]


async def _send(
    client: HttpClient, path: str, body: bytes, outcome: Outcome, keep_text: bool
) -> None:
    times = outcome.times

    def on_event(data: bytes, at: float) -> None:
        if data == b"[DONE]":
            return
        event = _decode(data)
        if event.error is not None:
            outcome.error = error_text(data)
        if event.usage is not None:
            outcome.prompt_tokens = event.usage.prompt_tokens
            outcome.output_tokens = event.usage.completion_tokens
        for choice in event.choices:
            delta = choice.delta
            outcome.finish_reason = choice.finish_reason or outcome.finish_reason
            # Of a chat the first event only names the role, and the last may be empty.
            if delta is None or delta.content or delta.reasoning_content:
                times.append(at)
                if keep_text:
                    text = choice.text if delta is None else delta.content
                    outcome.text.append(text or "")

    outcome.sent = time.perf_counter()
    try:
        answer = await client.request("POST", path, body, on_event)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return
    if answer.status != 200:
        outcome.error = f"{answer.status}: {error_text(answer.body)}"
    elif not times and not outcome.error:
        outcome.error = "the answer has no tokens"
