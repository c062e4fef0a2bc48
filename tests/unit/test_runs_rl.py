"""The RL loop with a learner and a weight sync that only write down what happens: the order of a step, resuming, evaluations."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from tests.rollout_fakes import TimedRunner, make_task
from tests.runs_fakes import FakeLearner, FakeWeights, make_config, make_services, open_telemetry
from tests.virtual_time import run_virtual
from webdancer.config import OptimizerConfig
from webdancer.data.tasks import TaskStream
from webdancer.errors import CanaryError, ConfigError, DataError, ServiceError, WebDancerError
from webdancer.rollout.collector import GroupCollector
from webdancer.runs import rl
from webdancer.telemetry.telemetry import read_metrics
from webdancer.types import Task, TrainingPhase

ARRAYS = ("token_ids", "loss_mask", "logprobs", "versions")
HELDOUT = tuple(Task(id=f"h{index}", question="?", answers=("yes",)) for index in range(3))
TASKS = tuple(make_task(index) for index in range(12))


def drawn(task, attempt, member):
    """Mixed for most (task, attempt), all right or all wrong for the others: groups are dropped and refilled on the way."""
    draw = random.Random(f"{task.id}/{attempt}").random()
    return draw < 0.2 if draw < 0.4 else member % 3 == 0


class Collector(GroupCollector):
    """Writes down what the loop does with it, and which groups it trains on."""

    events: ClassVar[list] = []
    batches: ClassVar[list] = []

    async def next_batch(self):
        groups = await super().next_batch()
        self.events.append(("next_batch",))
        self.batches.append([(group.task.id, group.attempt) for group in groups])
        return groups

    def release(self, groups, *, version):
        self.events.append(("release", version))
        super().release(groups, version=version)


@pytest.fixture
def events(monkeypatch):
    found = []
    monkeypatch.setattr(Collector, "events", found)
    monkeypatch.setattr(Collector, "batches", [])
    monkeypatch.setattr(rl, "GroupCollector", Collector)
    evaluate_stage = rl.evaluate_stage

    async def noted(*arguments, stage, version):
        found.append(("evaluate", stage, version))
        return await evaluate_stage(*arguments, stage=stage, version=version)

    monkeypatch.setattr(rl, "evaluate_stage", noted)
    return found


def run(config, learner, *, resume=None, weights=None, runner=None):
    services = make_services(learner, runner=runner or TimedRunner(correct=drawn), weights=weights)
    with open_telemetry(config) as telemetry:
        try:
            run_virtual(rl.train(config, TaskStream(TASKS, seed=1), HELDOUT, services, telemetry, resume=resume))
        except WebDancerError:
            assert learner.committed, "finished steps are on disk before the run ends"
            raise
    assert learner.committed


def test_a_step_is_draw_train_publish_release_then_save_and_evaluate(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=3", "rl.save_every=2", "rl.evaluate_every=2")
    learner = FakeLearner(events)
    run(config, learner)
    assert events == [
        ("begin", "dapo"),
        *[("next_batch",), ("step", 1), ("publish", 1), ("release", 1)],
        *[("next_batch",), ("step", 2), ("publish", 2), ("release", 2), ("save", 2), ("evaluate", "rl-2", 2)],
        *[("next_batch",), ("step", 3), ("publish", 3), ("release", 3), ("save", 3)],  # the last step is always saved
    ]
    assert sorted(read_metrics(tmp_path)["rl"]) == [1, 2, 3]
    assert read_metrics(tmp_path)["rl"][2].keys() >= {"train/loss", "canary/mean", "rollout/accuracy", "time/rollout_s", "time/sync_s"}


def test_the_phase_knows_temperature_optimizer_and_all_optimizer_steps(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=3", "rl.minibatches=2", "rollout.temperature=0.7", "rl.optimizer.lr=1e-3")
    learner = FakeLearner(events)
    run(config, learner)
    assert learner.phases == [TrainingPhase(loss="dapo", optimizer=OptimizerConfig(lr=1e-3), total_steps=6, temperature=0.7)]
    for batch in learner.batches:
        assert batch.loss == "dapo"
        assert len(batch.steps) == 2
        assert all(len(step.microbatches) == config.learner.num_ranks for step in batch.steps)


def test_the_learner_gets_the_rollouts_own_logprobs_and_each_groups_advantages(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=1")
    learner = FakeLearner(events)
    run(config, learner, runner=TimedRunner(correct=lambda task, attempt, member: member == 0))
    (step,) = learner.batches[0].steps
    rows = [row for rank in step.microbatches for row in rank]
    trained = [(a, p) for row in rows for a, p, on in zip(row.advantages, row.rollout_logprobs, row.loss_mask, strict=True) if on]
    assert step.num_loss_tokens == len(trained) == 2 * 4 * 3
    assert {float(logprob) for _, logprob in trained} == {-0.5}
    # One right among four: (1 - 0.325) / 0.45 = 1.5, the others -0.5; three tokens a member, two groups.
    assert sorted(round(float(advantage), 4) for advantage, _ in trained) == [-0.5] * 18 + [1.5] * 6


def test_loss_and_normalisation_are_settings(tmp_path, events):
    learner = FakeLearner(events)
    config = make_config(tmp_path, "rl.num_steps=1", "rl.loss=cispo", "rl.normalize_std=false")
    run(config, learner, runner=TimedRunner(correct=lambda task, attempt, member: member == 0))
    assert [learner.phases[0].loss, learner.batches[0].loss] == ["cispo", "cispo"]
    rows = [row for rank in learner.batches[0].steps[0].microbatches for row in rank]
    trained = {round(float(advantage), 4) for row in rows for advantage in row.advantages[row.loss_mask]}
    assert trained == {0.675, -0.225}, "R - mean: 1 and 0.1 with the mean 0.325"


class LongMember(TimedRunner):
    """Member 1 of each group is longer than the others, and right."""

    async def run(self, task, *, member, **settings):
        scored = await super().run(task, member=member, **settings)
        if member != 1:
            return scored
        short = scored.trajectory
        tail = {name: np.concatenate([getattr(short, name), getattr(short, name)[-1:].repeat(60)]) for name in ARRAYS}
        return replace(scored, trajectory=replace(short, **tail))


def test_a_rollout_longer_than_the_budget_is_left_out_and_counted_and_its_reward_still_counts(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=1", "learner.token_budget=64", "learner.too_long=drop")
    learner = FakeLearner(events)
    run(config, learner, runner=LongMember(correct=lambda task, attempt, member: member == 1))
    assert read_metrics(tmp_path)["rl"][1]["train/dropped_too_long"] == 2
    (step,) = learner.batches[0].steps
    trained = [float(a) for rank in step.microbatches for row in rank for a in row.advantages[row.loss_mask]]
    assert trained == pytest.approx([-0.5] * 18), "the right answer is not trained on, and the others are still worse than it"


def test_a_rollout_longer_than_the_budget_ends_a_run_that_drops_nothing(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=1")
    config.learner.token_budget = 64  # not through `load`, which refuses a budget below episode.max_tokens
    learner = FakeLearner(events)
    with pytest.raises(ConfigError, match=r"learner\.token_budget: must hold the longest sample, got 64 for '.*' of 65 tokens"):
        run(config, learner, runner=LongMember(correct=lambda task, attempt, member: member == 1))


@pytest.mark.parametrize("skipped", [0, 2])
def test_skipped_updates_are_said_aloud(tmp_path, events, capsys, skipped):
    learner = FakeLearner(events)
    learner.metrics = {"skipped_updates": float(skipped)}
    run(make_config(tmp_path, "rl.num_steps=1"), learner)
    assert ("2 update(s) skipped: loss or gradient not finite" in capsys.readouterr().out) == bool(skipped)


@pytest.mark.parametrize("saved_at", [2, 4])
def test_a_resumed_run_goes_on_with_the_step_and_the_batches_it_would_have_had(tmp_path, events, saved_at):
    whole = FakeLearner(events)
    run(make_config(tmp_path / "whole", "rl.num_steps=6"), whole)
    wanted = list(Collector.batches)

    config = make_config(tmp_path / "cut", "rl.num_steps=6", "rl.save_every=2")
    learner = FakeLearner(events, fails_at=saved_at + 1)
    Collector.batches.clear()
    with pytest.raises(RuntimeError, match="the learner died"):
        run(config, learner)
    assert Collector.batches == wanted[: saved_at + 2]

    learner.fails_at = None
    cursor = run_virtual(learner.load(tmp_path))
    assert (cursor["phase"], cursor["step"], learner.version) == ("rl", saved_at, saved_at)
    Collector.batches.clear()
    events.clear()
    run(config, learner, resume=cursor)
    assert Collector.batches == wanted[saved_at:]
    assert [event for event in events if event[0] in ("begin", "step")] == [("step", v) for v in range(saved_at + 1, 7)]
    assert sorted(read_metrics(tmp_path / "cut")["rl"]) == [1, 2, 3, 4, 5, 6]
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "rl"] == [*range(1, saved_at + 2), *range(saved_at + 1, 7)]


def test_an_evaluation_that_the_stop_cut_off_is_made_up_for(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=4", "rl.save_every=2", "rl.evaluate_every=2")
    learner = FakeLearner(events, fails_at=2)
    with pytest.raises(RuntimeError, match="the learner died"):
        run(config, learner)
    (tmp_path / "evaluations" / "rl-2.json").unlink()  # as if the stop had come between checkpoint and evaluation
    learner.fails_at = None
    cursor = run_virtual(learner.load(tmp_path))
    events.clear()
    run(config, learner, resume=cursor)
    assert [event for event in events if event[0] in ("evaluate", "step")] == [("evaluate", "rl-2", 2), ("step", 3), ("step", 4)]
    events.clear()
    run(config, learner, resume=cursor)
    assert not [event for event in events if event[0] == "evaluate"], "one that is there is not repeated"


def test_a_finished_run_trains_no_further(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=2", "rl.save_every=0", "rl.evaluate_every=0")
    learner = FakeLearner(events)
    run(config, learner)
    assert [event for event in events if event[0] == "save"] == [("save", 2)]
    events.clear()
    run(config, learner, resume=run_virtual(learner.load(tmp_path)))
    assert events == []


def test_no_slot_is_freed_and_nothing_saved_where_the_weights_did_not_arrive(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=2", "rl.save_every=1")
    with pytest.raises(CanaryError, match="no engine"):
        run(config, FakeLearner(events), weights=FakeWeights(events, CanaryError("no engine agrees")))
    assert events == [("begin", "dapo"), ("next_batch",), ("step", 1)]
    assert read_metrics(tmp_path).get("rl") is None


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_staleness_stays_within_its_bound(tmp_path, events, staleness):
    config = make_config(tmp_path, "rl.num_steps=8", f"rollout.max_staleness={staleness}")
    runner = TimedRunner(correct=drawn, latency_s=lambda task, member: random.Random(f"{task.id}{member}").paretovariate(1.1))
    run(config, FakeLearner(events), runner=runner)
    seen = [metrics["rollout/staleness_max"] for metrics in read_metrics(tmp_path)["rl"].values()]
    assert max(seen) <= staleness
    assert len(seen) == 8


def test_questions_without_mixed_groups_end_the_run_with_a_reason(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=2", "rollout.max_admitted_per_step=4")
    with pytest.raises(DataError, match=r"rollout\.max_admitted_per_step: 4 groups admitted"):
        run(config, FakeLearner(events), runner=TimedRunner(correct=lambda task, attempt, member: False))
    assert events == [("begin", "dapo")]


@pytest.mark.parametrize("noticed", ["release", "evaluation"])
def test_the_finished_steps_are_kept_wherever_an_outage_is_noticed(tmp_path, events, monkeypatch, noticed):
    settings = ["rollout.max_staleness=1"] if noticed == "release" else ["rl.evaluate_every=2"]
    config = make_config(tmp_path, "rl.num_steps=6", "rl.save_every=0", *settings)
    learner = FakeLearner(events)

    class Failing(TimedRunner):
        async def run(self, task, **settings):
            if learner.version >= 2:
                raise ServiceError("the judge is gone")
            return await super().run(task, **settings)

    async def slowly(version):
        await asyncio.sleep(1.0)  # time enough for the rollouts beside it to fail
        return {}

    weights = FakeWeights(events)
    weights.publish = slowly if noticed == "release" else weights.publish
    with pytest.raises(ServiceError, match="the judge is gone"):
        run(config, learner, weights=weights, runner=Failing(correct=drawn))
    finished = events[-1][1]
    assert events[-1] == ("save", learner.version)
    assert finished >= 2
    if noticed == "release":
        assert events[-2] == ("release", finished)


def test_the_finished_steps_are_kept_when_rollouts_cannot_go_on(tmp_path, events):
    config = make_config(tmp_path, "rl.num_steps=5", "rl.save_every=0", "rollout.max_admitted_per_step=6")
    learner = FakeLearner(events)
    with pytest.raises(DataError, match=r"rollout\.max_admitted_per_step"):
        run(config, learner, runner=TimedRunner(correct=lambda task, attempt, member: learner.version < 2 and member == 0))
    assert [event for event in events if event[0] == "save"] == [("save", 2)]
    cursor = run_virtual(learner.load(tmp_path))
    run(config, learner, resume=cursor)
    assert sorted(read_metrics(tmp_path)["rl"]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("drift", "heard"), [({"drift_0": 0.06}, True), ({"drift_0": 0.04, "drift_1": 9.0}, False), ({}, False)])
def test_drift_of_fresh_tokens_is_said_aloud(tmp_path, events, capsys, drift, heard):
    learner = FakeLearner(events)
    learner.metrics = drift
    run(make_config(tmp_path, "rl.num_steps=1", "rl.drift_alarm=0.05"), learner)
    assert ("above rl.drift_alarm (0.05)" in capsys.readouterr().out) == heard
