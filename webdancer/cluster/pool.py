"""The pool of rollout workers: who runs an episode, who still lives, and who comes after the dead.

    acquire   least-loaded worker; the members of a group stay together while there is room (their prompt is in its prefix cache)
    watch     one standing `report` call a worker: carries turns, proves life, says when the engine is broken
    retire    a worker that is dead, hung or broken leaves at once; its episodes are lost, and go on elsewhere
    scale     more workers are started, or the least loaded drain: they finish the turns that run, and their episodes go on elsewhere
    balance   as many start as are missing; a newcomer joins when `prepare` (current weights, canary) let it
    sleep     every engine gives its GPU's memory back until it gets new weights; nobody starts meanwhile (cluster.shared_gpus)

A pool goes on with fewer workers where a newcomer does not start; one without any worker fails, and everyone who waits for a worker
gets the reason.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from webdancer.cluster.calls import ActorLost, answer, kill
from webdancer.cluster.worker import WorkerReport
from webdancer.errors import EngineFault, StalledError, WebDancerError
from webdancer.rollout.watch import Waiting
from webdancer.types import TurnNews

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""In a row; then the pool goes on without that worker."""
STOP_TIMEOUT_S = 20.0
"""For an engine to end in an orderly way before its actor is killed."""
SLEEP_TIMEOUT_S = 60.0
MAX_FAULTS = 2
"""Episodes in a row that a worker's engine failed; one alone may be an aborted request, more are the engine."""

TurnListener = Callable[[TurnNews], None]


@dataclass(slots=True, eq=False)
class PooledWorker:
    """`gone` becomes the reason once the worker has left for good; one that is `leaving` gets no episode any more. `activity` is what its
    episodes waited for at its last report."""

    name: str
    handle: Any
    node_id: str
    process_id: int
    gone: asyncio.Future[str]
    leaving: bool = False
    activity: Mapping[str, Waiting] = field(default_factory=dict)
    capacity: int = 1
    load: int = 0
    groups: Counter[Hashable] = field(default_factory=Counter)
    faults: int = 0
    watch: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """`failure`: why the last worker that did not start did not, or may not."""

    wanted: int
    serving: int
    starting: int
    leaving: int
    failure: str


class WorkerPool:
    """`spawn(name)` makes an actor of RolloutWorker; `capacity` bounds the episodes of one worker, until it reports another; `max_workers`
    is for how many there is a learner rank's GPU, where they need one.

    Timeouts: see config.RolloutConfig.
    """

    def __init__(
        self,
        spawn: Callable[[str], Any],
        *,
        num_workers: int,
        capacity: int,
        start_timeout_s: float,
        heartbeat_timeout_s: float = 60.0,
        drain_timeout_s: float = 120.0,
        max_workers: int | None = None,
    ) -> None:
        self._spawn = spawn
        self._num_workers = num_workers
        self._capacity = capacity
        self._start_timeout_s = start_timeout_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._max_workers = max_workers
        self._names = itertools.count()
        self._runs = itertools.count()
        self._workers: list[PooledWorker] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._listeners: dict[int, TurnListener] = {}
        self._starting: list[asyncio.Task[None]] = []
        self._leaving: set[PooledWorker] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self._not_started = ""
        self._stopping = False
        self._awake = asyncio.Event()
        self._awake.set()
        self._num_loading = 0
        self._none_loads = asyncio.Event()
        self._none_loads.set()
        self.rest: Mapping[str, float] = {}
        """Of the last sleep: seconds until all slept, GiB in use on the fullest GPU before and after."""
        self.prepare: Callable[[PooledWorker], Awaitable[None]] | None = None
        """Brings a newcomer up to date before it may serve; raises where it cannot."""
        self.num_replaced = 0

    @property
    def workers(self) -> Sequence[PooledWorker]:
        """Those that serve now."""
        return tuple(self._workers)

    @property
    def state(self) -> PoolState:
        return PoolState(
            wanted=self._num_workers,
            serving=len(self._workers),
            starting=len(self._starting),
            leaving=len(self._leaving),
            failure=self._not_started,
        )

    @property
    def num_waiting(self) -> int:
        """Episodes that wait for a place on a worker."""
        return len(self._waiting)

    async def start(self) -> None:
        """Start all workers at once; raises the first error."""
        starting = [asyncio.ensure_future(self._start_one()) for _ in range(self._num_workers)]
        try:
            for worker in await asyncio.gather(*starting):
                self._join(worker)
        finally:
            for task in starting:
                task.cancel()

    async def stop(self) -> None:
        """End engines in an orderly way, then the actors. Never raises: what does not answer is killed."""
        self._stopping = True
        workers = [*self._workers, *self._leaving]
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for worker in workers:
            self._leave(worker, "the pool was stopped")
        await asyncio.gather(*map(self._end, workers))
        self._fail(ActorLost("the pool of rollout workers was stopped"))

    def scale(self, num_workers: int) -> None:
        """Have so many workers from now on; `state` says how far that is."""
        assert num_workers >= 1, num_workers
        self._num_workers, self._not_started = num_workers, ""
        if self._max_workers is not None and num_workers > self._max_workers:
            self._num_workers = self._max_workers
            self._not_started = f"each needs the GPU of a learner rank (cluster.shared_gpus), of which there are {self._max_workers}"
        self._balance()

    async def sleep(self) -> None:
        """Every engine sleeps until its next weights; a worker that starts already is waited for. One that cannot sleep is replaced, and
        the newcomer starts after `wake`."""
        if not self._awake.is_set():
            return
        self._awake.clear()
        began = time.perf_counter()
        await self._none_loads.wait()
        workers = [*self._workers, *self._leaving]
        calls = [answer(worker.handle.sleep.remote(), stage=f"sleep of {worker.name}", timeout_s=SLEEP_TIMEOUT_S) for worker in workers]
        told = []
        for worker, memory in zip(workers, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(memory, BaseException):
                self.retire(worker, f"sleep: {memory}")
            else:
                told.append(memory)
        fullest = {name: max(memory[name] for memory in told if name in memory) for name in {name for memory in told for name in memory}}
        self.rest = {"sync/sleep_s": time.perf_counter() - began, **fullest}

    def wake(self) -> None:
        """All engines have new weights: who waits to start may."""
        self._awake.set()

    async def acquire(self, group: Hashable) -> PooledWorker:
        """A place on a worker, waiting for one if need be. Raises when the pool has failed."""
        while True:
            if self._failure is not None:
                raise self._failure
            if (worker := self._pick(group)) is not None:
                worker.load += 1
                worker.groups[group] += 1
                return worker
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self._wake_one()  # the place offered to us goes to the next
                raise

    def release(self, worker: PooledWorker, group: Hashable) -> None:
        worker.load -= 1
        worker.groups[group] -= 1
        if not worker.groups[group]:
            del worker.groups[group]
        self._wake_one()

    def listen(self, listener: TurnListener | None) -> int:
        """A number for one run of an episode, under which its turns are reported until `forget`."""
        run = next(self._runs)
        if listener is not None:
            self._listeners[run] = listener
        return run

    def forget(self, run: int, last_turns: Sequence[TurnNews] = ()) -> None:
        for finished in last_turns:
            self._deliver(run, finished)
        self._listeners.pop(run, None)

    def retire(self, worker: PooledWorker, reason: str) -> None:
        """Take the worker out at once and replace it. Harmless for one that has left already."""
        if worker.gone.done():
            return
        log.warning("rollout worker %s is taken out: %s", worker.name, reason)
        self._leave(worker, reason)
        kill(worker.handle)
        self.num_replaced += not worker.leaving
        self._balance()

    def note(self, worker: PooledWorker, *, fault: str | None) -> None:
        """How the engine served an episode: `fault` is why it was lost, None if it was not."""
        worker.faults = worker.faults + 1 if fault is not None else 0
        if fault is not None and worker.faults >= MAX_FAULTS:
            self.retire(worker, fault)

    def _pick(self, group: Hashable) -> PooledWorker | None:
        free = [worker for worker in self._workers if worker.load < worker.capacity]
        together = [worker for worker in free if group in worker.groups]
        return min(together or free, key=lambda worker: worker.load / worker.capacity, default=None)

    def _wake_one(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def _balance(self) -> None:
        """Start what is missing. Of too many, those that have not joined go first, then the least loaded."""
        if self._stopping:
            return
        surplus = len(self._workers) + len(self._starting) - self._num_workers
        for _ in range(-surplus):
            self._starting.append(self._in_background(self._start_and_join(), "start of a rollout worker"))
        while surplus > 0 and self._starting:
            self._starting.pop().cancel()
            surplus -= 1
        for worker in sorted(self._workers, key=lambda worker: worker.load)[: max(surplus, 0)]:
            worker.leaving = True
            self._workers.remove(worker)
            self._leaving.add(worker)
            self._in_background(self._drain(worker), f"drain of {worker.name}")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _drain(self, worker: PooledWorker) -> None:
        """Until its episodes have moved; what does not come to the end of a turn in time is cut off, and goes on elsewhere all the same."""
        reason = "it leaves, as the pool was scaled down"
        log.info("rollout worker %s: %s", worker.name, reason)
        draining = worker.handle.drain.remote(f"{worker.name}: {reason}")
        try:
            await answer(draining, stage=f"drain of {worker.name}", timeout_s=self._drain_timeout_s)
        except WebDancerError as error:
            reason = str(error)
        if not worker.gone.done():
            self._leave(worker, reason)
            await self._end(worker)

    async def _end(self, worker: PooledWorker) -> None:
        try:
            await answer(worker.handle.stop.remote(), stage=f"stop of {worker.name}", timeout_s=STOP_TIMEOUT_S)
        except Exception as error:  # whatever it is, the actor is killed next
            log.info("%s", error)
        finally:
            kill(worker.handle)

    def _join(self, worker: PooledWorker) -> None:
        self._workers.append(worker)
        worker.watch = asyncio.get_running_loop().create_task(self._watch(worker), name=f"watch over {worker.name}")
        for _ in range(worker.capacity):
            self._wake_one()

    def _resize(self, worker: PooledWorker, capacity: int) -> None:
        """As its engine has room; episodes that are too many by then just end."""
        grown, worker.capacity = capacity - worker.capacity, capacity
        for _ in range(grown):
            self._wake_one()

    def _leave(self, worker: PooledWorker, reason: str) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        self._leaving.discard(worker)
        if not worker.gone.done():
            worker.gone.set_result(reason)
        if worker.watch is not None and worker.watch is not asyncio.current_task():
            worker.watch.cancel()

    async def _start_one(self) -> PooledWorker:
        await self._awake.wait()
        self._num_loading += 1
        self._none_loads.clear()
        try:
            return await self._load(f"rollout-{next(self._names)}")
        finally:
            self._num_loading -= 1
            if not self._num_loading:
                self._none_loads.set()

    async def _load(self, name: str) -> PooledWorker:
        handle = self._spawn(name)
        try:
            await answer(handle.start.remote(), stage=f"start of {name}", timeout_s=self._start_timeout_s)
            node_id, process_id = await answer(handle.place.remote(), stage=f"start of {name}", timeout_s=self._start_timeout_s)
            gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            worker = PooledWorker(name=name, handle=handle, node_id=node_id, process_id=process_id, gone=gone, capacity=self._capacity)
            if self.prepare is not None:
                await self.prepare(worker)
        except BaseException:
            kill(handle)
            raise
        return worker

    async def _watch(self, worker: PooledWorker) -> None:
        while not worker.gone.done():
            try:
                report: WorkerReport = await answer(worker.handle.report.remote(), stage=worker.name, timeout_s=self._heartbeat_timeout_s)
            except (ActorLost, StalledError) as error:
                return self.retire(worker, str(error))
            except Exception as error:  # a fault of the program in the worker: the run ends with it
                return self._fail(error)
            worker.activity = report.activity
            for run, finished in report.turns:
                self._deliver(run, finished)
            if report.capacity:
                self._resize(worker, report.capacity)
            if report.broken is not None:
                return self.retire(worker, report.broken)

    async def _start_and_join(self) -> None:
        for _ in range(MAX_FAILED_STARTS):
            try:
                worker = await self._start_one()
            except Exception as error:  # whatever keeps a newcomer from starting: tried again, but not for ever
                self._not_started = str(error)
                log.warning("a rollout worker did not start: %s", self._not_started)
            else:
                self._no_longer_starting()
                return self._join(worker)
        self._no_longer_starting()
        self._num_workers -= 1
        if not self._workers and not self._starting:
            last = f"{MAX_FAILED_STARTS} replacements did not start; the last: {self._not_started}"
            self._fail(EngineFault(f"rollout: no worker is left, and {last}"))

    def _no_longer_starting(self) -> None:
        """One that was taken off the list by `_balance` is being cancelled."""
        task = asyncio.current_task()
        self._starting = [one for one in self._starting if one is not task]

    def _deliver(self, run: int, news: TurnNews) -> None:
        listener = self._listeners.get(run)
        if listener is not None:
            listener(news)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
