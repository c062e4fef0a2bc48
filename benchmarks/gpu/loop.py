"""One call on one GPU: the quickstart on it, then three RL steps of a 0.5B model whose engine sleeps while the learner trains beside it.

    python -m benchmarks.gpu.loop --out benchmarks/baselines/gpu_loop.json
    python -m benchmarks.gpu.loop --no-quickstart --steps 3                                        the second part only
    python -m benchmarks.gpu.loop --device cpu --shape small --no-quickstart                       its parts, where there is no GPU: tests

Every step: the engine rolls out, sleeps, the learner trains, the engine wakes and gets the weights by `ipc` (vLLM's own; on the CPU
by file, and without sleep, which is nothing there), and both score the canary. Printed: memory before and after sleep, seconds of a sync
over the seconds of copying the same bytes once on the device, the canary's largest figures. Random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from benchmarks.engine_throughput import NoText, measure
from benchmarks.gpu.all import SHAPES, Shape, make_batch, make_model, open_learner
from webdancer.config import EngineConfig
from webdancer.inference.canary import compare, probe
from webdancer.inference.engine import VllmEngine

SMALL = Shape(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=512)
ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 300.0


class LocalClient:
    """vLLM's VLLMWeightSyncClient for an engine of this process; called from another thread than the engine's loop."""

    def __init__(self, engine: VllmEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._do(self._engine.connect_weights(init_info))

    def start_weight_update(self) -> None:
        self._do(self._engine.begin_update())

    def update_weights(self, update_info: Any) -> None:
        self._do(self._engine.receive_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def _do(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)


class Sync:
    """Weights of one learner to one engine, by `ipc` on a GPU and by file elsewhere."""

    def __init__(self, learner: Any, engine: VllmEngine, directory: Path, *, on_gpu: bool) -> None:
        self._learner = learner
        self._engine = engine
        self._directory = directory
        self._on_gpu = on_gpu
        self._sender: Any = None

    async def send(self) -> dict[str, float]:
        version = self._learner.version
        if not self._on_gpu:
            self._learner.export_weights(self._directory / f"v{version}", version)
            return dict(await self._engine.load_weights(self._directory / f"v{version}", version))
        if self._sender is None:
            self._sender = await asyncio.to_thread(self._open, asyncio.get_running_loop())
        await asyncio.to_thread(self._sender.send_weights)
        return dict(await self._engine.finish_update(version, self._source.checksums()))

    def _open(self, loop: asyncio.AbstractEventLoop) -> Any:
        from webdancer.inference.weight_send import GatheredWeights, open_sender

        self._source = GatheredWeights(self._learner.tensor_specs(), self._learner.gathered_weights)
        return open_sender("ipc", self._source, LocalClient(self._engine, loop), rank=0, address="127.0.0.1", port=0, num_engine_ranks=1)


def used_gib(*, on_gpu: bool) -> float:
    """Of the device, by all processes on it."""
    import torch

    if not on_gpu:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def copy_s(learner: Any, *, on_gpu: bool) -> float:
    """Seconds in which the device copies all weights once."""
    import torch

    tensors = [tensor for _, tensor in learner.gathered_weights()]
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    copies = [tensor.clone() for tensor in tensors]
    if on_gpu:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    del copies
    return took


async def step(number: int, learner: Any, engine: VllmEngine, sync: Sync, shape: Shape, batch: Any, *, on_gpu: bool) -> dict[str, float]:
    rollout = await measure(engine, shape.vocab_size, sessions=16, first_task=1000 * number)
    awake_gib = used_gib(on_gpu=on_gpu)
    if on_gpu:
        await engine.sleep()
    asleep_gib = used_gib(on_gpu=on_gpu)
    began = time.perf_counter()
    loss = (await asyncio.to_thread(learner.step, batch)).metrics
    train_s = time.perf_counter() - began
    if on_gpu:
        await engine.wake()
    began = time.perf_counter()
    timing = await sync.send()
    sync_s = time.perf_counter() - began
    sequences = probe(shape.vocab_size)
    report = compare(await engine.score(sequences), [scores[1:] for scores in learner.score(sequences)])
    copied_s = copy_s(learner, on_gpu=on_gpu)
    return {
        "rollout_tokens_per_s": rollout["tokens_per_s"],
        "awake_gib": awake_gib,
        "asleep_gib": asleep_gib,
        "train_s": train_s,
        "grad_norm": float(loss.get("grad_norm", 0.0)),
        "pause_s": timing["pause_s"],
        "sync_s": sync_s,
        "copy_s": copied_s,
        "canary_mean": report.mean,
        "canary_max": report.max,
        "ratio": sync_s / copied_s,
    }


async def steps(arguments: argparse.Namespace, shape: Shape, folder: Path) -> list[dict[str, float]]:
    on_gpu, dtype = arguments.device == "cuda", "bfloat16" if arguments.device == "cuda" else "float32"
    model = make_model(shape, folder / "model", dtype=dtype)
    learner = open_learner(model, dtype=dtype, token_budget=arguments.token_budget)
    config = EngineConfig(gpu_memory_utilization=arguments.engine_memory, kv_cache_gib=0.25)
    settings = {"weight_backend": "ipc" if on_gpu else "file", "can_sleep": on_gpu}
    engine = VllmEngine(str(model), NoText(), config, dtype=dtype, max_model_len=1024, **settings)
    batch, _ = make_batch(shape, num_sequences=8, length=arguments.length, token_budget=arguments.token_budget)
    try:
        await engine.start()
        sync = Sync(learner, engine, folder / "weights", on_gpu=on_gpu)
        return [await step(n, learner, engine, sync, shape, batch, on_gpu=on_gpu) for n in range(arguments.steps)]
    finally:
        await engine.stop()
        learner.close()


def quickstart(run_dir: Path) -> dict[str, float]:
    """The real command with two RL steps; engines and learner take the GPU that they see."""
    command = [sys.executable, "-m", "webdancer.cli", "quickstart", f"run_dir={run_dir}", "rl.num_steps=2"]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return {"quickstart_s": time.perf_counter() - began}


def render(rows: list[dict[str, float]]) -> str:
    lines = []
    for name in rows[0]:
        values = "".join(f"{row[name]:>12.4g}" for row in rows)
        lines.append(f"{name:22}{values}")
    return "\n".join([f"{'step':22}" + "".join(f"{n:>12}" for n in range(len(rows))), *lines])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=(*SHAPES, "small"), default="qwen2.5-0.5b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the longest sequence in a learner step")
    parser.add_argument("--token-budget", type=int, default=8192, help="tokens of a microbatch")
    parser.add_argument("--engine-memory", type=float, default=0.4, help="share of the GPU's memory for the engine")
    parser.add_argument("--quickstart", action=argparse.BooleanOptionalAction, default=True, help="run it first")
    parser.add_argument("--out", default="", help="write the figures as JSON")
    arguments = parser.parse_args(words)
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu.loop: needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found: dict[str, Any] = quickstart(Path(folder) / "run") if arguments.quickstart else {}
        shape = SMALL if arguments.shape == "small" else SHAPES[arguments.shape]
        found["steps"] = asyncio.run(steps(arguments, shape, Path(folder)))
    print(render(found["steps"]))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
