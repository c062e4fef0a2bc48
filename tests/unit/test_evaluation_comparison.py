"""Figures over rounds, and tests of whether two evaluations differ, against what can be counted by hand or by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from webdancer.errors import DataError
from webdancer.evaluation.attempts import Attempt
from webdancer.evaluation.comparison import agreement, compare, mcnemar_p, permutation_p
from webdancer.evaluation.round_metrics import accuracy, majority, round_figures, same_answers
from webdancer.evaluation.round_table import agreement_text, comparison_text, table
from webdancer.types import JudgeUse, Verdict


def attempt(id, round, right, *, answer="yes", **rest):
    status = {True: "correct", False: "wrong", None: "unknown"}[right]
    return Attempt(task_id=id, round=round, status=status, stop="answered", answer=answer, **rest)


def rounds_of(outcomes):
    return [attempt(id, round, right) for id, tried in outcomes.items() for round, right in enumerate(tried, start=1)]


def test_accuracy_in_every_sense():
    found = accuracy(rounds_of({"a": [True, False, False], "b": [True, True, False], "c": [False] * 3, "d": [True, None, True]}), rounds=3)
    assert found.pass_at_1 == pytest.approx((3 / 4, 1 / 3, 1 / 4))
    assert (found.avg, found.best) == pytest.approx(((3 / 4 + 1 / 3 + 1 / 4) / 3, 3 / 4))
    assert found.pass_at_k.mean == pytest.approx(2 / 3), "without d, of which one verdict is missing"
    assert found.cons_at_k.mean == pytest.approx((1 / 3 + 2 / 3 + 0 + 1) / 4)
    assert found.num_questions == 4


def test_questions_that_all_agree_prove_little():
    found = accuracy(rounds_of({str(n): [False] for n in range(10)}), rounds=1).pass_at_k
    assert (found.mean, found.low, found.high) == (0.0, 0.0, pytest.approx(0.2775, abs=1e-3))


@pytest.mark.parametrize(
    ("tried", "share"),
    [
        ([("Paris", True), ("paris.", True), ("Lyon", False)], 1.0),
        ([("Paris", True), ("Lyon", False), ("Lyon", False)], 0.0),
        ([("Paris", True), ("Lyon", False)], 0.5),
        ([(None, False), (None, False), ("Paris", True)], 1.0),
        ([(None, False)], 0.0),
        ([("$5 million", True), ("5,000,000", True), ("6 million", False), ("7", False)], 1.0),
        ([("March 5, 1990", False), ("1990-03-05", False), ("March 1990", True)], 0.0),
        ([("Nice and Lyon", True), ("Lyon; Nice", True), ("Lyon", False)], 1.0),
        ([("UK", True), ("United Kingdom", True), ("France", False), ("Spain", False)], 0.5),
    ],
)
def test_majority_vote_is_by_answer_not_by_verdict(tried, share):
    assert majority([attempt("a", round, right, answer=answer) for round, (answer, right) in enumerate(tried, start=1)]) == share


def test_two_right_answers_of_a_question_are_one_answer():
    tried = [
        attempt("a", 1, True, answer="the U.K."),
        attempt("a", 2, True, answer="United Kingdom"),
        attempt("a", 3, False, answer="France"),
    ]
    assert majority(tried) == pytest.approx(2 / 3), "nobody says that they are aliases"
    assert majority(tried, gold=("United Kingdom", "U.K.")) == 1.0
    figures = round_figures(tried, rounds=3, gold={"a": ("United Kingdom", "U.K.")})
    assert figures.accuracy.majority_at_k.mean == 1.0


ANSWERS = st.lists(st.sampled_from(["12", "$12", "12 %", "twelve", "1990-03-05", "March 5, 1990", "Lyon, Nice", "Nice; Lyon", "Lyon", ""]))


@given(ANSWERS, st.randoms())
def test_which_answers_are_the_same_does_not_depend_on_their_order(answers, random):
    order = random.sample(range(len(answers)), len(answers))
    groups = same_answers(answers)
    assert sorted(index for group in groups for index in group) == list(range(len(answers)))
    shuffled = [sorted(order[index] for index in group) for group in same_answers([answers[index] for index in order])]
    assert sorted(shuffled) == sorted(groups)


@given(st.lists(st.lists(st.sampled_from([True, False, None]), min_size=3, max_size=3), min_size=1, max_size=8))
def test_figures_are_shares_and_in_order(outcomes):
    found = accuracy(rounds_of(dict(enumerate(outcomes))), rounds=3)
    known = [value for value in (found.avg, found.best, found.cons_at_k.mean, found.majority_at_k.mean) if not math.isnan(value)]
    assert all(0 <= value <= 1 for value in known)
    if all(right is not None for tried in outcomes for right in tried):
        assert found.avg == pytest.approx(found.cons_at_k.mean)
        assert found.cons_at_k.mean <= found.best + 1e-12
        assert found.best <= found.pass_at_k.mean + 1e-12


def test_the_table_says_what_it_took():
    attempts = [
        attempt(
            "a",
            1,
            True,
            calls={"search": 2, "visit": 1},
            num_actions=4,
            num_tokens=100,
            num_policy_tokens=40,
            usd=0.01,
            labels={"level": "1"},
        ),
        attempt("b", 1, False, answer=None, calls={"search": 1}, num_actions=2, num_tokens=50, num_policy_tokens=20, labels={"level": "2"}),
    ]
    text = table(round_figures(attempts, rounds=1))
    assert "level 1" in text
    assert "3.0 actions, 2.0 tool calls (1.5 search, 0.5 visit), 75.0 tokens, 30.0 of them the policy's; tools cost $0.01" in text
    assert "no verdict 0.0 %, no answer 50.0 %" in text
    lost = Attempt(task_id="a", round=1, status="unknown", stop="failed")
    assert "no verdict 100.0 %, no answer -" in table(round_figures([lost], rounds=1))


@hypothesis_settings(max_examples=30)
@given(st.lists(st.sampled_from([-1.0, -1 / 3, 0.0, 1 / 3, 1.0]), max_size=10))
def test_the_permutation_test_is_the_enumeration(differences):
    values = [value for value in differences if value]
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    assert permutation_p(differences) == pytest.approx(sum(one >= abs(sum(values)) - 1e-9 for one in sums) / len(sums))


def test_many_differences_are_drawn():
    assert permutation_p([1.0] * 40) < 1e-4
    assert permutation_p([1.0, -1.0] * 20) == 1.0
    assert permutation_p([1.0] * 14 + [-1.0] * 6) == pytest.approx(mcnemar_p(14, 6), abs=5e-3), "the same test, where all is 0 or 1"


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 6, 2 / 64), (10, 2, 158 / 4096), (5, 5, 1.0), (2000, 2000, 1.0)],
)
def test_mcnemars_exact_test(only_first, only_second, p):
    assert mcnemar_p(only_first, only_second) == mcnemar_p(only_second, only_first) == pytest.approx(p)


def test_two_models_are_compared_on_the_questions_that_both_have():
    first = rounds_of({"a": [True, False], "b": [False, False], "c": [True, None], "only here": [True, True]})
    second = rounds_of({"a": [True, True], "b": [True, False], "c": [False, False], "d": [True, True]})
    found = compare(first, second)
    assert (found.num_questions, found.first, found.second) == (3, 0.5, 0.5)
    assert found.difference.mean == pytest.approx(0.0)
    assert (found.only_first, found.only_second, found.mcnemar_p) == (1, 1, 1.0)
    assert "3 questions: first 50.0 %, second 50.0 %" in comparison_text(found)
    with pytest.raises(DataError, match="--compare: must name two evaluations of the same questions"):
        compare(first[:2], rounds_of({"z": [True]}))


def test_a_large_difference_has_a_small_p_value():
    first = rounds_of({str(index): [False] * 3 for index in range(30)})
    second = rounds_of({str(index): [index % 2 == 0] * 3 for index in range(30)})
    found = compare(first, second)
    assert found.p_value == found.mcnemar_p == pytest.approx(2 / 2**15)
    assert found.difference.low > 0.3


def agreed(pairs):
    return agreement([first for first, _ in pairs], [Verdict(status=second) for _, second in pairs])


def test_agreement_of_two_judges():
    pairs = [("correct", "correct")] * 40 + [("wrong", "wrong")] * 40 + [("correct", "wrong")] * 15 + [("wrong", "correct")] * 5
    found = agreed([*pairs, ("unknown", "correct")])
    assert (found.num_decided, found.agreement.mean) == (100, 0.8)
    by_chance = 0.55 * 0.45 + 0.45 * 0.55
    assert found.kappa == pytest.approx((0.8 - by_chance) / (1 - by_chance))
    assert "15 correct/wrong" in agreement_text(found)
    assert "1 unknown/correct" in agreement_text(found)
    assert math.isnan(agreed([("correct", "correct")]).kappa)
    with pytest.raises(DataError, match="--judge-agreement: must have answers"):
        agreed([("unknown", "wrong")])


def test_what_the_second_judge_took_is_said():
    use = JudgeUse(requests=2, prompt_tokens=900, completion_tokens=100, usd=0.25)
    found = agreement(["correct"] * 2, [Verdict(status="correct", use=use)] * 2)
    assert "judge: 4 requests, 2,000 tokens, $0.50 in all" in agreement_text(found)
    assert "judge:" not in agreement_text(agreed([("correct", "correct")])).partition("recorded/this judge:")[2]
