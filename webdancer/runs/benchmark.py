"""A benchmark in rounds: every question once a round, by the same episode code and pools as training; goes on where it was stopped.

    RUN_DIR/benchmarks/NAME/iterN.jsonl   a row an episode (evaluation/attempts.py)
    RUN_DIR/benchmarks/NAME/result.json   the figures

Trajectories of an encrypted benchmark are in no other file; those of any other are in trajectories.jsonl as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from webdancer.config import Config
from webdancer.evaluation.attempts import Attempt, RoundFiles, and_paid_before, attempt_of, verdict_of
from webdancer.evaluation.benchmarks import CANARY, OWN
from webdancer.evaluation.round_metrics import RoundFigures, round_figures
from webdancer.interfaces import EpisodeRunner, Judge
from webdancer.model_location import is_reasoning_model
from webdancer.rewards.judge import unpaid
from webdancer.runs.evaluate import run_persistently
from webdancer.runs.together import together
from webdancer.telemetry import Telemetry
from webdancer.tools.ledger import out_of_money
from webdancer.types import Sampling, Task
from webdancer.whole_file import write_whole

REASONING_PENALTY = 1.1
"""Repetition penalty of the paper (App. E.3) for models that think before they speak; 1.0 for others."""


async def run_benchmark(config: Config, tasks: Sequence[Task], runner: EpisodeRunner, judge: Judge, telemetry: Telemetry) -> RoundFigures:
    """`evaluation.rounds` attempts at each of `evaluation.num_tasks` questions, less those that an earlier start has made."""
    settings = config.evaluation
    chosen = _chosen(config, tasks)
    sampling = paper_sampling(config)
    directory = benchmark_directory(config)
    files = RoundFiles(directory, chosen, rounds=settings.rounds, settings=_settings(config, sampling), prompt=config.prompt)
    right = decided = 0

    async def attempt(task: Task, round: int) -> Attempt:
        nonlocal right, decided
        made = files.found(task, round)
        if made is not None and made.needs_judge_only and made.answer is not None:
            verdict = await judge.grade(task, made.answer)
            if unpaid(verdict):
                raise out_of_money()
            made = verdict_of(made, verdict)
            files.write_again(made)
        elif made is None or made.status == "unknown":
            scored = await run_persistently(runner, task, member=round - 1, sampling=sampling)
            made = and_paid_before(attempt_of(task, round, scored), made)
            files.write(made, scored)
            if scored is not None and CANARY not in task.metadata:
                telemetry.record(scored, decision="evaluated")
        decided += made.status != "unknown"
        right += made.status == "correct"
        progress.advance(accuracy=right / decided if decided else None)
        return made

    with (
        closing(files),
        telemetry.progress(f"{name_of(config)}: {settings.rounds} rounds", total=len(chosen) * settings.rounds) as progress,
    ):
        attempts = await together(attempt(task, round) for round in range(1, settings.rounds + 1) for task in chosen)
    figures = round_figures(attempts, rounds=settings.rounds, gold={task.id: task.answers for task in chosen})
    report = {
        "benchmark": name_of(config),
        "model": config.model.path,
        "settings": _settings(config, sampling),
        "figures": figures.as_dict(),
    }
    write_whole(directory / "result.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    telemetry.log("evaluation", 0, _scalars(f"benchmark/{name_of(config)}", figures))
    return figures


def is_finished(config: Config, tasks: Sequence[Task]) -> bool:
    """Whether what is there is of these questions, rounds and settings, and has every verdict."""
    path = benchmark_directory(config) / "result.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    figures, settings = found["figures"], _settings(config, paper_sampling(config))
    whole = figures["k"] == config.evaluation.rounds and figures["accuracy"]["num_questions"] == len(_chosen(config, tasks))
    return bool(whole and figures["unknown"] == 0 and found["settings"] == settings)


def _chosen(config: Config, tasks: Sequence[Task]) -> Sequence[Task]:
    return tasks[: config.evaluation.num_tasks] if config.evaluation.num_tasks else tasks


def paper_sampling(config: Config) -> Sampling:
    """Temperature 0.6 and top_p 0.95 by default, and the repetition penalty that the paper has for this kind of model."""
    settings = config.evaluation
    penalty = settings.repetition_penalty or (REASONING_PENALTY if is_reasoning_model(config.model.path) else 1.0)
    return Sampling(temperature=settings.temperature, top_p=settings.top_p, repetition_penalty=penalty)


def name_of(config: Config) -> str:
    settings = config.evaluation
    return Path(settings.data).stem if settings.benchmark == OWN else settings.benchmark


def benchmark_directory(config: Config) -> Path:
    return Path(config.run_dir) / "benchmarks" / name_of(config)


def _settings(config: Config, sampling: Sampling) -> dict[str, Any]:
    """What must be the same in all rounds that are counted together."""
    return {
        "model": config.model.path,
        "method": config.evaluation.method,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "judge": config.judge.model if config.judge.backend != "match" else "match",
        "judge_prompt": config.judge.prompt,
    }


def _scalars(prefix: str, figures: RoundFigures) -> dict[str, float]:
    accuracy = figures.accuracy
    named = {
        "avg": accuracy.avg,
        "best": accuracy.best,
        f"pass@{figures.k}": accuracy.pass_at_k.mean,
        f"cons@{figures.k}": accuracy.cons_at_k.mean,
        f"majority@{figures.k}": accuracy.majority_at_k.mean,
        "no_answer": figures.no_answer,
        "unknown": figures.unknown,
        "tool_calls": figures.calls,
        "usd": figures.usd,
        "judge_tokens": figures.judge_tokens,
        "judge_usd": figures.judge_usd,
    }
    return {f"{prefix}/{name}": value for name, value in named.items() if not math.isnan(value)}
