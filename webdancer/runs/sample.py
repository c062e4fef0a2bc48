"""Rejection sampling: a teacher answers each question up to N times over the real tools; what the funnel lets through is kept.

Nothing is thrown away: every attempt has the stage and the reason at which it ended, every question a state, and what is no demonstration
is RL's. A killed job goes on where it was, and ends with the very same files:

    sampling/attempts.jsonl     every attempt, in the released layout and with what became of it (synthesis/attempts.py)
    sampling/questions.jsonl    every question's state
    demonstrations.jsonl        for SFT, in the released layout
    questions/rl_pool.jsonl     the reserved RL questions, and those without a demonstration (paper section 3)
    sampling/manifest.json      configuration, counts, reasons, hashes, cost
    sampling/report.html
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from webdancer.agent.episode import EPISODE_ERRORS
from webdancer.config import Config
from webdancer.rewards.reward import outage
from webdancer.rollout.group import member_sampling, sample_member
from webdancer.runs.teacher import Teacher
from webdancer.runs.together import together
from webdancer.synthesis.attempts import AttemptLog, Record, settle
from webdancer.synthesis.funnel import KNOWN_TOOLS, Outcome, attempt_of, sift
from webdancer.synthesis.manifest import cost
from webdancer.synthesis.sampling_files import SampleFiles, counts, told, write_files
from webdancer.telemetry import Telemetry
from webdancer.telemetry.sampling_report import write_sampling_report
from webdancer.tools.result import INFRASTRUCTURE_ERRORS
from webdancer.types import Sampling, ScoredTrajectory, Task

OnEpisode = Callable[[ScoredTrajectory, str], None]


async def make_demonstrations(
    config: Config, tasks: Sequence[Task], reserved: Sequence[Task], teacher: Teacher, telemetry: Telemetry
) -> str:
    """Try all `tasks` and write all files; `reserved` are RL's from the start. Returns what to say of it."""
    files = SampleFiles(run_dir=Path(config.run_dir))
    with closing(AttemptLog(files.attempts, keep=config.sample.keep)) as log:
        known = sum(_is_done(log.of(task), config) for task in tasks)
        with telemetry.progress("teacher", total=len(tasks), start=known) as progress:
            await try_all(
                config,
                tasks,
                teacher,
                log,
                on_question=lambda accepted: progress.advance(accepted=accepted, usd=_spent(teacher)),
                on_episode=telemetry.record,
            )
        questions = settle(tasks, reserved, log, config.sample)
        write_files(config, files, questions, log, cost=cost(teacher.usage(), await teacher.spent()))
    write_sampling_report(files.folder)
    telemetry.log("sample", 0, {f"sample/{name}": float(value) for name, value in counts(questions).items()})
    return told(questions)


async def try_all(
    config: Config,
    tasks: Sequence[Task],
    teacher: Teacher,
    log: AttemptLog,
    *,
    on_question: Callable[[int], None] | None = None,
    on_episode: OnEpisode | None = None,
) -> None:
    """Attempts at all questions, or until enough are demonstrations; those that the log has are not made again.

    Questions start in their order, so which of them have attempts before the last demonstration does not depend on how long episodes
    take. `on_question` hears of each question that is done how many demonstrations there are, `on_episode` of every new attempt.
    """
    limit = asyncio.Semaphore(config.sample.concurrent_questions)
    wanted = config.sample.max_demonstrations or float("inf")
    num_accepted = 0

    async def one(task: Task) -> None:
        nonlocal num_accepted
        async with limit:
            if num_accepted >= wanted:
                return
            is_new = not _is_done(log.of(task), config)
            if is_new:
                await _try(config, task, teacher, log, on_episode)
            num_accepted += _num_accepted(log.of(task), config)
        if is_new and on_question is not None:
            on_question(num_accepted)

    await together(one(task) for task in tasks)


async def _try(config: Config, task: Task, teacher: Teacher, log: AttemptLog, on_episode: OnEpisode | None) -> None:
    known = {record.attempt for record in log.of(task)}
    for attempt in range(config.sample.attempts):
        if _is_done(log.of(task), config):
            return
        if attempt in known:
            continue
        sampling = Sampling(temperature=config.sample.temperature, seed=config.seed)
        scored = await sample_member(
            task,
            teacher.runner,
            member=attempt,
            attempt=attempt,
            sampling=member_sampling(sampling, task, attempt=attempt, member=attempt),
            max_lost=config.rollout.max_lost,
            on_turn=None,
        )
        outcome = await _judged(config, scored, teacher)
        log.add(scored, outcome, attempt=attempt, prompt=config.prompt)
        if on_episode is not None:
            on_episode(scored, "accepted" if outcome.is_kept(config.sample.keep) else outcome.reason)


async def _judged(config: Config, scored: ScoredTrajectory, teacher: Teacher) -> Outcome:
    """Through the whole funnel, the model's check last, as it alone costs something."""
    tools = KNOWN_TOOLS | {schema["name"] for schema in json.loads(f"[{config.prompt.more_tools}]")}
    broken = outage(scored.trajectory, EPISODE_ERRORS | INFRASTRUCTURE_ERRORS)
    attempt = attempt_of(scored)
    outcome = sift(attempt, scored.verdict, config.sample.quality, outage=broken, tools=tools)
    if outcome.stage != "passed" or teacher.checker is None:
        return outcome
    decision = await teacher.checker.check(attempt)
    return outcome if decision.keep else Outcome(stage="quality", reason=decision.reason, detail=decision.detail)


def _is_done(records: Sequence[Record], config: Config) -> bool:
    sample = config.sample
    return len(records) >= sample.attempts or _num_accepted(records, config) >= sample.accepted_per_question


def _num_accepted(records: Sequence[Record], config: Config) -> int:
    return sum(record.outcome.is_kept(config.sample.keep) for record in records)


def _spent(teacher: Teacher) -> float | None:
    """None where nobody sends a bill."""
    usages = teacher.usage().values()
    return sum(float(usage["usd"]) for usage in usages) if usages else None
