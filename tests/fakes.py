"""The outer edges, faked: a policy that reads from a script, tools and a judge that answer from tables, and a small but real tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from webdancer.agent.actions import render_action
from webdancer.agent.tokenizer import FastTokenizer
from webdancer.interfaces import OnTokens
from webdancer.types import Completion, FinalAnswer, Sampling, Task, ToolCall, ToolResult, Verdict, VersionSpan

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CORPUS = (
    '<think>\nNeed school of Karo Mil.\n</think>\n<tool_call>\n{"name": "search", "arguments": {"query": ["Karo Mil"]}}\n</tool_call>',
    '<think>\nNo school, visit.\n</think>\n<tool_call>\n{"name": "visit", "arguments": {"url": ["/wiki/K"], "goal": "x"}}\n</tool_call>',
    "<think>\nschool of Karo Mil: Bana School.\n</think>\n<answer>Bana School</answer>",
    "<tool_response>\nA Google search for 'Karo Mil' found 3 results:\n\n## Web Results\n1. [Karo Mil](/wiki/Karo_Mil)\n</tool_response>",
    "The useful information in the page for user goal as follows: \n\nEvidence in page: \n\nSummary: \n",
)


@lru_cache(maxsize=1)
def make_tokenizer() -> FastTokenizer:
    """Byte-level BPE with ChatML's special tokens: every text encodes, and decodes to itself."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return FastTokenizer(tokenizer)


def search(query: str | list[str], thought: str | None = "Look it up.") -> str:
    return render_action(ToolCall(name="search", arguments={"query": query}), thought=thought)


def answer(text: str, thought: str | None = "Now I know.") -> str:
    return render_action(FinalAnswer(text=text), thought=thought)


def make_completion(text: str, *, version: int = 0, ends: bool = True, logprob: float = -0.25) -> Completion:
    """The turn of a policy that wrote `text`, and then <|im_end|> unless it was cut."""
    tokenizer = make_tokenizer()
    token_ids = tuple(tokenizer.encode(text)) + ((tokenizer.eos_id,) if ends else ())
    return Completion(
        token_ids=token_ids,
        text=tokenizer.decode(token_ids),
        logprobs=(logprob,) * len(token_ids),
        finish="stop" if ends else "length",
        versions=(VersionSpan(version=version, start=0, end=len(token_ids)),),
    )


class ScriptedPolicy:
    """Says one script entry a turn: a text, or an exception to raise, or a function of the prompt's text. `version` tags its tokens.

    A text longer than `max_tokens` is cut there, as an engine would. `prompts` keeps what it was asked, `budgets` the max_tokens.
    """

    def __init__(self, script: Iterable[str | BaseException | Callable[[str], str]], *, version: int = 0, delay_s: float = 0.0) -> None:
        self._script = iter(script)
        self.version = version
        self.delay_s = delay_s
        self.prompts: list[tuple[int, ...]] = []
        self.budgets: list[int] = []
        self.sessions: list[str] = []

    async def complete(self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str) -> Completion:
        assert max_tokens > 0
        self.prompts.append(tuple(prompt_ids))
        self.budgets.append(max_tokens)
        self.sessions.append(session)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        entry = next(self._script)
        if isinstance(entry, BaseException):
            raise entry
        text = entry if isinstance(entry, str) else entry(make_tokenizer().decode(prompt_ids))
        whole = make_completion(text, version=self.version)
        if len(whole.token_ids) <= max_tokens:
            return whole
        return Completion(
            token_ids=whole.token_ids[:max_tokens],
            text=make_tokenizer().decode(whole.token_ids[:max_tokens]),
            logprobs=whole.logprobs[:max_tokens],
            finish="length",
            versions=(VersionSpan(version=self.version, start=0, end=max_tokens),),
        )


class SpeakingPolicy(ScriptedPolicy):
    """Says its tokens one by one, `token_s` apart; waits for ever after `stops_after` of them, if that is set."""

    def __init__(self, script: Iterable[str], *, token_s: float = 0.0, stops_after: int | None = None) -> None:
        super().__init__(script)
        self.token_s, self.stops_after = token_s, stops_after
        self.cancelled = False

    async def stream(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str, on_tokens: OnTokens
    ) -> Completion:
        whole = await self.complete(prompt_ids, sampling=sampling, max_tokens=max_tokens, session=session)
        try:
            for number, token_id in enumerate(whole.token_ids):
                if number == self.stops_after:
                    await asyncio.sleep(1e6)
                on_tokens([token_id])
                await asyncio.sleep(self.token_s)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return whole


class FakeToolbox:
    """Answers every call with `reply`: a text, a result, an exception to raise, or a function of the call; keeps the calls."""

    def __init__(
        self, reply: str | ToolResult | BaseException | Callable[[ToolCall], str | ToolResult] = "Nothing.", *, delay_s: float = 0.0
    ):
        self._reply = reply
        self.delay_s = delay_s
        self.calls: list[ToolCall] = []

    async def call(self, call: ToolCall) -> ToolResult:
        self.calls.append(call)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        reply = self._reply(call) if callable(self._reply) else self._reply
        if isinstance(reply, BaseException):
            raise reply
        return ToolResult(text=reply) if isinstance(reply, str) else reply


class FakeJudge:
    """Right is what is exactly an alias; `verdict` overrides that, or is raised. Keeps what it was asked."""

    def __init__(self, verdict: Verdict | BaseException | None = None) -> None:
        self.verdict = verdict
        self.asked: list[tuple[str, str]] = []

    async def grade(self, task: Task, answer: str) -> Verdict:
        self.asked.append((task.id, answer))
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        return self.verdict or Verdict(status="correct" if answer in task.answers else "wrong", judge="fake")


def make_task(answers: tuple[str, ...] = ("Bana School",), *, id: str = "t0", question: str = "What is the school of Karo Mil?") -> Task:
    return Task(id=id, question=question, answers=answers, source="test")
