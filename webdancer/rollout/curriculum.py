"""Which question comes next, and how its group grows: chosen by how likely the group is to be mixed.

Questions come from the run's stream in its order; one is taken with the squared probability that its group of G will be mixed, by the
posterior of its pass rate, and passed over otherwise. So what is solved by all or by none is seldom asked, everything has its turn in
every epoch, and what was passed over comes back: evidence fades. Choosing uses nothing but earlier groups, so a group's own baseline is
untouched by it; only how often each question is asked changes, as with any curriculum.

Pure and deterministic: the n-th choice depends on the seed, on n and on the groups that had left their slots when the current weights
arrived, never on which of several episodes was faster. With `rollout.curriculum` and `rollout.staged_groups` off, it is the plain stream.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from webdancer.config import RolloutConfig
from webdancer.rollout.pass_rates import DISCOUNT, PassRates, mixed_probability
from webdancer.rollout.stages import StagePlan, is_right, plan_stages
from webdancer.types import Group, ScoredTrajectory, Task

SHARPNESS = 2
"""1 asks in proportion to the chance of a mixed group; more saves rollouts and asks fewer different questions (docs/algorithm.md)."""

MAX_SKIPPED = 1000
"""In a row; the next question is then taken whatever is expected of it."""


class Stream(Protocol):
    def __next__(self) -> Task: ...


class Curriculum:
    """`choose` and `plan` for every admission, `observe` for every group that leaves its slot, `advance` when new weights have landed."""

    def __init__(self, config: RolloutConfig, *, seed: int) -> None:
        self._chooses = config.curriculum
        self._stages = config.staged_groups
        self._size = config.group_size
        self._seed = seed
        self._draws = 0
        self._skipped = 0
        self._rates = PassRates()
        self._pending: list[tuple[int, Group, bool, StagePlan]] = []
        self._useful, self._rollouts = self._size / 2.0, float(self._size)  # a guess worth one group

    def choose(self, tasks: Stream) -> Task | None:
        """The next task of the stream that is taken; None when a finite stream has run out."""
        for _ in range(MAX_SKIPPED):
            task = next(tasks, None)
            if task is None or not self._chooses or self._draw() < self.expected_mixed(task) ** SHARPNESS:
                return task
            self._skipped += 1
        return next(tasks, None)

    def plan(self, task: Task) -> StagePlan:
        if not self._stages:
            return StagePlan(size=self._size)
        a, b = self._rates.posterior(task)
        return plan_stages(a, b, size=self._size, rate=self._useful / self._rollouts)

    def expected_mixed(self, task: Task) -> float:
        """The probability that a whole group of this question would be mixed."""
        a, b = self._rates.posterior(task)
        return mixed_probability(a, b, self._size)

    def observe(self, number: int, group: Group, *, kept: bool, plan: StagePlan | None = None) -> None:
        """A group, admitted as the `number`-th, was trained or dropped; `plan`: how it grew, if not as a whole. It counts from the next
        `advance` on."""
        if self._learns:
            self._pending.append((number, group, kept, plan or StagePlan(size=self._size)))

    def advance(self) -> None:
        """New weights: count what was observed, in the order of admission, and discount everything."""
        self._count_pending()
        self._rates.version += 1
        self._useful, self._rollouts = DISCOUNT * self._useful, DISCOUNT * self._rollouts

    def skipped(self) -> int:
        """Questions passed over since this was asked last."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """What was observed since the last `advance` counts in it: its questions have left the stream. Empty for the plain stream."""
        if not self._learns:
            return {}
        whole = copy.copy(self)
        whole._rates, whole._pending = copy.deepcopy(self._rates), list(self._pending)
        whole._count_pending()
        return {"draws": whole._draws, "useful": whole._useful, "rollouts": whole._rollouts, "rates": whole._rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """An empty state (of a run that did not choose) leaves everything unknown."""
        if not state:
            return
        self._draws, self._useful, self._rollouts = int(state["draws"]), float(state["useful"]), float(state["rollouts"])
        self._rates.load_state_dict(state["rates"])

    @property
    def _learns(self) -> bool:
        return self._chooses or self._stages

    def _draw(self) -> float:
        self._draws += 1
        return random.Random(f"{self._seed}/{self._draws}").random()

    def _count_pending(self) -> None:
        for _, group, kept, plan in sorted(self._pending, key=lambda seen: seen[0]):
            right, wrong = _outcomes(group.members)
            if right + wrong:
                self._rates.observe(group.task, right=right, wrong=wrong, first=_outcomes(group.members[: plan.first]))
            self._rollouts += len(group.members)
            self._useful += len(group.members) if kept else 0
        self._pending.clear()


def _outcomes(members: Sequence[ScoredTrajectory]) -> tuple[int, int]:
    """Right and wrong ones among those that are valid."""
    valid = [is_right(member.reward.answer) for member in members if member.reward.valid]
    return sum(valid), len(valid) - sum(valid)
