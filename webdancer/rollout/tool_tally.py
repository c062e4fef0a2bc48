"""What tools and judge did and cost, over all rollouts, whether kept or not: `tools/...` and `judge/...` in the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from webdancer.types import JudgeUse, ScoredTrajectory, ToolCall, ToolUse, by_provider


class ToolTally:
    """Add trajectories, then ask for the figures. Counts are of the agent's calls and of requests on the network, money is in dollars.

    The judge's are left out where no model judges.
    """

    def __init__(self, members: Iterable[ScoredTrajectory] = ()) -> None:
        self._num_trajectories = 0
        self._counts: Counter[str] = Counter()
        self._by_provider: dict[str, ToolUse] = {}
        self._judge = JudgeUse()
        for member in members:
            self.add(member)

    def add(self, member: ScoredTrajectory) -> None:
        self._num_trajectories += 1
        self._judge += member.verdict.use
        self._by_provider = by_provider((*self._by_provider.values(), *member.trajectory.tool_uses))
        for turn in member.trajectory.turns:
            if turn.result is None or not isinstance(turn.action, ToolCall):
                continue
            self._counts.update(calls=1, cached=turn.result.cached, throttled=turn.result.throttled)
            self._counts["replay_misses"] += turn.result.error == "replay_miss"

    def figures(self, *, useful_groups: int = 0) -> dict[str, float]:
        """`useful_groups`: those that are trained on; money is also told per one of them."""
        return {**self._of_tools(useful_groups), **self._of_judge()}

    def _of_judge(self) -> dict[str, float]:
        used = JudgeUse() != self._judge
        return {f"judge/{name}": float(value) for name, value in asdict(self._judge).items()} if used else {}

    def _of_tools(self, useful_groups: int) -> dict[str, float]:
        if not self._counts["calls"]:
            return {}
        calls = self._counts["calls"]
        usd = sum(use.usd for use in self._by_provider.values())
        figures = {
            "calls": float(calls),
            "requests_per_call": sum(use.requests for use in self._by_provider.values()) / calls,
            "hit_rate": self._counts["cached"] / calls,
            "throttled": self._counts["throttled"] / calls,
            "usd": usd,
            "usd_per_trajectory": usd / self._num_trajectories,
        }
        if useful_groups:
            figures["usd_per_useful_group"] = usd / useful_groups
        if self._counts["replay_misses"]:
            figures["replay_misses"] = float(self._counts["replay_misses"])
        for name, use in sorted(self._by_provider.items()):
            figures |= {f"{name}_requests": float(use.requests), f"{name}_hits": float(use.hits), f"{name}_usd": use.usd}
        return {f"tools/{name}": value for name, value in figures.items()}
