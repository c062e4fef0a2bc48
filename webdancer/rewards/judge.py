"""Whether a final answer is right: by exact matching, or by a model that is asked with the prompt of the question's benchmark.

A judge that cannot decide says `unknown`, which makes the member invalid; it never says `wrong` for a failure of its own. It sees the
question, the right answers and the final answer, never the trajectory, so that no page can talk to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from typing import Any, Protocol

from webdancer.config import JudgeConfig
from webdancer.errors import EngineFault, ServiceError
from webdancer.rewards.chat import Chat, ChatFailed, ChatRefused, HttpChat, Reply
from webdancer.rewards.judge_prompts import MAX_ANSWER_CHARS as MAX_ANSWER_CHARS
from webdancer.rewards.judge_prompts import JudgePrompt, prompt_for
from webdancer.rewards.matching import normalise as normalise
from webdancer.rewards.matching import same_answer
from webdancer.tools.cache import SingleFlightCache
from webdancer.tools.ledger import Purse, out_of_money
from webdancer.tools.limits import Schedule, wait_for
from webdancer.tools.result import BUDGET_SPENT
from webdancer.types import JudgeUse, Task, Verdict

NO_USE = JudgeUse()
PROVIDER = "judge"
"""The judge's name in the run's accounts (spending.json)."""
_MAX_CACHED_CHARS = 20_000_000


class RunningJudge(Protocol):
    """interfaces.Judge with a beginning and an end. `check` raises ServiceError where it does not give the verdict that it must."""

    async def grade(self, task: Task, answer: str) -> Verdict: ...

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...


class MatchJudge:
    """Right is what equals an alias by `matching.same_answer`. Needs nothing, never unknown for a task that has answers."""

    async def grade(self, task: Task, answer: str) -> Verdict:
        if not task.answers:
            return Verdict(status="unknown", reason="the task has no answer", judge="match")
        how = next((how for alias in task.answers if (how := same_answer(answer, alias))), None)
        reason = f"the same {how}" if how else f"normalised: {normalise(answer)[:200]!r}"
        return Verdict(status="correct" if how else "wrong", reason=reason, judge="match")

    async def check(self) -> None:
        """Nothing can be down."""

    async def aclose(self) -> None:
        """Nothing is open."""


class ModelJudge:
    """A chat model as the judge. One actor's share of the pool's places and pace: of `num_servers` that share them evenly.

    Verdicts are remembered by question, gold, answer, prompt and judge; what is asked twice at once is asked once, and whoever came first
    pays. `unknown` is not remembered.
    """

    def __init__(self, config: JudgeConfig, chat: Chat, *, backoff_s: float = 1.0, purse: Purse | None = None) -> None:
        """backoff_s: the pause after the first failure; it doubles. purse: the run's, for a judge that costs money."""
        self._purse = purse
        self._config = config
        self._chat = chat
        self._backoff_s = backoff_s
        self._places = asyncio.Semaphore(-(-config.max_concurrent // config.num_servers))
        self._pace = Schedule(config.requests_per_s / config.num_servers)
        self._known: SingleFlightCache[bytes, Verdict] = SingleFlightCache(
            max_entries=config.cache_entries,
            max_size=_MAX_CACHED_CHARS,
            size_of=lambda verdict: len(verdict.reason) + 200,
            lifetime_s=lambda verdict: 0.0 if verdict.status == "unknown" else float("inf"),
        )

    async def grade(self, task: Task, answer: str) -> Verdict:
        """Retries what may pass (no connection, 408, 429, 5xx, a reply without a verdict); then the verdict is unknown.

        So it is, with BUDGET_SPENT as its reason, once the run's money is spent.
        """
        if not task.answers:
            return self._unknown("the task has no answer")
        prompt = prompt_for(task, chosen=self._config.prompt)
        verdict, cached = await self._known.get(
            verdict_key(task, answer, judge=f"{self._config.model} {prompt.name}"), lambda: self._decide(prompt, task, answer)
        )
        return replace(verdict, use=JudgeUse(hits=1)) if cached else verdict

    async def check(self) -> None:
        """One real question before a run."""
        task = Task(id="check", question="What is the capital of France?", answers=("Paris",))
        verdict = await self.grade(task, "Paris")
        if unpaid(verdict):
            raise out_of_money()
        if verdict.status != "correct":
            backend, where = self._config.backend, f"{self._config.base_url} ({self._config.model})".strip()
            field = "judge.base_url" if backend == "openai" else "judge.model"
            raise ServiceError(f"{field}: must be a judge that answers, got {verdict.status} from {where}: {verdict.reason}")

    async def aclose(self) -> None:
        await self._known.aclose()
        await self._chat.aclose()

    async def _decide(self, prompt: JudgePrompt, task: Task, answer: str) -> Verdict:
        messages = prompt.messages(task, answer)
        failure, wordless, use = "not asked", False, JudgeUse()
        for attempt in range(max(self._config.max_attempts, 1)):
            if attempt:
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))
            if self._purse is not None and not await self._purse.pay(PROVIDER, requests=0, usd=0.0):
                return self._unknown(BUDGET_SPENT, use)
            try:
                # At temperature 0 a model would only repeat the reply that was no verdict.
                reply = await self._ask(messages, temperature=0.7 if wordless else 0.0)
            except ChatRefused as error:
                return self._unknown(str(error), use)
            except (ChatFailed, EngineFault, TimeoutError) as error:
                failure = str(error) or type(error).__name__
                continue
            use += await self._billed(reply)
            found = None if reply.is_cut else prompt.verdict(reply.text)
            if found is not None:
                return Verdict(status=found.status, reason=found.reason, judge=self._config.model, use=use)
            limit = f"judge.max_reply_tokens ({self._config.max_reply_tokens})"
            failure, wordless = f"the reply is longer than {limit}" if reply.is_cut else "the reply holds no verdict", True
        return self._unknown(failure, use)

    async def _billed(self, reply: Reply) -> JudgeUse:
        config = self._config
        price = reply.prompt_tokens * config.usd_per_million_prompt + reply.completion_tokens * config.usd_per_million_completion
        usd = price / 1e6
        if self._purse is not None:
            await self._purse.pay(PROVIDER, requests=1, usd=usd)
        return JudgeUse(requests=1, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens, usd=usd)

    async def _ask(self, messages: list[dict[str, str]], *, temperature: float) -> Reply:
        async with self._places:
            await wait_for(self._pace, patience_s=float("inf"))
            async with asyncio.timeout(self._config.timeout_s):
                return await self._chat.reply(messages, temperature=temperature, max_tokens=self._config.max_reply_tokens)

    def _unknown(self, reason: str, use: JudgeUse = NO_USE) -> Verdict:
        return Verdict(status="unknown", reason=reason, judge=self._config.model, use=use)


class OpenAIJudge(ModelJudge):
    """A model behind any OpenAI-compatible endpoint: see `HttpChat`."""

    def __init__(self, config: JudgeConfig, *, transport: Any = None, backoff_s: float = 1.0, purse: Purse | None = None) -> None:
        """transport: an httpx transport instead of the network."""
        chat = HttpChat(config.base_url, config.model, timeout_s=config.timeout_s, transport=transport)
        super().__init__(config, chat, backoff_s=backoff_s, purse=purse)


def build_judge(config: JudgeConfig, *, engine: Chat | None = None, purse: Purse | None = None) -> RunningJudge:
    """The configured judge. engine: the chat over a vLLM engine that backend vllm needs (inference.chat.EngineChat)."""
    if config.backend == "vllm":
        assert engine is not None, "backend vllm without an engine"
        return ModelJudge(config, engine, purse=purse)
    return OpenAIJudge(config, purse=purse) if config.backend == "openai" else MatchJudge()


def unpaid(verdict: Verdict) -> bool:
    """The judge was not asked for want of money."""
    return verdict.status == "unknown" and verdict.reason == BUDGET_SPENT


def has_price(config: JudgeConfig) -> bool:
    return config.backend != "match" and config.usd_per_million_prompt + config.usd_per_million_completion > 0


def verdict_key(task: Task, answer: str, *, judge: str) -> bytes:
    """The identity of one judgement: question, gold, answer, judge."""
    return hashlib.sha256(json.dumps([task.question, task.source, *task.answers, answer[:MAX_ANSWER_CHARS], judge]).encode()).digest()
