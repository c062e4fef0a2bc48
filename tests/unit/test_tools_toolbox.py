"""The toolbox as an episode sees it: real HTTP to a small site with a /retrieve server, wrong arguments, and outages."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile_server import endless, hostile_server, raw, response
from webdancer.config import FetchConfig, SearchConfig, ToolsConfig, VisitConfig
from webdancer.errors import ConfigError, ServiceError
from webdancer.interfaces import Toolbox
from webdancer.tools import polite, visit
from webdancer.tools.fetch import BLOCK_CODES
from webdancer.tools.render import SEPARATOR
from webdancer.tools.result import Part, join_parts
from webdancer.tools.toolbox import INFRASTRUCTURE_ERRORS, WebToolbox
from webdancer.types import ToolCall, ToolResult

KARO = "person. school: Bana School. employer: Tiro Works. home: Veltor Ridge."
DOCUMENTS = [
    {"id": "1", "contents": f'"Karo Mil"\n{KARO}', "url": "/wiki/Karo_Mil", "title": "Karo Mil"},
    {"id": "2", "contents": '"Karo Zan"\nperson. born: 1934. job: Fidem.', "url": "/wiki/Karo_Zan", "title": "Karo Zan"},
    {"id": "3", "contents": '"Mil School"\nschool. town: Veltor Ridge.'},
]
ROWS = "<tr><th>school</th><td>Bana School</td></tr><tr><th>born</th><td>1934</td></tr>"
PAGE = f"<html><body><h1>Karo Mil</h1><table>{ROWS}</table></body></html>"
HITS = """A Google search for 'Karo Mil' found 3 results:

## Web Results
1. [Karo Mil](/wiki/Karo_Mil)

person. school: Bana School. employer: Tiro Works.

2. [Karo Zan](/wiki/Karo_Zan)

person.

3. [Mil School]()

school."""
VISITED = """The useful information in /wiki/Karo_Mil for user goal school as follows: \n
Evidence in page: \nschool: Bana School.\nborn: 1934.\n
Summary: \nschool: Bana School.\n\n"""


def _retrieve(documents=DOCUMENTS, with_scores=True):
    items = [{"document": document, "score": 1.0} for document in documents] if with_scores else list(documents)
    return response(json.dumps({"result": [items]}), content_type="application/json")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(polite, "_BACKOFF_S", 0.001)


@asynccontextmanager
async def _toolbox(handlers, *, call_timeout_s=30.0, **changes):
    pages = {"/retrieve": _retrieve(), "/wiki/Karo_Mil": response(PAGE)}
    async with hostile_server({**pages, **handlers}) as server:
        config = ToolsConfig(
            search=SearchConfig(url=server.origin, top_k=3, snippets="first", snippet_sentences=3, timeout_s=5.0),
            visit=VisitConfig(site=server.origin, max_evidence_sentences=6, extraction_processes=0),
            fetch=FetchConfig(timeout_s=2.0),
            **changes,
        )
        async with WebToolbox(config, call_timeout_s=call_timeout_s) as toolbox:
            yield toolbox, server


def _search(query):
    return ToolCall(name="search", arguments={"query": query})


def _visit(url, goal="school"):
    return ToolCall(name="visit", arguments={"url": url, "goal": goal})


async def test_search_shows_the_quickstart_format():
    async with _toolbox({}) as (toolbox, server):
        protocol: Toolbox = toolbox
        result = await protocol.call(_search("Karo Mil"))
    assert (result.text, result.error, result.cached) == (HITS, None, False)
    assert result.latency_s > 0
    assert json.loads(server.bodies[0]) == {"queries": ["Karo Mil"], "topk": 3, "return_scores": True}


async def test_visit_shows_evidence_and_summary_of_a_site_relative_page():
    async with _toolbox({}) as (toolbox, _):
        result = await toolbox.call(_visit("/wiki/Karo_Mil"))
    assert (result.text, result.error) == (VISITED, None)


async def test_several_queries_and_pages_keep_their_order():
    async with _toolbox({"/slow": endless(b"", b"", pause_s=0.01)}) as (toolbox, _):
        searched = await toolbox.call(_search(["b  b", "a"]))
        visited = await toolbox.call(_visit(["/wiki/none", "/wiki/Karo_Mil"]))
    assert [part.split("'")[1] for part in searched.text.split(SEPARATOR)] == ["b  b", "a"]
    missing, found = visited.text.split(SEPARATOR)
    assert "could not be accessed" in missing
    assert (found, visited.error) == (VISITED, None)


async def test_the_same_thing_is_asked_once_and_remembered():
    async with _toolbox({}) as (toolbox, server):
        first = await asyncio.gather(*(toolbox.call(_search("Karo  Mil")) for _ in range(16)))
        again = await toolbox.call(_search(["Karo Mil"]))
        pages = await asyncio.gather(*(toolbox.call(_visit("/wiki/Karo_Mil#x", goal)) for goal in ("school", "born", "school")))
    assert len(server.requests) == 2
    assert sum(not result.cached for result in first) == 1
    assert again.cached
    assert [page.text.split("Summary: \n")[1].strip() for page in pages] == ["school: Bana School.", "born: 1934.", "school: Bana School."]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (ToolCall(name="calculate", arguments={}), "unknown_tool", "search, visit"),
        (ToolCall(name=["search"], arguments={}), "unknown_tool", "search, visit"),
        (ToolCall(name="search", arguments={}), "invalid_arguments", '"query" is missing'),
        (ToolCall(name="search", arguments=None), "invalid_arguments", "an object"),
        (ToolCall(name="search", arguments=["Karo"]), "invalid_arguments", "an object"),
        (_search(7), "invalid_arguments", "a string or a list of strings, got a number"),
        (_search(None), "invalid_arguments", "got null"),
        (_search({"q": "x"}), "invalid_arguments", "got an object"),
        (_search(["x", 7]), "invalid_arguments", "something else in it"),
        (_search([]), "invalid_arguments", "1 to 10"),
        (_search(["x"] * 100), "invalid_arguments", "got 100"),
        (_search("  "), "invalid_arguments", "must not be empty"),
        (_search(["x", ""]), "invalid_arguments", "must not be empty"),
        (_search("x" * 1_001), "invalid_arguments", "1000 characters"),
        (ToolCall(name="visit", arguments={"url": "/wiki/Karo_Mil"}), "invalid_arguments", '"goal" is missing'),
        (_visit("/wiki/Karo_Mil", ["school"]), "invalid_arguments", '"goal" must be a string'),
        (_visit([["/wiki/Karo_Mil"]]), "invalid_arguments", "a list of strings"),
    ],
)
async def test_wrong_calls_say_what_is_expected(call, error, says):
    async with _toolbox({}) as (toolbox, server):
        result = await toolbox.call(call)
    assert result.error == error
    assert says in result.text
    assert not server.requests


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("/wiki/none", "not_found"),
        ("/forbidden", "http_error"),
        ("/empty", "empty_page"),
        ("/image", "content_type"),
        ("/loop", "too_many_redirects"),
        ("/leak", "private_address"),
        ("http://169.254.169.254/latest/meta-data/", "private_address"),
        ("http://localhost:8265/", "port"),
        ("file:///etc/passwd", "scheme"),
        ("//example.com/x", "scheme"),
        ("wiki/Karo_Mil", "scheme"),
        ("http://u:p@example.com/", "userinfo"),
        ("/a\nb", "control_char"),
        ("/" + "x" * 3_000, "too_long"),
        ("/500", "unavailable"),
        ("/garbage", "unavailable"),
        ("/silent", "unavailable"),
    ],
)
async def test_a_page_that_fails_is_text_in_the_released_form(url, error):
    handlers = {
        "/forbidden": response(status=403), "/empty": response(""), "/image": response("x", content_type="image/png"),
        "/loop": response(status=302, Location="/loop"), "/leak": response(status=302, Location="http://10.0.0.1/"),
        "/500": response("oops", status=500), "/garbage": raw(b"garbage\r\n\r\n"), "/silent": endless(b"", b"", pause_s=0.05),
    }  # fmt: skip
    async with _toolbox(handlers) as (toolbox, _):
        result = await toolbox.call(_visit(url))
    assert result.error == error
    assert (error in INFRASTRUCTURE_ERRORS) == (error == "unavailable")
    assert "Evidence in page: \nThe provided webpage content could not be accessed." in result.text
    assert result.text.endswith("Summary: \nThe webpage content could not be processed, and therefore, no information is available.\n\n")


async def test_the_agent_cannot_visit_the_search_server():
    async with hostile_server({"/retrieve": _retrieve(), "/secret": response("keys")}) as search_server, _toolbox({}) as (_, site):
        config = ToolsConfig(search=SearchConfig(url=search_server.origin), visit=VisitConfig(site=site.origin))
        async with WebToolbox(config) as toolbox:
            assert (await toolbox.call(_search("x"))).error is None
            assert (await toolbox.call(_visit(f"{search_server.origin}/secret"))).error == "port"


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (response("down", status=503), "unavailable"),
        (response("busy", status=429), "unavailable"),
        (raw(b"garbage\r\n\r\n"), "unavailable"),
        (response("no", status=400), "refused"),
        (response(status=302, Location="/wiki/Karo_Mil"), "refused"),
        (response("<html>", content_type="text/html"), "bad_response"),
        (response("x", content_type="image/png"), "bad_response"),
        (response("[1]", content_type="application/json"), "bad_response"),
        (response('{"result": []}', content_type="application/json"), "bad_response"),
        (response('{"result": {}}', content_type="application/json"), "bad_response"),
        (response('{"result": [[{"document": {}}]]}', content_type="application/json"), "bad_response"),
        (response('{"result": [[null]]}', content_type="application/json"), "bad_response"),
        (response('{"result": [["text"]]}', content_type="application/json"), "bad_response"),
        (response('{"result": [[{"contents": null}]]}', content_type="application/json"), "bad_response"),
        (response('{"result": [[{"contents": "x", "url": 7}]]}', content_type="application/json"), "bad_response"),
        (response("[" * 100_000, content_type="application/json"), "bad_response"),
    ],
    ids=range(16),
)
async def test_a_search_outage_is_an_infrastructure_error_and_not_remembered(handler, error):
    answer = handler

    async def current(writer):
        await answer(writer)

    async with _toolbox({"/retrieve": current}) as (toolbox, _):
        result = await toolbox.call(_search("Karo Mil"))
        answer = _retrieve()
        later = await toolbox.call(_search("Karo Mil"))
    assert result.error == error
    assert error in INFRASTRUCTURE_ERRORS
    assert "unavailable" in result.text
    assert (later.text, later.cached) == (HITS, False)


async def test_a_provider_that_recovers_within_the_attempts_is_no_outage():
    answers = [response("busy", status=429), response("busy", status=503), _retrieve()]

    async def answer(writer):
        await answers.pop(0)(writer)

    async with _toolbox({"/retrieve": answer}) as (toolbox, _):
        assert (await toolbox.call(_search("Karo Mil"))).text == HITS


@pytest.mark.parametrize("with_scores", [True, False])
async def test_documents_without_url_and_title_are_read_from_contents(with_scores):
    bare = [{"id": "7", "contents": '"Karo Mil"\n' + KARO}]
    async with _toolbox({"/retrieve": _retrieve(bare, with_scores)}) as (toolbox, _):
        assert "1. [Karo Mil]()\n\nperson. school: Bana School." in (await toolbox.call(_search("x"))).text


async def test_no_hits_is_an_answer():
    async with _toolbox({"/retrieve": _retrieve([])}) as (toolbox, _):
        result = await toolbox.call(_search("Karo"))
    assert (result.text, result.error) == ("No results found for 'Karo'. Try with a more general query.", None)


async def test_a_call_has_a_deadline_and_a_place():
    async with _toolbox({"/silent": endless(b"", b"", pause_s=0.05)}, call_timeout_s=2.0, max_concurrent=1) as (toolbox, _):
        hanging = asyncio.create_task(toolbox.call(_visit("/silent")))
        await asyncio.sleep(0.5)
        queued = await toolbox.call(_visit("/wiki/Karo_Mil"))
    assert (await hanging).error == "unavailable"
    assert queued.error is None
    assert queued.latency_s > 0.1


async def test_a_tool_that_breaks_is_marked_and_logged(monkeypatch, caplog):
    async with _toolbox({}) as (toolbox, _):
        monkeypatch.setattr("webdancer.tools.extraction.find_evidence", lambda *a, **k: 1 / 0)
        result = await toolbox.call(_visit("/wiki/Karo_Mil"))
    assert result.error == "internal"
    assert result.error in INFRASTRUCTURE_ERRORS
    assert "ZeroDivisionError" in caplog.text


async def test_an_extractor_that_does_not_import_ends_the_run_before_it_starts_and_is_never_an_observation(monkeypatch):
    async with _toolbox({}) as (toolbox, _):
        monkeypatch.setitem(sys.modules, "trafilatura", None)
        with pytest.raises(ImportError):
            await toolbox.check()
        with pytest.raises(ImportError):
            await toolbox.call(_visit("/wiki/Karo_Mil"))


async def test_text_always_encodes():
    async with _toolbox({}) as (toolbox, _):
        result = await toolbox.call(_search("a\ud800\x00b"))
        result.text.encode()
    assert "\x00" not in result.text


def _nested(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["query", "url", "goal", "x"]), inner, max_size=4)


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), _nested, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["search", "visit", "answer", ""]), _JSON)
def test_no_arguments_raise(name, arguments):
    """Against a site that is down, so that whatever is well-formed meets an outage."""

    async def run():
        down = "http://127.0.0.1:9"
        config = ToolsConfig(search=SearchConfig(url=down), visit=VisitConfig(site=down))
        async with WebToolbox(config) as toolbox:
            return await toolbox.call(ToolCall(name=name, arguments=arguments))

    result = asyncio.run(run())
    assert result.error is not None
    assert result.error != "internal"
    result.text.encode()


def test_what_is_missing_at_the_start_is_one_clear_error(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ServiceError, match="SERPER_API_KEY"):
        WebToolbox(ToolsConfig(search=SearchConfig(backend="serper")))
    with pytest.raises(ConfigError, match=r"tools\.search\.url"):
        WebToolbox(ToolsConfig())
    with pytest.raises(ConfigError, match=r"tools\.visit\.site"):
        WebToolbox(ToolsConfig(search=SearchConfig(url="http://127.0.0.1:1"), visit=VisitConfig(site="http://127.0.0.1:1/wiki")))


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ([None, None], None),
        ([None, "not_found"], None),
        (["not_found", "empty_page"], "not_found"),
        ([None, "unavailable"], "unavailable"),
        (["not_found", "unavailable"], "unavailable"),
    ],
)
def test_an_outage_of_any_part_shows_and_a_bad_page_only_if_nothing_went_well(errors, shown):
    parts = [Part(text=str(index), error=error, cached=index == 0) for index, error in enumerate(errors)]
    assert join_parts(parts, SEPARATOR) == ToolResult(text=f"0{SEPARATOR}1", error=shown, cached=False)


def test_the_guide_has_every_code():
    guide = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    passing = {"unreachable", "no_summary", "extraction_timeout", "invalid_arguments", "unknown_tool"}
    assert {code for code in BLOCK_CODES | INFRASTRUCTURE_ERRORS | visit._LASTING | passing if f"`{code}`" not in guide} == set()


async def test_a_search_that_waits_for_its_quota_keeps_no_page_waiting():
    class Waits:
        usage = ""

        async def __call__(self, arguments):
            await asyncio.sleep(60)

        async def aclose(self): ...

    class AtOnce(Waits):
        async def __call__(self, arguments):
            return ToolResult(text="page")

    async with WebToolbox(ToolsConfig(max_concurrent=2), tools={"search": Waits(), "visit": AtOnce()}) as toolbox:
        searches = [asyncio.ensure_future(toolbox.call(ToolCall(name="search", arguments={}))) for _ in range(8)]
        async with asyncio.timeout(5):
            assert (await toolbox.call(ToolCall(name="visit", arguments={}))).text == "page"
        for search in searches:
            search.cancel()
