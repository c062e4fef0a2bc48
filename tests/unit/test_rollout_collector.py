"""The collector in virtual time: the staleness bound holds, nothing deadlocks, and every admitted group is accounted for."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rollout_fakes import CountingTasks, CyclingTasks, ListRecorder, TimedRunner, make_member, make_turn
from tests.virtual_time import run_virtual
from webdancer.config import RolloutConfig
from webdancer.errors import DataError, StalledError
from webdancer.rollout.collector import GroupCollector
from webdancer.rollout.slots import newest_drawable
from webdancer.types import ToolResult, TurnFinished


def rollout_config(**changes) -> RolloutConfig:
    defaults = {"groups_per_step": 2, "group_size": 4, "max_staleness": 0, "stall_timeout_s": 1e6}
    return RolloutConfig(**{**defaults, **changes})


def collector(config, *, tasks=None, runner=None, recorder=None, **rest) -> GroupCollector:
    return GroupCollector(config, tasks or CountingTasks(), runner or TimedRunner(), recorder or ListRecorder(), **rest)


def unmixed(share: float, seed: int):
    """`correct` for TimedRunner: so many groups are all right or all wrong, the rest are mixed."""

    def correct(task, attempt, member):
        draw = random.Random(f"{seed}/{task.id}/{attempt}").random()
        if draw < share:
            return draw < share / 2
        return member == 0

    return correct


def heavy_tail(seed: int):
    def latency_s(task, member):
        draw = random.Random(f"{seed}/{task.id}/{member}")
        return draw.paretovariate(1.1)

    return latency_s


async def train(config, *, steps, runner, recorder, train_s=0.0, version=0):
    """The loop of runs/rl.py, with the bound and the accounting checked at every step."""
    batches = []
    async with collector(config, runner=runner, recorder=recorder, version=version) as groups:
        for _ in range(steps):
            batch = await groups.next_batch()
            assert len(batch) == config.groups_per_step
            assert all(0 <= version - group.start_version <= config.max_staleness for group in batch)
            check_accounting(groups)
            await asyncio.sleep(train_s)
            version += 1
            groups.release(batch, version=version)
            check_accounting(groups)
            batches.append(batch)
        final = groups.accounting
    assert runner.running == 0
    return batches, final


def check_accounting(groups: GroupCollector) -> None:
    accounts = groups.accounting
    assert accounts.admitted == accounts.trained + sum(accounts.dropped.values()) + accounts.in_flight


@settings(max_examples=20, deadline=None)
@given(
    groups_per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    train_s=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_bound_holds_nothing_is_lost_nothing_deadlocks(groups_per_step, max_staleness, seed, train_s):
    config = rollout_config(groups_per_step=groups_per_step, max_staleness=max_staleness, max_admitted_per_step=1000)
    runner = TimedRunner(latency_s=heavy_tail(seed), correct=unmixed(0.4, seed))
    recorder = ListRecorder()
    batches, final = run_virtual(train(config, steps=15, runner=runner, recorder=recorder, train_s=train_s))
    trained = [(group.task.id, group.attempt) for batch in batches for group in batch]
    assert len(trained) == len(set(trained)) == final.trained
    assert final.dropped.get("surplus", 0) == 0, "the deadline rule leaves nobody behind"
    recorded = {(group.task.id, group.attempt): decision for group, decision in recorder.groups}
    assert len(recorded) == len(recorder.groups)
    assert all(recorded[key] == "kept" for key in trained)
    assert sum(final.dropped.values()) == sum(decision != "kept" for decision in recorded.values())


@settings(max_examples=30, deadline=None)
@given(
    held=st.dictionaries(st.integers(0, 5), st.integers(1, 6), min_size=1),
    places_left=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
)
def test_newest_drawable_is_the_rule_word_for_word(held, places_left, max_staleness):
    def allowed(start):
        after = {v: count - (v == start) for v, count in held.items()}
        return all(
            sum(count for w, count in after.items() if w <= v) <= places_left - 1 + 4 * (v + max_staleness - 5)
            for v in range(5 - max_staleness, 6)
        )

    held = {v: count for v, count in held.items() if v >= 5 - max_staleness} or {5: 1}
    newest = newest_drawable(held, version=5, places_left=places_left, groups_per_step=4, max_staleness=max_staleness)
    if any(allowed(start) for start in held):  # else somebody moved the version without training: the oldest goes first
        slots_hold = all(
            sum(count for w, count in held.items() if w <= v) <= places_left + 4 * (v + max_staleness - 5)
            for v in range(5 - max_staleness, 6)
        )
        if slots_hold:
            assert newest == max(start for start in held if allowed(start))
    assert newest in held


def test_questions_that_run_out_while_tools_are_throttled_are_missed_at_once():
    """The timer of back-pressure finds that there are none: nobody else would say so until the run counts as stalled."""

    class Throttled(TimedRunner):
        async def run(self, task, *, member, attempt, on_turn, **settings):
            await asyncio.sleep(0.5)
            turn = replace(make_turn(), result=ToolResult(text="", error="unavailable", throttled=True))
            for index in range(3):
                on_turn(TurnFinished(task_id=task.id, member=member, attempt=attempt, index=index, turn=turn))
            return make_member(task, member=member, attempt=attempt, correct=False)

    async def main():
        config = rollout_config(groups_per_step=4, stall_timeout_s=3600)
        async with collector(config, runner=Throttled(), tasks=CountingTasks(limit=4)) as groups:
            with pytest.raises(DataError, match="the questions ran out"):
                await groups.next_batch()
            assert asyncio.get_running_loop().time() < 60

    run_virtual(main())


def test_first_finished_first_kept_would_break_the_bound():
    """The reason for the deadline rule: one very slow group is waited for, not left to age."""
    config = rollout_config(groups_per_step=2, max_staleness=1)
    runner = TimedRunner(latency_s=lambda task, member: 1000.0 if task.id == "t0" else 1.0)
    batches, _ = run_virtual(train(config, steps=4, runner=runner, recorder=ListRecorder()))
    slow = next(step for step, batch in enumerate(batches) if any(group.task.id == "t0" for group in batch))
    assert slow == 1


def test_synchronous_batches_are_those_of_a_plain_loop():
    correct = unmixed(0.4, seed=7)
    config = rollout_config(groups_per_step=3)
    runner = TimedRunner(latency_s=heavy_tail(7), correct=correct)
    batches, final = run_virtual(train(config, steps=6, runner=runner, recorder=ListRecorder(), train_s=3.0))
    tasks, expected = CountingTasks(), []
    while len(expected) < 18:
        task = next(tasks)
        if len({correct(task, 0, member) for member in range(config.group_size)}) == 2:
            expected.append(task.id)
    assert [group.task.id for batch in batches for group in batch] == expected
    assert final.dropped.get("surplus", 0) == 0
    assert [group.start_version for batch in batches for group in batch] == [step for step in range(6) for _ in range(3)]


def test_staleness_overlaps_rollout_and_training():
    async def seconds(max_staleness):
        config = rollout_config(groups_per_step=2, max_staleness=max_staleness)
        await train(config, steps=10, runner=TimedRunner(latency_s=lambda task, member: 5.0), recorder=ListRecorder(), train_s=5.0)
        return asyncio.get_running_loop().time()

    assert run_virtual(seconds(0)) == pytest.approx(100.0)
    assert run_virtual(seconds(1)) < 60.0


def test_new_weights_without_training_make_leftovers_surplus():
    async def main():
        runner = TimedRunner(latency_s=lambda task, member: 1.0 if task.id == "t0" else 50.0)
        async with collector(rollout_config(), runner=runner) as groups:
            waiting = asyncio.create_task(groups.next_batch())
            await asyncio.sleep(2)
            groups.set_version(1)
            batch = await waiting
            return groups, batch, runner

    groups, batch, runner = run_virtual(main())
    assert groups.accounting.dropped == {"surplus": 2}
    assert [group.start_version for group in batch] == [1, 1]
    assert runner.cancelled >= 4
    check_accounting(groups)


def test_every_finished_group_is_recorded_before_it_is_dropped():
    seen = []

    class Recorder(ListRecorder):
        def record_group(self, group, decision):
            seen.append((decision, collecting.accounting.dropped.get(decision, 0)))

    async def main():
        nonlocal collecting
        collecting = collector(rollout_config(groups_per_step=6), runner=TimedRunner(correct=unmixed(0.5, 3)), recorder=Recorder())
        async with collecting as groups:
            await groups.next_batch()

    collecting = None
    run_virtual(main())
    dropped_before = {}
    for reason, dropped in seen:
        if reason != "kept":
            assert dropped == dropped_before.get(reason, 0)
            dropped_before[reason] = dropped + 1
    assert dropped_before


@pytest.mark.parametrize("where", ["runner", "recorder"])
def test_a_dead_background_task_ends_the_run_with_its_own_error(where):
    class BrokenRunner(TimedRunner):
        async def run(self, task, **rest):
            if where == "runner" and task.id == "t1":
                raise ZeroDivisionError("a bug")
            return await super().run(task, **rest)

    class BrokenRecorder(ListRecorder):
        def record_group(self, group, decision):
            if where == "recorder" and group.task.id == "t1":
                raise ZeroDivisionError("a bug")

    async def main():
        async with collector(rollout_config(), runner=BrokenRunner(), recorder=BrokenRecorder()) as groups:
            await groups.next_batch()

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_virtual(main())


def test_a_task_that_dies_after_the_last_batch_is_not_forgotten():
    class BrokenLater(TimedRunner):
        async def run(self, task, **rest):
            if task.id == "t2":
                raise ZeroDivisionError("a bug")
            return await super().run(task, **rest)

    async def main():
        async with collector(rollout_config(max_staleness=0), runner=BrokenLater()) as groups:
            groups.release(await groups.next_batch(), version=1)
            await asyncio.sleep(1)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_virtual(main())


def test_a_stall_names_the_stage_and_the_oldest_task():
    async def main():
        runner = TimedRunner(latency_s=lambda task, member: 1.0 if member < 3 else 1e9)
        async with collector(rollout_config(stall_timeout_s=60), runner=runner) as groups:
            await groups.next_batch()

    with pytest.raises(StalledError, match=r"rollout: no episode finished for 60 s with 2 groups in flight.*t0.*3 of 4 members"):
        run_virtual(main())


def test_slow_but_moving_episodes_are_no_stall():
    async def main():
        runner = TimedRunner(latency_s=lambda task, member: 50.0 * (member + 1))
        async with collector(rollout_config(stall_timeout_s=60), runner=runner) as groups:
            return await groups.next_batch()

    assert len(run_virtual(main())) == 2


def test_learning_slowly_is_no_stall():
    async def main():
        async with collector(rollout_config(stall_timeout_s=60), runner=TimedRunner(latency_s=lambda task, member: 50.0)) as groups:
            groups.release(await groups.next_batch(), version=1)
            await asyncio.sleep(1000)
            groups.release(await groups.next_batch(), version=2)
            await asyncio.sleep(1000)
            return await groups.next_batch()

    assert len(run_virtual(main())) == 2


def test_search_for_mixed_groups_is_bounded_and_says_why():
    async def main():
        runner = TimedRunner(correct=lambda task, attempt, member: int(task.id[1:]) % 4 == 0)
        async with collector(rollout_config(max_admitted_per_step=12), runner=runner) as groups:
            await groups.next_batch()

    message = r"max_admitted_per_step: 12 groups.*0 of 2 mixed.*of 12 finished: 25% all_correct, 75% all_wrong, 0% too_few_valid"
    with pytest.raises(DataError, match=message):
        run_virtual(main())


def test_the_very_last_admitted_group_still_counts():
    async def main():
        runner = TimedRunner(correct=lambda task, attempt, member: int(task.id[1:]) in (8, 9) and member == 0)
        async with collector(rollout_config(max_admitted_per_step=10), runner=runner) as groups:
            return [group.task.id for group in await groups.next_batch()]

    assert run_virtual(main()) == ["t8", "t9"]


def test_tasks_that_run_out_are_an_error_of_the_data():
    async def main():
        runner = TimedRunner(correct=lambda task, attempt, member: False)
        async with collector(rollout_config(), tasks=CountingTasks(limit=5), runner=runner) as groups:
            await groups.next_batch()

    with pytest.raises(DataError, match=r"rl\.data: the questions ran out with 0 of 2"):
        run_virtual(main())


def test_cursor_gives_out_again_what_was_not_trained():
    async def main():
        tasks = CountingTasks()
        async with collector(rollout_config(max_staleness=1), tasks=tasks) as groups:
            batch = await groups.next_batch()
            groups.release(batch, version=1)
            return [group.task.id for group in batch], groups.state_dict()

    trained, state = run_virtual(main())
    again = state["again"]
    assert sorted(trained + again, key=lambda name: int(name[1:])) == [f"t{index}" for index in range(state["next_index"])]
    assert len(again) == 4


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_synchronous_run_goes_on_with_the_very_same_batches(stop_after):
    correct = unmixed(0.4, seed=5)

    async def batches(steps, *, tasks, runner, version=0, resume=None):
        config = rollout_config(groups_per_step=3)
        done = []
        async with collector(config, tasks=tasks, runner=runner, version=version, seed=9, resume=resume) as groups:
            for step in range(steps):
                batch = await groups.next_batch()
                groups.release(batch, version=version + step + 1)
                await asyncio.sleep(0.5)  # the next groups are under way when the run is saved
                done.append([(g.task.id, g.attempt, [runner.seeds[g.task.id, g.attempt, m] for m in range(4)]) for g in batch])
            return done, groups.state_dict()

    def runner():
        return TimedRunner(latency_s=heavy_tail(5), correct=correct)

    whole, _ = run_virtual(batches(5, tasks=CyclingTasks(8), runner=runner()))
    first, state = run_virtual(batches(stop_after, tasks=CyclingTasks(8), runner=runner()))
    rest, _ = run_virtual(batches(5 - stop_after, tasks=CyclingTasks(8), runner=runner(), version=stop_after, resume=state))
    assert first + rest == whole
    assert any(attempt > 0 for batch in whole for _, attempt, _ in batch), "the stream came round"


def test_an_attempt_that_is_made_again_is_no_other_attempts_number():
    """t0's first attempt is slow, its second one dropped: after a resume there is a first one again, and then a third."""

    class OneSlow(TimedRunner):
        async def run(self, task, *, member, attempt, **settings):
            await asyncio.sleep(1e5 if (task.id, attempt) == ("t0", 0) else 1.0)
            return make_member(task, member=member, attempt=attempt, correct=task.id == "t0" or member == 0)

    config = rollout_config(max_staleness=1)
    before, after = ListRecorder(), ListRecorder()

    async def main():
        async with collector(config, runner=OneSlow(), tasks=CyclingTasks(3), recorder=before) as groups:
            groups.release(await groups.next_batch(), version=1)
            await asyncio.sleep(1.5)
            state = groups.state_dict()
        async with collector(config, tasks=CyclingTasks(3), recorder=after, version=1, resume=state) as groups:
            groups.release(await groups.next_batch(), version=2)
            await groups.next_batch()

    run_virtual(main())
    left = [(group.task.id, group.attempt) for group, decision in before.groups if decision != "kept"]
    again = [(group.task.id, group.attempt) for group, _ in after.groups]
    assert ("t0", 1) in left
    assert ("t0", 0) in again
    assert not set(left) & set(again)
    assert len(set(again)) == len(again)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_group_is_begun_that_no_batch_is_left_for(staleness):
    async def main():
        runner = TimedRunner(latency_s=heavy_tail(3), correct=unmixed(0.4, 3))
        async with collector(rollout_config(max_staleness=staleness), runner=runner, num_batches=4) as groups:
            for version in range(1, 5):
                batch = await groups.next_batch()
                await asyncio.sleep(5.0)
                groups.release(batch, version=version)
            await asyncio.sleep(5.0)
            return groups.accounting

    accounts = run_virtual(main())
    assert (accounts.trained, accounts.in_flight) == (8, 0)
    assert set(accounts.dropped) <= {"all_correct", "all_wrong"}


def test_leaving_the_context_cancels_what_runs():
    async def main():
        runner = TimedRunner(latency_s=lambda task, member: 1e6)
        async with collector(rollout_config(max_staleness=2), runner=runner) as groups:
            await asyncio.sleep(1)
        return runner, groups

    runner, groups = run_virtual(main())
    assert runner.running == 0
    assert runner.cancelled == 6 * 4
    check_accounting(groups)


def test_metrics_count_dropped_groups_too():
    async def main():
        runner = TimedRunner(correct=lambda task, attempt, member: int(task.id[1:]) < 2 or member == 0)
        async with collector(rollout_config(), runner=runner, version=4) as groups:
            await groups.next_batch()
            return groups.metrics()

    metrics = run_virtual(main())
    assert metrics["rollout/groups_kept"] == 2
    assert metrics["rollout/dropped_all_correct"] == metrics["rollout/groups_dropped"] == 2
    assert metrics["rollout/rollouts"] == 16
    assert metrics["rollout/rollouts_per_useful"] == 2
    assert metrics["rollout/accuracy"] == pytest.approx((8 + 2) / 16)
    assert metrics["rollout/batch_accuracy"] == pytest.approx(0.25)
    assert metrics["rollout/staleness_max"] == 0
    assert metrics["rollout/tokens_per_s"] == pytest.approx(16 * 3 / 2.0)
    assert metrics["rollout/stop_answered"] == 1.0
