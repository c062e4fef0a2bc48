"""A turn that is still being written: whole characters, no glitch of a tag or an escape that is not whole, and nothing taken back."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import answer, make_completion, make_tokenizer, search
from webdancer.agent.actions import END_OF_TURN, parse_action, render_action
from webdancer.agent.spoken import SpokenText, turn_speaker
from webdancer.demo.turns import shown_turn
from webdancer.demo.writing import LiveTurn, Writing, call_so_far, parts
from webdancer.types import ToolCall, Turn, TurnText

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TURNS = [
    search(
        ["Karo Mil", 'b < c </tool_call> \U0001f600 \\ " \u00e9'], thought="Is a < b?\n\n</thin, <answer> or\r\n<tool_call>? \U0001f600"
    ),
    render_action(ToolCall(name="visit", arguments={"url": ["/wiki/K", "/wiki/L"], "goal": "find (it)"}), thought=None),
    "<tool_call>" + json.dumps({"name": "search", "arguments": {"query": "caf\u00e9 \U0001f600"}}) + "</tool_call>",  # with escapes
    answer("two\nlines"),
    "just words",
    "First <think>\nthen\n</think> <answer>x</answer>",
    "<think>never closed",
    "<think>\na\n</think>\n<tool_response>made up</tool_response><answer>x</answer>",
]


@given(TEXT)
def test_every_character_is_told_once_and_whole(text):
    spoken, tokenizer = SpokenText(make_tokenizer()), make_tokenizer()
    pieces = [spoken.add([token_id]) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(TEXT, st.data())
def test_what_comes_in_lumps_is_the_same(text, data):
    tokenizer, spoken, whole = make_tokenizer(), SpokenText(make_tokenizer()), ""
    ids = tokenizer.encode(text)
    while ids:
        size = data.draw(st.integers(1, 5))
        whole, ids = whole + spoken.add(ids[:size]), ids[size:]
    assert whole == text


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    tokenizer = make_tokenizer()
    half = tokenizer.encode("\U0001f600")[:2]
    spoken = SpokenText(tokenizer)
    assert spoken.add([*half, *tokenizer.encode("abcdef")]).endswith("abcdef")


def live(text, sizes=None):
    """What is shown of a turn at each of its tokens: (thought, call, answer) so far."""
    told: list[TurnText] = []
    listener, turn = turn_speaker(make_tokenizer(), told.append, index=0), LiveTurn()
    for token_id in make_completion(text).token_ids:
        listener([token_id])
    thought = call = said = ""
    shown = []
    for one in told:
        if (writing := turn.add(one)) is not None:
            thought, call, said = thought + writing.thought, writing.call or call, said + writing.answer
            shown.append((thought, call, said))
    return shown


@pytest.mark.parametrize("text", TURNS)
def test_nothing_is_taken_back_and_the_end_is_what_the_finished_turn_shows(text):
    shown = live(text)
    for before, after in pairwise(shown):
        assert all(later.startswith(earlier) for earlier, later in zip(before, after, strict=True)), (before, after)
    final = shown_turn(Turn(completion=make_completion(text), action=parse_action(text)))
    thought, call, said = shown[-1]
    assert thought == final.thought
    assert call == final.call
    assert said == (final.answer or said)


@pytest.mark.parametrize("text", TURNS[:4])
def test_no_part_of_a_tag_is_ever_shown(text):
    final = shown_turn(Turn(completion=make_completion(text), action=parse_action(text)))
    for thought, call, said in live(text):
        assert final.thought.startswith(thought)
        assert final.call.startswith(call)
        assert (final.answer or "").startswith(said)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.booleans())
def test_any_call_grows_at_its_end(thought, queries, escaped):
    body = json.dumps({"name": "search", "arguments": {"query": queries}}, ensure_ascii=escaped)
    lines = [line for end in range(len(body) + 1) if (line := call_so_far(body[:end])) is not None]
    assert all(after.startswith(before) for before, after in pairwise(lines))
    assert lines[-1] == shown_turn(Turn(completion=make_completion(""), action=parse_action(f"<tool_call>{body}</tool_call>"))).call


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet='<>/{}[]":\\ud83answertoolcpthik_\n ', max_size=80), st.text(max_size=20))
def test_any_text_can_be_looked_at(text, more):
    turn = LiveTurn()
    for end in range(0, len(text), 7):
        turn.add(TurnText(index=0, start=end, text=text[end : end + 7]))
    parts(text + more)
    call_so_far(text + more)


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '{"name": "sea', '{"name": "search"', '{"name": 3, "arguments": {}}', "[" * 30_000, "x" * 30_000]
)
def test_a_call_that_says_nothing_yet(body):
    assert call_so_far(body) is None


def test_a_turn_that_begins_again_is_void():
    turn = LiveTurn()
    assert turn.add(TurnText(index=2, start=0, text="<think>a b")) == Writing(thought="a b", anew=True)
    assert turn.add(TurnText(index=2, start=10, text=" c")) == Writing(thought=" c")
    assert turn.add(TurnText(index=2, start=12, text="</thi")) is None
    assert turn.add(TurnText(index=2, start=0, text="<think>other")) == Writing(thought="other", anew=True)
    assert turn.add(TurnText(index=3, start=0, text=f"<answer>x</answer>{END_OF_TURN}")) == Writing(answer="x", anew=True)
