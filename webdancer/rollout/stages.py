"""How a group grows: a few members first, the others only where they may still teach something, and no bias from having looked.

A group whose first `stop_right` members are all right (`stop_wrong`: all wrong) ends there and is dropped; any other gets all G members,
the rest of them as soon as two disagree. Both numbers are fixed before the group starts.

Why the weight. Of the groups with k of G right, those that just began with equal members are lost, and most often so where k = 1 or G - 1.
What is kept would look more even than the policy is, and so would its mean, which is the baseline. But members are exchangeable: given k,
every order of right and wrong is equally likely, and

    P(kept | k) = 1 - C(k, t) / C(G, t) - C(G - k, t') / C(G, t'),        t = stop_right, t' = stop_wrong

holds whatever the pass rate is. A kept group weighs 1 / P(kept | k), at most G / t (Horvitz and Thompson, 1952), and so the expected
gradient of a question is exactly that of whole groups; with invalid members, G and t count the valid ones. A group that is trained as
soon as it is mixed could not be repaired: its last member is always the odd one. Nothing here looks at time: short episodes have no
advantage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from webdancer.rollout.pass_rates import all_right_probability, right_probabilities

Outcomes = Mapping[int, bool | None]
"""By member: right, wrong, or None for an invalid one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """At most `size` members. A stop is from 2 to size - 1, or 0: agreement of this kind never ends the group."""

    size: int
    stop_right: int = 0
    stop_wrong: int = 0

    @property
    def first(self) -> int:
        """Members that the group has whatever their outcomes."""
        return self.next_size({}, 0)

    def next_size(self, outcomes: Outcomes, size: int) -> int:
        """How many members the group has after its first `size`: more of them, or the same number, which ends it."""
        known = [outcome for outcome in outcomes.values() if outcome is not None]
        if is_mixed(outcomes):
            return self.size
        if len(known) >= 2 and size == (self.stop_right if known[0] else self.stop_wrong):
            return size
        return min([stop for stop in (self.stop_right, self.stop_wrong) if stop > size], default=self.size)

    def keep_probability(self, valid: int, right: int, *, seen_right: int | None = None, seen_wrong: int | None = None) -> float:
        """Of a group with `right` of `valid` members right. `seen_*`: valid members before each stop, where some are not valid."""
        probability = 1.0
        for stop, seen, count in ((self.stop_right, seen_right, right), (self.stop_wrong, seen_wrong, valid - right)):
            seen = stop if seen is None else seen
            if seen >= 2:
                probability -= math.comb(count, seen) / math.comb(valid, seen)
        return probability

    def weight(self, outcomes: Sequence[bool | None]) -> float:
        """1 / P(kept) of a group with these outcomes, in the order of its members; 1 of one that agrees, which is dropped anyway."""
        known = [outcome for outcome in outcomes if outcome is not None]
        right = sum(known)
        if right in (0, len(known)):
            return 1.0
        seen_right, seen_wrong = (sum(o is not None for o in outcomes[:stop]) for stop in (self.stop_right, self.stop_wrong))
        return 1.0 / self.keep_probability(len(known), right, seen_right=seen_right, seen_wrong=seen_wrong)


def is_right(accuracy: float) -> bool:
    return accuracy >= 0.5


def is_mixed(outcomes: Outcomes) -> bool:
    return len({outcome for outcome in outcomes.values() if outcome is not None}) > 1


def plan_stages(a: float, b: float, *, size: int, rate: float) -> StagePlan:
    """The plan of the highest value when the pass rate is Beta(a, b): useful rollouts, less what the rollouts are worth elsewhere.

    `rate` is how many useful rollouts one is worth elsewhere. Weights cost variance: n groups of weights w among many of weight 1 count as
    sum (2 w - w^2) of these (the change of the effective sample size (sum w)^2 / sum w^2). So whole groups win where little is known: the
    mixed groups that stopping loses are the ones that weigh most.
    """
    counts = right_probabilities(a, b, size)

    def value(plan: StagePlan) -> float:
        mixed = sum(counts[1:-1])
        squares = sum(counts[k] / plan.keep_probability(size, k) for k in range(1, size))
        rollouts = float(size)
        for stop, (x, y) in ((plan.stop_right, (a, b)), (plan.stop_wrong, (b, a))):
            rollouts -= all_right_probability(x, y, stop) * (size - stop) if stop else 0.0
        return size * (2.0 * mixed - squares) - rate * rollouts

    stops = (0, *range(2, size))
    best = max((StagePlan(size=size, stop_right=stop) for stop in stops), key=value)
    return max((replace(best, stop_wrong=stop) for stop in stops), key=value)
