"""What a weight update costs: the time of the real publisher over copying the same bytes once, and how long a request stands still.

    OMP_NUM_THREADS=1 python -m benchmarks.weight_sync --out benchmarks/baselines/weight_sync.json
    OMP_NUM_THREADS=1 python -m benchmarks.weight_sync --models tiny --engines 1 2                     a quick look

One learner rank and 1, 2 and 4 vLLM engines on one node, all actors of a local Ray, each engine busy with 8 requests. A round is
an update of each number of engines in turn, each with a copy after it: the export's files, read and written once as new files beside them
(in memory, as a rule). Ratios are of neighbours, medians over the rounds.

    total    WeightPublisher.publish: gather, hash and write, check in every engine, pause, load, resume, canary of engine and learner
    weights  of that, the way of the bytes: all but the canary, an engine's forward pass of 417 tokens beside its requests
    pause    for how long requests stand still, worst engine (keys and values cleared, the default)

`tiny` is the quickstart's model (6 MB): what it shows are fixed costs. `50m` has 200 MB, random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.learner_fixture import add_out, finish, make_model, median, table, vocab_size
from webdancer.cluster.calls import answer, kill, spawn
from webdancer.cluster.connection import cluster
from webdancer.cluster.learner_actor import LearnerActor
from webdancer.cluster.pool import PooledWorker, WorkerPool
from webdancer.cluster.services import RemoteLearner
from webdancer.cluster.weight_sync import WeightPublisher
from webdancer.cluster.worker import RolloutWorker, WorkerSpec
from webdancer.config import (
    ClusterConfig,
    EngineConfig,
    EpisodeConfig,
    LearnerConfig,
    ModelConfig,
    PromptConfig,
    RewardConfig,
    RlConfig,
    WeightSyncConfig,
)
from webdancer.inference.canary import probe
from webdancer.offline_web.base_model import TINY_BASE
from webdancer.types import Sampling

REQUESTS = 8
START_S = 600.0
COLUMNS = (
    *("model", "MB", "engines", "copy", "export", "verify", "pause", "load", "canary", "weights", "total"),
    *("pause/copy", "total/copy", "weights/copy"),
)
"""Seconds, where it is no ratio."""


class BusyWorker(RolloutWorker):
    """A rollout worker whose engine always has requests."""

    async def keep_busy(self, vocabulary: int) -> None:
        self._requests = [asyncio.create_task(self._endlessly(number, vocabulary)) for number in range(REQUESTS)]

    async def _endlessly(self, number: int, vocabulary: int) -> None:
        draw = random.Random(number)
        while True:
            prompt = [draw.randrange(vocabulary) for _ in range(64)]
            await self._engine.complete(prompt, sampling=Sampling(), max_tokens=128, session=f"busy{number}")


class Some:
    """The first workers of a pool, as the publisher sees a pool; here none may fail."""

    def __init__(self, workers: Sequence[PooledWorker]) -> None:
        self.workers = workers
        self.num_replaced = 0
        self.prepare: object = None
        self.rest: Mapping[str, float] = {}

    def wake(self) -> None: ...

    def retire(self, worker: PooledWorker, reason: str) -> None:
        raise RuntimeError(f"{worker.name}: {reason}")


class Nothing:
    """Toolbox and judge: no episode runs."""


def engine_folder(name: str, folder: Path) -> Path:
    """The model, with a tokenizer for the worker."""
    model = make_model(name, folder)
    if not (model / "tokenizer.json").exists():
        shutil.copy(TINY_BASE / "tokenizer.json", model)
    return model


def spawn_worker(model: Path, name: str) -> Any:
    episode = EpisodeConfig(max_tokens=512, max_turn_tokens=128)
    spec = WorkerSpec(
        model_path=str(model),
        dtype="float32",
        engine=EngineConfig(kv_cache_gib=0.25, max_num_seqs=2 * REQUESTS),
        episode=episode,
        prompt=PromptConfig(style="brief"),
        reward=RewardConfig(),
    )
    return spawn(BusyWorker, {"num_cpus": 1, "max_concurrency": 1000}, spec, Nothing(), Nothing())


@asynccontextmanager
async def running(model: Path, num_engines: int) -> AsyncIterator[tuple[Any, WorkerPool]]:
    """The actor of the learner's rank, and as many engines."""
    settings = {"model": ModelConfig(path=str(model), dtype="float32"), "learner": LearnerConfig(num_ranks=1), "rl": RlConfig(), "seed": 0}
    rank = spawn(LearnerActor, {"num_cpus": 1}, rank=0, world_size=1, **settings)
    pool = WorkerPool(functools.partial(spawn_worker, model), num_workers=num_engines, capacity=1, start_timeout_s=START_S)
    try:
        _, _, port = await answer(rank.place.remote(), stage="learner", timeout_s=START_S)
        await answer(rank.setup.remote(f"tcp://127.0.0.1:{port}"), stage="learner", timeout_s=START_S)
        await pool.start()
        yield rank, pool
    finally:
        await pool.stop()
        await answer(rank.close.remote(), stage="learner", timeout_s=60.0)
        kill(rank)


def copy_once(source: Path) -> tuple[float, int]:
    """Seconds and bytes."""
    target = source.parent / "copy"
    target.mkdir()
    began = time.perf_counter()
    num_bytes = sum((target / file.name).write_bytes(file.read_bytes()) for file in source.iterdir())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds, num_bytes


async def measure(name: str, model: Path, counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    vocabulary = vocab_size(model)
    async with running(model, max(counts)) as (rank, pool):
        made = await answer(rank.make_weights_directory.remote("", str(model.parent)), stage="directory", timeout_s=START_S)
        node, _, _ = await answer(rank.place.remote(), stage="place", timeout_s=START_S)
        learner = RemoteLearner([rank], timeout_s=START_S)
        arguments = {"exporter": rank, "exporter_node": node, "directory": Path(made), "probe": probe(vocabulary)}
        some: dict[int, Any] = {count: Some(pool.workers[:count]) for count in counts}
        publishers = {count: WeightPublisher(WeightSyncConfig(), learner, some[count], **arguments) for count in counts}
        for worker in pool.workers:
            await answer(worker.handle.keep_busy.remote(vocabulary), stage="requests", timeout_s=START_S)
        found: dict[int, list[Mapping[str, float]]] = {count: [] for count in counts}
        version = num_bytes = 0
        for number in range(rounds + 1):  # the first warms up
            for count in counts:
                await asyncio.sleep(1.0)  # requests are in full flight again
                version += 1
                figures = await publishers[count].publish(version)
                copy_s, num_bytes = copy_once(Path(made) / f"v{version}")
                if number:
                    found[count].append(times(figures, copy_s))
        about = {"model": name, "megabytes": num_bytes / 1e6}
        return [{**about, "engines": count, **medians(found[count])} for count in counts]


def times(figures: Mapping[str, float], copy_s: float) -> dict[str, float]:
    parts = {f"{part}_s": figures[f"sync/{part}_s"] for part in ("export", "verify", "pause", "load", "canary")}
    total_s = figures["sync/seconds"]
    weights_s = total_s - parts["canary_s"]
    ratios = {"pause_ratio": parts["pause_s"] / copy_s, "total_ratio": total_s / copy_s, "ratio": weights_s / copy_s}
    return {"copy_s": copy_s, **parts, "weights_s": weights_s, "total_s": total_s, **ratios}


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median([one[name] for one in rows]) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "50m"), default=["tiny", "50m"])
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    add_out(parser)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder, cluster(ClusterConfig(), num_cpus=max(options.engines) + 2):
            rows += asyncio.run(measure(name, engine_folder(name, Path(folder)), options.engines, options.rounds))
    finish({"requests": REQUESTS, "rows": rows}, table(COLUMNS, [list(one.values()) for one in rows]), options.out)


if __name__ == "__main__":
    main()
