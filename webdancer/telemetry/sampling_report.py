"""One page of what a teacher's sampling made: the funnel, the questions and their states, lengths and actions, ten trajectories.

Made from the files of the `sampling` folder alone (runs/sample.py); like the run's report it loads nothing and runs nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from webdancer.agent.actions import parse_action
from webdancer.agent.prompt import observation_of, question_of
from webdancer.errors import DataError
from webdancer.telemetry.data_report import Thinned, bars, bins, cost_tiles, figures, funnel, headline, kind_of, kind_table, section
from webdancer.telemetry.funnel_chart import Level
from webdancer.telemetry.jsonl import read_jsonl
from webdancer.telemetry.report import page
from webdancer.telemetry.report_trajectory import trajectory_article
from webdancer.types import FinalAnswer
from webdancer.whole_file import write_whole

FILE_NAME = "report.html"
NUM_SHOWN, MAX_REJECTED = 10, 4
"""Trajectories shown: demonstrations from all over the file, and the first that was rejected for each of some reasons."""

_AFTER = {"": "Attempts", "outage": "Not interrupted", "validity": "Valid", "correctness": "Correct", "quality": "Good"}
"""What is left after each stage."""
_KEPT_FROM = {"all": "outage", "valid": "validity", "correct": "correctness", "quality": "quality"}
_STATE_NAMES = {
    "demonstrated": "demonstrated",
    "unsolved": "not solved",
    "undecided": "undecided",
    "not_needed": "not needed",
    "reserved": "reserved",
}


@dataclass(slots=True)
class _Seen:
    """What one pass over the attempts keeps: figures of all, texts of ten."""

    policy_tokens: Counter[int] = field(default_factory=Counter)
    num_actions: Counter[int] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    kept: Thinned[Mapping[str, Any]] = field(default_factory=lambda: Thinned(NUM_SHOWN))
    rejected: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def write_sampling_report(folder: Path) -> Path:
    """Write report.html into the folder, whole or not at all. Raises DataError where the folder holds no finished sampling."""
    path = folder / FILE_NAME
    write_whole(path, render_sampling_report(folder).encode("utf-8", "replace"))
    return path.resolve()


def render_sampling_report(folder: Path) -> str:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: must hold the manifest of a finished sampling, got: {error}") from error
    questions = list(read_jsonl(folder / "questions.jsonl"))
    shown = {id for question in questions for id in question["demonstrations"]}
    seen = _look(read_jsonl(folder / "attempts.jsonl"), shown)
    sections = (
        _headline(manifest, len(questions)),
        _funnel(manifest),
        _questions(questions),
        _demonstrations(seen),
        _samples(seen),
    )
    source = "the files of the sampling folder: attempts.jsonl, questions.jsonl, manifest.json"
    return page("WebDancer: sampling", "".join(sections), source)


def _look(rows: Iterable[Mapping[str, Any]], shown: set[str]) -> _Seen:
    seen = _Seen()
    for row in rows:
        told = row["sampling"]
        if row["id"] not in shown:
            seen.rejected.setdefault(told["reason"] or "surplus", row)
            continue
        seen.policy_tokens[told["num_policy_tokens"]] += 1
        seen.num_actions[told["num_actions"]] += 1
        seen.tools.update(told["actions"])
        seen.kept.add(row)
    return seen


def _headline(manifest: Mapping[str, Any], num_questions: int) -> str:
    sample = manifest["config"]["sample"]
    names = {"scripted": "The scripted expert", "openai": sample["llm"]["model"], "engine": manifest["config"]["model"]}
    attempts = sum(sum(reasons.values()) for reasons in manifest["attempts"].values())
    states = manifest["questions"]
    tiles = [
        (f"{num_questions:,}", "questions"),
        (f"{attempts:,}", "attempts"),
        (f"{manifest['demonstrations']:,}", "demonstrations"),
        (f"{num_questions - states['demonstrated']:,}", "questions for RL"),
    ]
    tiles += cost_tiles(manifest["cost"])
    lead = (
        f"{escape(names[sample['backend']])} tried each question {_times(sample['attempts'])}; what came through the funnel as far as "
        f"<strong>{escape(sample['keep'])}</strong> is a demonstration, every other question is for RL."
    )
    return headline("Sampling", lead, tiles)


def _times(attempts: int) -> str:
    return "once" if attempts == 1 else f"up to {attempts} times"


def _funnel(manifest: Mapping[str, Any]) -> str:
    ended: Mapping[str, Mapping[str, int]] = manifest["attempts"]
    stages = [stage for stage in _AFTER if stage != "outage" or stage in ended]
    kept = _KEPT_FROM[manifest["config"]["sample"]["keep"]]
    green = stages.index(kept) if kept in stages else 0
    count = sum(sum(reasons.values()) for reasons in ended.values())
    levels = []
    for index, stage in enumerate(stages):
        lost = ended.get(stages[index + 1], {}) if index + 1 < len(stages) else {}
        told = [(reason.replace("_", " "), number) for reason, number in sorted(lost.items(), key=lambda item: -item[1])]
        levels.append(Level(label=_AFTER[stage], count=count, lost=told, tone="tone-3" if index >= green else "tone-1"))
        count -= sum(lost.values())
    note = "Green: far enough to be a demonstration. A question is done with its first ones, so there may be fewer."
    return section("The funnel", funnel(levels, note))


def _questions(questions: Sequence[Mapping[str, Any]]) -> str:
    return section("Questions", kind_table(Counter((kind_of(question), question["state"]) for question in questions), _STATE_NAMES))


def _demonstrations(seen: _Seen) -> str:
    actions = [(f"{number} actions", count) for number, count in sorted(seen.num_actions.items())]
    shown = figures(
        [
            ("Actions", "tool calls and the answer, a demonstration", bars(actions)),
            ("Length", "tokens that are trained on, a demonstration", bars(bins(seen.policy_tokens), "tone-3")),
            ("Tool calls", "in all demonstrations", bars(seen.tools.most_common(), "tone-2")),
        ]
    )
    return section("Demonstrations", shown) if shown else ""


def _samples(seen: _Seen) -> str:
    rejected = list(seen.rejected.items())[:MAX_REJECTED]
    parts = [trajectory_article(_as_recorded(row), "Demonstration") for row in seen.kept.pick(NUM_SHOWN - len(rejected))]
    for reason, row in rejected:
        detail = row["sampling"]["detail"]
        title = f"Not kept, {reason.replace('_', ' ')}" + (f" ({detail[:80]})" if detail else "")
        parts.append(trajectory_article(_as_recorded(row), title))
    legend = (
        '<p class="legend"><span class="think">thought</span><span class="call">tool call</span>'
        '<span class="observation">observation (never trained on)</span><span class="answer">answer</span></p>'
    )
    return section(f"{len(parts)} trajectories", legend + "".join(parts)) if parts else ""


def _as_recorded(row: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt's row as the recorder would have written it, as far as it is shown."""
    told, messages = row["sampling"], row["messages"][2:]
    turns = []
    for index in range(0, len(messages), 2):
        turn = {"text": messages[index]["content"]}
        if index + 1 < len(messages):
            turn["observation"] = observation_of(messages[index + 1]["content"])
        turns.append(turn)
    right = float(told["verdict"] == "correct")
    form = float(told["stage"] not in ("outage", "validity"))
    is_answered = bool(messages) and isinstance(parse_action(messages[-1]["content"]), FinalAnswer)
    return {
        "task": {"question": question_of(row["messages"][1]["content"]), "answers": row["answer"][0]},
        "reward": {"total": 0.1 * form + 0.9 * right, "format": form, "answer": right},
        "answer": told["answer"],
        "num_tool_calls": told["num_actions"] - is_answered,
        "stop": told["stop"],
        "versions": None,
        "turns": turns,
    }
