"""The real vLLM against the contract of all engines, on CPU: on a thread for tied and untied weights, and in processes (as on a GPU).

About 20 s an engine; one event loop serves all tests of one.
"""

import asyncio
import multiprocessing

import pytest

from tests import engine_contract as contract

pytest.importorskip("vllm")

from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from webdancer.config import EngineConfig
from webdancer.errors import EngineFault
from webdancer.inference.engine import VllmEngine
from webdancer.inference.weight_import import WeightTransfer
from webdancer.types import Sampling


class TensorEngine(WeightTransferEngine):
    """The worker's end of a direct transfer where there is no GPU: the tensors are in the update itself."""

    init_info_cls = WeightTransferInitInfo

    def parse_update_info(self, update_dict):
        return update_dict

    def init_transfer_engine(self, init_info): ...

    def start_weight_update(self): ...

    def finish_weight_update(self): ...

    def shutdown(self): ...

    def receive_weights(self, update_info):
        self.model.load_weights(list(update_info["tensors"].items()))


class TensorTransfer(WeightTransfer):
    direct_cls = TensorEngine


WeightTransferEngineFactory.register_engine("webdancer_tensors", TensorTransfer)


@pytest.fixture(scope="module", params=["tied", "untied"])
def setting(request, tmp_path_factory):
    """(run a coroutine, engine, the transformers model with the same weights)."""
    path = tmp_path_factory.mktemp(request.param)
    model = contract.make_model(path, tied=request.param == "tied")
    with asyncio.Runner() as runner:
        engine = start(runner, path, weight_backend="tensors")
        yield runner.run, engine, model
        runner.run(engine.stop())


def start(runner, path, *, kv_cache_on_update="clear", **options):
    config = EngineConfig(kv_cache_gib=0.25, max_num_seqs=16, kv_cache_on_update=kv_cache_on_update)
    engine = VllmEngine(str(path), contract.IdTokenizer(), config, dtype="float32", max_model_len=contract.MAX_LEN, **options)
    runner.run(engine.start())
    return engine


def test_generates_what_the_model_says(setting):
    run, engine, model = setting
    run(contract.check_sampled_logprobs(engine, model))
    run(contract.check_greedy(engine, model))
    run(contract.check_score(engine, model))


def test_ends(setting):
    run, engine, _ = setting
    run(contract.check_stop_token(engine))
    run(contract.check_limits(engine))
    run(contract.check_cancel_frees_the_request(engine))
    run(contract.check_streaming(engine))


def test_every_tensor_arrives(setting, tmp_path):
    run, engine, model = setting
    run(contract.check_every_tensor_arrives(engine, model, tmp_path))


def test_weights_that_come_directly(setting):
    run, engine, model = setting
    run(contract.check_a_direct_update(engine, model))


def test_an_update_in_mid_generation(setting, tmp_path):
    run, engine, model = setting
    run(contract.check_update_in_mid_generation(engine, model, tmp_path))
    run(contract.check_score(engine, model))


def test_sleep(setting, tmp_path):
    run, engine, model = setting
    run(contract.check_sleep(engine, model, tmp_path))


def test_counts(setting):
    run, engine, _ = setting
    before = run(engine.stats())
    run(contract.check_stop_token(engine))
    after = run(engine.stats())
    assert after["requests"] == before["requests"] + 60
    assert after["generated_tokens"] > before["generated_tokens"]
    assert (after["running"], after["waiting"], after["preemptions"]) == (0, 0, 0)


def test_a_corrupt_export_is_refused_before_anything_is_loaded(setting, tmp_path):
    run, engine, model = setting
    run(contract.check_refuses_a_corrupt_export(engine, model, tmp_path))


def test_a_failed_update_breaks_the_engine(setting, tmp_path):
    """The last test of a setting: its engine is gone afterwards."""
    run, engine, model = setting
    run(contract.check_breaks_for_good(engine, model, tmp_path))


def test_the_engine_in_processes_of_its_own(tmp_path):
    model = contract.make_model(tmp_path / "model", tied=True)
    with asyncio.Runner() as runner:
        engine = start(runner, tmp_path / "model", in_process=False)
        runner.run(contract.check_sampled_logprobs(engine, model))
        runner.run(contract.check_every_tensor_arrives(engine, model, tmp_path / "a"))
        runner.run(contract.check_update_in_mid_generation(engine, model, tmp_path / "b"))
        runner.run(contract.check_sleep(engine, model, tmp_path / "s"))
        runner.run(contract.check_refuses_a_corrupt_export(engine, model, tmp_path / "c"))
        runner.run(contract.check_cancel_frees_the_request(engine))
        runner.run(contract.check_streaming(engine))
        runner.run(contract.check_breaks_for_good(engine, model, tmp_path / "d"))


@pytest.mark.parametrize("in_process", [True, False])
def test_keys_and_values_can_be_kept(tmp_path, in_process):
    model = contract.make_model(tmp_path / "model", tied=True)
    with asyncio.Runner() as runner:
        backend = "tensors" if in_process else "file"
        engine = start(runner, tmp_path / "model", kv_cache_on_update="keep", in_process=in_process, weight_backend=backend)
        runner.run(contract.check_update_that_keeps_the_cache(engine, model, tmp_path / "a"))
        if in_process:
            runner.run(contract.check_breaks_on_corrupt_bytes(engine, model))
        runner.run(engine.stop())


async def check_death(engine, kill):
    """Requests under way and calls after it get EngineFault, none waits for ever, and the engine says that it is broken."""
    running = [
        asyncio.create_task(engine.complete([5] * 10, sampling=Sampling(temperature=0.9), max_tokens=450, session=f"{i}")) for i in range(3)
    ]
    while (await engine.stats())["running"] < 3:
        await asyncio.sleep(0.001)
    kill()
    for outcome in await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 30):
        assert isinstance(outcome, EngineFault), outcome
    assert engine.broken
    with pytest.raises(EngineFault):
        await engine.complete([5, 6], sampling=Sampling(), max_tokens=3, session="x")
    await engine.stop()


def test_an_engine_that_fails_on_its_thread(tmp_path):
    contract.make_model(tmp_path, tied=True)

    def explode():
        raise MemoryError("a step failed")

    with asyncio.Runner() as runner:
        engine = start(runner, tmp_path)
        runner.run(check_death(engine, lambda: setattr(engine._core._engine, "step", explode)))


def test_an_engine_whose_process_is_killed(tmp_path):
    contract.make_model(tmp_path, tied=True)

    def kill():
        (child,) = multiprocessing.active_children()
        child.kill()

    with asyncio.Runner() as runner:
        engine = start(runner, tmp_path, in_process=False)
        runner.run(check_death(engine, kill))
    assert multiprocessing.active_children() == []
