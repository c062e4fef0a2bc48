"""Recordings: the same bytes again, from one file, anywhere; a damaged or foreign one is an error, and what it lacks is counted as such."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import sqlite3

import pytest

from tests.fakes import FakeToolbox
from tests.hostile_server import hostile_server, response
from webdancer.config import FetchConfig, ReplayConfig, SearchConfig, ToolsConfig, VisitConfig
from webdancer.errors import DataError
from webdancer.tools.replay import ReplayToolbox
from webdancer.tools.result import INFRASTRUCTURE_ERRORS, UNAVAILABLE
from webdancer.tools.store import SHAPING, RecordingFile, Said, question_of
from webdancer.tools.toolbox import open_toolbox
from webdancer.types import ToolCall, ToolResult

NOT_SHAPING = {
    "search": {"url", "index", "timeout_s", "requests_per_s", "usd_per_1000"},
    "visit": {
        "url", "site", "extraction_processes", "extraction_timeout_s", "requests_per_s", "usd_per_1000", "summarizer.base_url",
        "summarizer.timeout_s",
    },
}  # fmt: skip


class Closeable(FakeToolbox):
    async def call(self, call, hop=None):
        return await super().call(call)

    async def check(self): ...

    async def aclose(self): ...


def search(query) -> ToolCall:
    return ToolCall(name="search", arguments={"query": query})


def config_of(path, mode, **settings) -> ToolsConfig:
    return ToolsConfig(replay=ReplayConfig(mode=mode, path=str(path)), **settings)


def leaves(section, prefix=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        yield from leaves(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [f"{prefix}{field.name}"]


@pytest.mark.parametrize("tool", SHAPING)
def test_every_setting_of_a_tool_is_known_to_shape_its_text_or_not(tool):
    """A new knob must be put into SHAPING, or in here: else recordings of other settings would be taken for one's own."""
    known = set(SHAPING[tool]) | NOT_SHAPING[tool]
    assert set(leaves(getattr(ToolsConfig(), tool))) - known == set()


async def record(path, *calls, reply) -> list[ToolResult]:
    config = config_of(path, "record")
    file = RecordingFile(path, writable=True)
    toolbox = ReplayToolbox(config, live=Closeable(reply), writer=file)
    results = [await toolbox.call(call) for call in calls]
    file.close()
    return results


async def test_the_same_bytes_again_on_another_machine(tmp_path):
    texts = {"a": "A\u2028\x85 \ud800", "b": "B" * 50_000, "c": ""}
    calls = [search(["a", "b"]), search(" c "), ToolCall(name="clock", arguments={"zone": ["UTC"], "at": 3})]
    live = await record(tmp_path / "one.sqlite", *calls, reply=lambda call: texts.get(call.arguments.get("query"), "noon"))
    assert [path.name for path in tmp_path.iterdir()] == ["one.sqlite"], "one file, to be sent"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "one.sqlite", tmp_path / "elsewhere" / "other name")
    again = ReplayToolbox(config_of(tmp_path / "elsewhere" / "other name", "replay"), live=None)
    for call, said in zip(calls, live, strict=True):
        result = await again.call(call)
        assert (result.text, result.error, result.cached) == (said.text, said.error, True)
    other = await again.call(search(["b", "a"]))
    assert other.text == f"{texts['b']}\n=======\n{texts['a']}", "a page is a page, whoever asks for it with what"
    await again.aclose()


async def test_the_first_answer_stays(tmp_path):
    """It was acted upon. A run that goes on with its recording says the same, whatever the web says by now."""
    numbers = iter(range(100))
    for _ in range(2):
        results = await record(tmp_path / "r", search("x"), search("x"), reply=lambda call: f"answer {next(numbers)}")
        assert {result.text for result in results} == {"answer 0"}


async def test_a_run_that_goes_on_asks_nobody_for_what_its_recording_has(tmp_path):
    """Nor pays for it; and an outage by then would be seen now, and not by who replays."""
    await record(tmp_path / "r", search("x"), reply="answer 1")
    asked = []
    again = await record(tmp_path / "r", search("x"), search("x"), search("y"), reply=lambda call: asked.append(call) or "answer 2")
    assert [result.text for result in again] == ["answer 1", "answer 1", "answer 2"]
    assert [call.arguments["query"] for call in asked] == ["y"]


async def test_outages_are_not_recorded_and_other_errors_are(tmp_path):
    results = {
        "down": ToolResult(text="later", error=UNAVAILABLE),
        "gone": ToolResult(text="none", error="not_found"),
    }
    await record(tmp_path / "r", search("down"), search("gone"), reply=lambda call: results[call.arguments["query"]])
    toolbox = ReplayToolbox(config_of(tmp_path / "r", "replay"), live=None)
    assert (await toolbox.call(search("gone"))).error == "not_found"
    miss = await toolbox.call(search(["gone", "down"]))
    assert miss.error == "replay_miss"
    assert "replay_miss" in INFRASTRUCTURE_ERRORS, "the recording's fault, not the policy's"


async def test_what_a_recording_lacks_can_be_asked_live_and_is_not_added(tmp_path):
    await record(tmp_path / "r", search("old"), reply="recorded")
    before = (tmp_path / "r").read_bytes()
    live = Closeable("live")
    toolbox = ReplayToolbox(config_of(tmp_path / "r", "replay_or_live"), live=live)
    result = await toolbox.call(search(["old", "new"]))
    assert result.text == "recorded\n=======\nlive"
    assert [call.arguments["query"] for call in live.calls] == ["new"]
    assert (tmp_path / "r").read_bytes() == before


async def test_other_settings_ask_another_question(tmp_path):
    await record(tmp_path / "r", search("x"), reply="ten results")
    narrow = config_of(tmp_path / "r", "replay", search=SearchConfig(top_k=3))
    assert (await ReplayToolbox(narrow, live=None).call(search("x"))).error == "replay_miss"
    elsewhere = config_of(tmp_path / "r", "replay", search=SearchConfig(url="http://10.0.0.5:80", timeout_s=1.0))
    assert (await ReplayToolbox(elsewhere, live=None).call(search("x"))).text == "ten results"


def test_a_question_does_not_depend_on_the_order_of_its_arguments():
    one = ToolCall(name="visit", arguments={"url": "/a ", "goal": "x"})
    other = ToolCall(name="visit", arguments={"goal": " x", "url": "/a"})
    assert question_of(one, ToolsConfig()) == question_of(other, ToolsConfig())


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100])
def test_what_is_no_recording_is_refused_at_once(tmp_path, content):
    (tmp_path / "r").write_bytes(content)
    for path in (tmp_path / "r", tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=r"tools\.replay\.path: must be a recording"):
            RecordingFile(path, writable=False)


async def test_a_changed_answer_is_an_error_and_never_an_observation(tmp_path):
    await record(tmp_path / "r", search("x"), search("y"), reply=lambda call: f"about {call.arguments['query']}")
    with sqlite3.connect(tmp_path / "r") as db:
        rows = dict(db.execute("SELECT digest, body FROM answers").fetchall())
        (one, other) = rows
        db.execute("UPDATE answers SET body = ? WHERE digest = ?", (rows[other], one))
        db.execute("UPDATE answers SET body = ? WHERE digest = ?", (b"torn", other))
    file = RecordingFile(tmp_path / "r", writable=False)
    for query in "xy":
        with pytest.raises(DataError, match=r"tools\.replay\.path: the answer to"):
            file.get(question_of(search(query), ToolsConfig()))


async def test_a_recording_that_was_cut_off_by_a_crash_is_whole(tmp_path):
    """No close, no flush: what was said is in the file, and the file is one."""
    file = RecordingFile(tmp_path / "r", writable=True)
    for number in range(50):
        await file.record(question_of(search(str(number)), ToolsConfig()), Said(str(number)))
    shutil.copy(tmp_path / "r", tmp_path / "copy")
    assert len(RecordingFile(tmp_path / "copy", writable=False)) == 50


def test_a_database_of_something_else_is_not_made_a_recording(tmp_path):
    for path, version in ((tmp_path / "pages.db", 0), (tmp_path / "newer", 2)):
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE pages (url TEXT)")
            db.execute(f"PRAGMA user_version = {version}")
        before = path.read_bytes()
        for writable in (True, False):
            with pytest.raises(DataError, match="must be a recording of format 1"):
                RecordingFile(path, writable=writable)
        assert path.read_bytes() == before


PAGE = "<html><body><article><h1>Karo Mil</h1><p>The school of Karo Mil is Bana School, in the north.</p></article></body></html>"
HITS = '{"result": [[{"document": {"contents": "\\"Karo Mil\\"\\nThe school of Karo Mil.", "url": "/wiki/K"}}]]}'


async def test_the_whole_toolbox_recorded_and_replayed_without_a_web(tmp_path):
    calls = [search(["Karo Mil", "school"]), ToolCall(name="visit", arguments={"url": ["/wiki/K", "/none"], "goal": "school"})]
    calls.append(ToolCall(name="visit", arguments={"url": "http://10.0.0.1/", "goal": "x"}))
    handlers = {"/retrieve": response(HITS, content_type="application/json"), "/wiki/K": response(PAGE)}

    def config(origin, mode):
        return config_of(
            tmp_path / "r",
            mode,
            search=SearchConfig(url=origin),
            visit=VisitConfig(site=origin),
            fetch=FetchConfig(allowed_origins=[origin]),
        )

    async with hostile_server(handlers) as server:
        toolbox = open_toolbox(config(server.origin, "record"))
        live = await asyncio.gather(*map(toolbox.call, calls))
        await toolbox.aclose()
    assert "Bana School" in live[1].text
    replayed = open_toolbox(config("http://127.0.0.1:9", "replay"))
    await replayed.check()
    again = await asyncio.gather(*map(replayed.call, calls))
    assert [(result.text, result.error) for result in again] == [(result.text, result.error) for result in live]
    await replayed.aclose()
