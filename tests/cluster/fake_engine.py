"""An engine without a model for the cluster tests, importable in every worker: it searches `num_calls` times, then answers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np

from tests.fakes import answer, make_completion, search
from webdancer.errors import EngineFault
from webdancer.types import ToolResult

NUM_CALLS = 3


class FakeEngine:
    """Waits for the file `<directory>/go` before its third turn, if there is a directory; the first worker that gets there signs
    `<directory>/waiting` with its process id and waits for ever."""

    def __init__(self, directory: str | None = None, *, turn_s: float = 0.01) -> None:
        self.turn_s = turn_s
        self.directory = Path(directory) if directory else None
        self.broken: str | None = None
        self.version = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def complete(self, prompt_ids, *, sampling, max_tokens, session):
        from tests.fakes import make_tokenizer

        if self.broken:
            raise EngineFault(self.broken)
        done = make_tokenizer().decode(prompt_ids).count("<tool_response>")
        if done == 2 and self.directory is not None:
            await self._hold()
        await asyncio.sleep(self.turn_s)
        return make_completion(search(f"q{done}") if done < NUM_CALLS else answer("yes"), version=self.version)

    async def stream(self, prompt_ids, *, sampling, max_tokens, session, on_tokens):
        completion = await self.complete(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=session)
        for token_id in completion.token_ids:
            on_tokens([token_id])
            await asyncio.sleep(self.turn_s)
        return completion

    async def _hold(self) -> None:
        try:
            with open(self.directory / "waiting", "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return
        if (self.directory / "break").exists():
            self.broken = "the engine failed on purpose"
            raise EngineFault(self.broken)
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            (self.directory / "cancelled").touch()
            raise

    async def score(self, sequences):
        return [np.zeros(len(ids) - 1, np.float32) for ids in sequences]

    async def load_weights(self, manifest_path, version):
        self.version = version
        return {"load_s": 0.0}

    async def stats(self):
        return {"kv_usage": 0.0, "preemptions": 0.0, "prefix_hit_rate": 0.0, "generated_tokens": 0.0}


class CorruptedEngine:
    """An ExactEngine that spoils one tensor after loading a version, on the first worker that signs `<directory>/corrupted`."""

    def __init__(self, engine, directory: str, *, everywhere: bool) -> None:
        self.engine = engine
        self.directory = Path(directory)
        self.everywhere = everywhere

    def __getattr__(self, name):
        return getattr(self.engine, name)

    async def load_weights(self, manifest_path, version):
        timing = await self.engine.load_weights(manifest_path, version)
        if version >= 1 and (self.everywhere or self._first()):
            self.engine._model.model.norm.weight.mul_(1.5)
        return timing

    def _first(self) -> bool:
        try:
            (self.directory / "corrupted").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class CountingTools:
    """Tool server that counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def call(self, call, hop=None):
        self.num_calls += 1
        return ToolResult(text=f"Nothing about {call.arguments['query']}.")

    async def count(self):
        return self.num_calls

    async def pid(self):
        return os.getpid()

    async def node(self):
        import ray

        return ray.get_runtime_context().get_node_id()

    async def gpus(self):
        """Node and numbers of the GPUs that this actor has."""
        import ray

        node = await self.node()
        return tuple((node, gpu) for gpu in ray.get_gpu_ids())


def make_fake_engine(directory, spec, tokenizer):
    return FakeEngine(directory)


def make_slow_engine(turn_s, spec, tokenizer):
    return FakeEngine(turn_s=turn_s)


def make_exact_engine(spec, tokenizer):
    from webdancer.inference.exact import ExactEngine

    return ExactEngine(spec.model_path, tokenizer, max_model_len=spec.episode.max_tokens)


class RefusingEngine(CorruptedEngine):
    """Takes no weights that come directly, on the first worker that signs."""

    async def receive_weights(self, update_info):
        if self._first():
            raise EngineFault("refused on purpose")
        await self.engine.receive_weights(update_info)


def make_refusing_engine(directory, spec, tokenizer):
    return RefusingEngine(make_exact_engine(spec, tokenizer), directory, everywhere=False)


def make_corrupted_engine(directory, everywhere, spec, tokenizer):
    return CorruptedEngine(make_exact_engine(spec, tokenizer), directory, everywhere=everywhere)
