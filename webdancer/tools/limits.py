"""How fast a host or a provider is asked: token buckets that hand out send times instead of counting tokens."""

from __future__ import annotations

import asyncio
import math

from webdancer.tools.network import FetchFailed

_AWAKE_S = 1e-3  # a sleeper may wake that much too early


class Schedule:
    """A token bucket (GCRA) on any one clock in seconds: any n requests that it lets through span at least (n - burst) / rate.

    rate_per_s 0: no rate, only pauses count. `burst` defaults to a second's worth, at least 1.
    """

    def __init__(self, rate_per_s: float, *, burst: float | None = None) -> None:
        self._between_s = 1 / rate_per_s if rate_per_s else 0.0
        self._ahead_s = (max(1.0, rate_per_s if burst is None else burst) - 1) * self._between_s
        self._next = -math.inf  # when the next request would be due if none were let through ahead of time
        self._paused_until = -math.inf
        self._slowed = False

    def reserve(self, now: float, *, patience_s: float = math.inf) -> float | None:
        """Seconds after which the caller may send; None, and nothing is reserved, where that would be more than `patience_s`."""
        wait = max(0.0, self._next - self._ahead_s - now)
        if wait > patience_s:
            return None
        self._next = max(self._next, now) + self._between_s
        return wait

    def pause(self, until: float) -> None:
        """Nothing is let through before; after it, one at a time at first."""
        self._next = max(self._next, until + self._ahead_s)
        self._paused_until = max(self._paused_until, until)

    def paused(self, now: float) -> bool:
        """Also for those who reserved their time before the pause was known: they are to reserve another."""
        return now < self._paused_until - _AWAKE_S

    def slow_to(self, between_s: float) -> None:
        """At least so long between two requests from now on, none ahead of time (Crawl-delay)."""
        if between_s > self._between_s:
            self._between_s, self._ahead_s, self._slowed = between_s, 0.0, True

    def held_back(self, now: float) -> bool:
        """By the wish of who is asked (pause, slow_to), more than by the rate."""
        return self._slowed or self.paused(now)


class NotAsked(FetchFailed):
    """No request was made. `reason`: robots, rules (the host did not say what robots may), slow (the host wants to be asked later), quota
    (ours, of a provider or a host), budget or breaker."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Exhausted(Exception):
    """The next free time is further away than the caller can wait."""


async def wait_for(schedule: Schedule, *, patience_s: float) -> float:
    """Sleep until the schedule lets one request through; gives the seconds. Raises Exhausted at once instead of waiting too long."""
    wait_s = schedule.reserve(asyncio.get_running_loop().time(), patience_s=patience_s)
    if wait_s is None:
        raise Exhausted
    if wait_s > 0:
        await asyncio.sleep(wait_s)
    return wait_s


class Breaker:
    """Leaves alone who fails: after `failures` in a row nothing is let through for `open_s`, then one attempt, whose result decides.

    An attempt that never says how it went (its caller was cancelled) counts as failed.
    """

    def __init__(self, *, failures: int, open_s: float) -> None:
        self._limit = failures
        self._open_s = open_s
        self._failed = 0
        self._open_until = -math.inf

    def lets_through(self, now: float) -> bool:
        if self._failed < self._limit:
            return True
        if now < self._open_until:
            return False
        self._open_until = now + self._open_s  # for all others, while this one tries
        return True

    def note(self, *, fine: bool, now: float) -> None:
        self._failed = 0 if fine else self._failed + 1
        if self._failed >= self._limit:
            self._open_until = now + self._open_s
