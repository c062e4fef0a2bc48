"""Does the funnel help? SFT on all, valid, correct and fully filtered trajectories of a noisy teacher: as the paper's Figure 3 asks.

    python -m benchmarks.funnel --out benchmarks/baselines/funnel.json           four arms, three seeds; stop it at will
    python -m benchmarks.funnel --seeds 0 --arms all quality --tasks 100         some cells

Once a seed, the teacher (`webdancer sample` with every fault of the scripted expert, malformed turns included) makes all its attempts. An
arm takes those that came as far through the funnel as it asks, in one random order, until they hold the same number of trained tokens; then
`webdancer sft` from the base model and `webdancer evaluate` on held-out questions of 1 to 3 hops. A finished cell is an entry of --out, and
is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from webdancer.data.demonstrations import write_demonstrations
from webdancer.data.jsonl import write_rows
from webdancer.evaluation.metrics import Estimate, estimate, mean_of
from webdancer.evaluation.results import read_evaluation
from webdancer.synthesis.funnel import NEEDED, STAGES
from webdancer.telemetry.jsonl import read_jsonl
from webdancer.whole_file import write_whole

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "ray_configs" / "quickstart.yaml"
ARMS = tuple(NEEDED)
MALFORM = 0.1
"""The chance of a turn out of form; the expert's other faults are the quickstart's."""
ATTEMPTS = 3


def main() -> int:
    arguments = _arguments()
    results = _read(arguments.out)
    for seed in arguments.seeds:
        teacher = make_attempts(arguments.runs / f"teacher-{seed}", seed)
        budget = min(arguments.tokens, *(sum(map(_tokens, _rows(teacher, arm))) for arm in ARMS))
        for arm in arguments.arms:
            if f"{arm}-{seed}" not in results:
                cell = run_cell(arguments.runs / f"{arm}-{seed}", teacher, arm, seed, budget=budget, num_tasks=arguments.tasks)
                results = {**_read(arguments.out), f"{arm}-{seed}": cell}
                write_whole(arguments.out, (json.dumps(results, indent=1) + "\n").encode())
    print(render(results))
    return 0


def make_attempts(run_dir: Path, seed: int) -> Path:
    """The run directory of the teacher's attempts at the quickstart's own questions, all of them."""
    keep = ["sample.keep=all", f"sample.attempts={ATTEMPTS}", f"sample.accepted_per_question={ATTEMPTS}", "sample.max_demonstrations=0"]
    keep += [f"sample.teacher.malform={MALFORM}"]
    if not (run_dir / "questions" / "heldout.jsonl").exists():
        _command("synthesize", run_dir, seed, keep)
    if not (run_dir / "sampling" / "manifest.json").exists():
        _command("sample", run_dir, seed, keep)
    return run_dir


def run_cell(run_dir: Path, teacher: Path, arm: str, seed: int, *, budget: int, num_tasks: int) -> dict[str, Any]:
    chosen = choose(_rows(teacher, arm), budget, seed=seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    data = run_dir / "demonstrations.jsonl"
    write_demonstrations(data, ({name: value for name, value in row.items() if name != "sampling"} for row in chosen))
    if not (run_dir / "sft" / "model").exists():
        _command("sft", run_dir / "sft", seed, [f"sft.data={data}", "sft.strict=false"])
    questions = run_dir / "questions.jsonl"
    heldout = [row for row in read_jsonl(teacher / "questions" / "heldout.jsonl") if row["metadata"].get("type") == "hop"]
    write_rows(questions, heldout[:num_tasks])
    evaluated = run_dir / "evaluate" / "evaluations" / "evaluation.json"
    if not evaluated.exists():
        settings = [f"model.path={run_dir / 'sft' / 'model'}", f"evaluation.data={questions}", "evaluation.num_tasks=0"]
        settings += ["evaluation.num_samples=4", "evaluation.temperature=1.0", "evaluation.top_p=1.0"]
        _command("evaluate", run_dir / "evaluate", seed, settings)
    rows = [row for row in read_evaluation(evaluated).rows if row.samples_correct and row.greedy_correct is not None]
    return {
        "arm": arm,
        "seed": seed,
        "demonstrations": len(chosen),
        "tokens": sum(map(_tokens, chosen)),
        "share_right": sum(row["sampling"]["verdict"] == "correct" for row in chosen) / len(chosen),
        "pass_at_1": {row.task_id: sum(row.samples_correct) / len(row.samples_correct) for row in rows},
        "greedy": {row.task_id: float(bool(row.greedy_correct)) for row in rows},
        "well_formed": mean_of(row.format_ok for row in rows),
    }


def choose(rows: Sequence[Mapping[str, Any]], budget: int, *, seed: int) -> list[Mapping[str, Any]]:
    """In a random order that is the same for every arm, as many as do not go beyond the budget of trained tokens."""
    order = sorted(rows, key=lambda row: random.Random(f"{seed}/{row['id']}").random())
    chosen: list[Mapping[str, Any]] = []
    for row in order:
        budget -= _tokens(row)
        if budget < 0:
            break
        chosen.append(row)
    return chosen


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    head = f"{'arm':9} {'seeds':>5} {'shown':>6} {'tokens':>8} {'right':>6} {'formed':>7}  {'pass@1 (T=1)':22} {'greedy':22} minus all"
    lines = [head, "-" * len(head)]
    for arm in ARMS:
        cells = [cell for cell in results.values() if cell["arm"] == arm]
        if not cells:
            continue
        mean = {name: sum(cell[name] for cell in cells) / len(cells) for name in ("demonstrations", "tokens", "share_right", "well_formed")}
        sampled, greedy = (estimate([value for cell in cells for value in cell[name].values()]) for name in ("pass_at_1", "greedy"))
        gain = _gain(cells, results)
        shown = f"{_interval(gain, '+')}" if gain.num_tasks and arm != "all" else ""
        data = f"{mean['demonstrations']:6.0f} {mean['tokens']:8.0f} {mean['share_right']:6.2f} {mean['well_formed']:7.2f}"
        lines.append(f"{arm:9} {len(cells):5} {data}  {_interval(sampled):22} {_interval(greedy):22} {shown}")
    means = {arm: _mean([cell for cell in results.values() if cell["arm"] == arm]) for arm in ("all", "quality")}
    if means["all"] and means["quality"]:
        lines.append(f"ratio of pass@1, fully filtered over all: {means['quality'] / means['all']:.2f}")
    return "\n".join(lines)


def _gain(cells: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]) -> Estimate:
    """Pass@1 minus that of `all`, paired by question and seed."""
    differences: list[float] = []
    for cell in cells:
        other = results.get(f"all-{cell['seed']}", {"pass_at_1": {}})["pass_at_1"]
        differences += [value - other[name] for name, value in cell["pass_at_1"].items() if name in other]
    return estimate(differences)


def _mean(cells: Sequence[Mapping[str, Any]]) -> float:
    values = [value for cell in cells for value in cell["pass_at_1"].values()]
    return sum(values) / len(values) if values else 0.0


def _interval(value: Estimate, sign: str = "") -> str:
    mean, low, high = (format(number, f"{sign}.3f") for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _rows(teacher: Path, arm: str) -> list[dict[str, Any]]:
    rows = read_jsonl(teacher / "sampling" / "attempts.jsonl")
    return [row for row in rows if STAGES.index(row["sampling"]["stage"]) >= STAGES.index(NEEDED[arm])]


def _tokens(row: Mapping[str, Any]) -> int:
    return int(row["sampling"]["num_policy_tokens"])


def _command(program: str, run_dir: Path, seed: int, settings: Sequence[str]) -> None:
    log = run_dir.parent / f"{run_dir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    common = ["--config", str(CONFIG), f"run_dir={run_dir}", f"seed={seed}", "telemetry.wandb_mode=disabled"]
    with log.open("a") as out:
        command = [sys.executable, "-m", "webdancer.cli", program, *common, *settings]
        code = subprocess.run(command, stdout=out, stderr=out, cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(f"{run_dir}: {program} ended with code {code}; see {log}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=60_000, help="trained tokens of every arm, at most what the smallest has")
    parser.add_argument("--tasks", type=int, default=200, help="held-out questions")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "funnel", help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "funnel.json", help="what was measured")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
