"""DAPO with dynamic sampling: the whole loop on a page.

    next_batch   kept groups only, at most `max_staleness` versions old       waits for rollouts
    pack         group advantages, packed per-rank microbatches               pure
    step         rl.loss, one or more optimizer steps                         waits for the learner
    publish      weights into every engine, compared on the canary            waits for the slowest engine
    release      the trained groups' slots are free, on the new weights       new rollouts start here (max_staleness 0)

`max_staleness: 0` is the paper's synchronous DAPO; 1 and more overlap rollout and learning. There is no second trainer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from webdancer.algorithm.advantages import samples_from
from webdancer.algorithm.packing import fitting, pack
from webdancer.config import Config
from webdancer.data.tasks import TaskStream
from webdancer.errors import WebDancerError
from webdancer.interfaces import Services
from webdancer.rollout.collector import GroupCollector
from webdancer.runs.evaluate import BoundedRunner, evaluate_stage
from webdancer.runs.sft import is_due, warn_of_skips
from webdancer.telemetry import Telemetry
from webdancer.types import Group, LossName, Task, TrainBatch, TrainingPhase


async def train(
    config: Config,
    tasks: TaskStream,
    heldout: Sequence[Task],
    services: Services,
    telemetry: Telemetry,
    *,
    resume: Mapping[str, Any] | None = None,
) -> None:
    """Run `rl.num_steps` steps; `resume` is the cursor of a checkpoint that the learner has loaded and the engines serve already.

    The evaluations before the first and after the last step are the caller's; without held-out questions there are none in between.
    """
    run_dir = Path(config.run_dir)
    evaluates_after = partial(_evaluates_after, config=config, heldout=heldout)
    start = int(resume["step"]) if resume else 0
    if resume is None:
        await services.learner.begin(_phase(config))
    elif evaluates_after(start) and not (run_dir / "evaluations" / f"rl-{start}.json").exists():
        # The run was stopped between this checkpoint and its evaluation.
        await _evaluate(start, config, heldout, services, telemetry)
    progress = telemetry.progress("RL", total=config.rl.num_steps, start=start)
    collecting = GroupCollector(
        config.rollout,
        tasks,
        services.runner,
        telemetry,
        version=services.learner.version,
        curriculum_seed=config.seed,
        num_batches=config.rl.num_steps - start,
        resume=resume["tasks"] if resume else None,
    )
    kept = _Kept(finished=start, saved=start)
    with progress:
        async with collecting as collector, _finished_steps_kept(kept, collector, run_dir, services):
            for step in range(start + 1, config.rl.num_steps + 1):
                with telemetry.timed("rollout"):
                    groups = await collector.next_batch()
                kept.finished = None
                with telemetry.timed("train"):
                    batch, left_out = pack_groups(groups, config)
                    result = await services.learner.step(batch)
                with telemetry.timed("sync"):
                    canary = await services.weights.publish(result.version)
                kept.finished = step  # now: what `release` raises, once it has done its work, is of rollouts that go on
                collector.release(groups, version=result.version)
                trained = prefixed("train", {**result.metrics, "dropped_too_long": left_out})
                metrics = {**collector.metrics(), **trained, **canary, **telemetry.timings()}
                telemetry.log("rl", step, metrics)
                progress.advance(**headline(metrics))
                _warn(metrics, config, telemetry)
                if is_due(step, every=config.rl.save_every, last=config.rl.num_steps):
                    await _save(step, collector, run_dir, services)
                    kept.saved = step
                if evaluates_after(step):
                    await _evaluate(step, config, heldout, services, telemetry)
    await services.learner.saved()


def pack_groups(groups: Sequence[Group], config: Config) -> tuple[TrainBatch, int]:
    """The batch, and how many samples learner.too_long left out of it: their rewards still count in the advantages of their group."""
    learner = config.learner
    samples = samples_from(groups, normalize_std=config.rl.normalize_std)
    fits = fitting(samples, learner.token_budget, too_long=learner.too_long)
    batch = pack(
        fits,
        num_ranks=learner.num_ranks,
        token_budget=learner.token_budget,
        minibatches=config.rl.minibatches,
        loss=loss_name(config),
    )
    return batch, len(samples) - len(fits)


def _phase(config: Config) -> TrainingPhase:
    total = config.rl.num_steps * config.rl.minibatches
    return TrainingPhase(loss=loss_name(config), optimizer=config.rl.optimizer, total_steps=total, temperature=config.rollout.temperature)


def loss_name(config: Config) -> LossName:
    return "cispo" if config.rl.loss == "cispo" else "dapo"


@dataclass(slots=True, kw_only=True)
class _Kept:
    """The last step that is finished, None while the learner is ahead of the engines, and the last one that is saved."""

    finished: int | None
    saved: int


@asynccontextmanager
async def _finished_steps_kept(kept: _Kept, collector: GroupCollector, run_dir: Path, services: Services) -> AsyncIterator[None]:
    """Where the run ends for an outage, a stall or questions that teach nothing, whoever noticed, the finished steps are saved first."""
    try:
        yield
    except WebDancerError:
        if kept.finished is not None:
            if kept.saved < kept.finished:
                await _save(kept.finished, collector, run_dir, services)
            await services.learner.saved()
        raise


async def _save(step: int, collector: GroupCollector, run_dir: Path, services: Services) -> None:
    await services.learner.save(run_dir / "checkpoints", {"phase": "rl", "step": step, "tasks": collector.state_dict()})


def _evaluates_after(step: int, *, config: Config, heldout: Sequence[Task]) -> bool:
    every = config.rl.evaluate_every
    return len(heldout) > 0 and every > 0 and step % every == 0 and 0 < step < config.rl.num_steps


async def _evaluate(step: int, config: Config, heldout: Sequence[Task], services: Services, telemetry: Telemetry) -> None:
    """On half of the places that the workers have: rollouts go on in the others, as far as their slots allow."""
    places = config.rollout.num_workers * (config.rollout.episodes_per_worker or config.engine.max_num_seqs)
    runner = BoundedRunner(services.runner, max(1, places // 2))
    await evaluate_stage(config, heldout, runner, telemetry, stage=f"rl-{step}", version=services.learner.version)


def _warn(metrics: Mapping[str, float], config: Config, telemetry: Telemetry) -> None:
    warn_of_skips(metrics.get("train/skipped_updates", 0.0), telemetry)
    # Tokens of the learner's own version: what lies between is engine against learner, not the policy that has moved on.
    drift, limit = metrics.get("train/drift_0", 0.0), config.rl.drift_alarm
    if drift > limit:
        telemetry.say(f"  drift: |log p rollout - log p learner| is {drift:.2g} on fresh tokens, above rl.drift_alarm ({limit:g})")


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def headline(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The numbers worth a place in the progress bar."""
    names = {
        "accuracy": "rollout/accuracy",
        "tool calls": "rollout/tool_calls",
        "kept": "rollout/groups_kept",
        "dropped": "rollout/groups_dropped",
        "tok/s": "rollout/tokens_per_s",
    }
    return {label: metrics.get(name) for label, name in names.items()}
