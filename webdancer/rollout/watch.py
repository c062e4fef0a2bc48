"""What the episodes of a worker wait for just now, and a guard around the engine that they wait for most.

Each wait is one of three stages: `generate`, `tool` and `judge`. A run that stalls can so say in which one, and since when.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from webdancer.errors import EngineFault
from webdancer.interfaces import Judge, OnTokens, Policy, StreamingPolicy, Toolbox
from webdancer.types import Completion, Sampling, Task, ToolCall, ToolResult, Verdict

MAX_LOGPROB = 1e-3
"""A log-probability may be above 0 by rounding only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How many episodes wait in a stage, and seconds since the first of them began to."""

    count: int
    longest_s: float


class Activity:
    """Who waits for what since when."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[str, float]] = {}
        self._numbers = itertools.count()

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        number = next(self._numbers)
        self._since[number] = stage, time.monotonic()
        try:
            yield
        finally:
            del self._since[number]

    def now(self) -> dict[str, Waiting]:
        """By stage; those in which nobody waits are left out."""
        seconds: dict[str, list[float]] = {}
        for stage, since in self._since.values():
            seconds.setdefault(stage, []).append(time.monotonic() - since)
        return {stage: Waiting(count=len(waits), longest_s=max(waits)) for stage, waits in seconds.items()}


def described(places: Mapping[str, Mapping[str, Waiting]]) -> str:
    """One line on all `places` (workers) together, beginning with the stage in which somebody waits the longest."""
    longest: dict[str, tuple[float, str]] = {}
    counts: dict[str, int] = {}
    for place, activity in places.items():
        for stage, waiting in activity.items():
            counts[stage] = counts.get(stage, 0) + waiting.count
            longest[stage] = max(longest.get(stage, (-1.0, "")), (waiting.longest_s, place))
    order = sorted(longest, key=lambda stage: longest[stage], reverse=True)
    return ", ".join(f"{counts[stage]} in {stage} (the longest for {longest[stage][0]:.0f} s, {longest[stage][1]})" for stage in order)


class GuardedPolicy:
    """interfaces.Policy. Raises EngineFault where the engine does not answer within `timeout_s`, and where what it gave cannot be a
    completion: neither becomes data. While `leaving` is set, nothing new is begun."""

    def __init__(self, policy: Policy, activity: Activity, *, timeout_s: float) -> None:
        self._policy = policy
        self._activity = activity
        self._timeout_s = timeout_s
        self.leaving = ""
        self.proven = asyncio.Event()
        """Not set while nobody knows whether the engine's weights are right: what it gives meanwhile waits."""
        self.proven.set()

    async def complete(self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str) -> Completion:
        generating = self._policy.complete(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=session)
        return await self._guarded(generating, max_tokens=max_tokens)

    async def stream(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str, on_tokens: OnTokens
    ) -> Completion:
        """`complete` alone where the engine cannot be listened to."""
        if not isinstance(self._policy, StreamingPolicy):
            return await self.complete(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=session)
        generating = self._policy.stream(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=session, on_tokens=on_tokens)
        return await self._guarded(generating, max_tokens=max_tokens)

    async def _guarded(self, generating: Coroutine[Any, Any, Completion], *, max_tokens: int) -> Completion:
        if self.leaving:
            generating.close()
            raise EngineFault(self.leaving)
        deadline = asyncio.timeout(self._timeout_s)
        try:
            with self._activity.during("generate"):
                async with deadline:
                    completion = await generating
        except TimeoutError:
            if not deadline.expired():
                raise
            raise EngineFault(f"generate: no answer of the engine within {self._timeout_s:g} s (episode.turn_timeout_s)") from None
        if (fault := garbage(completion, max_tokens=max_tokens)) is not None:
            raise EngineFault(f"generate: the engine gave {fault}")
        await self.proven.wait()
        return completion


class RunPolicy:
    """interfaces.StreamingPolicy of one run of an episode: its sessions are not those of another run of the same episode, whose keys and
    values may be of weights that are long gone."""

    def __init__(self, policy: StreamingPolicy, run: int) -> None:
        self._policy = policy
        self._run = run

    async def complete(self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str) -> Completion:
        return await self._policy.complete(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=self._own(session))

    async def stream(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str, on_tokens: OnTokens
    ) -> Completion:
        own = self._own(session)
        return await self._policy.stream(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=own, on_tokens=on_tokens)

    def _own(self, session: str) -> str:
        return f"{session}#{self._run}"


def garbage(completion: Completion, *, max_tokens: int) -> str | None:
    """What no sound engine gives, if there is any of it."""
    if not 0 < len(completion.token_ids) <= max_tokens:
        return f"{len(completion.token_ids)} tokens where 1 to {max_tokens} were asked for"
    if min(completion.token_ids) < 0:
        return f"the token id {min(completion.token_ids)}"
    bad = next((logprob for logprob in completion.logprobs if not (math.isfinite(logprob) and logprob <= MAX_LOGPROB)), None)
    if bad is not None:
        return f"the log-probability {bad}"
    ends = [0]
    for span in completion.versions:
        if span.start != ends[-1]:
            break
        ends.append(span.end)
    return None if ends[-1] == len(completion.token_ids) else "weight versions for a part of its tokens only"


class WatchedToolbox:
    """interfaces.Toolbox."""

    def __init__(self, toolbox: Toolbox, activity: Activity) -> None:
        self._toolbox = toolbox
        self._activity = activity

    async def call(self, call: ToolCall) -> ToolResult:
        with self._activity.during("tool"):
            return await self._toolbox.call(call)


class WatchedJudge:
    """interfaces.Judge."""

    def __init__(self, judge: Judge, activity: Activity) -> None:
        self._judge = judge
        self._activity = activity

    async def grade(self, task: Task, answer: str) -> Verdict:
        with self._activity.during("judge"):
            return await self._judge.grade(task, answer)
