"""A bound on the tokens that a model thinks: where they are spent, what ends the thinking follows,
whatever the model would write."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Of each completion of a request.

    most: tokens of thinking; a character that is begun is finished. opened: whether the prompt has
    begun the thinking; else it begins where the output does, or not at all.
    openers: strings that begin it. closers: those that end it, one of which is written. breaks:
    those that end it as well, but begin something else.
    """

    most: int
    opened: bool
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    breaks: tuple[str, ...] = ()


class ThinkingCount:
    """How far one output has come in its thinking, which follows from its tokens alone.

    closing: the tokens of what is written to end it.
    """

    def __init__(self, budget: ThinkingBudget, closing: Sequence[int]) -> None:
        self._budget = budget
        self._closing = closing
        self._ends = (*budget.closers, *budget.breaks)
        self._longest = max(map(len, self._ends))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""  # in which a mark may yet be found
        self._thinks = budget.opened
        self._count = 0
        self._written = 0  # of ``closing``
        self._spent = False  # ``closing`` is being written
        self._over = False  # there is no more thinking to come
        self._bound()

    @property
    def forced(self) -> int | None:
        """The token that comes next, whatever the model would write; None if that is free."""
        return self._closing[self._written] if self._spent else None

    def take(self, token: bytes) -> None:
        """Take the output's next token."""
        if self._over:
            return
        thought = self._thinks
        self._written += self._spent
        self._text += self._decoder.decode(token)
        self._find()
        self._count += thought and self._thinks
        self._bound()

    def _bound(self) -> None:
        """See whether the thinking has to end here."""
        if self._written == len(self._closing):  # a tokenizer that writes it in another way
            self._over, self._thinks = True, False
        spent = self._thinks and self._count >= self._budget.most
        whole = not self._decoder.getstate()[0]  # of the last character
        self._spent = spent and (whole or self._spent)

    def _find(self) -> None:
        """Pass over the marks in the text so far."""
        while not self._over and (self._end() if self._thinks else self._begin()):
            pass

    def _end(self) -> bool:
        found = [mark for mark in self._ends if mark in self._text]
        if not found:
            self._text = self._text[1 - self._longest :]
            return False
        first = min(found, key=self._text.index)
        self._text, self._thinks, self._written = self._text.partition(first)[2], False, 0
        return True

    def _begin(self) -> bool:
        """Thinking is begun where nothing was said: at the output's beginning, or after more."""
        self._text = self._text.lstrip()
        for mark in self._budget.openers:
            if self._text.startswith(mark):
                self._text, self._thinks = self._text[len(mark) :], True
                return True
        self._over = not any(mark.startswith(self._text) for mark in self._budget.openers)
        return False
