"""The given questions that E2HQA begins with: none that an evaluation set has, none twice, each in one split."""

from __future__ import annotations

from collections.abc import Sequence

from webdancer.synthesis.collect import Need, Outcome
from webdancer.synthesis.e2hqa import SOURCE
from webdancer.synthesis.hygiene import Hygiene
from webdancer.synthesis.pools import split_of
from webdancer.types import Task


def sift_seeds(seeds: Sequence[Task], hygiene: Hygiene) -> tuple[dict[str, list[Task]], list[Outcome]]:
    """Those to begin with, by split and in their order, and those that are unfit as they stand, which no rewriting would make fit.

    The split is that of the first answer, so that no answer is in two of them. hygiene: one of its own, as a seed is no question that
    was made; it is given every seed that is taken.
    """
    by_split: dict[str, list[Task]] = {}
    unfit: list[Outcome] = []
    for task in seeds:
        split = split_of(task.answers[0].casefold())
        if reason := hygiene.check(task):
            unfit.append(Outcome(Need(split, SOURCE, 0), task, reason))
        else:
            hygiene.add(task)
            by_split.setdefault(split, []).append(task)
    return by_split, unfit
