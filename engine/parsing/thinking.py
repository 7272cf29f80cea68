"""How a model's thinking stands in its text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thinking:
    """Tags around what the model thinks.

    openers: what begins it, where nothing was said yet or after a call; the prompt may have opened
    it already. closers: what ends it.
    """

    openers: tuple[str, ...]
    closers: tuple[str, ...]

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag."""
        return self.openers + self.closers

    def opened_by(self, prompt: str, final: str = "") -> bool:
        """Whether the model goes on thinking after ``prompt``. ``final``: the message at its end
        that the model goes on with, if it does."""
        if final:
            return _last(final, self.openers) > _last(final, self.closers)
        return prompt.rstrip().endswith(tuple(tag.rstrip() for tag in self.openers))


def _last(text: str, tags: tuple[str, ...]) -> int:
    return max(text.rfind(tag) for tag in tags)
