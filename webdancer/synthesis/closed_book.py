"""Questions that a model answers without looking teach nobody to look: it is asked, n times, before a question is let through."""

from __future__ import annotations

from webdancer.llm.client import ChatModel, ChatRefused
from webdancer.rewards.judge import MatchJudge
from webdancer.synthesis.collect import ClosedBook
from webdancer.synthesis.hygiene import CLOSED_BOOK
from webdancer.types import Task

_SYSTEM = (
    "Answer from memory. Reply with the answer alone, as short as it can be: a name, a number, a date. "
    "If you do not know it, reply with the one word unknown."
)
_TEMPERATURE, _MAX_TOKENS = 0.7, 4_096  # a model that reasons needs most of it before it answers


def closed_book(model: ChatModel, *, attempts: int) -> ClosedBook:
    """Says `closed_book` for a question that any of so many attempts answers right. One that the endpoint refuses to answer stays."""
    judge = MatchJudge()

    async def ask(task: Task) -> str:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": task.question}]
        for sample in range(attempts):
            try:
                answer = await model.chat(messages, temperature=_TEMPERATURE, max_tokens=_MAX_TOKENS, sample=sample)
            except ChatRefused:
                return ""
            if (await judge.grade(task, answer.text)).status == "correct":
                return CLOSED_BOOK
        return ""

    return ask
