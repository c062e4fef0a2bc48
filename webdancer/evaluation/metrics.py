"""What an evaluation says: pass@k and its 95 % intervals, over all questions and by type and hops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One question: one greedy episode and n sampled ones. An invalid episode (infrastructure) is None or left out."""

    task_id: str
    question: str
    answers: tuple[str, ...]
    type: str
    hops: int
    greedy_correct: bool | None
    samples_correct: tuple[bool, ...]
    answer: str | None
    stop: str
    num_tool_calls: float | None
    """Mean over the sampled episodes, or the greedy one's where none was sampled."""
    format_ok: float | None
    """Share of well-formed episodes among the valid ones; None, as for the tool calls, where infrastructure took them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions with its 95 % interval (bootstrap over questions: samples of one question are not independent)."""

    mean: float
    low: float
    high: float
    num_tasks: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, Eq. 1). Needs num_samples >= k."""
    if not 0 < k <= num_samples:
        raise ValueError(f"k: must be between 1 and the number of samples, got {k} of {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def estimate(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of one value per question, percentile bootstrap interval; an empty sequence gives NaN."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Estimate(mean=math.nan, low=math.nan, high=math.nan, num_tasks=0)
    draws = np.random.default_rng(seed).integers(0, data.size, size=(resamples, data.size))
    low, high = np.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(mean=float(data.mean()), low=float(low), high=float(high), num_tasks=data.size)


def share(values: Sequence[float]) -> Estimate:
    """As `estimate`, of values in [0, 1]. Where all are equal the bootstrap has no width; Wilson's interval says how little that proves."""
    found = estimate(values)
    return found if not found.num_tasks or found.low < found.high else with_wilson(found)


def with_wilson(found: Estimate) -> Estimate:
    """The same with Wilson's interval, as of as many independent trials."""
    if found.num_tasks == 0:
        return found
    low, high = wilson_interval(found.mean * found.num_tasks, found.num_tasks)
    return Estimate(mean=found.mean, low=low, high=high, num_tasks=found.num_tasks)


def wilson_interval(num_correct: float, num_trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of independent trials (Wilson 1927); (0, 1) for no trial."""
    if num_trials == 0:
        return 0.0, 1.0
    rate = num_correct / num_trials
    centre = rate + z * z / (2 * num_trials)
    spread = z * math.sqrt(rate * (1 - rate) / num_trials + z * z / (4 * num_trials * num_trials))
    scale = 1 + z * z / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def greedy(rows: Sequence[EvaluationRow]) -> Estimate:
    return share([float(row.greedy_correct) for row in rows if row.greedy_correct is not None])


def sampled_pass_at_1(rows: Sequence[EvaluationRow]) -> Estimate:
    return share([sum(row.samples_correct) / len(row.samples_correct) for row in rows if row.samples_correct])


def sampled_pass_at_k(rows: Sequence[EvaluationRow], k: int) -> Estimate:
    """Over the questions with at least k valid samples."""
    enough = [row for row in rows if len(row.samples_correct) >= k]
    return share([pass_at_k(len(row.samples_correct), sum(row.samples_correct), k) for row in enough])


def summary(rows: Sequence[EvaluationRow], *, k: int = 8) -> dict[str, float]:
    """The scalars that go to metrics.jsonl and W&B."""
    figures: dict[str, float] = {}
    for name, subset in (("all", rows), *by(rows, lambda row: row.type), *by(rows, lambda row: f"{row.type}_{row.hops}")):
        figures[f"{name}/greedy"] = greedy(subset).mean
        figures[f"{name}/pass@1"] = sampled_pass_at_1(subset).mean
        figures[f"{name}/pass@{k}"] = sampled_pass_at_k(subset, k).mean
        figures[f"{name}/num_tasks"] = len(subset)
    figures["all/tool_calls"] = mean_of(row.num_tool_calls for row in rows)
    figures["all/format"] = mean_of(row.format_ok for row in rows)
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def mean_of(values: Iterable[float | None]) -> float:
    """Of those that are there; NaN without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def by(rows: Sequence[EvaluationRow], key: Callable[[EvaluationRow], str]) -> list[tuple[str, list[EvaluationRow]]]:
    """Rows grouped by a label, in label order."""
    labels = sorted({key(row) for row in rows})
    return [(label, [row for row in rows if key(row) == label]) for label in labels]
