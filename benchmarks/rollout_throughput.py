"""What rollouts keep of an engine's speed, and what slow tools cost: one real vLLM engine, the real rollout worker, simulated tools.

    python -m benchmarks.rollout_throughput --out benchmarks/baselines/rollout_throughput.json
    python -m benchmarks.rollout_throughput --parts raw curve                                          some of it

    raw         useful tokens/s at no latency over the engine alone, same lengths, same 64 at once; arms take turns
    curve       tokens/s at a mean latency of 0 to 10 s (log-normal, p99 = 8 x mean), episodes in flight as the worker itself sets them
    lockstep    two batches of 64 episodes against a loop that generates all, calls all, and then takes the next turn
    staleness   time of a step with max_staleness 1 over 0 at 1 s, through the real collector; training is a wait as long as a batch takes
    update      a weight update while 64 requests run: how long they stand still, keys and values cleared or kept

The engine is the CPU build with the tiny model: what is measured is how well its time is used, not how fast it is. Ratios are of one
run; on a busy machine, of neighbouring measurements (medians over rounds), and of tokens per CPU second of this process, engine and agent
loop together (`ratio_cpu`), which other work disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from statistics import NormalDist
from typing import Any

import xxhash

from benchmarks.rollout_fixture import CALLS, SEQUENCES, SIGMA, Bench, SlowTools, make_task
from webdancer.cluster.worker import RolloutWorker
from webdancer.config import RolloutConfig
from webdancer.data.tasks import TaskStream
from webdancer.model_location import model_path
from webdancer.rollout.collector import GroupCollector
from webdancer.types import EpisodeLost, Group, Sampling, ScoredTrajectory, Task, Turn

LATENCIES_S = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
GROUPS, GROUP_SIZE = 8, 8
LEAST_TOKENS = 10_000
BATCHES = 2
"""Of the comparison with lockstep, for each latency."""
RUNS = itertools.count()


class InFlight:
    """Runs episodes on one worker, as many at once as it reports to have room for: what the pool does, without actors."""

    def __init__(self, worker: RolloutWorker, *, capacity: int) -> None:
        self._worker = worker
        self._room = asyncio.Condition()
        self._running = 0
        self.capacity = capacity

    async def listen(self) -> None:
        while True:
            report = await self._worker.report()
            async with self._room:
                self.capacity = report.capacity or self.capacity
                self._room.notify_all()

    async def run(
        self, task: Task, *, member: int, attempt: int, sampling: Sampling, resume_from: tuple[Turn, ...] = (), on_turn: object = None
    ) -> ScoredTrajectory | EpisodeLost:
        async with self._room:
            await self._room.wait_for(lambda: self._running < self.capacity)
            self._running += 1
        try:
            end = await self._worker.run_episode(
                next(RUNS), task, member=member, attempt=attempt, sampling=sampling, resume_from=resume_from
            )
        finally:
            async with self._room:
                self._running -= 1
                self._room.notify()
        return end.outcome

    async def endlessly(self) -> None:
        """Always as many episodes as there is room for."""
        async with asyncio.TaskGroup() as group:
            while True:
                async with self._room:
                    await self._room.wait_for(lambda: self._running < self.capacity)
                number = next(RUNS)
                group.create_task(self.run(make_task(number), member=0, attempt=number, sampling=Sampling()))
                await asyncio.sleep(0)


@asynccontextmanager
async def flights(bench: Bench, tools: SlowTools, *, adapts: bool) -> AsyncIterator[InFlight]:
    worker = await bench.worker(tools, adapts=adapts)
    flight = InFlight(worker, capacity=SEQUENCES)
    listening = asyncio.create_task(flight.listen())
    try:
        yield flight
    finally:
        listening.cancel()
        await worker.stop()


@asynccontextmanager
async def in_background(*coroutines: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


async def window(bench: Bench, *, warm_s: float, seconds: float, least_tokens: int = LEAST_TOKENS) -> dict[str, float]:
    """Tokens that the engine samples a second and a CPU second of this process, the share of a core that everything but the engine takes,
    and the prefix-cache hit rate, while something else keeps the engine busy."""
    await asyncio.sleep(warm_s)
    before, began, process_s, loop_s = await bench.engine.stats(), time.perf_counter(), time.process_time(), time.thread_time()
    after, took = before, 0.0
    while took < seconds or after["generated_tokens"] < before["generated_tokens"] + least_tokens:  # tokens are counted turn by turn
        await asyncio.sleep(0.1)
        after, took = await bench.engine.stats(), time.perf_counter() - began
    process_s, loop_s = time.process_time() - process_s, time.thread_time() - loop_s
    change = {name: after[name] - before[name] for name in ("generated_tokens", "prompt_tokens", "cached_tokens")}
    hit_rate = change["cached_tokens"] / max(change["prompt_tokens"], 1)
    tokens = change["generated_tokens"]
    return {"tokens_per_s": tokens / took, "tokens_per_cpu_s": tokens / process_s, "loop_cpu": loop_s / process_s, "hit_rate": hit_rate}


async def stream(bench: Bench, mean_s: float, *, adapts: bool, warm_s: float, seconds: float) -> dict[str, float]:
    async with flights(bench, SlowTools(mean_s), adapts=adapts) as flight, in_background(flight.endlessly()):
        found = await window(bench, warm_s=warm_s, seconds=seconds)
        return {**found, "in_flight": flight.capacity}


async def raw(bench: Bench, *, warm_s: float, seconds: float) -> dict[str, float]:
    async def endlessly(number: int) -> None:
        for session in itertools.count():
            await bench.raw_session(f"raw{number}/{session}/{next(RUNS)}")

    async with in_background(*(endlessly(number) for number in range(SEQUENCES))):
        return await window(bench, warm_s=warm_s, seconds=seconds)


async def part_raw(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for number in range(3):
        alone = await raw(bench, warm_s=2.0, seconds=seconds)
        agents = await stream(bench, 0.0, adapts=False, warm_s=2.0, seconds=seconds)
        ratio_cpu = agents["tokens_per_cpu_s"] / alone["tokens_per_cpu_s"]
        ratio = agents["tokens_per_s"] / alone["tokens_per_s"]
        rows.append({"round": number, "raw_tokens_per_s": alone["tokens_per_s"], **agents, "ratio_cpu": ratio_cpu, "ratio": ratio})
    return rows


async def part_curve(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """Every latency is measured beside one at 0, which is its reference."""
    rows = []
    for mean_s in LATENCIES_S:
        reference = await stream(bench, 0.0, adapts=True, warm_s=3.0, seconds=seconds)
        found = await stream(bench, mean_s, adapts=True, warm_s=4.0 + 4 * mean_s, seconds=seconds)
        ratio_cpu = found["tokens_per_cpu_s"] / reference["tokens_per_cpu_s"]
        rows.append({"mean_latency_s": mean_s, **found, "ratio_cpu": ratio_cpu, "ratio": found["tokens_per_s"] / reference["tokens_per_s"]})
    return rows


async def part_lockstep(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """Batches of 64: seconds of all, in lockstep and not, every call as slow in both; and what they take in a stream with free growth.
    `bound` is the ratio of those latencies alone, for an engine that takes no time: a batch waits for its slowest episode."""
    rows = []
    for mean_s in (1.0, 3.0):
        batches_BSC = [drawn(mean_s, seed) for seed in range(BATCHES)]
        locked_s = batch_s = 0.0
        for drawn_SC in batches_BSC:
            began = time.perf_counter()
            await lockstep(bench, drawn_SC)
            locked_s += time.perf_counter() - began
            began = time.perf_counter()
            async with flights(bench, DrawnTools(mean_s), adapts=False) as flight:
                await asyncio.gather(*(one_episode(flight, drawn_C) for drawn_C in drawn_SC))
            batch_s += time.perf_counter() - began
        free = await stream(bench, mean_s, adapts=True, warm_s=4.0 + 4 * mean_s, seconds=seconds)
        free_s = BATCHES * SEQUENCES * bench.policy_tokens / free["tokens_per_s"]
        slowest_calls = sum(max(drawn_S) for drawn_SC in batches_BSC for drawn_S in zip(*drawn_SC, strict=True))
        bound = slowest_calls / sum(max(map(sum, drawn_SC)) for drawn_SC in batches_BSC)
        times = {"lockstep_s": locked_s, "batch_s": batch_s, "free_growth_s": free_s}
        rows.append({"mean_latency_s": mean_s, **times, "bound": bound, "ratio_free": locked_s / free_s, "ratio": locked_s / batch_s})
    return rows


def drawn(mean_s: float, seed: int) -> list[list[float]]:
    """Latencies by episode and call: as many quantiles of the distribution, shuffled. A few free draws of so long a tail are all luck."""
    count = SEQUENCES * CALLS
    quantiles = [math.exp(SIGMA * NormalDist().inv_cdf((index + 0.5) / count) - SIGMA**2 / 2) for index in range(count)]
    random.Random(seed).shuffle(quantiles)
    return [[mean_s * one for one in quantiles[start : start + CALLS]] for start in range(0, count, CALLS)]


SESSION: ContextVar[Iterator[float]] = ContextVar("latencies of this episode's calls")


class DrawnTools(SlowTools):
    def latency_s(self) -> float:
        return next(SESSION.get())


async def lockstep(bench: Bench, drawn_SC: Sequence[Sequence[float]]) -> None:
    """Generate all, call all, next turn: as loops do whose batch is the unit."""
    sessions = [bench.raw_prompt(f"lock{next(RUNS)}") for _ in drawn_SC]
    for turn in range(CALLS + 1):
        await asyncio.gather(*(bench.raw_turn(ids, turn) for ids in sessions))
        if turn < CALLS:
            await asyncio.gather(*(asyncio.sleep(drawn_C[turn]) for drawn_C in drawn_SC))


async def one_episode(flight: InFlight, latencies: Sequence[float] = ()) -> None:
    SESSION.set(iter(latencies))  # of this coroutine's own task
    number = next(RUNS)
    await flight.run(make_task(number), member=0, attempt=number, sampling=Sampling())


class Forgetful:
    def record_group(self, group: Group, decision: str) -> None: ...


async def part_staleness(bench: Bench, seconds: float, *, mean_s: float = 1.0, steps: int = 4) -> list[dict[str, Any]]:
    async with flights(bench, SlowTools(mean_s), adapts=True) as flight, in_background():
        began = time.perf_counter()
        await asyncio.gather(*(one_episode(flight) for _ in range(GROUPS * GROUP_SIZE)))
        train_s = time.perf_counter() - began
    rows: list[dict[str, Any]] = []
    for staleness in (0, 1):
        config = RolloutConfig(groups_per_step=GROUPS, group_size=GROUP_SIZE, max_staleness=staleness, dynamic_sampling=False)
        tasks = TaskStream([make_task(number) for number in range(1000)], 0)
        async with flights(bench, SlowTools(mean_s), adapts=True) as flight:
            times = []
            async with GroupCollector(config, tasks, flight, Forgetful()) as collector:
                for step in range(steps):
                    began = time.perf_counter()
                    groups = await collector.next_batch()
                    await asyncio.sleep(train_s)
                    collector.release(groups, version=step + 1)
                    times.append(time.perf_counter() - began)
        step_s = statistics.fmean(times[1:])  # the first fills the slots
        rows.append(
            {"max_staleness": staleness, "train_s": train_s, "step_s": step_s, "ratio": (rows[0]["step_s"] if rows else step_s) / step_s}
        )
    return rows


async def part_update(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """The same weights again, three times each way, while episodes run. What a running request's context costs to compute anew shows in
    the tokens that the engine gives in the seconds after: `after` is their rate over that before the update."""
    rows = []
    one_turn = SEQUENCES * bench.policy_tokens // len(bench.turns)
    with tempfile.TemporaryDirectory() as folder:
        copied_s = export_again(Path(bench.model), Path(folder) / "export")
        for number, keep in itertools.product(range(3), (False, True)):
            bench.engine._keeps_cache = keep  # one engine for both ways: its start is longer than all that is measured
            async with flights(bench, SlowTools(0.0), adapts=False) as flight, in_background(flight.endlessly()):
                before = await window(bench, warm_s=3.0, seconds=seconds, least_tokens=one_turn)
                timing = await bench.engine.load_weights(Path(folder) / "export", 0)
                after = await window(bench, warm_s=0.0, seconds=seconds, least_tokens=one_turn)
            times = {name: timing[name] for name in ("verify_s", "pause_s", "load_s")}
            rates = {"hit_rate_after": after["hit_rate"], "after": after["tokens_per_cpu_s"] / before["tokens_per_cpu_s"]}
            rows.append({"round": number, "kv_cache": "keep" if keep else "clear", **times, "copy_s": copied_s, **rates})
    bench.engine._keeps_cache = False
    return rows


def export_again(model: Path, directory: Path) -> float:
    """The model's own weights in the layout of an export; returns the seconds in which the same bytes are copied once."""
    from safetensors.torch import load_file, save

    directory.mkdir()
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    data = save(tensors)
    file = directory / "all.safetensors"
    began = time.perf_counter()
    file.write_bytes(data)
    copied_s = time.perf_counter() - began
    described = [{"name": n, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in tensors.items()]
    files = [{"file": file.name, "xxh3": xxhash.xxh3_128_hexdigest(data), "tensors": described}]
    (directory / "manifest.json").write_text(json.dumps({"version": 0, "files": files}))
    return copied_s


PARTS = {"raw": part_raw, "curve": part_curve, "lockstep": part_lockstep, "staleness": part_staleness, "update": part_update}


def print_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{name}\n" + "  ".join(f"{column:>16}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>16.3f}" if isinstance(value, float) else f"{value:>16}" for value in row.values()), flush=True)
    if name == "raw":
        for column in ("ratio_cpu", "ratio"):
            print(f"median {column} {statistics.median(row[column] for row in rows):.3f}")


async def measure(model: str, parts: Sequence[str], seconds: float, out: Path | None) -> None:
    bench = Bench(model)
    await bench.engine.start()
    try:
        await raw(bench, warm_s=3.0, seconds=1.0)  # the first requests warm kernels up
        found: dict[str, Any] = {
            "setting": {"sequences": SEQUENCES, "calls": CALLS, "seconds": seconds, "groups": GROUPS, "group_size": GROUP_SIZE}
        }
        for name in parts:
            found[name] = await PARTS[name](bench, seconds)
            print_rows(name, found[name])
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        await bench.engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny", help="builtin:tiny or a Hugging Face directory")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=12.0, help="of one measurement of throughput")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    asyncio.run(measure(model_path(arguments.model), arguments.parts, arguments.seconds, arguments.out))


if __name__ == "__main__":
    main()
