"""A vLLM engine as a chat model: messages in, text out, for a judge that lives in the cluster (the paper's Qwen2.5-72B-Instruct)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Protocol

from webdancer.agent.prompt import Message, neutral_specials
from webdancer.agent.transcript import Transcript
from webdancer.interfaces import Policy, Tokenizer
from webdancer.rewards.chat import ChatRefused, Reply
from webdancer.types import Sampling


class StartedPolicy(Policy, Protocol):
    """A policy with a beginning and an end, as inference.engine.VllmEngine is. `broken`: why every call fails from now on, if it does."""

    broken: str | None

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class EngineChat:
    """`engine` is started with the first reply. The model speaks ChatML (the Qwen families do); text cannot leave its message."""

    def __init__(self, engine: StartedPolicy, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._sessions = itertools.count()
        self._starting = asyncio.Lock()
        self._started = False

    @property
    def broken(self) -> str | None:
        return self._engine.broken

    async def start(self) -> None:
        """Load the model. Raises what the engine raises."""
        async with self._starting:
            if not self._started:
                await self._engine.start()
                self._started = True

    async def reply(self, messages: Sequence[dict[str, str]], *, temperature: float, max_tokens: int) -> Reply:
        """Raises errors.EngineFault, and ChatRefused for a prompt that is longer than the engine takes."""
        plain = [Message(role=message["role"], content=neutral_specials(message["content"])) for message in messages]
        prompt_ids = Transcript(self._tokenizer, plain).token_ids
        sampling = Sampling(temperature=temperature)
        session = f"judge-{next(self._sessions)}"
        try:
            completion = await self._engine.complete(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=session)
        except ValueError as error:
            raise ChatRefused(str(error)) from error
        ids = completion.token_ids
        is_cut = not ids or ids[-1] != self._tokenizer.eos_id
        text = self._tokenizer.decode(ids if is_cut else ids[:-1]).strip()
        return Reply(text=text, is_cut=is_cut, prompt_tokens=len(prompt_ids), completion_tokens=len(ids))

    async def aclose(self) -> None:
        if self._started:
            await self._engine.stop()
