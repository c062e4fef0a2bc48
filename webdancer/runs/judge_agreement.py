"""Answers that were judged once, judged again by another judge: how far two judges agree says how far an accuracy can be trusted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from webdancer.evaluation.attempts import Attempt
from webdancer.evaluation.comparison import Agreement, agreement
from webdancer.rewards.judge import RunningJudge, unpaid
from webdancer.runs.together import together
from webdancer.tools.ledger import out_of_money
from webdancer.types import Task, Verdict


async def judge_again(
    judged: Sequence[tuple[Attempt, Task]], judge: RunningJudge, *, start: Callable[[], Awaitable[None]] | None = None
) -> Agreement:
    """The recorded verdicts against the judge's, on all that have an answer. `start`: of its engine. Closes the judge.

    Raises ServiceError where the judge does not answer, or its money does not cover all of them.
    """
    answered = [(attempt, task) for attempt, task in judged if attempt.answer is not None]
    try:
        if start is not None:
            await start()
        else:
            await judge.check()
        verdicts = await together(_graded(judge, task, attempt.answer or "") for attempt, task in answered)
    finally:
        await judge.aclose()
    return agreement([attempt.status for attempt, _ in answered], verdicts)


async def _graded(judge: RunningJudge, task: Task, answer: str) -> Verdict:
    verdict = await judge.grade(task, answer)
    if unpaid(verdict):
        raise out_of_money()
    return verdict
