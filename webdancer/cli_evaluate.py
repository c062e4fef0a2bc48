"""The options of `webdancer evaluate`: a model on a benchmark, two evaluations compared, two judges compared.

--model PATH --benchmark NAME --rounds N    the same as overrides of model.path, evaluation.benchmark and evaluation.rounds
--compare DIR DIR                           two RUN_DIR/benchmarks/NAME of the same questions
--judge-agreement DIR                       the verdicts recorded there against those of the configured judge
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from webdancer.config import Config
from webdancer.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="model.path: a directory, a Hugging Face id or builtin:tiny")
    parser.add_argument("--benchmark", metavar="NAME", help="evaluation.benchmark: gaia, webwalkerqa, ..., or a file of questions (JSONL)")
    parser.add_argument("--rounds", type=int, metavar="N", help="evaluation.rounds: attempts at each question of a benchmark")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compare", nargs=2, type=Path, metavar="DIR", help="two evaluations of the same questions (RUN_DIR/benchmarks/NAME)"
    )
    instead.add_argument("--judge-agreement", type=Path, metavar="DIR", help="let the configured judge judge an evaluation's answers again")


def named_overrides(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The named options as overrides, before which `overrides` win. A run gets a name of its own, unless those give it one."""
    named = []
    if options.model:
        named.append(f"model.path={options.model}")
    if options.benchmark and Path(options.benchmark).suffix == ".jsonl":
        named += ["evaluation.benchmark=jsonl", f"evaluation.data={options.benchmark}"]
    elif options.benchmark:
        named.append(f"evaluation.benchmark={options.benchmark}")
    if options.rounds is not None:
        named.append(f"evaluation.rounds={options.rounds}")
    if (options.model or options.benchmark) and not any(one.startswith(("name=", "run_dir=")) for one in overrides):
        named.insert(0, f"name={_run_name(options.model or '', options.benchmark or '')}")
    return [*named, *overrides]


def compare(first: Path, second: Path) -> str:
    """Raises DataError where one of them is no evaluation, or they have no question in common, or the same ids for other questions."""
    from webdancer.evaluation.attempts import read_judged, settings_that_differ
    from webdancer.evaluation.comparison import check_same_questions, compare
    from webdancer.evaluation.round_table import comparison_text

    left, right = read_judged(first), read_judged(second)
    check_same_questions([task for _, task in left], [task for _, task in right])
    text = comparison_text(compare([attempt for attempt, _ in left], [attempt for attempt, _ in right]))
    differ = settings_that_differ(first, second)
    return "\n".join([text, *(["besides the model, they differ in " + "; ".join(differ)] if differ else [])])


def judge_agreement(directory: Path, config: Config) -> str:
    """Raises DataError where there is no evaluation, ServiceError where the judge does not answer."""
    from webdancer.evaluation.attempts import read_judged
    from webdancer.evaluation.round_table import agreement_text
    from webdancer.rewards.judge import build_judge, has_price
    from webdancer.runs.judge_agreement import judge_again
    from webdancer.tools.ledger import Ledger

    judged = read_judged(directory)
    judge_config = replace(config.judge, num_servers=1)
    engine = None
    if judge_config.backend == "vllm":
        from webdancer.cluster.servers import open_engine
        from webdancer.model_location import model_path

        judge_config = replace(judge_config, model=model_path(judge_config.model))
        engine = open_engine(judge_config)
    purse = Ledger(budget_usd=config.tools.budget_usd) if has_price(judge_config) else None
    judge = build_judge(judge_config, engine=engine, purse=purse)
    return agreement_text(asyncio.run(judge_again(judged, judge, start=engine.start if engine else None)))


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    if (options.compare or options.judge_agreement) and (options.model or options.benchmark or options.rounds is not None):
        raise ConfigError("--compare, --judge-agreement: must stand without --model, --benchmark and --rounds, got both")
    if options.rounds is not None and not (options.benchmark or any("evaluation.benchmark=" in one for one in options.overrides)):
        raise ConfigError(f"--rounds: must come with --benchmark, got {options.rounds}")


def _run_name(model: str, benchmark: str) -> str:
    """eval-MODEL-BENCHMARK; runs/NAME/model is called NAME."""
    path = Path(model)
    stem = path.parent.name if path.name == "model" and path.parent.name else path.name
    words = ["eval", stem, Path(benchmark).stem]
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", word).strip("-") for word in words if word)
