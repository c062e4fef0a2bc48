"""Which group holds which slot, and where every admitted group went: admitted = trained + dropped(reason) + in flight, at every moment.

Also the order in which finished groups go into a batch: the deadline rule, which bounds how old they get.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from webdancer.config import RolloutConfig
from webdancer.rollout.stages import StagePlan
from webdancer.types import Group, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """Where every admitted group is; `in_flight` counts all that hold a slot: running, buffered, or drawn and not yet released."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    in_flight: int


@dataclass(slots=True, eq=False, kw_only=True)
class Held:
    """A group in its slot. `group` is set once it finished, `decision` with it; `drawn` once it has a place in a batch."""

    number: int
    task: Task
    attempt: int
    start_version: int
    plan: StagePlan
    admitted_s: float
    running: asyncio.Task[None] | None = None
    members_done: int = 0
    turns_done: int = 0
    group: Group | None = None
    decision: str = ""
    drawn: bool = False

    @property
    def kept(self) -> bool:
        return self.decision == "kept"


def newest_drawable(held: Mapping[int, int], *, version: int, places_left: int, groups_per_step: int, max_staleness: int) -> int | None:
    """The deadline rule: the newest start version that may be drawn now; None when nothing is held.

    `held[v]` counts groups of start version v that are in flight or buffered. A group of version s may be drawn when, for every v,
    the groups that stay behind with a version <= v still fit into the `places_left` - 1 places of this batch and the
    P (v + max_staleness - version) places of the batches that they can still go to. The oldest may always be drawn.
    """
    newest = None
    older = 0
    for v in sorted(held):
        newest = v
        older += held[v]
        if older > places_left - 1 + groups_per_step * (v + max_staleness - version):
            break
    return newest


class Slots:
    """(max_staleness + 1) x P slots, P groups a batch. `attempts` says how often each task was admitted before, `batches_left` how many
    more batches are wanted, if that is known: what could not be in any of them gets no slot."""

    def __init__(self, config: RolloutConfig, attempts: Mapping[str, int], batches_left: int | None) -> None:
        self.batches_left = batches_left
        self._groups_per_step = config.groups_per_step
        self._max_staleness = config.max_staleness
        self._held: dict[int, Held] = {}
        self._batch: list[Held] = []
        self._attempts = Counter(attempts)
        self._admitted = 0
        self._trained = 0
        self._dropped: Counter[str] = Counter()

    @property
    def held(self) -> Sequence[Held]:
        """In the order of admission."""
        return list(self._held.values())

    @property
    def batch(self) -> Sequence[Held]:
        """Drawn for the batch that is being gathered."""
        return self._batch

    @property
    def free(self) -> bool:
        places = (self._max_staleness + 1) * self._groups_per_step
        if self.batches_left is None:
            return len(self._held) < places
        waiting = sum(not held.drawn for held in self._held.values()) + len(self._batch)
        return len(self._held) < places and waiting < self.batches_left * self._groups_per_step

    @property
    def attempts(self) -> Mapping[str, int]:
        return self._attempts

    @property
    def accounting(self) -> Accounting:
        return Accounting(admitted=self._admitted, trained=self._trained, dropped=dict(self._dropped), in_flight=len(self._held))

    def admit(self, task: Task, *, version: int, plan: StagePlan, now_s: float, attempt: int | None = None) -> Held:
        """`attempt`: of one that an earlier process had admitted and not trained; else it is a new one."""
        if attempt is None:
            attempt = self._attempts[task.id]
            self._attempts[task.id] += 1
        number = self._admitted
        held = Held(number=number, task=task, attempt=attempt, start_version=version, plan=plan, admitted_s=now_s)
        self._held[number] = held
        self._admitted += 1
        return held

    def drop(self, held: Held, reason: str) -> None:
        self._free(held)
        self._dropped[reason] += 1

    def train(self, held: Held) -> None:
        self._free(held)
        self._trained += 1

    def draw(self, version: int) -> Held | None:
        """Move the oldest finished group that may be drawn into the batch."""
        waiting = [held for held in self._held.values() if not held.drawn]
        newest = newest_drawable(
            Counter(held.start_version for held in waiting),
            version=version,
            places_left=self._groups_per_step - len(self._batch),
            groups_per_step=self._groups_per_step,
            max_staleness=self._max_staleness,
        )
        finished = [held for held in waiting if held.group is not None and newest is not None and held.start_version <= newest]
        if not finished:
            return None
        drawn = min(finished, key=lambda held: (held.start_version, held.number))
        drawn.drawn = True
        self._batch.append(drawn)
        return drawn

    def take_batch(self) -> list[Held]:
        """What was drawn, in the order of admission; the next batch starts empty."""
        batch, self._batch = sorted(self._batch, key=lambda held: held.number), []
        return batch

    def too_old(self, version: int) -> list[Held]:
        """Not in a finished batch, and further behind `version` than allowed."""
        waiting = [held for held in self._held.values() if not held.drawn or held in self._batch]
        return [held for held in waiting if held.start_version < version - self._max_staleness]

    def _free(self, held: Held) -> None:
        del self._held[held.number]
        if held in self._batch:
            self._batch.remove(held)
