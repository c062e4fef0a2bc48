"""Evaluation: one greedy and n sampled episodes a question, lost and invalid ones left out, rows on disk and figures in the metrics."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter

import pytest

from tests.rollout_fakes import TimedRunner, make_member, make_task
from tests.runs_fakes import FakeLearner, make_config, make_services, open_telemetry
from tests.virtual_time import run_virtual
from webdancer.data.tasks import TaskStream
from webdancer.evaluation.metrics import summary
from webdancer.evaluation.results import read_evaluation
from webdancer.runs.evaluate import MAX_LOST, BoundedRunner, evaluate, evaluate_stage, evaluation_row
from webdancer.runs.rl import train
from webdancer.telemetry.recorder import read_trajectories
from webdancer.telemetry.telemetry import read_metrics
from webdancer.types import EpisodeLost, Sampling

TASKS = [dataclasses.replace(make_task(index), metadata={"type": "hop", "hops": 1 + index % 2}) for index in range(4)]
WARM = Sampling(temperature=0.6, top_p=0.95)


class Runner(TimedRunner):
    """Keeps the sampling of every episode; `lost` and `invalid` hold (task, member)."""

    def __init__(self, *, lost=(), invalid=(), **rest) -> None:
        super().__init__(**rest)
        self.lost, self.invalid = set(lost), set(invalid)
        self.sampling: dict[tuple[str, int], list[Sampling]] = {}

    async def run(self, task, *, member, attempt, sampling, resume_from=(), on_turn=None):
        self.sampling.setdefault((task.id, member), []).append(sampling)
        if (task.id, member) in self.lost:
            return EpisodeLost(task_id=task.id, member=member, attempt=attempt, reason="gone")
        scored = await super().run(task, member=member, attempt=attempt, sampling=sampling)
        return make_member(task, member=member, correct=scored.reward.answer > 0, valid=(task.id, member) not in self.invalid)


def rows_of(runner, *, num_samples=2):
    return run_virtual(evaluate(TASKS, runner, stage="s", version=3, num_samples=num_samples, sampling=WARM)).rows


def test_every_question_is_asked_once_greedily_and_n_times_sampled():
    runner = Runner(correct=lambda task, attempt, member: member == 0, latency_s=lambda task, member: 9.0 - int(task.id[1:]))
    rows = rows_of(runner)
    assert [row.task_id for row in rows] == ["t0", "t1", "t2", "t3"], "in the order of the tasks, whoever is first"
    assert {(row.greedy_correct, row.samples_correct) for row in rows} == {(True, (False, False))}
    for task in TASKS:
        assert runner.sampling[task.id, 0] == [Sampling(temperature=0.0)]
        assert runner.sampling[task.id, 1] == runner.sampling[task.id, 2] == [WARM]


def test_what_infrastructure_took_counts_nowhere():
    runner = Runner(correct=lambda *any: True, lost=[("t0", 0), ("t1", 1)], invalid=[("t2", 0), ("t3", 2)])
    rows = rows_of(runner)
    assert [(row.greedy_correct, row.samples_correct) for row in rows] == [
        (None, (True, True)),
        (True, (True,)),
        (None, (True, True)),
        (True, (True,)),
    ]
    assert len(runner.sampling["t0", 0]) == MAX_LOST
    assert rows[0].answer == "yes"


def test_a_question_of_which_nothing_came_back_is_a_row_without_a_verdict():
    rows = rows_of(Runner(lost=[("t0", member) for member in range(3)]))
    (row, *_) = rows
    assert (row.greedy_correct, row.samples_correct, row.answer, row.stop) == (None, (), None, "failed")
    assert (row.num_tool_calls, row.format_ok) == (None, None)
    assert summary(rows)["all/format"] == 1.0, "what infrastructure took is no fault of the policy's form"
    assert "all/format" not in summary([row])


@pytest.mark.parametrize(("hops", "read"), [(None, 0), ("two", 0), ("2", 2), (2.5, 0), ([1], 0), (3, 3)])
def test_hops_that_are_no_number_are_none(hops, read):
    task = dataclasses.replace(TASKS[0], metadata={"hops": hops})
    assert evaluation_row(task, None, []).hops == read


def test_a_repetition_penalty_set_by_hand_holds_for_held_out_questions(tmp_path):
    runner = Runner()
    config = make_config(tmp_path, "evaluation.repetition_penalty=1.2", "evaluation.num_samples=1")
    with open_telemetry(config) as telemetry:
        run_virtual(evaluate_stage(config, TASKS, runner, telemetry, stage="s", version=0))
    assert {sampling.repetition_penalty for (_, member), (sampling,) in runner.sampling.items() if member} == {1.2}


@pytest.mark.parametrize("num_tasks", [0, 2])
def test_a_stage_leaves_its_rows_and_its_figures(tmp_path, num_tasks):
    config = make_config(tmp_path, "evaluation.num_samples=2", "evaluation.temperature=0.6", f"evaluation.num_tasks={num_tasks}")
    runner = Runner(correct=lambda task, attempt, member: task.id == "t0")
    with open_telemetry(config) as telemetry:
        made = run_virtual(evaluate_stage(config, TASKS, runner, telemetry, stage="rl-5", version=7))
    asked = num_tasks or len(TASKS)
    assert read_evaluation(tmp_path / "evaluations" / "rl-5.json") == made
    assert (made.stage, made.version, len(made.rows)) == ("rl-5", 7, asked)
    recorded = list(read_trajectories(tmp_path))
    assert len(recorded) == 3 * asked
    assert {row["decision"] for row in recorded} == {"evaluated"}
    figures = read_metrics(tmp_path)["evaluation"][7]
    assert figures["evaluation/all/greedy"] == figures["evaluation/all/pass@1"] == pytest.approx(1 / asked)
    assert figures["evaluation/all/num_tasks"] == asked
    assert runner.sampling["t0", 1] == [WARM]


class FewPlaces(TimedRunner):
    """Places are given in the order in which they are asked for, as a pool does. Keeps (time, evaluation or rollout) of every start."""

    def __init__(self, places: int) -> None:
        super().__init__(latency_s=lambda task, member: 1.0)
        self.places = asyncio.Semaphore(places)
        self.starts: list[tuple[float, bool]] = []

    async def run(self, task, *, sampling, **settings):
        async with self.places:
            self.starts.append((asyncio.get_running_loop().time(), sampling.temperature != 1.0))
            return await super().run(task, sampling=sampling, **settings)


def test_rollouts_go_on_while_a_training_run_evaluates(tmp_path):
    """The evaluation has asked for everything before the first of them comes, and places are given in order."""
    runner = FewPlaces(8)

    async def both():
        bounded = BoundedRunner(runner, 4)
        held_out = asyncio.ensure_future(evaluate(TASKS, bounded, stage="s", version=1, num_samples=9, sampling=WARM))
        await asyncio.sleep(0.5)
        rollouts = [runner.run(task, member=member, attempt=0, sampling=Sampling()) for task in TASKS for member in range(4)]
        await asyncio.gather(*rollouts)
        assert not held_out.done()
        return await held_out

    assert len(run_virtual(both()).rows) == 4
    evaluating = [time for time, evaluates in runner.starts if evaluates]
    assert len(evaluating) == 40
    assert [time for time, evaluates in runner.starts if not evaluates][-1] < evaluating[-1] / 2


def test_a_training_run_evaluates_on_half_of_its_places(tmp_path):
    places = ["rollout.num_workers=1", "rollout.episodes_per_worker=8"]
    config = make_config(tmp_path, "rl.num_steps=2", "rl.evaluate_every=1", "evaluation.num_samples=9", *places)
    runner = FewPlaces(1000)
    heldout = [dataclasses.replace(task, id=f"h{task.id}") for task in TASKS]
    with open_telemetry(config) as telemetry:
        run_virtual(train(config, TaskStream(TASKS, seed=0), heldout, make_services(FakeLearner([]), runner=runner), telemetry))
    at_once = Counter(time for time, evaluates in runner.starts if evaluates)
    assert set(at_once.values()) == {4}
    assert len(read_evaluation(tmp_path / "evaluations" / "rl-1.json").rows) == 4


def test_rollouts_start_while_the_loop_evaluates(tmp_path):
    """The whole loop with a step of slack: groups that do not count are replaced while held-out questions are being asked."""
    places = ["rollout.num_workers=1", "rollout.episodes_per_worker=8", "rollout.max_staleness=1"]
    config = make_config(tmp_path, "rl.num_steps=2", "rl.evaluate_every=1", "evaluation.num_samples=9", *places)
    runner = FewPlaces(8)
    runner.correct = lambda task, attempt, member: member % 2 == 0 or int(task.id.strip("ht")) % 6 > 0  # five of six groups are dropped
    tasks, heldout = [make_task(index) for index in range(60)], [dataclasses.replace(task, id=f"h{task.id}") for task in TASKS]
    with open_telemetry(config) as telemetry:
        run_virtual(train(config, TaskStream(tasks, seed=0), heldout, make_services(FakeLearner([]), runner=runner), telemetry))
    evaluating = [time for time, evaluates in runner.starts if evaluates]
    assert len(evaluating) == 40
    meanwhile = [time for time, evaluates in runner.starts if not evaluates and evaluating[0] < time < evaluating[-1]]
    assert len(set(meanwhile)) > 3, "at several times between the evaluation's first episode and its last"


def test_without_samples_only_the_greedy_episode_runs():
    runner = Runner()
    rows = rows_of(runner, num_samples=0)
    assert {member for _, member in runner.sampling} == {0}
    assert all(row.samples_correct == () and row.greedy_correct for row in rows)
