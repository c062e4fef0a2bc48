"""The publisher of `nccl` and `ipc` without a Ray: calls are tasks of this process, the engines are exact ones, the transport a call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from tests import engine_contract as contract
from webdancer.cluster.calls import ActorLost
from webdancer.cluster.weight_sync import WeightPublisher
from webdancer.config import WeightSyncConfig
from webdancer.errors import CanaryError, EngineFault, StalledError
from webdancer.inference.canary import compare, probe
from webdancer.inference.checksum import checksum, numbers
from webdancer.inference.exact import ExactEngine

PROBE = probe(contract.VOCAB, max_length=16)


class Handle:
    """An actor's handle on a plain object: `handle.method.remote(...)` is awaited."""

    def __init__(self, target) -> None:
        self._target = target

    def __getattr__(self, name):
        async def call(*arguments):
            result = getattr(self._target, name)(*arguments)
            return await result if asyncio.iscoroutine(result) else result

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))


class Worker:
    def __init__(self, engine) -> None:
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    async def load_weights(self, path, version, files):
        return await self._engine.load_weights(path, version)

    async def confirm(self): ...

    async def stats(self):
        return {**await self._engine.stats(), "in_flight": 0.0, "in_flight_limit": 0.0}


@dataclass(eq=False)
class Member:
    name: str
    engine: ExactEngine
    node_id: str = "node"

    @property
    def handle(self):
        return Handle(Worker(self.engine))


class FakeLearner:
    """Holds a transformers model; `step` moves it. Counts what was sent to how many engines, and what was written."""

    def __init__(self, model) -> None:
        self.model, self.version, self.workers = model, 0, []
        self.connected, self.written = [], 0
        self.arrives = lambda engine, tensors: tensors

    def step(self):
        self.version += 1
        contract.perturb(self.model, "model.norm.weight")
        return self.version

    async def connect_engines(self, workers, **settings):
        self.workers = workers
        self.connected.append(len(workers))

    async def send_weights(self):
        await asyncio.gather(*(worker.begin_update.remote() for worker in self.workers))
        tensors = dict(self.model.named_parameters())
        await asyncio.gather(
            *(worker.receive_weights.remote({"tensors": self.arrives(n, tensors)}) for n, worker in enumerate(self.workers))
        )
        return numbers({name: checksum(tensor) for name, tensor in tensors.items()})

    async def export_weights(self, directory, version):
        self.written += 1
        contract.export(self.model, directory, self.version if version is None else version)
        return {"version": self.version, "files": []}

    async def score(self, sequences):
        scores = [contract.reference_logprobs(self.model, ids[:1], ids[1:]) for ids in sequences]
        return [np.array([0.0, *score], np.float32) for score in scores]


async def make_setting(tmp_path, *, engines: int, backend: str = "nccl"):
    model = contract.make_model(tmp_path / "model", tied=True)
    learner = FakeLearner(model)

    async def member(name):
        engine = ExactEngine(str(tmp_path / "model"), contract.IdTokenizer(), max_model_len=contract.MAX_LEN)
        await engine.start()
        return Member(name, engine)

    workers = [await member(f"rollout-{n}") for n in range(engines)]
    pool = SimpleNamespace(workers=workers, num_replaced=0, retired=[], rest={}, wake=lambda: None)
    pool.retire = lambda worker, reason: pool.retired.append((worker.name, reason))
    exporter = Handle(SimpleNamespace(place=lambda: ("node", "127.0.0.1", 1), remove=lambda path: None, set_aside=lambda path: None))
    config = WeightSyncConfig(backend=backend, timeout_s=60)
    weights = WeightPublisher(config, learner, pool, exporter=exporter, exporter_node="node", directory=tmp_path / "weights", probe=PROBE)
    return learner, pool, weights, member


async def difference(engine, learner):
    return compare(await engine.score(PROBE), [scores[1:] for scores in await learner.score(PROBE)]).max


def test_one_send_reaches_every_engine_and_files_only_who_joins_later(tmp_path):
    async def run():
        learner, pool, weights, member = await make_setting(tmp_path, engines=2)
        running = asyncio.create_task(pool.workers[0].engine.complete([5] * 8, sampling=contract.Sampling(), max_tokens=400, session="s"))
        await weights.publish(0)
        figures = await weights.publish(learner.step())
        assert figures["engine/workers"] == 2
        assert figures["canary/max"] < 1e-3
        assert (learner.connected, learner.written) == ([2], 0)
        newcomer = await member("rollout-2")
        await weights.bring_up_to_date(newcomer)
        assert learner.written == 1
        assert newcomer.engine.version == 1
        assert await difference(newcomer.engine, learner) < 1e-3
        pool.workers.append(newcomer)
        await weights.publish(learner.step())
        assert learner.connected == [2, 3], "connected anew when the workers are others"
        assert [await difference(worker.engine, learner) < 1e-3 for worker in pool.workers] == [True] * 3
        assert {span.version for span in (await running).versions} <= {0, 1, 2}

    asyncio.run(run())


def test_an_engine_that_computes_something_else_is_replaced(tmp_path):
    async def run():
        learner, pool, weights, _ = await make_setting(tmp_path, engines=2)
        finish = pool.workers[1].engine.finish_update

        async def spoilt(version, checksums):
            timing = await finish(version, checksums)
            pool.workers[1].engine._model.model.norm.weight.mul_(1.5)
            return timing

        pool.workers[1].engine.finish_update = spoilt
        figures = await weights.publish(learner.step())
        assert figures["sync/quarantined"] == 1
        ((name, reason),) = pool.retired
        assert name == "rollout-1"
        assert "canary" in reason

    asyncio.run(run())


def test_an_engine_that_got_other_bytes_is_replaced_and_the_others_go_on(tmp_path):
    """A change that the canary would let pass."""

    async def run():
        learner, pool, weights, _ = await make_setting(tmp_path, engines=2)
        name = "model.layers.0.mlp.up_proj.weight"

        def arrives(engine, tensors):
            return tensors | ({name: tensors[name] * (1 + 1e-7)} if engine == 1 else {})

        learner.arrives = arrives
        figures = await weights.publish(learner.step())
        assert (figures["engine/workers"], figures["sync/quarantined"]) == (1, 1)
        ((retired, reason),) = pool.retired
        assert retired == "rollout-1"
        assert f"weights: {name} must have the checksum of what was sent" in reason
        assert await difference(pool.workers[0].engine, learner) < 1e-3

    asyncio.run(run())


@pytest.mark.parametrize("error", [ActorLost("its node is gone"), StalledError("weights: no answer within 600 s")])
def test_engines_that_die_in_an_update_are_replaced_even_if_all_do(tmp_path, error):
    async def run():
        learner, pool, weights, member = await make_setting(tmp_path, engines=1, backend="file")

        async def die(path, version):
            raise error

        pool.workers[0].engine.load_weights = die
        figures = await weights.publish(learner.step())
        assert (figures["engine/workers"], figures["sync/quarantined"]) == (0, 1)
        assert [name for name, _ in pool.retired] == ["rollout-0"]
        newcomer = await member("rollout-1")
        await weights.bring_up_to_date(newcomer)
        assert learner.written == 1, "what was exported for the dead is still there"
        assert await difference(newcomer.engine, learner) < 1e-3

    asyncio.run(run())


def test_a_transfer_that_fails_ends_the_run(tmp_path):
    async def run():
        learner, pool, weights, _ = await make_setting(tmp_path, engines=2)

        async def refuse(info):
            raise EngineFault("refused on purpose")

        pool.workers[0].engine.receive_weights = refuse
        with pytest.raises(CanaryError, match=r"no engine serves version 1.*refused on purpose"):
            await weights.publish(learner.step())

    asyncio.run(run())
