"""Evaluation: one greedy and n sampled episodes a question, all in flight at once, by the same episode code as training."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from webdancer.config import Config
from webdancer.data.tasks import num_hops
from webdancer.evaluation.benchmarks import CANARY
from webdancer.evaluation.metrics import EvaluationRow, summary
from webdancer.evaluation.results import Evaluation, write_evaluation
from webdancer.interfaces import EpisodeRunner
from webdancer.rollout.tool_tally import ToolTally
from webdancer.runs.together import together
from webdancer.telemetry import Telemetry
from webdancer.types import EpisodeLost, Sampling, ScoredTrajectory, Task

GREEDY = Sampling(temperature=0.0)
SEALED = "[an encrypted benchmark's]"
MAX_LOST = 3  # an episode lost so often with its worker is left out of the row


class BoundedRunner:
    """At most `at_once` episodes of another runner: its other places stay free for whoever else asks for them."""

    def __init__(self, runner: EpisodeRunner, at_once: int) -> None:
        self._runner = runner
        self._places = asyncio.Semaphore(at_once)

    async def run(self, task: Task, **settings: Any) -> ScoredTrajectory | EpisodeLost:
        async with self._places:
            return await self._runner.run(task, **settings)


async def evaluate(
    tasks: Sequence[Task],
    runner: EpisodeRunner,
    *,
    stage: str,
    version: int,
    num_samples: int,
    sampling: Sampling,
    on_row: Callable[[EvaluationRow], None] | None = None,
    on_episode: Callable[[ScoredTrajectory], None] | None = None,
) -> Evaluation:
    """Every question is answered once greedily and `num_samples` times with `sampling`; rows keep the order of the tasks."""

    async def episode(task: Task, member: int, how: Sampling) -> ScoredTrajectory | None:
        scored = await run_persistently(runner, task, member=member, sampling=how)
        if scored is not None and on_episode is not None:
            on_episode(scored)
        return scored

    async def one(task: Task) -> EvaluationRow:
        sampled = [episode(task, 1 + index, sampling) for index in range(num_samples)]
        first, *rest = await together([episode(task, 0, GREEDY), *sampled])
        row = evaluation_row(task, first, [member for member in rest if member is not None])
        if on_row is not None:
            on_row(row)
        return row

    rows = await together(one(task) for task in tasks)
    return Evaluation(stage=stage, version=version, rows=tuple(rows))


def evaluation_row(task: Task, greedy: ScoredTrajectory | None, sampled: Sequence[ScoredTrajectory]) -> EvaluationRow:
    """`greedy` is None when its episode was lost; members that are not valid count nowhere."""
    greedy = greedy if greedy is not None and greedy.reward.valid else None
    valid = [member for member in sampled if member.reward.valid]
    shown = greedy or (valid[0] if valid else None)
    counted = valid or ([greedy] if greedy else [])
    return EvaluationRow(
        task_id=task.id,
        question=SEALED if CANARY in task.metadata else task.question,
        answers=(SEALED,) if CANARY in task.metadata else task.answers,
        type=str(task.metadata.get("type", task.source)),
        hops=num_hops(task.metadata),
        greedy_correct=None if greedy is None else greedy.reward.answer > 0,
        samples_correct=tuple(member.reward.answer > 0 for member in valid),
        answer=shown.trajectory.answer if shown and CANARY not in task.metadata else None,
        stop=str(shown.trajectory.stop) if shown else "failed",
        num_tool_calls=_mean([member.trajectory.num_tool_calls for member in counted]),
        format_ok=_mean([member.reward.format for member in counted]),
    )


async def evaluate_stage(
    config: Config, tasks: Sequence[Task], runner: EpisodeRunner, telemetry: Telemetry, *, stage: str, version: int
) -> Evaluation:
    """Evaluate the weights that the engines serve on `evaluation.num_tasks` of the tasks, and keep the rows in the run directory."""
    settings = config.evaluation
    chosen = tasks[: settings.num_tasks] if settings.num_tasks else tasks
    right = 0

    tally = ToolTally()

    def note(scored: ScoredTrajectory) -> None:
        tally.add(scored)
        if CANARY not in scored.trajectory.task.metadata:  # what is published encrypted stays so
            telemetry.record(scored, decision="evaluated")

    def advance(row: EvaluationRow) -> None:
        nonlocal right
        right += bool(row.greedy_correct)
        progress.advance(greedy=right / (progress.done + 1))

    with telemetry.progress(f"evaluation: {stage}", total=len(chosen)) as progress:
        evaluation = await evaluate(
            chosen,
            runner,
            stage=stage,
            version=version,
            num_samples=settings.num_samples,
            sampling=Sampling(
                temperature=settings.temperature, top_p=settings.top_p, repetition_penalty=settings.repetition_penalty or 1.0
            ),
            on_row=advance,
            on_episode=note,
        )
    write_evaluation(Path(config.run_dir) / "evaluations", evaluation)
    figures = summary(evaluation.rows, k=max(1, settings.num_samples))
    telemetry.log("evaluation", version, {f"evaluation/{name}": value for name, value in figures.items()} | tally.figures())
    return evaluation


async def run_persistently(runner: EpisodeRunner, task: Task, *, member: int, sampling: Sampling) -> ScoredTrajectory | None:
    """One episode, run again where its worker is lost; None where it was lost MAX_LOST times."""
    for attempt in range(MAX_LOST):
        outcome = await runner.run(task, member=member, attempt=attempt, sampling=sampling)
        if not isinstance(outcome, EpisodeLost):
            return outcome
    return None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
