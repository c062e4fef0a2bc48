"""From a source of questions to as many good ones as are needed, in an order that only the seed and the answers decide.

A source draws what a question could be made of (at once, without waiting) and writes it (which may ask a model, many at a time). What it
writes is checked in the order in which it was drawn, and let through, or left out with a reason.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from webdancer.synthesis.hygiene import Hygiene, described
from webdancer.synthesis.in_order import in_order
from webdancer.types import Task

WINDOW = 64
"""Questions under way. Fixed, as what is drawn next depends on it; how many requests run at once is the model's to limit."""
_FRUITLESS = 400
"""Questions in a row of one kind that came to nothing, after which no more are tried."""


@dataclass(frozen=True, slots=True)
class Need:
    """So many questions of a type, of the pages of a split."""

    split: str
    type: str
    count: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why no question came of it; `detail` is for people."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`reason` is empty for a question that was let through; `task` is None where none was written."""

    need: Need
    task: Task | None
    reason: str = ""
    detail: str = ""


class Source(Protocol):
    """Where questions come from."""

    def draw(self, split: str, type_: str) -> Any | None:
        """Something to make a question of; None if the split has nothing (more) for this type."""

    async def write(self, drawn: Any) -> Task | LeftOut:
        """The question; called many at a time."""


ClosedBook = Callable[[Task], Awaitable[str]]
"""The reason to leave a question out that needs asking somebody, or nothing."""


async def collect(
    needs: Sequence[Need], source: Source, hygiene: Hygiene, *, closed_book: ClosedBook | None = None, window: int = WINDOW
) -> AsyncIterator[Outcome]:
    """Every outcome until the needs are met or nothing more comes of trying. Types and splits take turns."""
    turns = _Turns(needs, source)

    async def work(item: tuple[Need, Any]) -> Task | LeftOut:
        written = await source.write(item[1])
        if not isinstance(written, Task):
            return written
        task = described(written, split=item[0].split)
        # Whether it repeats another one is known only in its turn, and a model must be asked the same whoever is faster.
        if closed_book is not None and not hygiene.fault(task) and (reason := await closed_book(task)):
            return LeftOut(reason, task.question)
        return task

    async with aclosing(in_order(turns.draw, work, window=window)) as results:
        async for (need, _), written in results:
            if isinstance(written, LeftOut):
                outcome = Outcome(need, None, written.reason, written.detail)
            elif reason := hygiene.check(written):
                outcome = Outcome(need, written, reason)
            else:
                hygiene.add(written)
                outcome = Outcome(need, written)
            turns.note(outcome)
            yield outcome


class _Turns:
    """Whose turn it is, among the needs that are neither met nor given up."""

    def __init__(self, needs: Sequence[Need], source: Source) -> None:
        self._source = source
        self._missing = {need: need.count for need in needs if need.count}
        self._under_way = dict.fromkeys(self._missing, 0)
        self._fruitless = dict.fromkeys(self._missing, 0)
        self._given_up: set[Need] = set()
        self._turn = 0

    def draw(self) -> tuple[Need, Any] | None:
        while True:
            # No more under way than are missing: what a model writes is paid for.
            waiting = [need for need, missing in self._missing.items() if missing > self._under_way[need] and need not in self._given_up]
            if not waiting:
                return None
            self._turn += 1
            need = waiting[self._turn % len(waiting)]
            drawn = self._source.draw(need.split, need.type)
            if drawn is not None:
                self._under_way[need] += 1
                return need, drawn
            self._given_up.add(need)

    def note(self, outcome: Outcome) -> None:
        need = outcome.need
        self._under_way[need] -= 1
        self._missing[need] -= not outcome.reason
        self._fruitless[need] = self._fruitless[need] + 1 if outcome.reason else 0
        if self._fruitless[need] >= _FRUITLESS:
            self._given_up.add(need)
