"""Progress bars: while weights load, and while prompts are processed."""

import time

from tqdm import tqdm

from engine.outputs import RequestOutput


class LoadBar:
    """Progress of reading weights."""

    def __init__(self, total_bytes: int, show: bool) -> None:
        self._bar = tqdm(
            total=total_bytes,
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            disable=not show,
        )

    def read(self, name: str, num_bytes: int) -> None:
        self._bar.update(num_bytes)

    def __enter__(self) -> "LoadBar":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._bar.total = self._bar.n  # what files hold besides tensors is not read
            self._bar.refresh()
        self._bar.close()


class PromptBar:
    """``Processed prompts``, with the estimated speed of input and output so far. ``before``: of
    them were processed earlier."""

    def __init__(self, total: int, show: bool, before: int = 0) -> None:
        self._input = self._output = 0
        self._started = time.perf_counter()
        self._bar = tqdm(total=total, initial=before, desc="Processed prompts", disable=not show)
        self._postfix()

    def finished(self, output: RequestOutput) -> None:
        self.add(len(output.prompt_token_ids), sum(len(o.token_ids) for o in output.outputs))

    def add(self, input_tokens: int, output_tokens: int) -> None:
        """A prompt is done, of so many tokens."""
        self._input += input_tokens
        self._output += output_tokens
        self._postfix()
        self._bar.update(1)

    def _postfix(self) -> None:
        seconds = max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(
            f"est. speed input: {self._input / seconds:.2f} toks/s,"
            f" output: {self._output / seconds:.2f} toks/s",
            refresh=False,
        )

    def __enter__(self) -> "PromptBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
