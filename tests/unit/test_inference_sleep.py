"""In which order a vLLM engine on a GPU goes to sleep and wakes up: recorded at the edge to vLLM, as on a CPU there is no sleep."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from webdancer.config import EngineConfig
from webdancer.errors import EngineFault
from webdancer.inference.cores import ProcessCore
from webdancer.inference.engine import VllmEngine


class RecordingLLM:
    """vLLM's AsyncLLM as far as an update calls it; `refuses` is the call that fails."""

    errored = False

    def __init__(self, refuses: str = "") -> None:
        self.calls: list[str] = []
        self.refuses = refuses
        self.used_gib = [30.0, 6.0, 6.0]
        self.output_processor = SimpleNamespace(propagate_error=lambda error: None)

    def shutdown(self):
        self.calls.append("shutdown")

    def __getattr__(self, name):
        async def call(*arguments, **settings):
            if arguments[:1] == ("gpu_used_gib",):
                return [self.used_gib.pop(0)]
            shown = [*arguments, *(f"{key}={value}" for key, value in settings.items())]
            self.calls.append(" ".join([name, *map(str, shown)]))
            if self.refuses and self.refuses in self.calls[-1]:
                raise RuntimeError("out of memory")

        return call


def engine_over(llm: RecordingLLM, *, sleeps: bool = True, keeps: bool = False) -> VllmEngine:
    config = EngineConfig(kv_cache_on_update="keep" if keeps else "clear")
    engine = VllmEngine("model", SimpleNamespace(eos_id=1), config, dtype="bfloat16", max_model_len=64, weight_backend="ipc", sleeps=sleeps)
    engine._core = ProcessCore(SimpleNamespace(enable_sleep_mode=sleeps))
    engine._core._engine = llm
    return engine


async def update(engine):
    await engine.begin_update()
    await engine.receive_weights({"names": ["a"]})
    return await engine.finish_update(4, {"a": 7})


def test_memory_comes_back_for_the_weights_first_and_nothing_runs_before_they_are_whole():
    llm = RecordingLLM()
    engine = engine_over(llm)

    async def run():
        assert await engine.sleep() == {"gpu/awake_gib": 30.0, "gpu/asleep_gib": 6.0}
        await update(engine)

    asyncio.run(run())
    assert llm.calls == [
        "sleep level=2 mode=keep",
        "wake_up ['weights']",
        "collective_rpc start_weight_update kwargs={}",
        "collective_rpc update_weights kwargs={'update_info': {'names': ['a']}}",
        "collective_rpc update_weights kwargs={'update_info': {'checksums': {'a': 7}}}",
        "collective_rpc finish_weight_update kwargs={}",
        "update_weight_version 4",
        "wake_up ['kv_cache']",
        "reset_prefix_cache",
        "resume_generation",
    ]
    assert engine.version == 4


def test_an_engine_that_is_awake_is_paused_for_its_update():
    llm = RecordingLLM()
    asyncio.run(update(engine_over(llm, sleeps=False)))
    assert llm.calls[0] == "pause_generation mode=keep clear_cache=True"
    assert not any("wake" in call for call in llm.calls)


def test_without_memory_to_give_back_it_stands_still():
    llm = RecordingLLM()
    engine = engine_over(llm, sleeps=False)
    llm.used_gib = [None, None]

    async def run():
        assert await engine.sleep() == {}
        await update(engine)

    asyncio.run(run())
    assert llm.calls[:2] == ["pause_generation mode=keep clear_cache=True", "collective_rpc start_weight_update kwargs={}"]
    assert llm.calls[-1] == "resume_generation"


def test_who_sleeps_already_is_not_sent_to_sleep_again():
    llm = RecordingLLM()
    llm.used_gib = [6.0] * 4
    engine = engine_over(llm)

    async def run():
        await engine.sleep()
        await engine.sleep()

    asyncio.run(run())
    assert llm.calls == ["sleep level=2 mode=keep"]


@pytest.mark.parametrize("logprobs", [None, SimpleNamespace(logprobs=[-1.0])])
def test_tokens_without_their_logprobs_are_the_engines_fault(logprobs):
    output = SimpleNamespace(token_ids=[5, 6], finish_reason="length", logprobs=logprobs, weight_versions=[])
    with pytest.raises(EngineFault, match=r"gave [01] log-probabilities for 2 tokens"):
        engine_over(RecordingLLM())._completion(output)


@pytest.mark.parametrize("call", ["sleep level=2", "wake_up ['weights']", "wake_up ['kv_cache']"])
def test_an_engine_that_fails_at_it_is_broken(call):
    llm = RecordingLLM(refuses=call)
    engine = engine_over(llm)

    async def cycle():
        await engine.sleep()
        await update(engine)

    async def run():
        with pytest.raises(EngineFault, match="out of memory"):
            await cycle()
        assert engine.broken
        with pytest.raises(EngineFault):
            await engine.begin_update()

    asyncio.run(run())
    assert llm.calls[-1] == "shutdown"
    assert "resume_generation" not in llm.calls
