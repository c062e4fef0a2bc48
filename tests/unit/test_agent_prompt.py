"""The texts of the environment."""

from __future__ import annotations

import datetime
import json

import pytest

from tests.fakes import make_task
from webdancer.agent.prompt import correction_text, force_text, prompt_messages, question_of, response_message
from webdancer.config import PromptConfig
from webdancer.errors import ConfigError
from webdancer.types import MalformedAction, Task

BRIEF = PromptConfig(style="brief")


def test_the_brief_prompt_is_one_line():
    system, user = prompt_messages(make_task(), BRIEF)
    assert system == {"role": "system", "content": "You are a web agent."}
    assert user == {"role": "user", "content": "What is the school of Karo Mil?"}
    assert question_of(user["content"]) == "What is the school of Karo Mil?"


def test_the_released_prompt_has_the_date_and_both_tools():
    system, user = prompt_messages(make_task(), PromptConfig(), today=datetime.date(2026, 1, 31))
    assert system["content"].startswith("You are a Web Information Seeking Master.")
    assert system["content"].endswith("\nCurrent date: 2026-01-31")
    assert prompt_messages(make_task(), PromptConfig(current_date="2025-07-18"))[0]["content"].endswith("Current date: 2025-07-18")
    assert user["content"].endswith("</think>\n<answer> answer here </answer>\n\nUser: What is the school of Karo Mil?")
    assert question_of(user["content"]) == "What is the school of Karo Mil?"


def test_more_tools_follow_the_released_two():
    schema = '{"name": "define", "parameters": {}}'
    (_, plain), (_, user) = (prompt_messages(make_task(), PromptConfig(more_tools=more)) for more in ("", schema))
    before, _, after = user["content"].partition(f",\n{schema}\n</tools>\n")
    assert f"{before}\n</tools>\n{after}" == plain["content"]
    assert json.loads("[" + before.split("<tools>\n")[1] + "]")[1]["name"] == "visit"


def test_an_unknown_style_is_named():
    with pytest.raises(ConfigError, match=r"prompt\.style: must be one of released, brief, got 'long'"):
        prompt_messages(make_task(), PromptConfig(style="long"))


@pytest.mark.parametrize("prompt", [BRIEF, PromptConfig()])
def test_a_response_and_the_call_for_an_answer(prompt):
    plain = response_message("page", forced=False, prompt=prompt)
    assert plain == {"role": "user", "content": "<tool_response>\npage\n</tool_response>"}
    assert response_message("page", forced=True, prompt=prompt)["content"] == plain["content"] + "\n" + force_text(prompt)


@pytest.mark.parametrize("prompt", [BRIEF, PromptConfig()])
def test_a_correction_says_what_was_wrong(prompt):
    reason = "the tool call is not valid JSON: {reason} {0} {"
    assert reason in correction_text(MalformedAction(reason=reason), prompt)


def test_a_question_that_quotes_a_dialogue_stays_whole():
    question = "Who said this?\n\nUser: hello\n\nUser: again"
    for settings in ({"style": "released"}, {"style": "brief"}):
        _, user = prompt_messages(Task(id="q", question=question, answers=()), PromptConfig(**settings))
        assert question_of(user["content"]) == question
