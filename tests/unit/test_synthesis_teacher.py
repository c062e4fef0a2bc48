"""A chat model's replies as turns of the protocol, what it is told, and the model's check of right trajectories."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fakes import FakeToolbox, answer, make_task, make_tokenizer, search
from webdancer.agent.actions import conforms, parse_action
from webdancer.agent.episode import run_episode
from webdancer.config import EpisodeConfig, LlmConfig, PromptConfig, QualityConfig
from webdancer.errors import EngineFault
from webdancer.llm.client import ChatRefused, NoUsableReply, Usage
from webdancer.synthesis.funnel import Attempt, Step, attempt_of, validity
from webdancer.synthesis.quality_check import CRITERIA, MAX_OBSERVATION_CHARS, QualityCheck
from webdancer.synthesis.teacher import ASKINGS, ChatTeacher, Unreadable, read_step
from webdancer.tools.completion import ChatAnswer
from webdancer.types import FinalAnswer, MalformedAction, Sampling, ScoredTrajectory, ToolCall, Verdict

CALL = 'Action: search\nAction Input: {"query": ["Karo Mil"]}'


class Model:
    """ChatModel's face: says a script's entries, a text, (text, reasoning) or an exception; keeps what it was asked."""

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []
        self.usage = Usage()
        self.config = LlmConfig()

    async def chat(self, messages, *, temperature, max_tokens, stop=(), sample=0):
        self.asked.append({"messages": messages, "temperature": temperature, "stop": stop, "sample": sample})
        entry = self.script.pop(0)
        if isinstance(entry, Exception):
            raise entry
        text, reasoning = entry if isinstance(entry, tuple) else (entry, "")
        return ChatAnswer(text=text, reasoning=reasoning)

    async def chat_json(self, messages, parse, *, temperature, max_tokens):
        reply = (await self.chat(messages, temperature=temperature, max_tokens=max_tokens)).text
        return parse(json.loads(reply))


def episode(model, *, style="instruct", prompt=None, attempt=0, tools=None):
    prompt = prompt or PromptConfig(current_date="2026-01-02")
    return asyncio.run(
        run_episode(
            make_task(),
            policy=ChatTeacher(model, make_tokenizer(), style=style),
            toolbox=tools or FakeToolbox("The school is the Bana School."),
            tokenizer=make_tokenizer(),
            limits=EpisodeConfig(),
            prompt=prompt,
            sampling=Sampling(temperature=0.7),
            member=attempt,
            attempt=attempt,
        )
    )


def test_an_instruct_model_sees_its_thoughts_and_its_steps_become_turns():
    model = Model(f"Thought: Look it up.\n{CALL}", "Thought: It is there.\nFinal Answer: Bana School")
    trajectory = episode(model)
    assert [turn.completion.text.removesuffix("<|im_end|>") for turn in trajectory.turns] == [
        search(["Karo Mil"], thought="Look it up."),
        answer("Bana School", thought="It is there."),
    ]
    told = model.asked[1]["messages"]
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[1]["content"] == "Question: What is the school of Karo Mil?"
    assert told[2]["content"] == f"Thought: Look it up.\n{CALL}"
    assert told[3]["content"] == "Observation: The school is the Bana School."
    assert "Current date: 2026-01-02" in told[0]["content"]
    assert model.asked[0]["stop"] == ("\nObservation:",)
    assert model.asked[0]["temperature"] == 0.7
    assert trajectory.answer == "Bana School"


def test_a_reasoning_model_sees_no_earlier_thought_and_its_reasoning_is_stored():
    model = Model((CALL, "I do not know it, so I search."), ("Final Answer: Bana School", "The page says so."))
    trajectory = episode(model, style="reasoning", prompt=PromptConfig(style="brief"))
    assert "I do not know it, so I search." in trajectory.turns[0].completion.text
    told = model.asked[1]["messages"]
    assert told[2]["content"] == CALL
    assert not any("I do not know it" in message["content"] for message in told)
    assert "Thought" not in told[0]["content"]
    assert model.asked[0]["stop"] == ()
    assert validity(attempt_of(ScoredTrajectory(trajectory=trajectory, reward=None, verdict=Verdict(status="correct")))).keep


def test_the_thought_tokens_are_trained_and_nothing_of_the_observation():
    model = Model((CALL, "I search."), ("Final Answer: Bana School", "Found."))
    trajectory = episode(model, style="reasoning")
    trained = make_tokenizer().decode(trajectory.token_ids[trajectory.loss_mask])
    assert "I search." in trained
    assert "The school is" not in trained


def test_an_unreadable_reply_is_asked_for_again_and_counted():
    model = Model("I think I should search.", f"Thought: x\n{CALL}", "Thought: y\nFinal Answer: Bana School")
    trajectory = episode(model, attempt=2)
    assert trajectory.answer == "Bana School"
    assert [asked["sample"] for asked in model.asked] == [2 * ASKINGS, 2 * ASKINGS + 1, 2 * ASKINGS]
    assert model.usage.malformed == 1


def test_a_model_that_keeps_to_no_form_is_data():
    trajectory = episode(Model(*["Sure, happy to help!"] * 3 * ASKINGS))
    assert trajectory.stop == "malformed"
    assert all(isinstance(turn.action, MalformedAction) for turn in trajectory.turns)


def test_the_last_turn_asks_for_the_answer():
    limits = EpisodeConfig(max_tool_calls=1)
    model = Model(f"Thought: x\n{CALL}", "Thought: y\nFinal Answer: z")
    teacher = ChatTeacher(model, make_tokenizer(), style="instruct")
    edges = {"policy": teacher, "toolbox": FakeToolbox("Nothing."), "tokenizer": make_tokenizer(), "limits": limits}
    trajectory = asyncio.run(run_episode(make_task(), **edges, prompt=PromptConfig(), sampling=Sampling(), member=0))
    assert trajectory.answer == "z"
    assert "No more tools can be used" in model.asked[1]["messages"][-1]["content"]


def test_a_refused_conversation_is_a_lost_episode_not_a_wrong_one():
    with pytest.raises(EngineFault, match="too long"):
        episode(Model(ChatRefused("status 400: too long")))


SIMULATED = f"Thought: x\n{CALL}\nObservation: The school is Bana.\nThought: y\nFinal Answer: Bana"


def test_an_observation_of_the_models_own_is_kept_for_the_funnel_to_see():
    turn = read_step(ChatAnswer(text=SIMULATED), "instruct")
    assert parse_action(turn) == ToolCall(name="search", arguments={"query": ["Karo Mil"]})
    step = Step(text=turn, action=parse_action(turn), observation="x")
    assert validity(Attempt(question="", answers=("x",), steps=(step,))).reason == "simulated_observation"


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (f"Search first.\n{CALL}", ToolCall(name="search", arguments={"query": ["Karo Mil"]})),
        ('**Thought:** x\n**Action:** `visit`\n**Action Input:** ```json\n{"url": "/k", "goal": "y"}\n```', "visit"),
        ("Thought: x\nFinal Answer: two\nlines", FinalAnswer(text="two\nlines")),
        ("Thought: x\nFinal Answer: an <answer> tag", FinalAnswer(text="an < answer> tag")),
        ("Thought: say </think> twice </think>\nFinal Answer: y", FinalAnswer(text="y")),
    ],
)
def test_replies_are_read_as_models_write_them(text, action):
    turn = read_step(ChatAnswer(text=text), "instruct")
    assert conforms(turn)
    found = parse_action(turn)
    assert found.name == action if isinstance(action, str) else found == action


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Thought: x",
        CALL,
        "Thought: x\nAction: search",
        "Thought: x\nAction: search\nAction Input: {'query': 1}",
        'Thought: x\nAction: search\nAction Input: {"query": "a"} and more',
        'Thought: x\nAction:\nAction Input: {"query": "a"}',
        f"Thought: x\n{CALL}\nFinal Answer: both",
        "Thought: x\nFinal Answer:",
    ],
)
def test_what_is_no_step_is_unreadable(text):
    with pytest.raises(Unreadable):
        read_step(ChatAnswer(text=text), "instruct")


def test_a_cut_reply_is_unreadable():
    with pytest.raises(Unreadable, match="cut"):
        read_step(ChatAnswer(text="Thought: x\nFinal Answer: Ban", finish="length"), "instruct")


FIELDS = ["Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:"]
PIECES = [*FIELDS, "search", '{"query": "a"}', "{", "</think>", "<answer>", "x", "\n"]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join), st.text(max_size=20))
@example("Thought: x\nObservation: y\nAction: search\nAction Input: {}", "")
def test_every_reply_is_a_turn_or_unreadable(text, reasoning):
    for style in ("instruct", "reasoning"):
        try:
            turn = read_step(ChatAnswer(text=text, reasoning=reasoning), style)
        except Unreadable:
            continue
        assert not isinstance(parse_action(turn), MalformedAction)


def check(*script):
    step = Step(text=search(["a"]), action=parse_action(search(["a"])), observation="seen " * 5000)
    tried = Attempt(question="q?", answers=("x",), steps=(step, Step(text=answer("x"), action=FinalAnswer(text="x"))))
    model = Model(*script)
    return asyncio.run(QualityCheck(model).check(tried)), model


GOOD = dict.fromkeys(CRITERIA, "yes")


@pytest.mark.parametrize("failed", [*CRITERIA, ""])
def test_the_first_criterion_that_fails_is_the_reason(failed):
    decision, model = check(json.dumps(GOOD | ({failed: "No"} if failed else {}) | {"reasoning": "because"}))
    assert (decision.keep, decision.reason, decision.detail) == (not failed, failed, "because" if failed else "")
    case = json.loads(model.asked[0]["messages"][1]["content"])
    assert [sorted(step) for step in case["steps"]] == [["action", "observation", "thought"], ["final_answer", "thought"]]
    assert len(case["steps"][0]["observation"]) < MAX_OBSERVATION_CHARS + 20


@pytest.mark.parametrize("error", [NoUsableReply("never"), ChatRefused("no")])
def test_a_check_that_failed_is_neither_good_nor_bad(error):
    decision, _ = check(error)
    assert (decision.keep, decision.reason) == (False, "unchecked")


def test_a_check_that_leaves_a_criterion_out_is_not_one():
    with pytest.raises(KeyError):
        check(json.dumps({"logic": "yes"}))
    with pytest.raises(ValueError, match="accuracy"):
        check(json.dumps(GOOD | {"accuracy": "perhaps"}))


def test_the_paper_rules_are_the_defaults():
    assert (QualityConfig().max_repetition, QualityConfig().min_actions, QualityConfig().max_actions) == (4, 2, 0)
