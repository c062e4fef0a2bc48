"""The deterministic transformers engine against the contract of all engines."""

import asyncio

import pytest

from tests import engine_contract as contract
from webdancer.inference.exact import ExactEngine
from webdancer.types import Sampling


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def engine_and_model(request, tmp_path):
    model = contract.make_model(tmp_path / "model", tied=request.param)
    engine = ExactEngine(str(tmp_path / "model"), contract.IdTokenizer(), max_model_len=contract.MAX_LEN)
    asyncio.run(engine.start())
    return engine, model


def test_generates_what_the_model_says(engine_and_model):
    async def checks():
        await contract.check_sampled_logprobs(*engine_and_model)
        await contract.check_greedy(*engine_and_model)
        await contract.check_score(*engine_and_model)

    asyncio.run(checks())


def test_ends(engine_and_model):
    async def checks():
        await contract.check_stop_token(engine_and_model[0])
        await contract.check_limits(engine_and_model[0])
        await contract.check_cancel_frees_the_request(engine_and_model[0])
        await contract.check_streaming(engine_and_model[0])

    asyncio.run(checks())


def test_takes_new_weights(engine_and_model, tmp_path):
    async def checks():
        await contract.check_every_tensor_arrives(*engine_and_model, tmp_path / "a")
        await contract.check_update_in_mid_generation(*engine_and_model, tmp_path / "b")
        await contract.check_sleep(*engine_and_model, tmp_path / "s")
        await contract.check_refuses_a_corrupt_export(*engine_and_model, tmp_path / "c")
        await contract.check_breaks_for_good(*engine_and_model, tmp_path / "d")

    asyncio.run(checks())


def test_takes_weights_directly_and_refuses_corrupt_ones(engine_and_model):
    async def checks():
        await contract.check_a_direct_update(*engine_and_model)
        await contract.check_breaks_on_corrupt_bytes(*engine_and_model)

    asyncio.run(checks())


def test_keys_and_values_can_be_kept(tmp_path):
    model = contract.make_model(tmp_path / "model", tied=True)

    async def run():
        engine = ExactEngine(str(tmp_path / "model"), contract.IdTokenizer(), max_model_len=contract.MAX_LEN, keeps_cache=True)
        await engine.start()
        await contract.check_update_that_keeps_the_cache(engine, model, tmp_path / "a")

    asyncio.run(run())


def test_a_request_depends_on_nothing_that_runs_beside_it(engine_and_model):
    engine, _ = engine_and_model

    async def completions(count):
        return await asyncio.gather(
            *(engine.complete([7, 8, i + 3], sampling=Sampling(seed=i), max_tokens=12, session=f"{i}") for i in range(count))
        )

    async def checks():
        alone, together = await completions(1), await completions(5)
        assert alone[0] == together[0]
        assert len({completion.token_ids for completion in together}) == 5

    asyncio.run(checks())


def test_a_session_repeats_itself_without_a_seed(tmp_path):
    contract.make_model(tmp_path / "model", tied=True)

    async def run():
        engine = ExactEngine(str(tmp_path / "model"), contract.IdTokenizer(), max_model_len=contract.MAX_LEN)
        await engine.start()
        return [await engine.complete([9, 10], sampling=Sampling(), max_tokens=12, session="one") for _ in range(2)]

    first, again = asyncio.run(run()), asyncio.run(run())
    assert first == again
    assert first[0].token_ids != first[1].token_ids
