"""As many tool actors as are asked for, while a run goes on: `webdancer scale tools=N`.

    more    the new ones start and are checked; then everybody is told, and asks them what is theirs
    fewer   everybody is told; then the leavers end the calls that they have, and go

Everybody is the driver and each rollout worker: they have the list of actors, and find the owner of a query or page in it by rendezvous
hashing of numbers (tools/pieces.py). The last numbers leave, so that only what they own moves. Who is not told yet asks whom it knew: any
actor gives a right answer, the owner alone remembers it, and a call that meets a dead one is made again on the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from webdancer.cluster.calls import answer, answers, kill
from webdancer.cluster.pool import PooledWorker, PoolState, WorkerPool
from webdancer.cluster.services import RemoteToolbox
from webdancer.errors import WebDancerError

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""For new tool actors to be ready, the wait for a free node included."""
TELL_TIMEOUT_S = 60.0


class ToolPool:
    """`spawn(shard)` makes an actor of ToolServer; `servers` are those there are, the same list from now on. `toolbox` is the driver's,
    which is also what newcomers of `workers` get. A call has `drain_timeout_s` to end on a leaver."""

    def __init__(
        self,
        spawn: Callable[[int], Any],
        servers: list[Any],
        toolbox: RemoteToolbox,
        workers: WorkerPool | None = None,
        *,
        drain_timeout_s: float,
    ) -> None:
        self._spawn = spawn
        self._servers = servers
        self._toolbox = toolbox
        self._workers = workers
        self._drain_timeout_s = drain_timeout_s
        self._wanted = len(servers)
        self._starting = self._leaving = self._changes = 0
        self._failure = ""
        self._work: asyncio.Task[None] | None = None
        if workers is not None:
            self._prepare_before = workers.prepare
            workers.prepare = self._prepare

    @property
    def state(self) -> PoolState:
        return PoolState(
            wanted=self._wanted, serving=len(self._servers), starting=self._starting, leaving=self._leaving, failure=self._failure
        )

    def scale(self, number: int) -> None:
        """Have so many from now on; `state` says how far that is."""
        assert number >= 1, number
        self._wanted, self._failure = number, ""
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._reach(), name="scaling of the tools")

    async def stop(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _reach(self) -> None:
        """What is wanted may change meanwhile."""
        while (missing := self._wanted - len(self._servers)) != 0:
            try:
                await (self._grow(missing) if missing > 0 else self._shrink(-missing))
            except Exception as error:  # a run goes on with the tools that it has
                log.warning("tool actors: %s", error)
                self._failure, self._wanted = f"{type(error).__name__}: {error}", len(self._servers)

    async def _grow(self, count: int) -> None:
        new = [self._spawn(len(self._servers) + index) for index in range(count)]
        self._starting = count
        try:
            await answers([server.ready.remote() for server in new], stage="start of tool actors", timeout_s=START_TIMEOUT_S)
        except BaseException:
            for server in new:
                kill(server)
            raise
        finally:
            self._starting = 0
        self._servers += new
        await self._tell()

    async def _shrink(self, count: int) -> None:
        leavers = self._servers[-count:]
        del self._servers[-count:]
        self._leaving = count
        try:
            await self._tell()
            draining = [answer(server.drain.remote(), stage="drain of a tool actor", timeout_s=self._drain_timeout_s) for server in leavers]
            for error in await asyncio.gather(*draining, return_exceptions=True):
                if isinstance(error, Exception):
                    log.warning("%s", error)  # its calls are made again elsewhere
        finally:
            self._leaving = 0
            for server in leavers:
                kill(server)

    async def _tell(self) -> None:
        """One that cannot be told is watched over by its pool, and finds out by itself who is gone."""
        self._changes += 1
        self._toolbox.use(self._servers)
        workers = self._workers.workers if self._workers is not None else ()
        told = [self._tell_one(worker) for worker in workers]
        for error in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(error, WebDancerError):
                log.warning("%s", error)
            elif isinstance(error, BaseException):
                raise error

    async def _tell_one(self, worker: PooledWorker) -> None:
        await answer(worker.handle.use_tools.remote(list(self._servers)), stage=f"tools of {worker.name}", timeout_s=TELL_TIMEOUT_S)

    async def _prepare(self, worker: PooledWorker) -> None:
        """A newcomer was made with the list of its time."""
        if self._prepare_before is not None:
            await self._prepare_before(worker)
        told = 0
        while told != self._changes:
            told = self._changes
            await self._tell_one(worker)
