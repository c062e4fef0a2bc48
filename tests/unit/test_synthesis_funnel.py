"""The funnel: each stage alone, and that validity is what the reward calls well-formed."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import answer, make_completion, search
from webdancer.agent.actions import parse_action, render_action
from webdancer.config import QualityConfig
from webdancer.rewards.reward import format_score
from webdancer.synthesis.funnel import (
    Attempt,
    Step,
    calls_after_answer,
    correctness,
    most_repeated,
    quality,
    redundant_calls,
    sift,
    validity,
)
from webdancer.types import ToolCall, Turn, Verdict

RIGHT, WRONG, UNKNOWN = (Verdict(status=status) for status in ("correct", "wrong", "unknown"))
QUALITY = QualityConfig()


def attempt(*turns, answers=("Bana School",)):
    """Turns are texts, or (text, observation)."""
    pairs = [turn if isinstance(turn, tuple) else (turn, None) for turn in turns]
    steps = tuple(Step(text=text, action=parse_action(text), observation=observation) for text, observation in pairs)
    return Attempt(question="q?", answers=answers, steps=steps)


def visit(url, goal="x"):
    return render_action(ToolCall(name="visit", arguments={"url": [url], "goal": goal}), thought="Read it.")


GOOD = attempt((search(["Karo Mil"]), "Karo Mil"), (visit("/k"), "Bana School"), answer("Bana School"))


def test_a_good_attempt_passes_every_stage():
    assert sift(GOOD, RIGHT, QUALITY).stage == "passed"
    assert GOOD.num_actions == 3


UNFINISHED = "<think>\nx\n</think>\n<tool_call>\n{"
FORMS = [
    (answer("a"), ""),
    (answer("a", thought=None), "malformed"),
    (search("a", thought=None), "malformed"),
    (f"{search('a')} and more", "malformed"),
    (f"{search('a')}\n<tool_response>\nmade up\n</tool_response>\n{answer('a')}", "simulated_observation"),
    (answer("a", thought="<tool_response>\nmade up\n</tool_response>"), "simulated_observation"),
    (answer("a", thought="A <tool_response> is what I wait for."), ""),
    (UNFINISHED, "malformed"),
    ("", "malformed"),
    (search("a"), "no_answer"),
    (f"{search('a')}\n{answer('a')}", "malformed"),
    (search("a").replace('"search"', '"calculate"'), "unknown_tool"),
]


@pytest.mark.parametrize(("text", "reason"), FORMS)
def test_validity_says_what_is_wrong_with_the_form(text, reason):
    decision = validity(attempt((search("b"), "Nothing."), text))
    assert (decision.keep, decision.reason) == (not reason, reason)


def test_a_special_token_in_a_thought_is_nothing_that_sft_can_read():
    text = search("a").replace("<think>", "<think>\n<|fim_pad|>", 1)
    assert validity(attempt((text, "Nothing."), answer("a"))).reason == "malformed"
    assert validity(attempt((search("a") + "<|im_end|>", "Nothing."), answer("a"))).keep


def test_an_answer_is_last_or_it_is_none():
    assert validity(attempt((answer("a"), "x"), answer("b"))).reason == "no_answer"
    assert validity(attempt()).reason == "no_answer"


def test_a_turn_that_was_cut_is_not_valid():
    steps = (*GOOD.steps[:-1], dataclasses.replace(GOOD.steps[-1], cut=True))
    assert validity(dataclasses.replace(GOOD, steps=steps)).reason == "cut_off"


@given(st.lists(st.tuples(st.sampled_from([text for text, _ in FORMS]), st.booleans()), max_size=4))
def test_validity_is_the_format_score_and_known_tools(turns):
    texts = [(text, ends) for text, ends in turns if "calculate" not in text]
    scored = [Turn(completion=make_completion(text, ends=ends), action=parse_action(text)) for text, ends in texts]
    steps = tuple(Step(text=turn.completion.text, action=turn.action, cut=turn.completion.finish != "stop") for turn in scored)
    assert validity(Attempt(question="q?", answers=("a",), steps=steps)).keep == bool(format_score(scored))


@pytest.mark.parametrize(("verdict", "keep", "reason"), [(RIGHT, True, ""), (WRONG, False, "wrong"), (UNKNOWN, False, "no_verdict")])
def test_a_missing_verdict_is_not_a_wrong_answer(verdict, keep, reason):
    decision = correctness(verdict)
    assert (decision.keep, decision.reason) == (keep, reason)
    assert sift(GOOD, verdict, QUALITY).is_undecided == (reason == "no_verdict")


def test_an_outage_comes_before_everything():
    outcome = sift(attempt(), RIGHT, QUALITY, outage="turn 1: tool_timeout")
    assert (outcome.stage, outcome.is_undecided) == ("outage", True)
    assert not any(outcome.is_kept(keep) for keep in ("all", "valid", "correct", "quality"))


TEN = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("texts", "times"), [([TEN] * 5, 5), ([f"{TEN} {TEN}"], 2), ([TEN[4:]], 0), (["one two", "three " * 8], 0), ([], 0)]
)
def test_repetition_counts_ten_words_in_a_row(texts, times):
    assert most_repeated(texts)[0] == times


def test_repetition_counts_characters_where_a_script_has_no_spaces():
    assert most_repeated(["春夏秋冬東西南北上下" * 3])[0] == 3


@given(st.lists(st.text(alphabet="ab ", max_size=60), max_size=3))
def test_repetition_is_what_counting_by_hand_gives(texts):
    runs = [tuple(words[start : start + 10]) for words in map(str.split, texts) for start in range(len(words) - 9)]
    assert most_repeated(texts)[0] == max((runs.count(run) for run in runs), default=0)


def test_the_models_own_words_alone_count_as_repetition():
    said = [(search([f"q{index}"], thought=TEN), TEN * 30) for index in range(4)]
    assert quality(attempt(*said, answer("a")), QUALITY).keep
    assert quality(attempt(*said, answer("a", thought=TEN)), QUALITY).reason == "repetition"


def test_too_few_and_too_many_actions():
    assert quality(attempt(answer("a")), QUALITY).reason == "too_few_actions"
    assert quality(GOOD, QualityConfig(max_actions=2)).reason == "too_many_actions"
    assert quality(GOOD, QualityConfig(max_actions=3)).keep


@pytest.mark.parametrize(
    ("calls", "redundant"),
    [
        ([search(["a", "b"]), search(["B", " a "])], 1),
        ([search(["a"]), search(["a", "b"])], 0),
        ([search(["a", "b"]), search("a"), search("b")], 2),
        ([visit("/k", "born"), visit("/k", "died")], 0),
        ([visit("/k", "born"), visit("/k", "Born")], 1),
        ([search("a"), visit("a")], 0),
    ],
)
def test_a_call_is_redundant_when_all_it_asks_for_was_asked(calls, redundant):
    tried = attempt(*((call, "Nothing.") for call in calls), answer("a"))
    assert redundant_calls(tried) == redundant
    assert quality(tried, QUALITY).reason == ("redundant_call" if redundant else "")


def test_to_try_again_after_an_error_is_not_redundant():
    failed = Step(text=search("a"), action=parse_action(search("a")), observation="The tool did not answer.", failed=True)
    again = dataclasses.replace(failed, observation="Found.", failed=False)
    assert redundant_calls(Attempt(question="", answers=("x",), steps=(failed, again))) == 0
    assert redundant_calls(Attempt(question="", answers=("x",), steps=(failed, again, again))) == 1


@pytest.mark.parametrize(
    ("answers", "observations", "late"),
    [
        (("Bana School",), ["The school is the Bana school.", "a", "b"], 2),
        (("Bana School",), ["Bana Schoolhouse", "a", "b"], 0),
        (("1984",), ["In 1984 it was", "a", "b"], 0),
        (("no", "Bana School"), ["There is no more", "Bana School"], 0),
        (("Bana School",), ["a", "b", "Bana School"], 0),
        (("北京大学",), ["他毕业于北京大学。", "a", "b"], 2),
    ],
)
def test_calls_after_the_answer_was_seen(answers, observations, late):
    tried = attempt(*((search([f"q{index}"]), text) for index, text in enumerate(observations)), answer("x"), answers=answers)
    assert calls_after_answer(tried) == late
    assert quality(tried, QualityConfig(max_calls_after_answer=1)).reason == ("over_action" if late > 1 else "")
