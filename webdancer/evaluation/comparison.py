"""Two models on the same questions, and two judges on the same answers: how far they differ, and whether that may be chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from webdancer.errors import DataError
from webdancer.evaluation.attempts import Attempt
from webdancer.evaluation.metrics import Estimate, estimate, share
from webdancer.evaluation.round_metrics import scores
from webdancer.types import JudgeUse, Task, Verdict, VerdictStatus

NUM_SIGNS = 100_000
"""Random sign vectors of the permutation test, unless all of them are fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Second minus first. `p_value`: of the permutation test over questions, each with its mean over rounds. `mcnemar_p`: of the exact
    McNemar test on round 1, over the `only_first` and `only_second` questions that just one of the two has right."""

    num_questions: int
    first: float
    second: float
    difference: Estimate
    p_value: float
    only_first: int
    only_second: int
    mcnemar_p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of two judges, on what both have decided. `counts`: (first's status, second's) -> number, unknown included.

    kappa: Cohen's, NaN where neither judge could have disagreed by chance. use: what the second judge took.
    """

    num_decided: int
    agreement: Estimate
    kappa: float
    counts: Mapping[tuple[VerdictStatus, VerdictStatus], int]
    use: JudgeUse


def compare(first: Sequence[Attempt], second: Sequence[Attempt], *, seed: int = 0) -> Comparison:
    """On the questions that both have a verdict for. Raises DataError where there are none."""
    left, right = scores(first), scores(second)
    ids = sorted(left.keys() & right.keys())
    if not ids:
        raise DataError("--compare: must name two evaluations of the same questions, got none in common")
    differences = np.array([right[id] - left[id] for id in ids])
    only_first, only_second = _discordant(first, second)
    return Comparison(
        num_questions=len(ids),
        first=float(np.mean([left[id] for id in ids])),
        second=float(np.mean([right[id] for id in ids])),
        difference=estimate(differences.tolist(), seed=seed),
        p_value=permutation_p(differences.tolist(), seed=seed),
        only_first=only_first,
        only_second=only_second,
        mcnemar_p=mcnemar_p(only_first, only_second),
    )


def check_same_questions(first: Sequence[Task], second: Sequence[Task]) -> None:
    """Raises DataError where an id stands for one question here and for another there."""
    known = {task.id: task for task in first}
    for task in second:
        other = known.get(task.id, task)
        if (other.question, set(other.answers)) != (task.question, set(task.answers)):
            raise DataError(f"--compare: must be of the same questions, got id {task.id!r} for another question or answer in each")


def permutation_p(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value of paired differences under random signs: exact up to 16 that are not 0, else over NUM_SIGNS draws."""
    values = np.array([value for value in differences if value != 0.0])
    if values.size == 0:
        return 1.0
    seen = abs(values.sum()) - 1e-9
    if values.size <= 16:
        signs = 1 - 2 * ((np.arange(2**values.size)[:, None] >> np.arange(values.size)) & 1)
        return int(np.sum(np.abs(signs @ values) >= seen)) / len(signs)
    draws = np.random.default_rng(seed)
    extreme = 0
    for _ in range(NUM_SIGNS // 1000):
        extreme += int(np.sum(np.abs(draws.choice((-1.0, 1.0), size=(1000, values.size)) @ values) >= seen))
    return (extreme + 1) / (NUM_SIGNS + 1)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact, two-sided: a binomial test of the discordant pairs (McNemar 1947; exact form as in Edwards 1948)."""
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, number) for number in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def agreement(recorded: Sequence[VerdictStatus], verdicts: Sequence[Verdict]) -> Agreement:
    """Of the same answers. Raises DataError where none was decided by both."""
    pairs = [(status, verdict.status) for status, verdict in zip(recorded, verdicts, strict=True)]
    decided = [pair for pair in pairs if "unknown" not in pair]
    if not decided:
        raise DataError("--judge-agreement: must have answers that both judges decide, got none")
    same = share([float(one == other) for one, other in decided])
    first = sum(one == "correct" for one, _ in decided) / len(decided)
    second = sum(other == "correct" for _, other in decided) / len(decided)
    by_chance = first * second + (1 - first) * (1 - second)
    kappa = (same.mean - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan
    use = sum((verdict.use for verdict in verdicts), JudgeUse())
    return Agreement(num_decided=len(decided), agreement=same, kappa=kappa, counts=Counter(pairs), use=use)


def _discordant(first: Sequence[Attempt], second: Sequence[Attempt]) -> tuple[int, int]:
    left, right = ({one.task_id: one.status for one in attempts if one.round == 1} for attempts in (first, second))
    pairs = Counter((left[id], right[id]) for id in left.keys() & right.keys())
    return pairs["correct", "wrong"], pairs["wrong", "correct"]
