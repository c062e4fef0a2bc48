"""Beliefs about pass rates, and the choice of questions that follows from them: right by the book, pure, resumable."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rollout_fakes import CountingTasks, CyclingTasks, make_member
from webdancer.config import RolloutConfig
from webdancer.rollout.curriculum import MAX_SKIPPED, Curriculum
from webdancer.rollout.pass_rates import PassRates, mixed_probability, right_probabilities
from webdancer.rollout.stages import StagePlan
from webdancer.types import Group, Task


def question(index: int, hops: int = 1) -> Task:
    return Task(id=f"t{index}", question="?", answers=("yes",), source="s", metadata={"type": "hop", "hops": hops})


def outcome(task: Task, *correct: bool, valid: bool = True) -> Group:
    members = tuple(make_member(task, member=i, correct=c, valid=valid) for i, c in enumerate(correct))
    return Group(task=task, members=members, attempt=0, start_version=0)


def curriculum(*, seed: int = 0, size: int = 8, **switches: bool) -> Curriculum:
    return Curriculum(RolloutConfig(group_size=size, **(switches or {"curriculum": True})), seed=seed)


@given(a=st.floats(0.05, 30), b=st.floats(0.05, 30), size=st.integers(2, 16))
def test_group_outcomes_are_beta_binomial(a, b, size):
    counts = right_probabilities(a, b, size)
    assert sum(counts) == pytest.approx(1.0)
    assert sum(k * p for k, p in enumerate(counts)) == pytest.approx(size * a / (a + b))
    assert mixed_probability(a, b, size) == pytest.approx(sum(counts[1:-1]), abs=1e-12)


def test_under_a_uniform_belief_every_count_is_equally_likely():
    assert right_probabilities(1.0, 1.0, 4) == pytest.approx([0.2] * 5)
    assert mixed_probability(1.0, 1.0, 8) == pytest.approx(7 / 9)


def test_evidence_adds_up_and_fades_back_to_the_kind():
    rates = PassRates()
    task, other = question(0), question(1)
    before = rates.posterior(task)
    rates.observe(task, right=7, wrong=1)
    a, b = rates.posterior(task)
    prior = rates.posterior(other)
    assert (a - prior[0], b - prior[1]) == pytest.approx((7.0, 1.0))
    assert prior[0] / sum(prior) > before[0] / sum(before), "questions like it look easier, too"
    rates.version += 500
    assert rates.posterior(task) == pytest.approx(before, abs=1e-3)


def test_kinds_learn_their_distribution_from_first_meetings_only():
    rates, draw = PassRates(), random.Random(0)
    for index in range(3000):
        p = draw.betavariate(0.4, 0.4) if index % 2 else draw.betavariate(9.0, 3.0)
        right = sum(draw.random() < p for _ in range(8))
        rates.observe(question(index, hops=index % 2), right=right, wrong=8 - right)
    even, uneven = rates.posterior(question(9999, hops=1)), rates.posterior(question(9999, hops=0))
    assert even == pytest.approx((0.4, 0.4), rel=0.2)
    assert uneven == pytest.approx((9.0, 3.0), rel=0.3)
    for _ in range(100):
        rates.observe(question(0, hops=0), right=0, wrong=8)
    assert rates.posterior(question(9999, hops=0)) == pytest.approx(uneven)
    rates.version += 120
    rates.observe(question(2, hops=0), right=0, wrong=8)
    assert rates.posterior(question(9999, hops=0))[0] < uneven[0], "as good as never met"


def test_kinds_look_the_same_where_groups_that_agree_end_early():
    """Learned from all members of such groups, this kind would look as even as can be: a strength of 19."""
    chosen, draw = curriculum(staged_groups=True), random.Random(0)
    plan = StagePlan(size=8, stop_right=3)
    for index in range(1500):
        p = draw.betavariate(2.0, 0.4)
        correct = [draw.random() < p for _ in range(8)]
        task = question(index)
        chosen.observe(index, outcome(task, *(correct[:3] if all(correct[:3]) else correct)), kept=not all(correct[:3]), plan=plan)
        if index % 500 == 499:
            chosen.advance()
    a, b = chosen._rates.posterior(question(9999))
    assert (a / (a + b), a + b) == (pytest.approx(2.0 / 2.4, rel=0.03), pytest.approx(2.4, rel=0.25))


def test_what_was_seen_since_the_last_weights_is_saved_too():
    """Its questions have left the stream, and would be unknown when they come again."""
    first, second = curriculum(), curriculum()
    before = first.expected_mixed(question(0))
    first.observe(0, outcome(question(0), *[False] * 8), kept=False)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.expected_mixed(question(0)) == before, "but it counts only from the next ones on"
    first.advance()
    second.advance()
    assert second.expected_mixed(question(0)) == first.expected_mixed(question(0)) < before


def test_what_cannot_be_mixed_is_seldom_asked_and_what_is_mixed_often():
    chosen = curriculum()
    tasks = CyclingTasks(3)
    for _ in range(5):
        for index, right in enumerate((8, 4, 0)):
            task = Task(id=f"t{index}", question="?", answers=("yes",))
            chosen.observe(index, outcome(task, *[True] * right, *[False] * (8 - right)), kept=0 < right < 8)
        chosen.advance()
    asked = [chosen.choose(tasks).id for _ in range(300)]
    assert asked.count("t1") > 0.9 * len(asked)
    assert chosen.skipped() > 300
    assert chosen.skipped() == 0
    for _ in range(200):
        chosen.advance()
    assert {chosen.choose(tasks).id for _ in range(50)} == {"t0", "t1", "t2"}, "nothing is given up"


def test_choices_depend_on_seed_and_evidence_not_on_the_order_of_arrival():
    groups = [outcome(question(i), *[random.Random(i).random() < i / 12] * 3, i % 2 == 0) for i in range(12)]

    def choices(seed, order):
        chosen = curriculum(seed=seed)
        for number in order:
            chosen.observe(number, groups[number], kept=number % 3 == 0)
        chosen.advance()
        tasks = CyclingTasks(12)
        return [chosen.choose(tasks).id for _ in range(60)]

    forwards = choices(1, range(12))
    assert choices(1, reversed(range(12))) == forwards
    assert choices(2, range(12)) != forwards


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), stop=st.integers(1, 5), staged=st.booleans())
def test_a_saved_curriculum_goes_on_as_if_it_had_never_stopped(seed, stop, staged):
    def step(chosen, tasks, number):
        made = []
        for offset in range(4):
            task = chosen.choose(tasks)
            made.append((task.id, chosen.plan(task)))
            draw = random.Random(f"{seed}/{number}/{offset}")
            chosen.observe(offset, outcome(task, *[draw.random() < 0.7 for _ in range(8)]), kept=draw.random() < 0.5)
        chosen.advance()
        return made

    whole, whole_tasks = curriculum(seed=seed, curriculum=True, staged_groups=staged), CyclingTasks(9)
    wanted = [step(whole, whole_tasks, number) for number in range(6)]
    first, tasks = curriculum(seed=seed, curriculum=True, staged_groups=staged), CyclingTasks(9)
    found = [step(first, tasks, number) for number in range(stop)]
    second = curriculum(seed=seed, curriculum=True, staged_groups=staged)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [step(second, tasks, number) for number in range(stop, 6)]
    assert found == wanted


def test_off_it_is_the_plain_stream_with_whole_groups_and_no_state():
    plain = curriculum(curriculum=False)
    tasks = CountingTasks(limit=20)
    plain.observe(0, outcome(question(0), True, True), kept=False)
    plain.advance()
    asked = list(itertools.takewhile(lambda task: task is not None, (plain.choose(tasks) for _ in range(30))))
    assert [task.id for task in asked] == [f"t{i}" for i in range(20)]
    assert plain.plan(question(0)) == StagePlan(size=8)
    assert plain.state_dict() == {}


def test_stages_alone_pass_over_nothing():
    staged = curriculum(staged_groups=True)
    tasks = CountingTasks()
    assert [staged.choose(tasks).id for _ in range(5)] == ["t0", "t1", "t2", "t3", "t4"]
    task = question(0)
    for number in range(6):
        staged.observe(number, outcome(task, *[True] * 8), kept=False)
    staged.observe(9, outcome(question(1), True, False), kept=True)
    staged.advance()
    assert staged.plan(task).stop_right > 0
    assert staged.plan(question(1)).stop_right == 0


def test_a_hopeless_stream_is_not_searched_for_ever():
    hopeless = curriculum()
    task = question(0)
    for number in range(600):
        hopeless.observe(number, outcome(task, *[True] * 8), kept=False)
    hopeless.advance()

    class Same:
        given = 0

        def __next__(self):
            self.given += 1
            return task

    assert hopeless.choose(Same()) == task
    assert hopeless.skipped() <= MAX_SKIPPED


def test_invalid_members_are_no_evidence():
    chosen = curriculum()
    before = chosen.expected_mixed(question(0))
    chosen.observe(0, outcome(question(0), *[False] * 8, valid=False), kept=False)
    chosen.advance()
    assert chosen.expected_mixed(question(0)) == before
