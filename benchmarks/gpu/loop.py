"""One call on one GPU: the quickstart on it, then three RL steps of a 0.5B model in bfloat16, engine and learner on the same GPU.

    python -m benchmarks.gpu.loop --out benchmarks/baselines/gpu_loop.json
    python -m benchmarks.gpu.loop --no-quickstart --steps 3                                        the second part only
    python -m benchmarks.gpu.loop --device cpu --shape small --no-quickstart                       where there is no GPU

Both parts are the real program: actors, engine, offline web, `runs.rl.train`, with `cluster.shared_gpus`. A step rolls out, sends the
engine to sleep, trains, wakes the engine for its weights (`ipc`; on a CPU by file, and sleep gives no memory back there), and compares both
on the canary. Weights are random, so nothing is downloaded, and what such a policy says is noise: every second member of a group is taken
for right, which makes advantages and moves the weights. Printed by step: GPU memory in use before and after sleep, seconds of a weight sync
over those of copying the same bytes once on the device, and the canary's figures, which were within their bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.all import SHAPES, Shape, make_model
from webdancer.config import Config, load
from webdancer.interfaces import EpisodeRunner
from webdancer.types import EpisodeLost, Reward, ScoredTrajectory, Task

ROOT = Path(__file__).parent.parent.parent
TOKENIZER = ROOT / "webdancer" / "offline_web" / "tiny_base" / "tokenizer.json"
SMALL = Shape(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=4096)
SHARED = ["cluster.shared_gpus=true", "rollout.num_workers=1", "learner.num_ranks=1"]
FIGURES = {
    "rollout tokens/s": "rollout/tokens_per_s",
    "awake GiB": "gpu/awake_gib",
    "asleep GiB": "gpu/asleep_gib",
    "sleep s": "sync/sleep_s",
    "train s": "train/seconds",
    "gradient norm": "train/grad_norm",
    "pause s": "sync/pause_s",
    "sync s": "sync/seconds",
    "canary mean": "canary/mean",
    "canary max": "canary/max",
}


class EverySecondRight:
    """An EpisodeRunner: the episodes are real, their rewards are not."""

    def __init__(self, runner: EpisodeRunner) -> None:
        self._runner = runner

    async def run(self, task: Task, *, member: int, **settings: Any) -> ScoredTrajectory | EpisodeLost:
        outcome = await self._runner.run(task, member=member, **settings)
        if isinstance(outcome, EpisodeLost):
            return outcome
        right = float(member % 2)
        return replace(outcome, reward=Reward(total=right, format=right, answer=right))


def make_config(arguments: argparse.Namespace, model: Path, run_dir: Path) -> Config:
    on_gpu = arguments.device == "cuda"
    bounds = load([ROOT / "ray_configs" / "rl_1node_8gpu.yaml"]).rollout.weights
    device = [
        "model.dtype=bfloat16",
        "rollout.weights.backend=ipc",
        f"engine.gpu_memory_utilization={arguments.engine_memory}",
        f"rollout.weights.canary_mean={bounds.canary_mean}",
        f"rollout.weights.canary_max={bounds.canary_max}",
    ]
    settings = [
        *SHARED,
        *(device if on_gpu else ["model.dtype=float32", "engine.kv_cache_gib=0.25"]),
        f"model.path={model}",
        f"run_dir={run_dir}",
        f"rl.num_steps={arguments.steps}",
        "rl.optimizer.lr=1e-4",
        "rl.evaluate_every=0",
        "rl.save_every=0",
        "prompt.style=brief",
        "episode.max_tokens=2048",
        "episode.max_turns=4",
        f"episode.max_turn_tokens={arguments.turn_tokens}",
        "rollout.groups_per_step=4",
        "rollout.group_size=8",
        "learner.token_budget=8192",
        "tools.num_servers=1",
        "judge.num_servers=1",
        "telemetry.wandb_mode=disabled",
    ]
    return load([], settings)


async def train_on_random_weights(config: Config) -> list[dict[str, float]]:
    """The metrics of every step."""
    from webdancer.cluster.launch import services
    from webdancer.data.tasks import TaskStream
    from webdancer.offline_web.server import running_server
    from webdancer.runs.quickstart import with_offline_web
    from webdancer.runs.rl import train
    from webdancer.telemetry import Telemetry
    from webdancer.telemetry.telemetry import read_metrics

    tasks = [Task(id=f"t{n}", question=f"Who built house {n}?", answers=("nobody",)) for n in range(64)]
    with running_server(num_entities=600) as origin, Telemetry.open(config.run_dir, config) as telemetry:
        webbed = with_offline_web(config, origin)
        async with services(webbed) as live:
            await live.weights.publish(live.learner.version)
            drawn = replace(live, runner=EverySecondRight(live.runner))
            await train(webbed, TaskStream(tasks, seed=0), (), drawn, telemetry)
    return [dict(row) for _, row in sorted(read_metrics(Path(config.run_dir))["rl"].items())]


def copy_s(model: Path, *, on_gpu: bool) -> float:
    """Seconds in which the device copies the model's bytes once, after a first time."""
    import torch
    from safetensors.torch import load_file

    device = "cuda" if on_gpu else "cpu"
    tensors = [tensor.to(device) for file in model.glob("*.safetensors") for tensor in load_file(file).values()]
    took = 0.0
    for _ in range(2):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        copies = [tensor.clone() for tensor in tensors]
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        del copies
    return took


def quickstart(run_dir: Path, *, engine_memory: float) -> dict[str, float]:
    """The real command with two RL steps, its actors on the GPU that they see."""
    device = [*SHARED, "rollout.weights.backend=ipc", f"engine.gpu_memory_utilization={engine_memory}"]
    command = [sys.executable, "-m", "webdancer.cli", "quickstart", f"run_dir={run_dir}", "rl.num_steps=2", *device]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return {"quickstart_s": time.perf_counter() - began}


def render(rows: list[dict[str, float]], copied_s: float) -> str:
    lines = [f"{'step':18}" + "".join(f"{n:>12}" for n in range(1, len(rows) + 1))]
    for name, metric in FIGURES.items():
        lines.append(f"{name:18}" + "".join(f"{row[metric]:>12.4g}" if metric in row else f"{'-':>12}" for row in rows))
    ratios = [row["sync/seconds"] / copied_s for row in rows]
    lines.append(f"{'sync / copy':18}" + "".join(f"{ratio:>12.4g}" for ratio in ratios))
    return "\n".join([*lines, f"ratio {min(ratios):.3g}: the fastest weight sync over copying the same bytes once on the device"])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=(*SHAPES, "small"), default="qwen2.5-0.5b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turn-tokens", type=int, default=256, help="of a turn: a random policy never ends one by itself")
    parser.add_argument("--engine-memory", type=float, default=0.4, help="share of the GPU's memory for the engine")
    parser.add_argument("--quickstart", action=argparse.BooleanOptionalAction, default=True, help="run it first")
    parser.add_argument("--out", default="", help="write the figures as JSON")
    arguments = parser.parse_args(words)
    import torch

    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("benchmarks.gpu.loop: needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found: dict[str, Any] = {}
        if arguments.quickstart:
            found |= quickstart(Path(folder) / "quickstart", engine_memory=arguments.engine_memory)
        shape = SMALL if arguments.shape == "small" else SHAPES[arguments.shape]
        model = make_model(shape, Path(folder) / "model", dtype="bfloat16" if on_gpu else "float32")
        shutil.copy(TOKENIZER, model)
        found["steps"] = asyncio.run(train_on_random_weights(make_config(arguments, model, Path(folder) / "run")))
        found["copy_s"] = copy_s(model, on_gpu=on_gpu)
    print(render(found["steps"], found["copy_s"]))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
