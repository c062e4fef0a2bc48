"""What a policy says while it says it: ids as they are sampled become text of whole characters, for whoever watches an episode.

Nothing of this is trained on or recorded; a turn that is finished is its Completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from webdancer.interfaces import OnTokens, Tokenizer
from webdancer.types import TurnText

_LONGEST = 4
"""Tokens of one character at most: a byte each."""


class SpokenText:
    """The text of ids that come one after another. What it gave, joined, is the text of all ids, less a character that is not whole yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_said = 0  # of `_ids`: they are there because how an id reads may depend on the one before

    def add(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._add, token_ids))

    def _add(self, token_id: int) -> str:
        self._ids.append(token_id)
        said, text = self._tokenizer.decode(self._ids[: self._num_said]), self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._num_said < _LONGEST:
            return ""
        del self._ids[: self._num_said]
        self._num_said = len(self._ids)
        return text[len(said) :]


def turn_speaker(tokenizer: Tokenizer, on_text: Callable[[TurnText], None], *, index: int) -> OnTokens:
    """A listener for the ids of turn `index` that passes their text on."""
    spoken, start = SpokenText(tokenizer), 0

    def on_tokens(token_ids: Sequence[int]) -> None:
        nonlocal start
        if text := spoken.add(token_ids):
            on_text(TurnText(index=index, start=start, text=text))
            start += len(text)

    return on_tokens
