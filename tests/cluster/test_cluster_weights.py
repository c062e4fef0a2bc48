"""Weights from a real learner rank into real engines on other nodes, proven by the canary; an engine that fails it never serves."""

from __future__ import annotations

import asyncio
import functools
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.fake_engine import make_corrupted_engine, make_exact_engine, make_refusing_engine
from tests.cluster.hand_over import HandOver
from tests.cluster.test_cluster_pool import worker_spec
from tests.fakes import FakeJudge, FakeToolbox, make_task, make_tokenizer
from webdancer.algorithm.packing import pack
from webdancer.cluster.calls import answers, kill, spawn
from webdancer.cluster.launch import CALLS_AT_ONCE
from webdancer.cluster.learner_actor import LearnerActor
from webdancer.cluster.pool import WorkerPool
from webdancer.cluster.services import RemoteLearner, RemoteRunner
from webdancer.cluster.weight_sync import WeightPublisher, check_backend
from webdancer.cluster.worker import RolloutWorker
from webdancer.config import Config, LearnerConfig, ModelConfig, OptimizerConfig, RlConfig, WeightSyncConfig
from webdancer.errors import CanaryError, ServiceError, StalledError
from webdancer.inference.canary import compare, probe
from webdancer.rollout.group import sample_group
from webdancer.types import Sampling, TrainingPhase, TrainSample

PROBE = probe(make_tokenizer().vocab_size, max_length=32)


class Synced:
    """One learner rank on the head, two workers on the other nodes, and the publisher between them."""

    def __init__(self, learner: RemoteLearner, pool: WorkerPool, weights: WeightPublisher, directory: Path) -> None:
        self.learner = learner
        self.pool = pool
        self.weights = weights
        self.directory = directory

    async def train(self) -> int:
        """One step big enough for every weight to move."""
        ids = np.arange(3, 43)
        mask = np.arange(40) >= 8
        zeros = np.zeros(40, np.float32)
        sample = TrainSample(id="s", token_ids=ids, loss_mask=mask, logprobs=zeros, advantages=zeros)
        batch = pack([sample], num_ranks=1, token_budget=64, minibatches=1, loss="sft")
        return (await self.learner.step(batch)).version

    async def difference(self) -> float:
        """The largest |log p engine - log p learner| over all engines."""
        truth = [scores[1:] for scores in await self.learner.score(PROBE)]
        scored = await answers([w.handle.score.remote(PROBE) for w in self.pool.workers], stage="score", timeout_s=60)
        return max(compare(scores, truth).max for scores in scored)


@asynccontextmanager
async def synced(nodes, model_path, tmp_path, make_engine=make_exact_engine, *, actor=LearnerActor, backend="file"):
    learner_config = LearnerConfig(num_ranks=1, token_budget=256, activation_checkpointing=False, timeout_s=120)
    model = ModelConfig(path=model_path, dtype="float32")
    settings = {"model": model, "learner": learner_config, "rl": RlConfig(), "seed": 0}
    rank = spawn(actor, {"num_cpus": 1, "resources": {"head": 0.1}}, rank=0, world_size=1, **settings)
    learner = RemoteLearner([rank], timeout_s=120)

    def spawn_worker(name):
        options = {"num_cpus": 1, "max_concurrency": CALLS_AT_ONCE, "resources": {"slot": 0.6}}
        return spawn(RolloutWorker, options, worker_spec(model_path), FakeToolbox(), FakeJudge(), make_engine)

    pool = WorkerPool(spawn_worker, num_workers=2, capacity=4, start_timeout_s=120)
    try:
        ((node, _, port),) = await answers([rank.place.remote()], stage="place", timeout_s=120)
        await asyncio.gather(pool.start(), *await started(rank, port))
        (directory,) = await answers([rank.make_weights_directory.remote(str(tmp_path), "")], stage="directory", timeout_s=120)
        weights = WeightPublisher(
            WeightSyncConfig(timeout_s=60, backend=backend),
            learner,
            pool,
            exporter=rank,
            exporter_node=node,
            directory=Path(directory),
            probe=PROBE,
        )
        optimizer = OptimizerConfig(lr=0.05, weight_decay=0.0)
        await learner.begin(TrainingPhase(loss="sft", optimizer=optimizer, total_steps=10))
        yield Synced(learner, pool, weights, Path(directory))
    finally:
        await pool.stop()
        await answers([rank.close.remote()], stage="close", timeout_s=30)
        kill(rank)


async def started(rank, port):
    return [asyncio.ensure_future(answers([rank.setup.remote(f"tcp://127.0.0.1:{port}")], stage="setup", timeout_s=120))]


async def test_every_engine_computes_what_the_learner_computes_after_every_publish(nodes, tiny_model, tmp_path):
    async with synced(nodes, tiny_model, tmp_path) as live:
        assert {worker.node_id for worker in live.pool.workers} == set(nodes[1:]), "both engines fetch their bytes"
        figures = await live.weights.publish(0)
        assert figures["canary/mean"] < 1e-5
        assert figures["engine/workers"] == 2
        version = await live.train()
        assert await live.difference() > 0.01, "the step moved the weights"
        figures = await live.weights.publish(version)
        assert figures["canary/max"] < 1e-3
        assert await live.difference() < 1e-3
        assert {path.name for path in live.directory.iterdir()} == {"v1", "spare"}, "the old version is set aside"
        figures = await live.weights.publish(await live.train())
        assert figures["canary/max"] < 1e-3
        assert await live.difference() < 1e-3
        assert {path.name for path in live.directory.iterdir()} == {"v2", "spare"}, "and written over"
        version = 2
        scored = (
            await sample_group(
                make_task(), RemoteRunner(live.pool), group_size=2, attempt=0, start_version=version, sampling=Sampling(seed=1)
            )
        ).members
        assert all(set(m.trajectory.versions[m.trajectory.loss_mask]) == {version} for m in scored)
    assert not live.directory.exists()


async def test_weights_that_go_directly_serve_every_engine_and_who_joins_later(nodes, tiny_model, tmp_path):
    async with synced(nodes, tiny_model, tmp_path, actor=HandOver, backend="nccl") as live:
        await live.weights.publish(0)
        figures = await live.weights.publish(await live.train())
        assert figures["canary/max"] < 1e-3
        assert figures["sync/pause_s"] > 0
        assert list(live.directory.iterdir()) == [], "no file is written"
        killed = live.pool.workers[0]
        kill(killed.handle)
        async with asyncio.timeout(90):
            await killed.gone
            while len(live.pool.workers) < 2:
                await asyncio.sleep(0.1)
        assert await live.difference() < 1e-3
        await live.weights.publish(await live.train())
        assert await live.difference() < 1e-3, "who has joined is connected, too"
        assert list(live.directory.iterdir()) == [], "nobody joins with old weights"


async def test_run_stops_when_a_direct_transfer_fails(nodes, tiny_model, tmp_path):
    async with synced(
        nodes, tiny_model, tmp_path, functools.partial(make_refusing_engine, str(tmp_path)), actor=HandOver, backend="ipc"
    ) as live:
        with pytest.raises(CanaryError, match=r"no engine serves version 0.*EngineFault.*refused"):
            await live.weights.publish(0)


@pytest.mark.parametrize(
    ("backend", "gpus", "rule"), [("nccl", 0, "without GPUs"), ("ipc", 0, "file"), ("nccl", 3, "a GPU each"), ("ipc", 4, "share")]
)
def test_backend_that_cannot_work_is_refused_before_anything_runs(backend, gpus, rule):
    config = Config()
    config.rollout.num_workers, config.learner.num_ranks, config.rollout.weights.backend = 2, 2, backend
    with pytest.raises(ServiceError, match=rf"rollout\.weights\.backend: must .*{rule}.*got {backend}"):
        check_backend(config, gpus)
    check_backend(config, {"nccl": 4, "ipc": 3}[backend])
    config.cluster.shared_gpus = True
    with pytest.raises(ServiceError) if backend == "nccl" else nullcontext():
        check_backend(config, 4)


async def test_engines_sleep_while_the_learner_works_and_who_replaces_one_starts_after(nodes, tiny_model, tmp_path):
    async with synced(nodes, tiny_model, tmp_path) as live:
        live.learner.make_room = live.pool.sleep
        await live.weights.publish(0)
        settings = {"group_size": 2, "attempt": 0, "start_version": 0, "sampling": Sampling(seed=1)}
        running = asyncio.create_task(sample_group(make_task(), RemoteRunner(live.pool), **settings))
        async with asyncio.timeout(60):
            while not any("generate" in worker.activity for worker in live.pool.workers):
                await asyncio.sleep(0.05)
        version = await live.train()
        killed, asleep = sorted(live.pool.workers, key=lambda worker: worker.load)
        with pytest.raises(StalledError):
            await answers([asleep.handle.score.remote(PROBE)], stage="score", timeout_s=1.0)
        kill(killed.handle)
        await asyncio.wait_for(asyncio.shield(killed.gone), 60)
        assert (live.pool.state.serving, live.pool.state.starting) == (1, 1)
        assert await live.train() == version + 1, "a second step finds them asleep, and waits for nobody"
        assert not running.done()
        figures = await live.weights.publish(version + 1)
        assert figures["sync/sleep_s"] > 0
        assert figures["canary/max"] < 1e-3
        async with asyncio.timeout(90):
            while len(live.pool.workers) < 2:
                await asyncio.sleep(0.1)
        assert await live.difference() < 1e-3
        assert all(member.reward.valid for member in (await asyncio.wait_for(running, 60)).members)


async def test_engine_that_fails_the_canary_is_named_and_replaced(nodes, tiny_model, tmp_path, caplog):
    make_engine = functools.partial(make_corrupted_engine, str(tmp_path), False)
    async with synced(nodes, tiny_model, tmp_path / "weights", make_engine) as live:
        await live.weights.publish(0)
        figures = await live.weights.publish(await live.train())
        assert figures["sync/quarantined"] == 1
        assert figures["canary/max"] < 1e-3
        assert len(live.pool.workers) == 1, "it serves no more episode"
        async with asyncio.timeout(90):
            while len(live.pool.workers) < 2:
                await asyncio.sleep(0.1)
        assert await live.difference() < 1e-3
    assert "rollout-" in caplog.text
    assert "canary: |log p engine - log p learner|" in caplog.text


async def test_run_stops_when_no_engine_agrees(nodes, tiny_model, tmp_path):
    make_engine = functools.partial(make_corrupted_engine, str(tmp_path), True)
    async with synced(nodes, tiny_model, tmp_path / "weights", make_engine) as live:
        await live.weights.publish(0)
        with pytest.raises(CanaryError, match=r"no engine serves version 1.*rollout-0: canary.*rollout-1: canary"):
            await live.weights.publish(await live.train())
