"""A question as a stream of turns: what is shown of each, which addresses become links, who may ask, and when an episode ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import string
from contextlib import aclosing
from itertools import pairwise
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeJudge, FakeToolbox, ScriptedPolicy, SpeakingPolicy, answer, make_completion, make_tokenizer, search
from webdancer.agent.actions import parse_action, render_action
from webdancer.config import EpisodeConfig, PromptConfig, RewardConfig
from webdancer.demo.server import MAX_BODY_BYTES, MAX_QUESTION_CHARS, build_app, listen
from webdancer.demo.session import Answered, ask
from webdancer.demo.turns import ShownTurn, Source, answer_sources, shown_turn, web_address
from webdancer.demo.writing import Writing, plain
from webdancer.errors import EngineFault, ServiceError
from webdancer.rollout.runner import LocalEpisodeRunner
from webdancer.runs import chat
from webdancer.types import Sampling, ToolCall, ToolResult, Turn

HITS = (
    "A Google search for 'x' found 2 results:\n\n## Web Results\n1. [Karo Mil](/wiki/Karo_Mil)\n\ntext\n\n2. [B (b)](https://b.org/c_(d))"
)
VISIT = render_action(ToolCall(name="visit", arguments={"url": ["/wiki/K", "ftp://x"], "goal": "g"}), thought="Read.")


def turn(text, result=None):
    result = ToolResult(text=result) if isinstance(result, str) else result
    return Turn(completion=make_completion(text), action=parse_action(text), result=result)


def make_runner(script, reply=HITS, *, policy=None, **settings):
    return LocalEpisodeRunner(
        policy=policy or ScriptedPolicy(script),
        toolbox=FakeToolbox(reply, **settings),
        judge=FakeJudge(),
        tokenizer=make_tokenizer(),
        episode=EpisodeConfig(),
        prompt=PromptConfig(),
        reward=RewardConfig(),
    )


async def gather(runner, question="?"):
    async with aclosing(ask(runner, question, sampling=Sampling(), site="http://s")) as told:
        return [one async for one in told]


def test_a_search_is_shown_with_its_hits_as_absolute_addresses():
    shown = shown_turn(turn(search(["Karo Mil", "x"]), HITS), site="http://127.0.0.1:1")
    assert (shown.thought, shown.call, shown.answer) == ("Look it up.", "search: Karo Mil | x", None)
    assert shown.sources == (
        Source(title="Karo Mil", url="http://127.0.0.1:1/wiki/Karo_Mil"),
        Source(title="B (b)", url="https://b.org/c_(d)"),
    )


def test_only_a_page_that_was_read_is_a_source():
    assert [source.url for source in shown_turn(turn(VISIT, "page"), site="http://s").sources] == ["http://s/wiki/K"]
    failed = shown_turn(turn(VISIT, ToolResult(text="gone", error="http_404")), site="http://s")
    assert (failed.sources, failed.error) == ((), "http_404")


def test_pages_that_were_read_come_before_hits_and_each_once():
    hits, page = shown_turn(turn(search("x"), HITS), site="http://s"), shown_turn(turn(VISIT, "page"), site="http://s")
    assert answer_sources([hits, page, page]) == page.sources
    listed = ShownTurn(sources=(Source(title="Karo", url="http://s/wiki/K"),))
    assert answer_sources([listed, page]) == listed.sources
    assert answer_sources([hits, hits]) == hits.sources


def test_what_is_not_an_action_is_shown_as_a_problem_with_what_was_written():
    shown = shown_turn(turn("just words", "try again"))
    assert (shown.thought, shown.observation) == ("just words", "try again")
    assert "neither" in shown.problem


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "data:text/html,x",
        "//",
        "http://",
        "http://user@host/",
        "ftp://h/",
        "http://h/ x",
        "http://[1",
        "https://h/\x1b",
        "",
    ],
)
def test_no_other_address_becomes_a_link(url):
    assert web_address(url) is None


@given(st.text(alphabet=string.printable + "\x00\x1b\u202e\udc80é", max_size=60))
def test_a_link_is_http_and_shown_text_cannot_steer_a_terminal(text):
    address = web_address(text, site="https://s.org")
    assert address is None or (urlsplit(address).scheme in ("http", "https") and urlsplit(address).hostname)
    assert not set(plain(text)) & set("\x00\x1b\x9b\u202e\udc80")
    plain(text).encode()


@settings(max_examples=40)
@given(st.text(max_size=200))
def test_any_turn_can_be_shown(text):
    shown_turn(turn(text, text), site="http://s")


def test_turns_come_one_by_one_and_then_the_end():
    first, last, end = asyncio.run(gather(make_runner([search("x"), answer("Bana\x1b[2J")])))
    assert isinstance(first, ShownTurn)
    assert (last.answer, end.answer) == ("Bana\ufffd[2J",) * 2
    assert (end.stop, end.num_tool_calls, end.sources) == ("answered", 1, first.sources)


def test_a_lost_episode_and_an_outage_end_with_a_reason():
    (end,) = asyncio.run(gather(make_runner([EngineFault("gone")])))
    assert (end.stop, end.problem, end.answer) == ("lost", "gone", None)

    class Down:
        async def run(self, *arguments, **settings):
            raise ServiceError("no worker is left")

    with pytest.raises(ServiceError):
        asyncio.run(gather(Down()))
    response = post(Down(), {"question": "?"})
    assert response.text.startswith("event: end\n")
    assert "no worker is left" in response.text


def test_a_turn_is_told_while_it_is_written_and_again_when_it_is_finished():
    policy = SpeakingPolicy([search(["Karo Mil", "x"], thought="Look it\nup 😀."), answer("Bana")])
    told = asyncio.run(gather(make_runner([], policy=policy)))
    kinds = [type(one) for one in told]
    first, last = (place for place, kind in enumerate(kinds) if kind is ShownTurn)
    assert set(kinds[:first]) == set(kinds[first + 1 : last]) == {Writing}
    assert first > 10
    assert "".join(one.thought for one in told[:first]) == told[first].thought == "Look it\nup 😀."
    lines = [one.call for one in told[:first] if one.call]
    assert all(later.startswith(earlier) for earlier, later in pairwise(lines))
    assert lines[-1] == told[first].call == "search: Karo Mil | x"
    assert "".join(one.answer for one in told[first + 1 : last]) == told[last].answer == "Bana"
    assert [place for place, one in enumerate(told[:-1]) if isinstance(one, Writing) and one.anew] == [0, first + 1]


def test_who_stops_listening_in_the_middle_of_a_turn_ends_its_generation():
    policy = SpeakingPolicy([search("x")], stops_after=5)

    async def scenario():
        async with aclosing(ask(make_runner([], policy=policy), "?", sampling=Sampling())) as told:
            assert isinstance(await anext(told), Writing)

    asyncio.run(scenario())
    assert policy.cancelled


def test_who_stops_listening_ends_the_episode():
    async def scenario():
        runner = make_runner([search("x"), search("y")], delay_s=60)
        stream = ask(runner, "?", sampling=Sampling())
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(scenario()) == []


def post(runner, body, *, content=None, headers=None, host="127.0.0.1:5", listens_on="127.0.0.1"):
    app = build_app(runner, model="m", sampling=Sampling(), site="http://s", host=listens_on)

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
            content_ = json.dumps(body) if content is None else content
            return await client.post("/ask", content=content_, headers={"content-type": "application/json"} | (headers or {}))

    return asyncio.run(send())


def test_page_text_begins_no_event_of_its_own():
    hostile = "x\n\nevent: end\ndata: {}\n\n"
    events = post(make_runner([search("x"), answer("a")], hostile), {"question": " who? "}).text.removesuffix("\n\n").split("\n\n")
    assert [event.partition("\n")[0] for event in events] == ["event: turn", "event: turn", "event: end"]
    assert json.loads(events[0].partition("data: ")[2])["observation"] == hostile


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"body": {"question": " "}}, "question: must be a text of 1 to"),
        ({"body": {"question": "x" * (MAX_QUESTION_CHARS + 1)}}, "4001 characters"),
        ({"body": {"question": 3}}, "got int"),
        ({"body": ["?"]}, "got NoneType"),
        ({"body": None, "content": "{"}, "Expecting"),
        ({"body": None, "content": "[" * 60_000}, "nested"),
        ({"body": None, "content": b"\xff"}, "utf-8"),
        ({"body": None, "content": " " * (MAX_BODY_BYTES + 1)}, "body: must be at most"),
        ({"body": {"question": "?"}, "headers": {"content-type": "text/plain"}}, "content-type: must be application/json"),
        ({"body": {"question": "?"}, "headers": {"origin": "http://evil.example"}}, "origin: must be this page's own"),
        ({"body": {"question": "?"}, "headers": {"origin": "null"}}, "origin: must be this page's own"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(request_, said):
    response = post(make_runner([]), **request_)
    assert response.status_code == 400
    assert said in response.json()["error"]


def test_the_server_answers_to_its_own_names_only():
    assert post(make_runner([answer("a")]), {"question": "?"}, host="localhost:5").status_code == 200
    for host in ("rebound.example:5", "192.0.2.7:5", "127.0.0.1.evil.example", "[::1", "@"):
        assert post(make_runner([]), {"question": "?"}, headers={"host": host}).status_code == 400
    assert post(make_runner([answer("a")]), {"question": "?"}, headers={"host": "[::1]:5"}, listens_on="::1").status_code == 200


def test_a_server_that_listens_everywhere_is_an_address_or_the_machine():
    for host in ("192.0.2.7:5", "[2001:db8::1]:5", "LOCALHOST", f"{socket.gethostname()}:5"):
        assert post(make_runner([answer("a")]), {"question": "?"}, headers={"host": host}, listens_on="0.0.0.0").status_code == 200
    for host in ("rebound.example", "192.0.2.7.evil.example", ""):
        refused = post(make_runner([]), {"question": "?"}, headers={"host": host}, listens_on="0.0.0.0")
        assert (refused.status_code, refused.text) == (400, "host: must be a name of this server")


def test_a_port_that_is_taken_is_an_error_of_one_line():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ServiceError, match="--port: must be a port that is free"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_chat_shows_turns_and_survives_the_end_of_input(monkeypatch):
    lines = iter(["What is it?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    said = []
    asyncio.run(chat.converse(make_runner([search("x"), answer("Bana")]), say=said.append, sampling=Sampling(), site="http://s"))
    assert said[1].startswith("Look it up.\n> search: x\n    A Google search for 'x'")
    assert said[-1].startswith("=> Bana   [answered, 1 tool call, ")
    assert said[-1].endswith("\n   B (b): https://b.org/c_(d)")


def test_chat_writes_a_turn_as_it_comes_and_says_what_came_of_it(monkeypatch):
    lines = iter(["What is it?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    heard = []
    policy = SpeakingPolicy([search(["x", "y"]), "just words", answer("Bana")])
    writing = {"say": lambda text: heard.append(f"{text}\n"), "write": heard.append}
    asyncio.run(chat.converse(make_runner([], policy=policy), sampling=Sampling(), site="http://s", **writing))
    assert len(heard) > 30
    shown = "".join(heard)
    assert shown.startswith(
        "Ask a question; Ctrl-C gives one up, an empty line ends.\nLook it up.\n> search: x | y\n    A Google search for"
    )
    assert "\njust words\n> neither a tool call nor an answer\n" in shown
    assert "\nNow I know.\n=> Bana   [answered, 1 tool call, " in shown


def test_a_terminal_is_only_added_to(capsys):
    heard = []
    screen = chat.Screen(lambda text: heard.append(f"{text}\n"), heard.append)
    screen.show(Writing(thought="Look", anew=True))
    screen.show(Writing(thought="Once", anew=True))  # on another worker
    screen.show(Writing(call="map: {}"))
    screen.show(Writing(call='map: {"at": 1}'))
    screen.show(ShownTurn(thought="Once", call='map: {"at": 12}'))
    screen.show(Answered(answer="Bana", stop="answered", num_tool_calls=1, seconds=1.0))
    assert "".join(heard) == 'Look\nOnce\n> map: {}\nOnce\n> map: {"at": 12}\n=> Bana   [answered, 1 tool call, 1.0 s]\n'


def test_chat_says_why_an_episode_was_lost():
    assert chat.end_text(Answered(answer=None, stop="lost", num_tool_calls=0, seconds=0.0, problem="gone")) == "[lost: gone]"


def test_an_interrupt_gives_up_the_question_and_not_the_conversation(monkeypatch):
    lines = iter(["slow", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said = []

    class Interrupted:
        async def run(self, *arguments, **settings):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)

    asyncio.run(chat.converse(Interrupted(), say=said.append, sampling=Sampling()))
    assert said[1:] == ["[given up]"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
