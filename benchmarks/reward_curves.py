"""Do two ways of running RL learn at the same pace? Reward per step of cells of `benchmarks.findings`, seed by seed.

    python -m benchmarks.reward_curves --runs runs/findings --out benchmarks/baselines/reward_curves.json
    python -m benchmarks.reward_curves --first stale_4 --second sft_rl --seeds 0 1 2

Both cells of a seed start from the same warm model and draw from the same questions; a step's reward is the mean over all its rollouts,
dropped groups included. The interval of the difference is Student's over the seeds: it is about another training run, and wide with three.
What a run differs from itself is beside it: the standard deviation over the seeds of the second cell, mean over the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from webdancer.telemetry.telemetry import read_metrics

REWARD = "rollout/reward"
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantile by degrees of freedom."""


def curve(run: Path) -> list[float]:
    """Reward of every RL step; empty where there is no run."""
    if not run.exists():
        return []
    steps: Mapping[int, Mapping[str, float]] = read_metrics(run).get("rl", {})
    return [steps[step][REWARD] for step in sorted(steps)]


def compare(firsts: Sequence[Sequence[float]], seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Curves by seed, in the same order: the steps that all of them have. `noise` and `interval` need two seeds."""
    num_steps = min(map(len, [*firsts, *seconds]))
    steps = []
    for step in range(num_steps):
        first, second = [one[step] for one in firsts], [one[step] for one in seconds]
        steps.append({"step": step + 1, "first": statistics.fmean(first), "second": statistics.fmean(second)})
    by_seed = [
        statistics.fmean(a - b for a, b in zip(one[:num_steps], other, strict=False)) for one, other in zip(firsts, seconds, strict=True)
    ]
    found: dict[str, Any] = {"steps": steps, "by_seed": by_seed, "difference": statistics.fmean(by_seed)}
    if len(by_seed) > 1:
        half = STUDENT[min(len(by_seed) - 1, max(STUDENT))] * statistics.stdev(by_seed) / math.sqrt(len(by_seed))
        found["interval"] = [found["difference"] - half, found["difference"] + half]
        found["noise"] = statistics.fmean(statistics.stdev(one[step] for one in seconds) for step in range(num_steps))
    return found


def show(found: Mapping[str, Any], first: str, second: str) -> None:
    print(f"| step | {first} | {second} | difference |\n|---|---|---|---|")
    for row in found["steps"]:
        print(f"| {row['step']} | {row['first']:.3f} | {row['second']:.3f} | {row['first'] - row['second']:+.3f} |")
    seeds = ", ".join(f"{one:+.3f}" for one in found["by_seed"])
    text = f"mean difference {found['difference']:+.3f}; by seed {seeds}"
    if "interval" in found:
        low, high = found["interval"]
        text += f"; 95 % [{low:+.3f}, {high:+.3f}]; {second} differs from itself by {found['noise']:.3f} from seed to seed"
    print(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/findings"), help="directory of benchmarks.findings")
    parser.add_argument("--first", default="stale_1")
    parser.add_argument("--second", default="sft_rl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    curves = {
        seed: tuple(curve(options.runs / f"{cell}-{seed}" / "train") for cell in (options.first, options.second)) for seed in options.seeds
    }
    seeds = [seed for seed, both in curves.items() if all(both)]
    if not seeds:
        print(f"{options.runs}: must hold {options.first} and {options.second} of a seed in {options.seeds}, got none")
        return 2
    found = compare(*zip(*(curves[seed] for seed in seeds), strict=True))
    show(found, options.first, options.second)
    if options.out is not None:
        options.out.write_text(json.dumps({"first": options.first, "second": options.second, "seeds": seeds, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
