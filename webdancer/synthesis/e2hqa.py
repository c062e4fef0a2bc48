"""E2HQA (paper section 2): a simple question is made harder, round by round, by describing what it names; its answer never changes.

    choose an entity E that the question names -> search for E -> rewrite what was found into a description -> put it in E's place

After every round three things are checked, and a round that fails one of them is not taken: the answer is unchanged, nothing leaks (neither
the answer nor E stands in the question), and the description picks out one entity. The rounds that a question went through are its
difficulty. Who chooses, rewrites and checks is a `Rounds`: infobox facts (infobox_rounds.py) or a model (model_rounds.py).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from webdancer.synthesis.collect import LeftOut
from webdancer.synthesis.questions import leaks, question_id
from webdancer.tools.render import Hit
from webdancer.types import Task

SOURCE = "e2hqa"

NOTHING_TO_DESCRIBE, NOT_FOUND, NOT_REWRITTEN = "nothing_to_describe", "entity_not_found", "not_rewritten"
LEAKED, AMBIGUOUS, CHANGED = "leak", "not_one_entity", "answer_changed"
_TRIES = 3
"""Of one round; each is another draw, or another reply of the model."""

Search = Callable[[str], Awaitable[Sequence[Hit]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One replacement. `urls`: what was found about the entity and used."""

    entity: str
    query: str
    description: str
    question: str
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoundFailed:
    reason: str


State = TypeVar("State")


class Rounds(Protocol[State]):
    """How a question is made harder once. A state holds the question so far and what its rounds must not use again."""

    def draw(self, split: str, rng: random.Random) -> State | None:
        """A simple question of this split, one that was not drawn before; None if there is none left."""

    def task(self, state: State) -> Task:
        """The question as it stands."""

    async def harder(self, state: State, rng: random.Random, attempt: int) -> tuple[State, Round] | RoundFailed:
        """One round: the entity, the search, the description; not yet checked but for what making it says."""

    async def is_one(self, state: State, made: Round) -> bool:
        """Whether the description picks out the entity that it replaced and no other."""

    async def is_answered(self, state: State, made: Round) -> bool:
        """Whether the question still has the answer that it had, and no other."""


class EasyToHard:
    """A source for `collect`: seeds of a split, each through a number of rounds drawn for it."""

    def __init__(self, rounds: Rounds[Any], *, max_rounds: int, seed: int) -> None:
        self._rounds = rounds
        self._max_rounds = max_rounds
        self._seed = seed
        self._rng: dict[str, random.Random] = {}

    def draw(self, split: str, type_: str) -> tuple[Any, int] | None:
        rng = self._rng.setdefault(split, random.Random(f"{self._seed} {split} {type_}"))
        state = self._rounds.draw(split, rng)
        return None if state is None else (state, rng.randint(1, self._max_rounds))

    async def write(self, drawn: tuple[Any, int]) -> Task | LeftOut:
        state, wanted = drawn
        first = self._rounds.task(state)
        rng = random.Random(f"{self._seed} {first.question}")
        done: list[Round] = []
        failed: list[str] = []
        while len(done) < wanted:
            step = await self._round(state, rng, [made.entity for made in done])
            if isinstance(step, RoundFailed):
                failed.append(step.reason)
                break
            state, made = step
            done.append(made)
        if not done:
            return LeftOut(failed[-1], first.question)
        return _made(self._rounds.task(state), first, done, wanted=wanted, failed=failed)

    async def _round(self, state: Any, rng: random.Random, replaced: Sequence[str]) -> tuple[Any, Round] | RoundFailed:
        """A round that passes the three checks; the reason of the last try if none does. `replaced`: entities of earlier rounds."""
        reason = NOTHING_TO_DESCRIBE
        for attempt in range(_TRIES):
            step = await self._rounds.harder(state, rng, attempt)
            if isinstance(step, RoundFailed):
                reason = step.reason
                continue
            after, made = step
            task = self._rounds.task(after)
            if leaks(made.question, (*task.answers, made.entity, *replaced)) or leaks(made.description, task.answers):
                reason = LEAKED
            elif not await self._rounds.is_one(after, made):
                reason = AMBIGUOUS
            elif not await self._rounds.is_answered(after, made):
                reason = CHANGED
            else:
                return step
        return RoundFailed(reason)


def _made(task: Task, first: Task, done: Sequence[Round], *, wanted: int, failed: Sequence[str]) -> Task:
    metadata: Mapping[str, Any] = {
        **task.metadata,
        "type": SOURCE,
        "hops": len(done) + 1,
        "rounds": len(done),
        "rounds_wanted": wanted,
        "stopped_by": failed[-1] if failed else "",
        "seed_question": first.question,
        "steps": [asdict(made) for made in done],
    }
    return Task(id=question_id(task.question, SOURCE), question=task.question, answers=first.answers, source=SOURCE, metadata=metadata)
