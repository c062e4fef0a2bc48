"""The paper's findings in miniature: real runs of the real commands on the offline encyclopedia with the tiny model.

    python -m benchmarks.findings                                   everything: half a day on 4 cores; stopped, it goes on where it was
    python -m benchmarks.findings --claims sft rl --seeds 0          some claims, some seeds
    python -m benchmarks.findings --render                           only docs/findings.md and its plots, of what was measured

Settings are those of ray_configs/quickstart.yaml. A seed has one warm start (`warm-SEED`), from which its RL cells take their 13 steps; a
cell is one `webdancer rl` or `sft` and one `webdancer evaluate`, each a process of its own in a directory of its own, on the same 300
questions of 1 to 3 hops about entities that no training saw. A finished cell is a line of `--results` and is not run again.

What was measured is in benchmarks/baselines/findings.json, the claims and what they come to are in benchmarks/findings_claims.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.findings_cells import BY_NAME, NUM_QUESTIONS, NUM_SAMPLES, POOL, RL_STEPS, Cell
from benchmarks.findings_claims import CLAIMS, Result, cells_of, result_row
from benchmarks.findings_data import write_demonstrations_of, write_pool, write_questions
from benchmarks.findings_report import write_report
from webdancer.config import load
from webdancer.data.tasks import read_tasks
from webdancer.offline_web.server import running_server
from webdancer.telemetry.jsonl import read_jsonl
from webdancer.telemetry.recorder import read_trajectories
from webdancer.telemetry.telemetry import PHASES_FILE, read_metrics
from webdancer.whole_file import write_whole

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "ray_configs" / "quickstart.yaml"
BASE = "builtin:tiny"
NO_MIXED_GROUPS = "mixed groups found"


class Bench:
    """The directory that all runs are in, and the file of results."""

    def __init__(self, runs: Path, results: Path) -> None:
        self.runs, self.path = runs.absolute(), results
        self.results: dict[str, Result] = read_results(results)

    def run(self, cell: Cell, seed: int) -> None:
        if f"{cell.name}-{seed}" in self.results:
            return
        for needed in (cell.model_of, cell.rollouts_of):
            if needed in BY_NAME:
                self.run(BY_NAME[needed], seed)
        warm = self.warm_start(seed)
        model, steps = self._trained(cell, seed, warm) if cell.train else (self._model(cell.model_of, seed), 0)
        self._evaluated(cell, seed, model)
        row = result_row(
            read_trajectories(self._at(cell, seed, "evaluate")),
            [task.id for task in read_tasks(self.questions)],
            about={"steps": steps, "rollouts": self._rollouts(cell, seed), "minutes": self._minutes(cell, seed), "commit": _commit()},
        )
        self.results = read_results(self.path) | {f"{cell.name}-{seed}": row}
        self._write()
        print(f"{cell.name}, seed {seed}: pass@1 {row['pass_at_1']:.3f} ({row['about']['minutes']} min)", flush=True)

    def _write(self) -> None:
        """A line a cell."""
        lines = [f"{json.dumps(name)}:{json.dumps(row, separators=(',', ':'))}" for name, row in sorted(self.results.items())]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def warm_start(self, seed: int) -> Path:
        """The quickstart up to its SFT, evaluated in passing only."""
        warm = self.runs / f"warm-{seed}"
        if not (warm / "model").exists():
            self._command(["quickstart"], warm, seed, ["rl.num_steps=0", "evaluation.num_tasks=1", "evaluation.num_samples=1"])
        if not self.questions.exists():
            write_questions(self.warm_start(0), self.questions, count=NUM_QUESTIONS)
        return warm

    @property
    def questions(self) -> Path:
        return self.runs / "questions.jsonl"

    def _minutes(self, cell: Cell, seed: int) -> float:
        """Of all phases of its commands, whichever start of theirs they ran in."""
        phases = [phase for part in ("train", "evaluate") for phase in read_jsonl(self._at(cell, seed, part) / PHASES_FILE)]
        return round(sum(float(phase["seconds"]) for phase in phases) / 60, 1)

    def _rollouts(self, cell: Cell, seed: int) -> int:
        """Of its RL, dropped ones included."""
        steps = read_metrics(self._at(cell, seed, "train")).get("rl", {}).values() if cell.train == "rl" else ()
        return round(sum(step["rollout/rollouts"] for step in steps))

    def _at(self, cell: Cell, seed: int, part: str) -> Path:
        return self.runs / f"{cell.name}-{seed}" / part

    def _model(self, name: str, seed: int) -> str:
        """Of `warm`, `base`, or a cell; a cell whose RL found nothing to learn from still has what it began with."""
        if name == "base":
            return BASE
        if name == "warm":
            return str(self.runs / f"warm-{seed}" / "model")
        exported = self._at(BY_NAME[name], seed, "train") / "model"
        return str(exported) if exported.exists() else self._model(BY_NAME[name].model_of, seed)

    def _trained(self, cell: Cell, seed: int, warm: Path) -> tuple[str, int]:
        """The model, and how many RL steps it has."""
        directory = self._at(cell, seed, "train")
        settings = [f"model.path={self._model(cell.model_of, seed)}", *cell.train_settings]
        if cell.train == "sft":
            data = self.runs / f"{cell.name}-{seed}" / "demonstrations.jsonl"
            write_demonstrations_of(cell.demonstrations, warm, data)
            settings.append(f"sft.data={data}")
        else:
            steps = self._steps_of(cell, seed)
            settings += [f"rl.data={self._pool(cell, seed, warm)}", f"rl.num_steps={steps}"]  # evaluated by a command of its own
        if not (directory / "model").exists():
            self._command([cell.train], directory, seed, settings, alter=cell.alter, may_stop=cell.train == "rl")
            if not (directory / "model").exists() and any((directory / "checkpoints").glob("step_*")):
                # RL that came to where no group is mixed any more: what it made of the policy until then is the result.
                self._command(["export", "--to", str(directory / "model")], directory, seed, settings)
        done = max(read_metrics(directory).get("rl", {}), default=0)
        return self._model(cell.name, seed), done

    def _pool(self, cell: Cell, seed: int, warm: Path) -> Path:
        """The questions of RL."""
        if not cell.pool:
            return warm / "questions" / "rl_pool.jsonl"
        to = self._at(cell, seed, "questions.jsonl")
        made = self.runs / f"e2hqa-{seed}" / "questions" / "rl.jsonl"
        if cell.pool != "crawlqa" and not made.exists():
            counts = [f"synthesis.{name}" for name in ("num_sft=10", f"num_rl={POOL}", "num_heldout=10", "num_dev=10")]
            self._command(["synthesize"], self.runs / f"e2hqa-{seed}", seed, ["synthesis.method=e2hqa", *counts])
        if not to.exists():
            write_pool(cell.pool, warm / "questions" / "rl.jsonl", made, to)
        return to

    def _steps_of(self, cell: Cell, seed: int) -> int:
        """13, or as many as come to the rollouts of the other cell, dropped groups included."""
        if not cell.rollouts_of:
            return RL_STEPS
        steps = read_metrics(self._at(BY_NAME[cell.rollouts_of], seed, "train"))["rl"].values()
        groups = sum(step["rollout/groups_kept"] + step["rollout/groups_dropped"] for step in steps)
        return round(groups / load([CONFIG]).rollout.groups_per_step)

    def _evaluated(self, cell: Cell, seed: int, model: str) -> None:
        directory = self._at(cell, seed, "evaluate")
        if any(phase["phase"] == "evaluate" and phase["finished"] for phase in read_jsonl(directory / PHASES_FILE)):
            return
        settings = [f"model.path={model}", f"evaluation.data={self.questions}", f"evaluation.num_tasks={NUM_QUESTIONS}"]
        settings += [f"evaluation.num_samples={NUM_SAMPLES}", *cell.evaluate_settings]
        with ExitStack() as stack:
            if cell.web_seed is not None:
                origin = stack.enter_context(shaky_web(cell.web_seed))
                settings += [f"tools.search.url={origin}", f"tools.visit.site={origin}", f"tools.fetch.allowed_origins=['{origin}']"]
            self._command(["evaluate"], directory, seed, settings)

    def _command(
        self, program: Sequence[str], run_dir: Path, seed: int, settings: Sequence[str], *, alter: str = "", may_stop: bool = False
    ) -> None:
        """One program to its end; its output goes to a log beside its run directory."""
        log = run_dir.parent / f"{run_dir.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        module = ["benchmarks.altered_program", alter] if alter else ["webdancer.cli"]
        common = ["--config", str(CONFIG), f"run_dir={run_dir}", f"seed={seed}", "telemetry.wandb_mode=disabled"]
        with log.open("a") as out:
            command = [sys.executable, "-m", *module, *program, *common, *settings]
            code = subprocess.run(command, stdout=out, stderr=out, cwd=ROOT, check=False).returncode
        if code and not (may_stop and code == 2 and NO_MIXED_GROUPS in log.read_text(errors="replace")):
            raise SystemExit(f"{run_dir}: the run ended with code {code}; see {log}")


@contextmanager
def shaky_web(seed: int) -> Iterator[str]:
    web = load([CONFIG]).web
    with running_server(seed=web.seed, num_entities=web.num_entities) as upstream:
        command = [sys.executable, "-m", "benchmarks.shaky_web", "--upstream", upstream, "--seed", str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as proxy:
            try:
                assert proxy.stdout is not None
                yield proxy.stdout.readline().strip()
            finally:
                proxy.terminate()


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", choices=[claim.key for claim in CLAIMS], default=[claim.key for claim in CLAIMS])
    parser.add_argument("--cells", nargs="+", choices=list(BY_NAME), default=[], metavar="CELL", help="only these, in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "findings", help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "baselines" / "findings.json", help="what was measured")
    parser.add_argument("--render", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    bench = Bench(arguments.runs, arguments.results)
    if not arguments.render:
        chosen = [cells_of(claim) for claim in CLAIMS if claim.key in arguments.claims]
        for cells in [arguments.cells] if arguments.cells else chosen:
            for seed in arguments.seeds:
                for name in cells:
                    bench.run(BY_NAME[name], seed)
    print(write_report(bench.results, ROOT / "docs"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
