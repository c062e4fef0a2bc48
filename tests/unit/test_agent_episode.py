"""One episode: every way to end, the forced answer, room for observations, and resuming."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeToolbox, ScriptedPolicy, answer, make_task, make_tokenizer, search
from webdancer.agent.episode import TOOL_CRASHED, TOOL_TIMEOUT, run_episode, truncate
from webdancer.agent.prompt import TRUNCATED, force_text
from webdancer.config import EpisodeConfig, PromptConfig
from webdancer.errors import EngineFault
from webdancer.types import FinalAnswer, MalformedAction, Sampling, StopReason, ToolCall, ToolResult

TOKENIZER = make_tokenizer()
LIMITS = EpisodeConfig(max_turns=6, max_tool_calls=5, max_tokens=4096, max_turn_tokens=512, timeout_s=20.0, tool_timeout_s=10.0)
BRIEF = PromptConfig(style="brief")
FORCE = "No more calls. Answer now."


async def episode(script, toolbox=None, *, limits=LIMITS, prompt=BRIEF, policy=None, resume_from=(), on_turn=None, task=None):
    return await run_episode(
        task or make_task(),
        policy=policy or ScriptedPolicy(script),
        toolbox=toolbox or FakeToolbox("school: Bana School."),
        tokenizer=TOKENIZER,
        limits=limits,
        prompt=prompt,
        sampling=Sampling(),
        member=2,
        attempt=1,
        resume_from=resume_from,
        on_turn=on_turn,
    )


def text_of(trajectory, mask=None):
    return TOKENIZER.decode(trajectory.token_ids[slice(None) if mask is None else mask].tolist())


async def test_a_search_and_an_answer():
    policy, toolbox = ScriptedPolicy([search(["Karo Mil"]), answer("Bana School")], version=7), FakeToolbox("school: Bana School.")
    trajectory = await episode([], toolbox, policy=policy)
    assert (trajectory.stop, trajectory.answer, trajectory.id) == (StopReason.ANSWERED, "Bana School", "t0/1/2")
    assert toolbox.calls == [ToolCall(name="search", arguments={"query": ["Karo Mil"]})]
    assert text_of(trajectory) == (
        "<|im_start|>system\nYou are a web agent.<|im_end|>\n<|im_start|>user\nWhat is the school of Karo Mil?<|im_end|>\n"
        '<|im_start|>assistant\n<think>\nLook it up.\n</think>\n<tool_call>\n{"name": "search", "arguments": {"query": ["Karo Mil"]}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nschool: Bana School.\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nNow I know.\n</think>\n<answer>Bana School</answer><|im_end|>"
    )
    assert text_of(trajectory, trajectory.loss_mask) == search(["Karo Mil"]) + "<|im_end|>" + answer("Bana School") + "<|im_end|>"
    assert set(trajectory.versions[trajectory.loss_mask]) == {7}
    assert policy.sessions == ["t0/1/2", "t0/1/2"]
    # Tokens in, tokens out: each prompt is a prefix of the trajectory.
    for prompt in policy.prompts:
        assert trajectory.token_ids[: len(prompt)].tolist() == list(prompt)


async def test_a_malformed_action_is_told_so_and_the_episode_goes_on():
    toolbox = FakeToolbox()
    trajectory = await episode([search("a") + search("b"), "hm", answer("x")], toolbox)
    assert trajectory.stop is StopReason.ANSWERED
    assert toolbox.calls == []
    assert [type(turn.action) for turn in trajectory.turns] == [MalformedAction, MalformedAction, FinalAnswer]
    assert trajectory.turns[0].result.error == "malformed_action"
    assert "<tool_response>\n[invalid action] more than one action in a turn: tool_call, tool_call.\n</tool_response>" in text_of(
        trajectory
    )


async def test_three_malformed_actions_in_a_row_end_it():
    trajectory = await episode(["a", "b", search("x"), "c", "d", "e", answer("never")], limits=replace(LIMITS, max_turns=20))
    assert (trajectory.stop, trajectory.answer, len(trajectory.turns)) == (StopReason.MALFORMED, None, 6)


async def test_a_call_cut_by_the_length_limit_is_not_run():
    toolbox = FakeToolbox()
    trajectory = await episode([search("Karo Mil " * 30), answer("x")], toolbox, limits=replace(LIMITS, max_turn_tokens=60))
    assert toolbox.calls == []
    first = trajectory.turns[0]
    assert first.completion.finish == "length"
    assert isinstance(first.action, MalformedAction)
    end = trajectory.token_ids.tolist().index(first.completion.token_ids[-1], 30)
    assert TOKENIZER.eos_id in trajectory.token_ids[end : end + 40]


async def test_after_the_last_turn_an_answer_is_forced():
    for final, expected in ((answer("x"), "x"), (search("again"), None), ("nothing", None)):
        toolbox = FakeToolbox()
        trajectory = await episode([search("a"), search("b"), final], toolbox, limits=replace(LIMITS, max_turns=2))
        assert (trajectory.stop, trajectory.answer, len(trajectory.turns)) == (StopReason.MAX_TURNS, expected, 3)
        assert len(toolbox.calls) == 2
        assert text_of(trajectory).count(FORCE) == 1
        assert f"</tool_response>\n{FORCE}<|im_end|>\n<|im_start|>assistant\n{final}" in text_of(trajectory)


async def test_after_the_last_call_an_answer_is_forced():
    trajectory = await episode([search("a"), "hm", search("b"), answer("x")], limits=replace(LIMITS, max_tool_calls=2))
    assert (trajectory.stop, trajectory.answer, trajectory.num_tool_calls) == (StopReason.TOOL_BUDGET, "x", 2)


@given(size=st.integers(0, 3000), max_tokens=st.integers(300, 1200), max_turn_tokens=st.integers(20, 400), prompt=st.sampled_from([BRIEF]))
@settings(deadline=None, max_examples=60)
def test_the_context_is_never_exceeded(size, max_tokens, max_turn_tokens, prompt):
    limits = replace(LIMITS, max_tokens=max_tokens, max_turn_tokens=max_turn_tokens, max_turns=40, max_tool_calls=40)
    policy = ScriptedPolicy([search(f"q{n}", "thought " * 7) for n in range(60)])
    page = "<|im_end|></tool_response>é世 " * (size // 10)
    trajectory = asyncio.run(episode([], FakeToolbox(page), policy=policy, limits=limits, prompt=prompt))
    assert len(trajectory.token_ids) <= max_tokens
    assert trajectory.stop in (StopReason.MAX_TOKENS, StopReason.MAX_TURNS, StopReason.MALFORMED)
    assert all(len(asked) + budget <= max_tokens for asked, budget in zip(policy.prompts, policy.budgets, strict=True))
    if trajectory.stop is StopReason.MAX_TOKENS:
        assert text_of(trajectory).count(FORCE) == 1


async def test_a_long_page_is_cut_so_that_an_answer_has_room():
    limits = replace(LIMITS, max_tokens=1024)
    trajectory = await episode([search("a"), answer("x")], FakeToolbox("Bana School 世界. " * 2000), limits=limits)
    assert (trajectory.stop, trajectory.answer) == (StopReason.MAX_TOKENS, "x")
    shown = trajectory.turns[0].result.text
    assert shown.endswith(TRUNCATED)
    assert ("Bana School 世界. " * 2000).startswith(shown.removesuffix(TRUNCATED))
    assert 900 < len(trajectory.token_ids) <= 1024
    assert f"{TRUNCATED}\n</tool_response>\n{FORCE}<|im_end|>" in text_of(trajectory)


@pytest.mark.parametrize(("prompt", "max_tokens"), [(BRIEF, 512), (PromptConfig(), 4096)])
async def test_a_rambling_policy_is_still_asked_for_its_answer(prompt, max_tokens):
    policy = ScriptedPolicy([search("a", "thought " * max_tokens), answer("x")])
    limits = replace(LIMITS, max_tokens=max_tokens, max_turn_tokens=max_tokens)
    trajectory = await episode([], policy=policy, limits=limits, prompt=prompt)
    assert (trajectory.stop, trajectory.answer, len(trajectory.turns)) == (StopReason.MAX_TOKENS, "x", 2)
    assert trajectory.turns[0].completion.finish == "length"
    assert policy.budgets[1] >= 32
    assert len(trajectory.token_ids) <= max_tokens
    assert f"\n</tool_response>\n{force_text(prompt)}<|im_end|>" in text_of(trajectory)


async def test_a_prompt_without_room_asks_once_or_not_at_all():
    long = make_task(question="why " * 400)
    trajectory = await episode([answer("x")], task=long, limits=replace(LIMITS, max_tokens=len(TOKENIZER.encode("why " * 400)) + 90))
    assert (trajectory.stop, trajectory.answer, len(trajectory.turns)) == (StopReason.MAX_TOKENS, "x", 1)
    trajectory = await episode([], task=long, limits=replace(LIMITS, max_tokens=200))
    assert (trajectory.stop, trajectory.answer, trajectory.turns) == (StopReason.MAX_TOKENS, None, ())
    assert not trajectory.loss_mask.any()


@pytest.mark.parametrize("said", [search("a"), "hm"])
async def test_the_deadline_ends_a_slow_policy_after_the_turn_that_it_is_at(said):
    toolbox = FakeToolbox("school: Bana School.")
    slow = ScriptedPolicy([said] * 9, delay_s=0.05)
    trajectory = await episode([], toolbox, policy=slow, limits=replace(LIMITS, timeout_s=0.08))
    assert (trajectory.stop, trajectory.answer, len(trajectory.turns)) == (StopReason.TIMEOUT, None, 2)
    assert len(toolbox.calls) == (said != "hm"), "a call that comes too late is not run"
    assert trajectory.num_policy_tokens == sum(len(turn.completion.token_ids) for turn in trajectory.turns)


@pytest.mark.parametrize(("delay_s", "error"), [(0.1, None), (5.0, TOOL_TIMEOUT)])
async def test_at_the_deadline_a_tool_is_waited_for_and_one_that_hangs_is_not_the_policys_doing(delay_s, error):
    limits = replace(LIMITS, timeout_s=0.05, tool_timeout_s=0.2)
    trajectory = await episode([search("a")], FakeToolbox(delay_s=delay_s), limits=limits)
    assert trajectory.stop is StopReason.TIMEOUT
    (turn,) = trajectory.turns
    assert turn.result.error == error
    assert trajectory.num_policy_tokens == len(turn.completion.token_ids)


async def test_a_hanging_tool_is_an_observation():
    trajectory = await episode([search("a"), answer("x")], FakeToolbox(delay_s=5), limits=replace(LIMITS, tool_timeout_s=0.03))
    assert trajectory.stop is StopReason.ANSWERED
    assert trajectory.turns[0].result.error == TOOL_TIMEOUT
    assert trajectory.turns[0].result.latency_s >= 0.03


async def test_a_crashed_toolbox_fails_the_episode_not_the_program(caplog):
    trajectory = await episode([search("a"), answer("x")], FakeToolbox(RuntimeError("actor died")))
    assert trajectory.stop is StopReason.FAILED
    assert trajectory.turns[0].result.error == TOOL_CRASHED
    assert "actor died" in caplog.text


async def test_faults_of_the_engine_and_of_the_program_propagate():
    for error in (EngineFault("aborted"), ZeroDivisionError(), TimeoutError("not the episode's")):
        with pytest.raises(type(error)):
            await episode([search("a"), error])


async def test_a_tools_error_is_only_an_observation():
    trajectory = await episode([search("a"), answer("x")], FakeToolbox(ToolResult(text="No such tool.", error="unknown_tool", cached=True)))
    assert trajectory.turns[0].result == ToolResult(text="No such tool.", error="unknown_tool", cached=True)


async def test_a_made_up_response_is_cut_and_the_call_before_it_run():
    toolbox = FakeToolbox("real")
    made_up = search("a") + "\n<tool_response>\nfake\n</tool_response>\n" + answer("fake")
    trajectory = await episode([made_up, answer("x")], toolbox)
    assert toolbox.calls == [ToolCall(name="search", arguments={"query": "a"})]
    assert (trajectory.stop, trajectory.answer) == (StopReason.ANSWERED, "x")
    assert "fake" not in text_of(trajectory)
    assert trajectory.turns[0].completion.text.startswith(made_up)  # what was sampled stays on record


SCRIPTS = {
    "answered": [search("a"), "hm", search("b"), answer("x")],
    "max_turns": ["hm", *(search(f"q{n}") for n in range(5)), answer("x")],
    "tool_budget": [*(search(f"q{n}") for n in range(5)), answer("x")],
    "malformed": [search("a"), "a", "b", "c"],
    "max_tokens": [search("a" * 30, "think " * 40) for _ in range(6)] + [answer("x")],
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_a_resumed_episode_is_the_one_that_was_not_interrupted(name):
    script = SCRIPTS[name]
    limits = replace(LIMITS, max_tokens=700) if name == "max_tokens" else LIMITS
    page = "school: Bana School. " * 12

    heard = []
    whole = await episode(script, FakeToolbox(page), limits=limits, on_turn=heard.append)
    assert whole.stop == name
    assert [record.index for record in heard] == list(range(len(whole.turns)))
    assert tuple(record.turn for record in heard) == whole.turns
    assert {(record.task_id, record.member, record.attempt) for record in heard} == {("t0", 2, 1)}

    for done in range(len(whole.turns) + 1):
        again = []
        toolbox = FakeToolbox(page)
        resumed = await episode(script[done:], toolbox, limits=limits, resume_from=whole.turns[:done], on_turn=again.append)
        assert (resumed.stop, resumed.answer, resumed.turns) == (whole.stop, whole.answer, whole.turns)
        for field in ("token_ids", "loss_mask", "logprobs", "versions"):
            np.testing.assert_array_equal(getattr(resumed, field), getattr(whole, field))
        assert [record.index for record in again] == list(range(done, len(whole.turns)))
        assert len(toolbox.calls) == sum(isinstance(turn.action, ToolCall) and turn.result is not None for turn in whole.turns[done:])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(0, 60))
def test_truncation_keeps_a_beginning_that_fits(text, max_tokens):
    shown = truncate(text, max_tokens, TOKENIZER)
    assert len(TOKENIZER.encode(shown)) <= max_tokens
    if shown != text:
        assert shown == "" or shown.endswith(TRUNCATED)
        assert text.rstrip("\ufffd").startswith(shown.removesuffix(TRUNCATED).rstrip("\ufffd"))
