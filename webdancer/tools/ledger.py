"""What the tools ask of the world and what that costs.

A `Bill` gathers what one call of the agent caused; it travels in the context, so that a request need not know for whom it is made. Who
starts a request that others share pays it. The `Ledger` is one for a whole cluster: it leases the quota of a provider request by
request, and the money of the run's budget with it, so that neither is ever exceeded.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from webdancer.config import ToolsConfig
from webdancer.errors import ServiceError
from webdancer.tools.limits import Schedule
from webdancer.types import ToolUse, by_provider
from webdancer.whole_file import write_whole

FILE_NAME = "spending.json"
_WRITE_EVERY_S = 1.0
_MAX_BACKLOG_S = 60.0
"""No tool actor waits longer for its turn: a file that says more is of a clock that was set, or of a job that died with its ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A service with a quota or a price; both 0: nobody needs a lease to ask it."""

    name: str
    requests_per_s: float = 0.0
    usd_per_1000: float = 0.0

    @property
    def leased(self) -> bool:
        return self.requests_per_s > 0 or self.usd_per_1000 > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """May be used once, after `delay_s` seconds. Refused: the quota is used up for longer than the caller can wait, or the budget spent."""

    delay_s: float = 0.0
    refused: Literal["", "quota", "budget"] = ""


class Purse(Protocol):
    """A Ledger, here or in another process, for who learns what a request cost only when it is answered."""

    async def pay(self, provider: str, *, requests: int, usd: float) -> bool: ...


class Quota(Purse, Protocol):
    """A Ledger, here or in another process. A lease that is not used is paid back, with negative numbers."""

    async def lease(self, provider: Provider, *, patience_s: float) -> Lease: ...


class Bill:
    """What one call of a tool caused, by provider."""

    def __init__(self) -> None:
        self._uses: dict[str, ToolUse] = {}
        self.throttled = False
        """A quota made it wait or turned it away, or a provider is left alone or said that it is asked too much."""

    @property
    def uses(self) -> tuple[ToolUse, ...]:
        return tuple(self._uses.values())

    def add(self, provider: str, *, requests: int = 0, hits: int = 0, usd: float = 0.0) -> None:
        use = ToolUse(provider=provider, requests=requests, hits=hits, usd=usd)
        self._uses = by_provider((*self._uses.values(), use))


_BILL: ContextVar[Bill | None] = ContextVar("bill", default=None)


def open_bill() -> Bill:
    """A new bill for everything that the current task and the tasks it starts will ask."""
    bill = Bill()
    _BILL.set(bill)
    return bill


def bill() -> Bill:
    """The bill of whoever asks; one that nobody will read where nobody has opened any."""
    return _BILL.get() or Bill()


class Ledger:
    """One quota a provider and one budget for all. `clock` is monotonic, in seconds.

    path: a file that remembers what was spent over all starts of a run, whole at any time and at most a second behind. It also says, by the
    world's clock, until when leases that were given may be due: a ledger that begins again after a crash gives none before, as those who
    hold them still use them.
    """

    def __init__(self, *, budget_usd: float = 0.0, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_usd = budget_usd
        self._path = path
        self._clock = clock
        self._schedules: dict[str, Schedule] = {}
        self._requests: dict[str, int] = {}
        self._usd: dict[str, float] = {}
        self._leased_until: dict[str, float] = {}
        self._changed = False
        self._writing: asyncio.Task[None] | None = None
        self._one_writer = threading.Lock()
        if path is not None and path.exists():
            for name, spent in json.loads(path.read_bytes()).items():
                self._requests[name], self._usd[name] = int(spent["requests"]), float(spent["usd"])
                if "leased_until" in spent:
                    self._leased_until[name] = float(spent["leased_until"])

    @property
    def usd(self) -> float:
        return sum(self._usd.values())

    @property
    def spent(self) -> Mapping[str, Mapping[str, float]]:
        return {name: {"requests": self._requests[name], "usd": self._usd[name]} for name in sorted(self._requests)}

    async def lease(self, provider: Provider, *, patience_s: float) -> Lease:
        """One request. It is counted and paid for now, whether or not it is made."""
        price = provider.usd_per_1000 / 1000
        if self._budget_usd and self.usd + price > self._budget_usd + 1e-12 and price:
            return Lease(refused="budget")
        delay_s = self._schedule(provider).reserve(self._clock(), patience_s=patience_s)
        if delay_s is None:
            return Lease(refused="quota")
        self._count(provider.name, requests=1, usd=price)
        if provider.requests_per_s and self._path is not None:
            await self._promise(provider.name, delay_s)
        return Lease(delay_s=delay_s)

    async def pay(self, provider: str, *, requests: int, usd: float) -> bool:
        """What was asked and is answered. False: the budget is spent, by this or before, and nothing priced may be asked any more."""
        if requests:
            self._count(provider, requests=requests, usd=usd)
        return not self._budget_usd or self.usd < self._budget_usd

    def _count(self, name: str, *, requests: int, usd: float) -> None:
        self._usd[name] = self._usd.get(name, 0.0) + usd
        self._requests[name] = self._requests.get(name, 0) + requests  # the last: another thread may go by its names
        self._changed = True
        if self._path is None:
            return
        if self._writing is not None and self._writing.done() and not self._writing.cancelled():
            self._writing.result()  # raises what keeps it from being written
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._keep_written())

    def _schedule(self, provider: Provider) -> Schedule:
        name = provider.name
        if name not in self._schedules:
            schedule = self._schedules[name] = Schedule(provider.requests_per_s, burst=1)  # a quota holds in any second
            backlog_s = min(_MAX_BACKLOG_S, self._leased_until.get(name, 0.0) - time.time())
            if backlog_s > 0:
                schedule.pause(self._clock() + backlog_s)
        return self._schedules[name]

    async def _promise(self, name: str, delay_s: float) -> None:
        """The file speaks of a lease before anybody has it; a second in advance, so that it need not be written for each."""
        due = time.time() + delay_s
        if due > self._leased_until.get(name, 0.0):
            self._leased_until[name] = due + _WRITE_EVERY_S
            await asyncio.to_thread(self.write)

    async def _keep_written(self) -> None:
        while self._changed:
            self._changed = False
            await asyncio.to_thread(self.write)  # the run directory may be on a slow network file system
            await asyncio.sleep(_WRITE_EVERY_S)

    def write(self) -> None:
        """Bring the file up to date. From any thread."""
        if self._path is None or not self._requests:
            return
        with self._one_writer:  # the last to write knows most
            content = {name: dict(spent) for name, spent in self.spent.items()}
            for name, until in list(self._leased_until.items()):
                content[name]["leased_until"] = until
            write_whole(self._path, json.dumps(content, indent=1).encode())


def out_of_money() -> ServiceError:
    return ServiceError(
        "tools.budget_usd: must cover the run, but is spent (spending.json in the run directory says on what); "
        "what is finished is kept, and the same command goes on with a larger one"
    )


def providers(config: ToolsConfig) -> tuple[Provider, Provider]:
    """Who searches, and who reads pages; hosts that are visited directly are no provider and have no price."""
    search, visit = config.search, config.visit
    reads = {} if visit.backend == "direct" else {"requests_per_s": visit.requests_per_s, "usd_per_1000": visit.usd_per_1000}
    return (
        Provider(name=search.backend, requests_per_s=search.requests_per_s, usd_per_1000=search.usd_per_1000),
        Provider(name=visit.backend, **reads),
    )
