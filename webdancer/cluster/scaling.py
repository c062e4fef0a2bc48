"""More or fewer rollout workers or tool actors while a run goes on: `webdancer scale rollout=N`, `tools=N`.

    command --ask--> desk <--exchange-- driver --scale--> WorkerPool | ToolPool

The desk is a named actor beside the driver, which stands in a call to it all the time. Whoever can run code on the Ray of a job can scale
it; where that is, the run's directory says (live_file).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from webdancer.cluster.calls import answer, kill, spawn
from webdancer.cluster.connection import joined, own_token
from webdancer.cluster.live_file import Live, announced
from webdancer.cluster.pool import PoolState
from webdancer.errors import ServiceError

log = logging.getLogger(__name__)

NAMESPACE = "webdancer"
EXCHANGE_S = 1.0
"""The driver's state at the desk is never older."""
DESK_TIMEOUT_S = 30.0
LOST_AFTER_S = 60.0
"""A request that the driver has not heard of by then never comes to it."""


NAMES: Mapping[str, str] = {"rollout": "rollout workers", "tools": "tool actors"}


class Scalable(Protocol):
    @property
    def state(self) -> PoolState: ...

    def scale(self, number: int, /) -> None: ...


Request = tuple[str, int]
"""A ticket, and how many there are to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the desk knows of the run: by part, its state as of the driver's last exchange, and the ticket of the last request heard of."""

    run_dir: str
    states: Mapping[str, PoolState]
    tickets: Mapping[str, str]


class ScaleDesk:
    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._states: Mapping[str, PoolState] = {}
        self._heard: Mapping[str, str] = {}
        self._requests: dict[str, Request] = {}
        self._asked = asyncio.Event()

    async def ask(self, part: str, number: int) -> str:
        """A ticket: the request stands once `look` shows it."""
        ticket = secrets.token_hex(8)
        self._requests[part] = ticket, number
        self._asked.set()
        return ticket

    async def look(self) -> Seen:
        return Seen(run_dir=self._run_dir, states=self._states, tickets=self._heard)

    async def exchange(self, states: Mapping[str, PoolState], heard: Mapping[str, str]) -> Mapping[str, Request]:
        """The driver's: leaves the states, takes the last request of each part as soon as there is one, and nothing after EXCHANGE_S."""
        self._states, self._heard = states, heard
        try:
            async with asyncio.timeout(EXCHANGE_S):
                await self._asked.wait()
        except TimeoutError:
            return {}
        self._asked.clear()
        requests, self._requests = self._requests, {}
        return requests


@asynccontextmanager
async def scalable(pools: Mapping[str, Scalable], run_dir: str) -> AsyncIterator[None]:
    """Inside, the pools, by the names of NAMES, do what they are asked at the desk."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"scale-{secrets.token_hex(8)}"
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1, "max_concurrency": 100}
    desk = spawn(ScaleDesk, {**options, "scheduling_strategy": here}, str(Path(run_dir).absolute()))
    following = asyncio.create_task(_follow(desk, pools), name="scaling")
    live = Live(address=ray.get_runtime_context().gcs_address, desk=name, token=own_token())
    try:
        with announced(Path(run_dir), live):
            yield
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        kill(desk)


async def _follow(desk: Any, pools: Mapping[str, Scalable]) -> None:
    """A run goes on without its desk: an error of it is only told."""
    heard: dict[str, str] = {}
    while True:
        states = {part: pool.state for part, pool in pools.items()}
        try:
            requests = await answer(desk.exchange.remote(states, heard), stage="scaling", timeout_s=DESK_TIMEOUT_S)
            for part, (ticket, number) in requests.items():
                heard[part] = ticket
                pools[part].scale(number)
        except Exception as error:  # whatever ails the desk or what it was asked: nobody's episode has to end for it
            log.warning("scaling: %s: %s", type(error).__name__, error)
            await asyncio.sleep(EXCHANGE_S)


def scale(part: str, number: int, *, live: Live | None, address: str, timeout_s: float, say: Callable[[str], None]) -> bool:
    """Ask this run, or the only one on the Ray at `address`, for so many of a part (NAMES), and wait until it has them.

    False, with a reason said, when it has not after `timeout_s` or will not have them. Raises ServiceError where no such run is found.
    """
    with joined(live.address if live else address, namespace=NAMESPACE):
        return asyncio.run(_scale(live.desk if live else None, part, number, timeout_s=timeout_s, say=say))


async def _scale(name: str | None, part: str, number: int, *, timeout_s: float, say: Callable[[str], None]) -> bool:
    desk = await _find(name)
    deadline = time.monotonic() + timeout_s
    ticket = await answer(desk.ask.remote(part, number), stage="scale", timeout_s=DESK_TIMEOUT_S)
    asked_s = time.monotonic()
    shown = ""
    heard = False
    while True:
        seen: Seen = await answer(desk.look.remote(), stage="scale", timeout_s=DESK_TIMEOUT_S)
        state = seen.states.get(part)
        if heard and seen.tickets.get(part) != ticket:
            say("scale: somebody else has asked for another number since")
            return False
        heard = seen.tickets.get(part) == ticket
        if not heard and time.monotonic() > asked_s + LOST_AFTER_S:
            say("scale: the run did not take the number: it does not answer, or somebody asked for another one at the same moment")
            return False
        if heard and state is not None:
            line = described(part, state)
            if line != shown:
                say(line)
                shown = line
            if (state.serving, state.starting, state.leaving) == (number, 0, 0):
                return True
            if state.wanted < number:
                say(f"scale: {number - state.wanted} did not start; the last: {state.failure}")
                return False
        if time.monotonic() > deadline:
            say(f"scale: not done after {timeout_s:g} s; the run keeps trying{_free_resources()}")
            return False
        await asyncio.sleep(EXCHANGE_S / 2)


def described(part: str, state: PoolState) -> str:
    parts = [f"{state.serving} of {state.wanted} serve"]
    parts += [f"{state.starting} start"] if state.starting else []
    parts += [f"{state.leaving} drain"] if state.leaving else []
    return f"{NAMES[part]}: {', '.join(parts)}"


def _free_resources() -> str:
    free: Mapping[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return f"; free on the cluster: {free.get('CPU', 0.0):g} CPUs, {free.get('GPU', 0.0):g} GPUs"


async def _find(name: str | None) -> Any:
    """The desk of this name, or the only one."""
    if name is None:
        desks = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
        if len(desks) != 1:
            runs = [await _run_dir(desk) for desk in desks]
            raise ServiceError(f"--run-dir: must say which of {len(desks)} runs on this Ray{': ' if runs else ''}{', '.join(runs)}")
        name = desks[0]
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        raise ServiceError(f"--run-dir: must be that of a run that goes on now, but its Ray has no desk {name}") from error


async def _run_dir(name: str) -> str:
    seen: Seen = await answer(ray.get_actor(name, namespace=NAMESPACE).look.remote(), stage="scale", timeout_s=DESK_TIMEOUT_S)
    return seen.run_dir
