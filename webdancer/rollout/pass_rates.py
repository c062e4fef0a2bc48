"""What is believed about each question's pass rate: a Beta posterior that forgets as the policy moves. Pure; no clock, no randomness.

A question's prior is that of its kind (source, type, hops), learned from questions of this kind that were met for the first time; what
was seen of the question itself is added, and every new version of the weights makes all of it count a little less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from webdancer.types import Task

DISCOUNT = 0.98
"""Of all evidence, for each version: half of it is gone after 34. In simulations with as much drift as a quickstart's first steps, 0.95
does 1 % worse (benchmarks/dynamic_sampling.py)."""

NO_EVIDENCE = (8.0, 4.0, 56.0, 21.0)
"""A kind of which nothing was seen counts as one group of 8 from Jeffreys' Beta(1/2, 1/2); see `_Kind`."""


def mixed_probability(a: float, b: float, size: int) -> float:
    """That `size` members disagree, when the pass rate is Beta(a, b)."""
    return 1.0 - all_right_probability(a, b, size) - all_right_probability(b, a, size)


def all_right_probability(a: float, b: float, size: int) -> float:
    """That `size` members are all right: beta-binomial, the product of (a + i) / (a + b + i)."""
    return math.prod((a + i) / (a + b + i) for i in range(size))


def right_probabilities(a: float, b: float, size: int) -> list[float]:
    """P(k of `size` right) for k = 0 ... size, when the pass rate is Beta(a, b)."""
    probability = all_right_probability(b, a, size)
    found = [probability]
    for k in range(size):
        probability *= (size - k) / (k + 1) * (a + k) / (b + size - k - 1)
        found.append(probability)
    return found


class PassRates:
    """Posteriors of all questions. `version` counts up; evidence of an older version is discounted when it is read."""

    def __init__(self) -> None:
        self.version = 0
        self._questions: dict[str, tuple[float, float, int]] = {}
        self._kinds: dict[str, tuple[tuple[float, ...], int]] = {}

    def posterior(self, task: Task) -> tuple[float, float]:
        """Beta(a, b) of the question's pass rate now."""
        a, b = self._prior(kind_of(task))
        right, wrong = self._evidence(task.id)
        return a + right, b + wrong

    def observe(self, task: Task, *, right: int, wrong: int, first: tuple[int, int] | None = None) -> None:
        """Count a finished group's valid members; `first`, where not all, how many of those were right and wrong that it had to have.

        A kind learns only from questions without a record, or a faded one: others were chosen for theirs, and would make it look mixed.
        And only from the `first` members: groups that agree end early, and would weigh less for having agreed.
        """
        old_right, old_wrong = self._evidence(task.id)
        if old_right + old_wrong < 1.0:
            first_right, first_wrong = first or (right, wrong)
            self._observe_kind(kind_of(task), first_right, first_right + first_wrong)
        self._questions[task.id] = (old_right + right, old_wrong + wrong, self.version)

    def state_dict(self) -> dict[str, Any]:
        kinds = {kind: [*sums, at] for kind, (sums, at) in self._kinds.items()}
        return {"version": self.version, "questions": {id: list(seen) for id, seen in self._questions.items()}, "kinds": kinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version = int(state["version"])
        self._questions = {id: (float(right), float(wrong), int(at)) for id, (right, wrong, at) in state["questions"].items()}
        self._kinds = {kind: (tuple(map(float, sums)), int(at)) for kind, (*sums, at) in state["kinds"].items()}

    def _evidence(self, task_id: str) -> tuple[float, float]:
        right, wrong, at = self._questions.get(task_id, (0.0, 0.0, self.version))
        fade = DISCOUNT ** (self.version - at)
        return fade * right, fade * wrong

    def _observe_kind(self, kind: str, right: int, valid: int) -> None:
        sums = self._kind_sums(kind)
        seen = (valid, right, valid * (valid - 1), right * (right - 1))
        self._kinds[kind] = tuple(old + new for old, new in zip(sums, seen, strict=True)), self.version

    def _kind_sums(self, kind: str) -> tuple[float, ...]:
        """Sums of n, k, n (n - 1) and k (k - 1) over groups with k of n right."""
        sums, at = self._kinds.get(kind, ((0.0,) * 4, self.version))
        fade = DISCOUNT ** (self.version - at)
        return tuple(fade * value for value in sums)

    def _prior(self, kind: str) -> tuple[float, float]:
        """Beta with the moments of the kind: E[p] = sum k / sum n and E[p^2] = sum k (k - 1) / sum n (n - 1), both unbiased."""
        n, k, pairs, both = (value + base for value, base in zip(self._kind_sums(kind), NO_EVIDENCE, strict=True))
        mean, square = k / n, both / pairs
        correlation = (square - mean**2) / (mean - mean**2)  # between members of a group: 1 / (a + b + 1)
        strength = 1.0 / min(max(correlation, 0.05), 0.8) - 1.0
        return strength * mean, strength * (1.0 - mean)


def kind_of(task: Task) -> str:
    """Questions of one source, type and number of hops are expected to be about as hard."""
    return "/".join(str(part) for part in (task.source, task.metadata.get("type", ""), task.metadata.get("hops", "")))
