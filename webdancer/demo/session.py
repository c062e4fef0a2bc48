"""One question put to the agent: an episode that can be watched while it is written, and which ends when nobody watches any more."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from webdancer.demo.turns import ShownTurn, Source, answer_sources, shown_turn
from webdancer.demo.writing import LiveTurn, Writing, plain
from webdancer.interfaces import EpisodeRunner
from webdancer.types import EpisodeLost, Sampling, ScoredTrajectory, Task, TurnNews, TurnText

_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """How an episode ended; `answer` None: without one. `stop` is a StopReason's value, or `lost` with the reason in `problem`."""

    answer: str | None
    stop: str
    num_tool_calls: int
    seconds: float
    sources: tuple[Source, ...] = ()
    problem: str = ""


async def ask(
    runner: EpisodeRunner, question: str, *, sampling: Sampling, site: str = ""
) -> AsyncGenerator[Writing | ShownTurn | Answered]:
    """Each turn as it is written, where the engine can be listened to, and when it is finished; then how the episode ended. Closing the
    iterator, or cancelling who waits for it, ends the episode, in the middle of a turn as well."""
    told: asyncio.Queue[TurnNews | None] = asyncio.Queue()
    task = Task(id=f"question-{next(_numbers)}", question=question, answers=())
    started = time.monotonic()
    running = asyncio.ensure_future(
        runner.run(task, member=0, attempt=0, sampling=sampling, on_turn=told.put_nowait, on_text=told.put_nowait)
    )
    running.add_done_callback(lambda _: told.put_nowait(None))  # a runner tells of every turn before it ends
    shown: list[ShownTurn] = []
    live = LiveTurn()
    try:
        while (news := await told.get()) is not None:
            if isinstance(news, TurnText):
                if (writing := live.add(news)) is not None:
                    yield writing
                continue
            shown.append(shown_turn(news.turn, site=site))
            yield shown[-1]
        yield _answered(running.result(), shown, seconds=time.monotonic() - started)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _answered(outcome: ScoredTrajectory | EpisodeLost, shown: Sequence[ShownTurn], *, seconds: float) -> Answered:
    if isinstance(outcome, EpisodeLost):
        return Answered(answer=None, stop="lost", num_tool_calls=0, seconds=seconds, problem=plain(outcome.reason))
    ended = outcome.trajectory
    answer = None if ended.answer is None else plain(ended.answer)
    sources = answer_sources(shown)
    return Answered(answer=answer, stop=str(ended.stop), num_tool_calls=ended.num_tool_calls, seconds=seconds, sources=sources)
