"""What a run left in its directory, gathered for the report: nothing is computed that the files do not say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdancer.errors import ConfigError, DataError
from webdancer.evaluation.metrics import Estimate, EvaluationRow, by, greedy, sampled_pass_at_1, with_wilson
from webdancer.evaluation.results import Evaluation, read_evaluation
from webdancer.telemetry.jsonl import read_jsonl
from webdancer.telemetry.recorder import read_trajectories
from webdancer.telemetry.telemetry import PHASES_FILE, read_metrics

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """Seconds over all starts of the program."""

    name: str
    seconds: float
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    name: str
    model: str
    rl_steps: dict[int, dict[str, float]]
    sft_steps: dict[int, dict[str, float]]
    evaluations: tuple[Evaluation, ...]
    """In the order base, sft, rl by step, others."""
    phases: tuple[PhaseTime, ...]
    solved: dict[str, Any] | None
    failed: dict[str, Any] | None
    num_trajectories: int
    decisions: dict[str, int]
    """Recorded trajectories by what became of their group."""
    usd: float = 0.0
    """What tools and judge cost, as far as steps and evaluations have told."""
    undecided: tuple[str, ...] = ()
    """Stages of whose evaluation no episode has a verdict; they are in no figure."""

    def curve(self, *names: str, phase: str = "rl") -> Points:
        """(step, value) of the first of these metrics that the phase has."""
        steps = self.rl_steps if phase == "rl" else self.sft_steps
        for name in names:
            points = [(float(step), metrics[name]) for step, metrics in steps.items() if name in metrics]
            if points:
                return points
        return []


def gather(run_dir: Path) -> RunData:
    """Raises DataError when there is no run, or a file of it is broken."""
    if not run_dir.is_dir():
        raise DataError(f"run directory: must exist, got {str(run_dir)!r}")
    metrics = read_metrics(run_dir)
    evaluations = sorted(_evaluations(run_dir), key=lambda evaluation: stage_order(evaluation.stage))
    name, model = _name_and_model(run_dir)
    chosen = _Examples()
    for row in read_trajectories(run_dir):
        chosen.look_at(row)
    return RunData(
        name=name,
        model=model,
        rl_steps=metrics.get("rl", {}),
        sft_steps=metrics.get("sft", {}),
        evaluations=tuple(one for one in evaluations if accuracy(one.rows).num_tasks),
        undecided=tuple(one.stage for one in evaluations if not accuracy(one.rows).num_tasks),
        phases=tuple(_phases(read_jsonl(run_dir / PHASES_FILE))),
        solved=chosen.solved,
        failed=chosen.failed,
        num_trajectories=chosen.count,
        decisions=chosen.decisions,
        usd=sum(figures.get(name, 0.0) for steps in metrics.values() for figures in steps.values() for name in ("tools/usd", "judge/usd")),
    )


def stage_order(stage: str) -> tuple[int, float, str]:
    kind, _, step = stage.partition("-")
    return {"base": 0, "sft": 1, "rl": 2}.get(kind, 3), float(step) if step.isdigit() else math.inf, stage


def stage_title(stage: str) -> str:
    kind, _, step = stage.partition("-")
    if stage == "rl-0":
        return "Before RL"
    if kind == "rl" and step.isdigit():
        return f"RL, step {step}"
    return {"base": "Base model", "sft": "After SFT", "rl": "After RL"}.get(stage, stage)


def accuracy(rows: Sequence[EvaluationRow]) -> Estimate:
    """Sampled pass@1, or greedy where nothing was sampled, with a 95 % interval."""
    estimate = sampled_pass_at_1(rows)
    return estimate if estimate.num_tasks else greedy_accuracy(rows)


def greedy_accuracy(rows: Sequence[EvaluationRow]) -> Estimate:
    return with_wilson(greedy(rows))


def has_samples(evaluations: Iterable[Evaluation]) -> bool:
    return any(row.samples_correct for evaluation in evaluations for row in evaluation.rows)


def kinds(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[list[EvaluationRow]]]]:
    """(label, the rows of each evaluation) by type and hops of the question."""
    split = [dict(by(evaluation.rows, kind_label)) for evaluation in evaluations]
    labels = sorted({label for rows in split for label in rows}, key=lambda label: (not label[:1].isdigit(), label))
    return [(label, [rows.get(label, []) for rows in split]) for label in labels]


def kind_label(row: EvaluationRow) -> str:
    """`2 hops` for chains of facts, the type's own name for the others."""
    if row.type.lower() in ("count", "intersection") or row.hops < 1:
        return row.type.upper() or "other"
    return f"{row.hops} hop{'s' if row.hops > 1 else ''}"


class _Examples:
    """The last solved trajectory of the last phase with as many tool calls as possible, and the last failed one that answered."""

    def __init__(self) -> None:
        self.solved: dict[str, Any] | None = None
        self.failed: dict[str, Any] | None = None
        self.count = 0
        self.decisions: dict[str, int] = {}

    def look_at(self, row: dict[str, Any]) -> None:
        self.count += 1
        self.decisions[row["decision"]] = self.decisions.get(row["decision"], 0) + 1
        if not row["reward"]["valid"]:
            return
        if row["reward"]["answer"] > 0:
            if row["reward"]["format"] > 0 and (self.solved is None or _worth(row) >= _worth(self.solved)):
                self.solved = row
        elif self.failed is None or _worth(row) >= _worth(self.failed):
            self.failed = row


def _worth(row: dict[str, Any]) -> tuple[int, bool, int]:
    """Late, finished and of a length that can be read come first."""
    versions = row["versions"] or [0, 0]
    return versions[1], row["answer"] is not None, min(row["num_tool_calls"], 5)


def _evaluations(run_dir: Path) -> list[Evaluation]:
    return [read_evaluation(path) for path in sorted((run_dir / "evaluations").glob("*.json"))]


def _phases(rows: Iterable[dict[str, Any]]) -> list[PhaseTime]:
    found: dict[str, PhaseTime] = {}
    for row in rows:
        before = found.get(row["phase"])
        seconds = row["seconds"] + (before.seconds if before else 0.0)
        found[row["phase"]] = PhaseTime(name=row["phase"], seconds=seconds, finished=bool(row["finished"]))
    return list(found.values())


def _name_and_model(run_dir: Path) -> tuple[str, str]:
    from webdancer.config import load
    from webdancer.run_directory import CONFIG_FILE

    try:
        config = load([run_dir / CONFIG_FILE])
    except ConfigError:  # a report of bare files is still a report
        return run_dir.name, ""
    return config.name, config.model.path
