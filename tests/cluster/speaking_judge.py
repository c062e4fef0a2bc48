"""A judge actor whose engine says one thing after another, as a tool actor's summarizer hears it."""

from __future__ import annotations

from types import SimpleNamespace

from tests.fakes import make_tokenizer
from webdancer.cluster.servers import JudgeServer
from webdancer.config import JudgeConfig
from webdancer.errors import EngineFault
from webdancer.inference.chat import EngineChat


class SpeakingJudge(JudgeServer):
    """`script`: texts, the last one for ever; `too long` and `broken` are what an engine raises."""

    broken = None

    def __init__(self, script: list[str]) -> None:
        super().__init__(JudgeConfig(backend="vllm"))
        self._engine = EngineChat(self, make_tokenizer())
        self._script = script
        self.prompts: list[str] = []

    def _opened(self):
        """Nothing that grades."""

    async def start(self) -> None:
        """An engine's; there is none to load."""

    async def complete(self, prompt_ids, **settings):
        self.prompts.append(make_tokenizer().decode(prompt_ids))
        said = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if said == "too long":
            raise ValueError("prompt_ids: must be 1 to 1023 tokens")
        if said == "broken":
            raise EngineFault("the engine is gone")
        ids = (*make_tokenizer().encode(said), make_tokenizer().eos_id)
        return SimpleNamespace(token_ids=ids, finish="stop")

    async def heard(self) -> list[str]:
        return self.prompts
