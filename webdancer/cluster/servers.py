"""Tool server, ledger and judge as actors: restarted by Ray, their clients opened on the actor's own event loop. No torch here."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from webdancer.config import JudgeConfig, ToolsConfig
from webdancer.tools import keys
from webdancer.types import Task, ToolCall, ToolResult, Verdict

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from webdancer.inference.chat import EngineChat
    from webdancer.rewards.judge import RunningJudge
    from webdancer.tools.hops import Hop
    from webdancer.tools.ledger import Lease, Provider
    from webdancer.tools.replay import ReplayToolbox
    from webdancer.tools.store import Said
    from webdancer.tools.summarize import Writer
    from webdancer.tools.toolbox import WebToolbox


class ToolServer:
    """The tools with their own connections, memory, buckets and breakers. `shard` is its number among the tool actors, and names its
    file of `tools.cache_dir`. `ledger` is the actor that all of them ask for quotas and money, and that keeps the recording; `engine` what
    summarizes pages, if that is an engine of the cluster."""

    KEYS = keys.TOOL_KEYS

    def __init__(
        self, config: ToolsConfig, *, call_timeout_s: float, shard: int = 0, ledger: Any = None, engine: Writer | None = None
    ) -> None:
        self._config = config
        self._engine = engine
        self._call_timeout_s = call_timeout_s
        self._shard = shard
        self._ledger = None if ledger is None else RemoteLedger(ledger)
        self._toolbox: ReplayToolbox | WebToolbox | None = None
        self._num_calls = 0
        self._idle = asyncio.Event()

    async def ready(self) -> None:
        """Raises ConfigError, DataError or ServiceError where the tools cannot work as configured."""
        await self._opened().check()

    async def call(self, call: ToolCall, hop: Hop | None = None) -> ToolResult:
        self._num_calls += 1
        try:
            return await self._opened().call(call, hop)
        finally:
            self._num_calls -= 1
            self._idle.set()

    async def drain(self) -> None:
        """Returns once no call is under way; what is remembered is on its shelf then, if there is one. A call that comes late all the same
        opens the tools once more."""
        while self._num_calls:
            self._idle.clear()
            await self._idle.wait()
        toolbox, self._toolbox = self._toolbox, None
        if toolbox is not None:
            await toolbox.aclose()

    def _opened(self) -> ReplayToolbox | WebToolbox:
        if self._toolbox is None:
            from webdancer.tools.toolbox import open_toolbox

            self._toolbox = open_toolbox(
                self._config,
                call_timeout_s=self._call_timeout_s,
                shard=self._shard,
                quota=self._ledger,
                writer=self._ledger,
                engine=self._engine,
            )
        return self._toolbox


class LedgerServer:
    """The one place for what tool and judge actors must share: quotas, money and the recording. It lives on the driver's node, where both
    files are; after a crash it goes on from them."""

    def __init__(self, config: ToolsConfig, *, run_dir: str) -> None:
        from webdancer.tools.ledger import FILE_NAME, Ledger
        from webdancer.tools.store import RecordingFile

        self._ledger = Ledger(budget_usd=config.budget_usd, path=Path(run_dir) / FILE_NAME)
        self._recording = RecordingFile(config.replay.path, writable=True) if config.replay.mode == "record" else None

    async def ready(self) -> None:
        """Raises nothing: what is wrong with the files was raised by the constructor."""

    async def lease(self, provider: Provider, patience_s: float) -> Lease:
        return await self._ledger.lease(provider, patience_s=patience_s)

    async def pay(self, provider: str, requests: int, usd: float) -> bool:
        return await self._ledger.pay(provider, requests=requests, usd=usd)

    async def record(self, question: str, said: Said) -> Said:
        assert self._recording is not None, "record without tools.replay.mode record"
        return await self._recording.record(question, said)

    async def recorded(self, question: str) -> Said | None:
        assert self._recording is not None, "recorded without tools.replay.mode record"
        return await self._recording.recorded(question)

    async def spent(self) -> Mapping[str, Mapping[str, float]]:
        """Requests and dollars by provider, over all starts of the run."""
        return self._ledger.spent

    async def close(self) -> None:
        self._ledger.write()
        if self._recording is not None:
            self._recording.close()


class RemoteLedger:
    """tools.ledger.Quota and Purse and tools.store.Recording over the actor, for tool and judge actors."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def lease(self, provider: Provider, *, patience_s: float) -> Lease:
        lease: Lease = await self._actor.lease.remote(provider, patience_s)
        return lease

    async def pay(self, provider: str, *, requests: int, usd: float) -> bool:
        solvent: bool = await self._actor.pay.remote(provider, requests, usd)
        return solvent

    async def record(self, question: str, said: Said) -> Said:
        first: Said = await self._actor.record.remote(question, said)
        return first

    async def recorded(self, question: str) -> Said | None:
        said: Said | None = await self._actor.recorded.remote(question)
        return said


class JudgeServer:
    """A judge with its own memory of verdicts, and with backend vllm its own engine. `ledger`: the actor that keeps the run's money."""

    KEYS = (keys.JUDGE,)

    def __init__(self, config: JudgeConfig, *, ledger: Any = None) -> None:
        self._config = config
        self._purse = None if ledger is None else RemoteLedger(ledger)
        self._judge: RunningJudge | None = None
        self._engine: EngineChat | None = None

    async def ready(self) -> None:
        """Raises ServiceError when the judge does not give the verdict that it must, and what its engine raises."""
        judge = self._opened()
        if self._engine is not None:
            await self._engine.start()  # a base model need not be right about anything: that is no fault of the program
        else:
            await judge.check()

    async def grade(self, task: Task, answer: str) -> Verdict:
        judge = self._opened()
        if self._engine is not None:
            await self._working(self._engine)
        return await judge.grade(task, answer)

    async def reply(self, messages: Sequence[dict[str, str]], temperature: float, max_tokens: int) -> str:
        """Of the engine, for whoever else may use it (backend vllm). Raises as EngineChat.reply does."""
        self._opened()
        assert self._engine is not None, "a judge without an engine"
        await self._working(self._engine)
        return (await self._engine.reply(messages, temperature=temperature, max_tokens=max_tokens)).text

    async def _working(self, engine: EngineChat) -> None:
        """Start it, after a restart of the actor. With one that is broken for good the actor ends: Ray starts it anew, and who waits for it
        asks another one."""
        if engine.broken is not None:
            log.error("the judge's engine is broken: %s", engine.broken)
            os._exit(1)
        await engine.start()

    async def stop(self) -> None:
        if self._judge is not None:
            await self._judge.aclose()

    def _opened(self) -> RunningJudge:
        if self._judge is None:
            from webdancer.rewards.judge import build_judge

            self._engine = open_engine(self._config) if self._config.backend == "vllm" else None
            self._judge = build_judge(self._config, engine=self._engine, purse=self._purse)
        return self._judge


def open_engine(config: JudgeConfig) -> EngineChat:
    """The engine of backend vllm, not yet started."""
    from webdancer.agent.tokenizer import load_tokenizer
    from webdancer.inference.chat import EngineChat
    from webdancer.inference.engine import VllmEngine

    tokenizer = load_tokenizer(config.model)
    engine = VllmEngine(config.model, tokenizer, config.engine, dtype="auto", max_model_len=config.context_tokens)
    return EngineChat(engine, tokenizer)
