"""The rollout worker: one engine and the agent loop beside it, so that token ids never leave the process between turns.

A plain class, made an actor by `launch`. Finished turns are reported in batches through one standing call (`report`), which is at
the same time the worker's heartbeat; another worker can go on from them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from webdancer.cluster.scratch import RECEIVED, make_scratch, remove_orphans, shared_memory
from webdancer.config import EngineConfig, EpisodeConfig, PromptConfig, RewardConfig
from webdancer.errors import EngineFault
from webdancer.inference.concurrency import INTERVAL_S, Concurrency, EngineLoad
from webdancer.interfaces import Judge, Policy, Tokenizer, Toolbox
from webdancer.rollout.watch import Activity, GuardedPolicy, RunPolicy, Waiting, WatchedJudge, WatchedToolbox
from webdancer.types import EpisodeLost, Sampling, ScoredTrajectory, Task, Turn, TurnFinished, TurnNews

BATCH_TURNS_S = 0.08
"""Turns that finish within this time, for each episode in flight, travel together: one episode alone is told of at once, and of dozens the
driver hears once a heartbeat. A worker that is killed takes with it what it has not reported; that is done again."""
HEARTBEAT_S = 5.0
"""A report is due at least so often, even an empty one."""


class Engine(Policy, Protocol):
    """What a worker needs of an engine; inference.engine.VllmEngine and inference.exact.ExactEngine have it."""

    broken: str | None

    async def start(self) -> None: ...

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]: ...

    async def load_weights(self, manifest_path: Path | str, version: int) -> Mapping[str, float]: ...

    async def connect_weights(self, init_info: Mapping[str, Any]) -> None: ...

    async def sleep(self) -> Mapping[str, float]: ...

    async def begin_update(self) -> None: ...

    async def receive_weights(self, update_info: Mapping[str, Any]) -> None: ...

    async def finish_update(self, version: int, checksums: Mapping[str, int] | None = None) -> Mapping[str, float]: ...

    async def stats(self) -> Mapping[str, float]: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What every rollout worker of a run is made of."""

    model_path: str
    dtype: str
    engine: EngineConfig
    episode: EpisodeConfig
    prompt: PromptConfig
    reward: RewardConfig
    weight_backend: str = "file"
    sleeps: bool = False


MakeEngine = Callable[[WorkerSpec, Tokenizer], Engine]


def make_vllm_engine(spec: WorkerSpec, tokenizer: Tokenizer) -> Engine:
    from webdancer.inference.engine import VllmEngine

    return VllmEngine(
        spec.model_path,
        tokenizer,
        spec.engine,
        dtype=spec.dtype,
        max_model_len=spec.episode.max_tokens,
        weight_backend=spec.weight_backend,
        sleeps=spec.sleeps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """Turns by run number (see RolloutWorker.run_episode), why the engine must not be used any more, if so, and what episodes wait for.

    capacity: episodes that the worker can have in flight, by its engine's load; 0: it does not say."""

    turns: Sequence[tuple[int, TurnNews]]
    broken: str | None
    activity: Mapping[str, Waiting]
    capacity: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeEnd:
    """How a run ended, with the turns that no report has carried yet; of an episode that goes on elsewhere all of this run's, as the last
    report may come after this. `moved`: nothing was lost, the worker is to leave."""

    outcome: ScoredTrajectory | EpisodeLost
    turns: Sequence[TurnNews]
    moved: bool = False


class RolloutWorker:
    """`start` first. The driver bounds how many episodes are in flight here: rollout.episodes_per_worker, or what `report` says."""

    def __init__(
        self, spec: WorkerSpec, toolbox: Toolbox, judge: Judge, make_engine: MakeEngine = make_vllm_engine, *, adapts: bool = False
    ) -> None:
        """`adapts`: `report` says how many episodes the engine has room for (inference/concurrency.py)."""
        self._spec = spec
        self._toolbox = toolbox
        self._judge = judge
        self._make_engine = make_engine
        self._turns: defaultdict[int, list[TurnNews]] = defaultdict(list)
        self._num_streams = 0
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()
        self._concurrency = Concurrency(spec.engine.max_num_seqs) if adapts else None
        self._adapting: asyncio.Task[None] | None = None
        self._activity = Activity()
        self._runs: set[int] = set()
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Load model and tokenizer. Raises what the engine raises."""
        from webdancer.agent.tokenizer import load_tokenizer
        from webdancer.rollout.runner import LocalEpisodeRunner
        from webdancer.tools.result import INFRASTRUCTURE_ERRORS

        tokenizer = load_tokenizer(self._spec.model_path)
        self._engine = self._make_engine(self._spec, tokenizer)
        await self._engine.start()
        self._policy = GuardedPolicy(self._engine, self._activity, timeout_s=self._spec.episode.turn_timeout_s)
        self._runner_of = partial(
            LocalEpisodeRunner,
            toolbox=WatchedToolbox(self._toolbox, self._activity),
            judge=WatchedJudge(self._judge, self._activity),
            tokenizer=tokenizer,
            episode=self._spec.episode,
            prompt=self._spec.prompt,
            reward=self._spec.reward,
            infrastructure_errors=INFRASTRUCTURE_ERRORS,
        )
        if self._concurrency is not None:
            self._adapting = asyncio.create_task(self._adapt(self._concurrency), name="episodes in flight")

    async def place(self) -> tuple[str, int]:
        """Node id and process id."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def run_episode(
        self, run: int, task: Task, *, member: int, attempt: int, sampling: Sampling, resume_from: tuple[Turn, ...], streams: bool = False
    ) -> EpisodeEnd:
        """`run` is the driver's number for this run of the episode; its turns are reported under it, with `streams` also their text."""

        finished: list[TurnFinished] = []

        def tell(news: TurnNews) -> None:
            if isinstance(news, TurnFinished):
                finished.append(news)
            self._turns[run].append(news)
            self._news.set()

        self._runs.add(run)
        self._num_streams += streams
        try:
            outcome = await self._runner_of(policy=RunPolicy(self._policy, run)).run(
                task,
                member=member,
                attempt=attempt,
                sampling=sampling,
                resume_from=resume_from,
                on_turn=tell,
                on_text=tell if streams else None,
            )
        finally:
            self._num_streams -= streams
            unreported = self._turns.pop(run, [])
            self._runs.discard(run)
            self._idle.set()
        if not isinstance(outcome, EpisodeLost):
            return EpisodeEnd(outcome=outcome, turns=unreported)
        return EpisodeEnd(outcome=outcome, turns=finished, moved=bool(self._policy.leaving))

    async def drain(self, reason: str) -> None:
        """Begin no turn any more; returns once every episode has ended, or can go on elsewhere from its last turn."""
        self._policy.leaving = reason
        while self._runs:
            self._idle.clear()
            await self._idle.wait()

    async def report(self) -> WorkerReport:
        """The turns finished since the last report, as soon as there are any; empty after a while: the heartbeat."""
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await self._news.wait()
                async with asyncio.timeout(BATCH_TURNS_S * (1 if self._num_streams else len(self._runs))):
                    await self._urgent.wait()
        self._news.clear()
        self._urgent.clear()
        turns = [(run, finished) for run, finished_turns in self._turns.items() for finished in finished_turns]
        self._turns.clear()
        if self._adapting is not None and self._adapting.done() and not self._adapting.cancelled():
            self._adapting.result()
        capacity = self._concurrency.limit if self._concurrency is not None else 0
        return WorkerReport(turns=turns, broken=self._engine.broken, activity=self._activity.now(), capacity=capacity)

    async def _adapt(self, concurrency: Concurrency) -> None:
        """Watch the engine's load as long as it lives; a new limit is reported at once."""
        while self._engine.broken is None:
            await asyncio.sleep(INTERVAL_S)
            before = concurrency.limit
            try:
                stats = await self._engine.stats()
            except EngineFault:
                return  # `broken` says why, and the next report carries it
            load = EngineLoad(
                in_flight=len(self._runs),
                running=int(stats["running"]),
                waiting=int(stats["waiting"]),
                kv_usage=stats["kv_usage"],
                preemptions=int(stats["preemptions"]),
            )
            if concurrency.observe(load) != before:
                self._news.set()
                self._urgent.set()

    async def use_tools(self, actors: Sequence[Any]) -> None:
        """Tool actors have come or gone (tool_pool)."""
        from webdancer.cluster.services import RemoteToolbox

        assert isinstance(self._toolbox, RemoteToolbox), "tools that are no actors do not change in number"
        self._toolbox.use(actors)

    async def load_weights(self, manifest_path: str, version: int, files: Mapping[str, Awaitable[bytes]] | None) -> Mapping[str, float]:
        """Load the export in the directory `manifest_path`; `files` are its files in the object store, where this node has no such path."""
        self._policy.proven.clear()
        if files is None:
            return await self._engine.load_weights(manifest_path, version)
        remove_orphans(RECEIVED, shared_memory())
        directory = make_scratch(RECEIVED, shared_memory())
        try:
            for name, content in files.items():
                await asyncio.to_thread((directory / name).write_bytes, await content)  # one layer group in memory at a time
            return await self._engine.load_weights(str(directory), version)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def connect_weights(self, init_info: Mapping[str, Any]) -> None:
        await self._engine.connect_weights(init_info)

    async def sleep(self) -> Mapping[str, float]:
        """The engine's figures, see there; it wakes up for its next weights."""
        return await self._engine.sleep()

    async def begin_update(self) -> None:
        self._policy.proven.clear()
        await self._engine.begin_update()

    async def confirm(self) -> None:
        """The engine has passed the canary: what it has sampled since its last update may be used."""
        self._policy.proven.set()

    async def receive_weights(self, update_info: Mapping[str, Any]) -> None:
        await self._engine.receive_weights(update_info)

    async def finish_update(self, version: int, checksums: Mapping[str, int]) -> Mapping[str, float]:
        return await self._engine.finish_update(version, checksums)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return await self._engine.score(sequences)

    async def stats(self) -> Mapping[str, float]:
        """The engine's, and the episodes in flight here with their limit (0: the driver's own)."""
        limit = self._concurrency.limit if self._concurrency is not None else 0
        return {**await self._engine.stats(), "in_flight": float(len(self._runs)), "in_flight_limit": float(limit)}

    async def stop(self) -> None:
        if self._adapting is not None:
            self._adapting.cancel()
        if hasattr(self, "_engine"):
            await self._engine.stop()
