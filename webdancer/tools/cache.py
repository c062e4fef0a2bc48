"""Memory of one tool actor: what several episodes ask at once is computed once, and what was found is remembered for as long as it holds.

Values say how long they hold (`lifetime_s`; 0: never remembered), so a failure that will last is a value with a short life, and one that
may pass is an exception, which nobody remembers. A `Shelf` keeps values beyond the process.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from webdancer.tools.ledger import Bill, bill

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
KS = TypeVar("KS", bound=Hashable, contravariant=True)


@dataclass(frozen=True, slots=True)
class Kept(Generic[V]):
    value: V
    expires: float
    """Seconds since the epoch."""


class Shelf(Protocol[KS, V]):
    """Never raises: what cannot be read is a miss, what cannot be written is forgotten."""

    async def get(self, key: KS) -> Kept[V] | None: ...

    async def put(self, key: KS, kept: Kept[V]) -> None: ...


class SingleFlightCache(Generic[K, V]):
    """LRU over values; `max_size` bounds the sum of `size_of`. 0 entries: nothing is remembered here, but flights are still shared.

    name: the provider whose bill hears of hits. clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        max_entries: int,
        max_size: int,
        size_of: Callable[[V], int],
        lifetime_s: Callable[[V], float] = lambda value: math.inf,
        shelf: Shelf[K, V] | None = None,
        name: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_entries = max_entries
        self._max_size = max_size
        self._size_of = size_of
        self._lifetime_s = lifetime_s
        self._shelf = shelf
        self._name = name
        self._clock = clock
        self._size = 0
        self._values: OrderedDict[K, Kept[V]] = OrderedDict()
        self._flights: dict[K, tuple[asyncio.Task[tuple[V, bool]], Bill]] = {}

    async def get(self, key: K, compute: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        """The value, and whether it took no work of its own. A caller that is cancelled leaves the flight to the others."""
        value, cached = await self._get(key, compute)
        if cached and self._name:
            bill().add(self._name, hits=1)
        return value, cached

    async def aclose(self) -> None:
        flights = [flight for flight, _ in self._flights.values()]
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _get(self, key: K, compute: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        kept = self._values.get(key)
        if kept is not None and self._clock() < kept.expires:
            self._values.move_to_end(key)
            return kept.value, True
        shared = key in self._flights
        if not shared:
            flight = asyncio.ensure_future(self._fly(key, compute))
            self._flights[key] = flight, bill()
            flight.add_done_callback(lambda done: self._land(key, done))
        flight, whose = self._flights[key]
        try:
            value, shelved = await asyncio.shield(flight)
        finally:
            bill().throttled |= whose.throttled  # what held up who pays held up all of them
        return value, shared or shelved

    async def _fly(self, key: K, compute: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        """The value, and whether it was on the shelf."""
        if self._shelf is not None:
            kept = await self._shelf.get(key)
            if kept is not None and self._clock() < kept.expires:
                self._remember(key, kept)
                return kept.value, True
        value = await compute()
        lifetime_s = self._lifetime_s(value)
        if lifetime_s > 0:
            kept = Kept(value, self._clock() + lifetime_s)
            self._remember(key, kept)
            if self._shelf is not None:
                await self._shelf.put(key, kept)
        return value, False

    def _land(self, key: K, flight: asyncio.Task[tuple[V, bool]]) -> None:
        del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # read here, or asyncio complains where every waiter was cancelled

    def _remember(self, key: K, kept: Kept[V]) -> None:
        if self._max_entries == 0:
            return
        old = self._values.pop(key, None)
        self._size -= 0 if old is None else self._size_of(old.value)
        self._values[key] = kept
        self._size += self._size_of(kept.value)
        while len(self._values) > self._max_entries or (self._size > self._max_size and self._values):
            _, dropped = self._values.popitem(last=False)
            self._size -= self._size_of(dropped.value)
