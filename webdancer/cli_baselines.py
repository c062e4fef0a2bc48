"""`webdancer baselines`: one benchmark, the rows that a paper's table has, one `webdancer evaluate` each.

    no tools, RAG, vanilla ReAct    --base (model.path where it is left out), asked by evaluation.method direct, rag and react
    SFT only, RL only, SFT + RL     --sft, --rl, --sft-rl, asked as agents; a row without a model is left out

Each row is a process and a run directory of its own, RUN_DIR/ROW; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from webdancer.config import Config
from webdancer.errors import ConfigError

if TYPE_CHECKING:
    from webdancer.evaluation.attempts import Attempt

Evaluate = Callable[[Sequence[str]], int]
"""Runs `webdancer evaluate` with these arguments; its exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    key: str
    title: str
    model: str
    method: str = "react"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(model=None)  # of cli_evaluate.named_overrides, which names the benchmark for both commands
    parser.add_argument("--benchmark", metavar="NAME", help="evaluation.benchmark: gaia, webwalkerqa, ..., or a file of questions (JSONL)")
    parser.add_argument("--rounds", type=int, metavar="N", help="evaluation.rounds: attempts at each question")
    parser.add_argument("--base", metavar="PATH", help="the model before any training (default: model.path)")
    parser.add_argument("--sft", metavar="PATH", help="after SFT only")
    parser.add_argument("--rl", metavar="PATH", help="after RL only")
    parser.add_argument("--sft-rl", metavar="PATH", help="after SFT and RL")


def rows_of(options: argparse.Namespace, config: Config) -> list[Row]:
    base = options.base or config.model.path
    rows = [
        Row(key="no_tools", title="no tools", model=base, method="direct"),
        Row(key="rag", title="RAG", model=base, method="rag"),
        Row(key="react", title="vanilla ReAct", model=base),
    ]
    trained = (("sft_only", "SFT only", options.sft), ("rl_only", "RL only", options.rl), ("sft_rl", "SFT + RL", options.sft_rl))
    return rows + [Row(key=key, title=title, model=model) for key, title, model in trained if model]


def run(options: argparse.Namespace, config: Config, *, evaluate: Evaluate | None = None) -> int:
    """Every row that is not whole yet, then the table; the exit code of the first row that failed, as one is whose run directory holds
    another model's results."""
    if not config.evaluation.benchmark:
        raise ConfigError("evaluation.benchmark: must name a benchmark or a file (JSONL) to compare on, as with --benchmark, got ''")
    from webdancer.evaluation.benchmarks import load_benchmark
    from webdancer.runs.benchmark import is_finished

    rows = rows_of(options, config)
    tasks = load_benchmark(config.evaluation.benchmark, config.evaluation.data)
    for row in rows:
        if is_finished(_config_of(row, config), tasks):
            continue
        print(f"{row.title}: {row.model}", flush=True)
        if code := (evaluate or _evaluate)(_arguments(row, options, config)):
            return code
    print(table(rows, config))
    return 0


def table(rows: Sequence[Row], config: Config) -> str:
    """Accuracy of each row, and its difference to vanilla ReAct on the same questions."""
    from webdancer.evaluation.attempts import read_attempts
    from webdancer.evaluation.comparison import compare
    from webdancer.evaluation.round_metrics import round_figures

    rounds = config.evaluation.rounds
    attempts: dict[str, Sequence[Attempt]] = {
        row.key: [one for one in read_attempts(_results(row, config)) if one.round <= rounds] for row in rows
    }
    head = f"{'':14} {'Avg':>6} {f'Pass@{rounds}':>7} {'no answer':>10} {'tool calls':>11}   against vanilla ReAct, in points"
    lines = [head, "-" * len(head)]
    for row in rows:
        figures = round_figures(attempts[row.key], rounds=rounds)
        accuracy = figures.accuracy
        line = f"{row.title:14} {_percent(accuracy.avg):>6} {_percent(accuracy.pass_at_k.mean):>7} "
        line += f"{_percent(figures.no_answer):>10} {figures.calls:>11.1f}   "
        if row.key != "react":
            found = compare(attempts["react"], attempts[row.key])
            gain = found.difference
            line += f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}], {_p(found.p_value)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _arguments(row: Row, options: argparse.Namespace, config: Config) -> list[str]:
    files = [word for path in options.config for word in ("--config", str(path))]
    where = [f"name={config.name}-{row.key}", f"run_dir={_run_dir(row, config)}"]
    own = [*where, f"model.path={row.model}", f"evaluation.method={row.method}"]
    return [*files, *options.overrides, *own]


def _evaluate(arguments: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "webdancer.cli", "evaluate", *arguments], check=False).returncode


def _config_of(row: Row, config: Config) -> Config:
    evaluation = replace(config.evaluation, method=row.method)
    return replace(config, run_dir=str(_run_dir(row, config)), model=replace(config.model, path=row.model), evaluation=evaluation)


def _run_dir(row: Row, config: Config) -> Path:
    return Path(config.run_dir) / row.key


def _results(row: Row, config: Config) -> Path:
    from webdancer.runs.benchmark import name_of

    return _run_dir(row, config) / "benchmarks" / name_of(config)


def _p(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
