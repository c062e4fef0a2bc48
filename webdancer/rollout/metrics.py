"""What happened between two batches, over ALL rollouts: dropped groups count as much as kept ones.

Training curves on kept groups alone would show an accuracy that dynamic sampling chose; these do not. Units: shares in [0, 1],
`_s` seconds, everything else counts or means per rollout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from webdancer.rollout.tool_tally import ToolTally
from webdancer.types import Group, ScoredTrajectory

DROP_REASONS = ("all_correct", "all_wrong", "too_few_valid", "surplus")


class RolloutWindow:
    """Counts from one batch to the next. `now_s` are times of one monotonic clock."""

    def __init__(self, now_s: float) -> None:
        self._started_s = now_s
        self.waited_s = 0.0
        self.admitted = 0
        self.skipped = 0
        self.kept = 0
        self._stopped_early = 0
        self.dropped: Counter[str] = Counter()
        self._members: list[ScoredTrajectory] = []
        self._dropped_tokens = 0

    def finish(self, group: Group, *, keep: bool, reason: str, whole: int = 0) -> None:
        """`whole`: members that the group would have had if it had not been ended early."""
        self._members.extend(group.members)
        self._stopped_early += len(group.members) < whole
        if keep:
            self.kept += 1
        else:
            self.drop(reason)
            self._dropped_tokens += _policy_tokens(group.members)

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    @property
    def mostly_invalid(self) -> bool:
        """More than half of the groups that finished had too few valid members."""
        return 2 * self.dropped["too_few_valid"] > self._finished

    @property
    def commonest_loss(self) -> str:
        """Why most of the invalid members are invalid."""
        reasons = Counter(member.verdict.reason for member in self._members if not member.reward.valid)
        return reasons.most_common(1)[0][0] if reasons else ""

    def shares(self) -> str:
        """For an error message: what the finished groups were, without numbers of its own making."""
        if not self._finished:
            return "none finished"
        parts = [f"{self._share(reason):.0%} {reason}" for reason in DROP_REASONS[:3]]
        return f"of {self._finished} finished: {', '.join(parts)}, {self.kept} mixed"

    @property
    def _finished(self) -> int:
        return self.kept + sum(self.dropped[reason] for reason in DROP_REASONS[:3])

    def _share(self, reason: str) -> float:
        """Of the groups that finished."""
        return self.dropped[reason] / self._finished if self._finished else 0.0

    def metrics(self, batch: Sequence[Group], *, version: int, now_s: float) -> dict[str, float]:
        """All figures of the window that ends with `batch`, drawn at learner `version`."""
        members = self._members
        seconds = max(now_s - self._started_s, 1e-9)
        tokens = _policy_tokens(members)
        distinct = {(group.task.id, group.attempt): group for group in batch}.values()
        useful = sum(len(group.members) for group in distinct)
        figures = {
            "groups_admitted": float(self.admitted),
            "groups_kept": float(self.kept),
            "groups_dropped": float(sum(self.dropped.values())),
            **{f"dropped_{reason}": float(self.dropped[reason]) for reason in DROP_REASONS},
            "solved_by_all": self._share("all_correct"),
            "solved_by_none": self._share("all_wrong"),
            "groups_stopped_early": float(self._stopped_early),
            "groups_duplicated": float(len(batch) - len(distinct)),
            "questions_skipped": float(self.skipped),
            "rollouts": float(len(members)),
            "rollouts_per_useful": len(members) / useful if useful else 0.0,
            "tokens": float(tokens),
            "tokens_per_s": tokens / seconds,
            "dropped_tokens": float(self._dropped_tokens),
            "dropped_token_share": self._dropped_tokens / tokens if tokens else 0.0,
            "window_s": seconds,
            "wait_s": self.waited_s,
            **_member_means(members),
            **_staleness(batch, version),
        }
        services = ToolTally(members).figures(useful_groups=len(distinct))
        return {**{f"rollout/{name}": value for name, value in figures.items()}, **services}


def _member_means(members: Sequence[ScoredTrajectory]) -> dict[str, float]:
    """Means over valid members; what made the others invalid is infrastructure, and shows as `invalid_members`."""
    figures = {"invalid_members": float(sum(not m.reward.valid for m in members))}
    valid = [m for m in members if m.reward.valid]
    if not valid:
        return figures
    trajectories = [m.trajectory for m in valid]
    figures |= {
        "accuracy": _mean([m.reward.answer for m in valid]),
        "format": _mean([m.reward.format for m in valid]),
        "reward": _mean([m.reward.total for m in valid]),
        "turns": _mean([len(t.turns) for t in trajectories]),
        "tool_calls": _mean([t.num_tool_calls for t in trajectories]),
        "policy_tokens": _mean([t.num_policy_tokens for t in trajectories]),
        "length": _mean([len(t.token_ids) for t in trajectories]),
    }
    stops = Counter(m.trajectory.stop for m in members)
    figures |= {f"stop_{stop.value}": count / len(members) for stop, count in stops.items()}
    results = [turn.result for t in trajectories for turn in t.turns if turn.result is not None]
    errors = Counter(result.error for result in results if result.error is not None)
    figures |= {f"tool_error_{code}": count / len(results) for code, count in errors.items()}
    if results:
        figures["tool_latency_s"] = _mean([result.latency_s for result in results])
    return figures


def _staleness(batch: Sequence[Group], version: int) -> dict[str, float]:
    """Learner versions the batch is behind: of its groups at admission, and of the tokens that will be trained."""
    if not batch:
        return {}
    groups = [version - group.start_version for group in batch]
    trained = [m.trajectory.versions[m.trajectory.loss_mask] for group in batch for m in group.members]
    ages = version - np.concatenate(trained)
    counts = np.bincount(np.maximum(ages, 0)) if ages.size else np.zeros(0)
    return {
        "staleness_mean": _mean(groups),
        "staleness_max": float(max(groups)),
        "token_staleness_mean": _mean(ages),
        "token_staleness_max": float(ages.max()) if ages.size else 0.0,
        **{f"token_share_stale_{age}": float(count / ages.size) for age, count in enumerate(counts)},
        "batch_accuracy": _mean([m.reward.answer for group in batch for m in group.members if m.reward.valid]),
    }


def _policy_tokens(members: Sequence[ScoredTrajectory]) -> int:
    return sum(m.trajectory.num_policy_tokens for m in members)


def _mean(values: Sequence[float] | NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
