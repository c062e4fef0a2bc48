"""One version of the weights from the learner to every engine, and the proof that it arrived.

    export    the learner gathers layer group by layer group; rank 0 writes files and manifest on its node
    load      every engine at once: from the path on that node, elsewhere from bytes fetched once a node over the object store
    canary    every engine and the learner score the same probe at the same version, the learner while the engines load and both while
              requests go on; an engine that differs is replaced

The files of a version stay until the next one is in all engines, because a replacement of a dead worker starts from them; then the version
after is written over them.

With `nccl` or `ipc` the learner sends to all engines at once through vLLM's own trainer engines (inference/weight_send.py);
the canary is the same. One failure then spoils all engines, and the run ends to be resumed. A worker that joins between two updates gets
files. Neither way has run on a GPU yet.

Engines that share the learner's GPUs sleep while it works (`WorkerPool.sleep`). An update wakes each: memory for weights, the weights, and
memory for keys and values once the learner's part is done; `publish` then lets newcomers start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from webdancer.cluster.calls import ActorLost, answer
from webdancer.cluster.placement import shares_gpus
from webdancer.cluster.pool import PooledWorker, WorkerPool
from webdancer.cluster.services import RemoteLearner
from webdancer.config import Config, WeightSyncConfig
from webdancer.errors import CanaryError, EngineFault, ServiceError, StalledError
from webdancer.inference.canary import CanaryReport, compare

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class Gone(str):
    """Why an engine did not answer: that says nothing about its weights."""


Outcome = tuple[Mapping[str, float], CanaryReport] | str
"""Timings and canary of an engine that took the weights, or what is wrong with it."""


def check_backend(config: Config, gpus: float) -> None:
    """Raises ServiceError where rollout.weights.backend cannot work on a cluster of so many GPUs."""
    backend = config.rollout.weights.backend
    if backend == "file":
        return
    needed = config.rollout.num_workers * config.engine.tensor_parallel_size + config.learner.num_ranks
    rules = {
        "nccl": (
            needed <= gpus and not config.cluster.shared_gpus,
            f"be file or ipc where engines and learner do not have a GPU each ({needed} are needed, the cluster has {gpus:g})",
        ),
        "ipc": (
            shares_gpus(config) or needed > gpus,
            f"be file or nccl where engines and learner share no GPU ({needed} are needed, the cluster has {gpus:g})",
        ),
    }
    fine, rule = rules[backend] if gpus else (False, "be file on a cluster without GPUs")
    if not fine:
        raise ServiceError(f"rollout.weights.backend: must {rule}, got {backend}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version that the engines serve: the names of its files below `directory` on the exporter's node, and what the learner says, or
    is about to say, about the probe."""

    version: int
    directory: Path
    names: Sequence[str]
    scores: asyncio.Task[list[NDArray[np.float32]]]


class WeightPublisher:
    """interfaces.WeightSync. `exporter` is the actor of rank 0, on node `exporter_node`, which writes below `directory`."""

    def __init__(
        self,
        config: WeightSyncConfig,
        learner: RemoteLearner,
        pool: WorkerPool,
        *,
        exporter: Any,
        exporter_node: str,
        directory: Path,
        probe: Sequence[Sequence[int]],
        ranks_per_engine: int = 1,
    ) -> None:
        self._config = config
        self._learner = learner
        self._pool = pool
        self._exporter = exporter
        self._exporter_node = exporter_node
        self._directory = directory
        self._probe = probe
        self._ranks_per_engine = ranks_per_engine
        self._current: Published | None = None
        self._has_published = False
        self._connected: tuple[str, ...] = ()
        self._publishing = asyncio.Lock()
        pool.prepare = self.bring_up_to_date

    async def publish(self, version: int) -> Mapping[str, float]:
        """Raises CanaryError when no engine took the weights and agrees with the learner; an engine alone that does not is replaced, and
        so are those that die, even if all do.

        Seconds of each part, the canary's worst figures over the engines that passed, and the engines' own counters.
        """
        async with self._publishing:
            began = time.perf_counter()
            workers = self._pool.workers
            export_s, outcomes = await (self._through_files if self._config.backend == "file" else self._directly)(workers, version)
            passed = [outcome for outcome in outcomes if not isinstance(outcome, str)]
            failed = {worker: outcome for worker, outcome in zip(workers, outcomes, strict=True) if isinstance(outcome, str)}
            if failed and not passed and not _all_gone(outcomes):
                reasons = "; ".join(f"{worker.name}: {reason}" for worker, reason in failed.items())
                raise CanaryError(f"weights: no engine serves version {version} as the learner computes it: {reasons}")
            for worker, reason in failed.items():
                self._pool.retire(worker, f"version {version}: {reason}")
            self._pool.wake()
        ended = time.perf_counter()
        return {
            **self._pool.rest,
            "sync/seconds": ended - began,
            "sync/export_s": export_s,
            "sync/quarantined": float(len(failed)),
            "engine/workers": float(len(passed)),
            "engine/replaced": float(self._pool.num_replaced),
            **_worst(passed),
            **await self._engine_stats(),
        }

    async def bring_up_to_date(self, worker: PooledWorker) -> None:
        """The current weights, proven, for a worker that is about to join; raises EngineFault where that fails."""
        async with self._publishing:
            if not self._has_published:
                return
            if self._current is None:  # engines got them directly: the learner writes them once more, as they are by now
                self._current = await self._export(None)
            (outcome,) = await self._update_all([worker], self._current)
        if isinstance(outcome, str):
            raise EngineFault(f"{worker.name}: {outcome}")

    async def _through_files(self, workers: Sequence[PooledWorker], version: int) -> tuple[float, list[Outcome]]:
        """Seconds of the export, and what became of every worker."""
        began = time.perf_counter()
        published = await self._export(version)
        export_s = time.perf_counter() - began
        outcomes = await self._update_all(workers, published)
        if _all_gone(outcomes) or any(not isinstance(outcome, str) for outcome in outcomes):
            await self._replace_current(published)
        return export_s, outcomes

    async def _directly(self, workers: Sequence[PooledWorker], version: int) -> tuple[float, list[Outcome]]:
        """`nccl`, `ipc`: all engines together. Where the transfer fails, none of them can be trusted: all have failed."""
        if not workers:
            await self._replace_current(None)
            return 0.0, []
        began = time.perf_counter()
        try:
            await self._connect(workers)
            checksums = await self._learner.send_weights()
        except Exception as error:  # whatever it is: the engines hold a mixture of weights
            log.warning("the transfer of version %d failed: %s", version, error)
            self._connected = ()
            return time.perf_counter() - began, [f"{type(error).__name__}: {error}"] * len(workers)
        sent_s = time.perf_counter() - began
        scores = asyncio.create_task(self._score())
        finishing = [self._checked(worker, worker.handle.finish_update.remote(version, checksums), scores, version) for worker in workers]
        outcomes = await asyncio.gather(*finishing)
        await self._replace_current(None)
        return sent_s, outcomes

    async def _connect(self, workers: Sequence[PooledWorker]) -> None:
        """Anew where a worker has come or gone."""
        names = tuple(worker.name for worker in workers)
        if not workers or names == self._connected:
            return
        _, address, port = await answer(self._exporter.place.remote(), stage="weights", timeout_s=self._config.timeout_s)
        settings = {"backend": self._config.backend, "address": address, "port": port, "timeout_s": self._config.timeout_s}
        await self._learner.connect_engines([worker.handle for worker in workers], ranks_per_engine=self._ranks_per_engine, **settings)
        self._connected = names

    async def _replace_current(self, published: Published | None) -> None:
        previous, self._current, self._has_published = self._current, published, True
        if previous is not None and (published is None or previous.directory != published.directory):
            leave = self._exporter.remove if published is None else self._exporter.set_aside
            left = leave.remote(str(previous.directory))
            await answer(left, stage="removal of old weights", timeout_s=self._config.timeout_s)

    async def _export(self, version: int | None) -> Published:
        """`version` None: the learner's own."""
        directory = self._directory / (f"v{version}" if version is not None else f"for-newcomers-{time.monotonic_ns()}")
        manifest = await self._learner.export_weights(directory, version)
        names = [MANIFEST, *(file["file"] for file in manifest["files"])]
        scores = asyncio.create_task(self._score())
        return Published(version=int(manifest["version"]), directory=directory, names=names, scores=scores)

    async def _score(self) -> list[NDArray[np.float32]]:
        return [score[1:] for score in await self._learner.score(self._probe)]

    def _files_for(self, workers: Sequence[PooledWorker], published: Published) -> Mapping[str, Any]:
        """References to the bytes of every file, read once, where a worker is on another node than the exporter."""
        if all(worker.node_id == self._exporter_node for worker in workers):
            return {}
        read = self._exporter.read_file.options(concurrency_group="files")  # the rank may be in a step, which a newcomer need not wait for
        return {name: read.remote(str(published.directory / name)) for name in published.names}

    async def _update_all(self, workers: Sequence[PooledWorker], published: Published) -> list[Outcome]:
        files = self._files_for(workers, published)
        return await asyncio.gather(*(self._update(worker, published, files) for worker in workers))

    async def _update(self, worker: PooledWorker, published: Published, files: Mapping[str, Any]) -> Outcome:
        here = worker.node_id == self._exporter_node
        load = worker.handle.load_weights.remote(str(published.directory), published.version, None if here else files)
        return await self._checked(worker, load, published.scores, published.version)

    async def _checked(self, worker: PooledWorker, update: Any, expected: asyncio.Task[list[NDArray[np.float32]]], version: int) -> Outcome:
        """Wait for the end of one engine's update and compare it with the learner; a text says what is wrong with it. Raises what kept
        the learner from scoring."""
        try:
            timing: Mapping[str, float] = await answer(update, stage=f"weights of {worker.name}", timeout_s=self._config.timeout_s)
            loaded = time.perf_counter()
            score = worker.handle.score.remote(self._probe)
            scores = await answer(score, stage=f"canary of {worker.name}", timeout_s=self._config.timeout_s)
        except Exception as error:  # whatever it is, it is this engine's: it is named, replaced, and the others go on
            log.warning("%s did not take version %d: %s", worker.name, version, error)
            reason = f"{type(error).__name__}: {error}"
            return Gone(reason) if isinstance(error, ActorLost | StalledError) else reason
        truth = await asyncio.shield(expected)  # others wait for it too
        try:
            report = compare(scores, truth)
        except ValueError as error:
            return f"canary: {error}"
        timing = {**timing, "canary_s": time.perf_counter() - loaded}
        if not report.within(mean=self._config.canary_mean, max=self._config.canary_max):
            return (
                f"canary: |log p engine - log p learner| is {report.mean:.2e} in the mean (rollout.weights.canary_mean: "
                f"{self._config.canary_mean:g}) and {report.max:.2e} at most (canary_max: {self._config.canary_max:g})"
            )
        try:
            await answer(worker.handle.confirm.remote(), stage=worker.name, timeout_s=self._config.timeout_s)
        except (ActorLost, StalledError) as error:
            return Gone(str(error))
        return timing, report

    async def _engine_stats(self) -> dict[str, float]:
        """Means over the engines; one that does not answer now will be seen by its watch."""
        calls = [answer(worker.handle.stats.remote(), stage=worker.name, timeout_s=30.0) for worker in self._pool.workers]
        answered = [stats for stats in await asyncio.gather(*calls, return_exceptions=True) if isinstance(stats, Mapping)]
        names = ("kv_usage", "preemptions", "prefix_hit_rate", "generated_tokens", "in_flight", "in_flight_limit")
        return {f"engine/{name}": float(np.mean([stats[name] for stats in answered])) for name in names if answered}


def _all_gone(outcomes: Sequence[Outcome]) -> bool:
    return all(isinstance(outcome, Gone) for outcome in outcomes)


def _worst(passed: Sequence[tuple[Mapping[str, float], CanaryReport]]) -> dict[str, float]:
    """The slowest engine's seconds and the largest differences; nothing where all engines are being replaced just now."""
    if not passed:
        return {}
    names = sorted({name for timing, _ in passed for name in timing})
    figures = {f"sync/{name}": max(timing.get(name, 0.0) for timing, _ in passed) for name in names}
    return figures | {"canary/mean": max(report.mean for _, report in passed), "canary/max": max(report.max for _, report in passed)}
