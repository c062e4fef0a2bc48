"""Every search provider over real HTTP: what it is asked, one observation for all, and each wrong answer as a typed outage."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from urllib.parse import parse_qs

import pytest

from tests.hostile_server import endless, hostile_server, raw, response
from webdancer.config import PoliteConfig, SearchConfig, ToolsConfig, VisitConfig
from webdancer.errors import ConfigError, DataError, ServiceError
from webdancer.offline_web.index import Document, SearchIndex
from webdancer.tools import keys
from webdancer.tools.provider import ProviderFailed
from webdancer.tools.render import SEPARATOR, Hit
from webdancer.tools.result import INFRASTRUCTURE_ERRORS
from webdancer.tools.search import SearchTool
from webdancer.tools.search_backends import open_backend
from webdancer.tools.shelf import Memory
from webdancer.tools.toolbox import WebToolbox
from webdancer.types import ToolCall

CANARY = "canary-0123456789abcdef"
VARIABLES = {"serper": keys.SERPER, "brave": keys.BRAVE, "tavily": keys.TAVILY}
PATHS = {"retrieve": "/retrieve", "serper": "/search", "brave": "/res/v1/web/search", "tavily": "/search", "searxng": "/search"}

KARO = {"title": "Karo Mil", "url": "https://e.example/karo", "text": "Karo Mil is a person. She was born in 1934."}
SCHOOL = {"title": "Bana\n School", "url": "https://e.example/bana", "text": "A school."}
OBSERVATION = """A Google search for 'Karo Mil' found 2 results:

## Web Results
1. [Karo Mil](https://e.example/karo)

Karo Mil is a person. She was born in 1934.

2. [Bana School](https://e.example/bana)

A school."""


def _answer(backend, documents=(KARO, SCHOOL)):
    """The documents as this provider would give them."""
    match backend:
        case "retrieve":
            contents = [{**one, "contents": f'"{" ".join(one["title"].split())}"\n{one["text"]}'} for one in documents]
            return {"result": [[{"document": document, "score": 1.0} for document in contents]]}
        case "serper":
            return {"organic": [{"title": one["title"], "link": one["url"], "snippet": one["text"], "position": 1} for one in documents]}
        case "brave":
            results = [{"title": f"<strong>{one['title']}</strong>", "url": one["url"], "description": one["text"]} for one in documents]
            return {"type": "search", "web": {"type": "search", "results": results}}
    return {"results": [{"title": one["title"], "url": one["url"], "content": one["text"], "score": 0.5} for one in documents]}


def _json(answer, status=200):
    return response(json.dumps(answer), status=status, content_type="application/json")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for variable in keys.ALL_KEYS:
        monkeypatch.delenv(variable, raising=False)
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, CANARY)


@asynccontextmanager
async def _asking(backend, handler, **changes):
    """What the search tool answers to a query, and the server that is asked."""
    async with hostile_server({PATHS[backend]: handler}) as server:
        search = SearchConfig(**{"backend": backend, "url": server.origin, "timeout_s": 5.0, **changes})
        config = ToolsConfig(search=search, visit=VisitConfig(extraction_processes=0), polite=PoliteConfig(max_attempts=1))
        async with WebToolbox(config) as toolbox:

            async def ask(query):
                return await toolbox.call(ToolCall(name="search", arguments={"query": query}))

            yield ask, server


@pytest.mark.parametrize("backend", PATHS)
async def test_the_observation_is_the_same_whoever_is_asked(backend):
    async with _asking(backend, _json(_answer(backend))) as (ask, server):
        result = await ask(["Karo Mil", "Karo  Mil"])
    assert result.error is None
    first, second = result.text.split(SEPARATOR)
    assert first == OBSERVATION
    assert second == OBSERVATION.replace("'Karo Mil'", "'Karo  Mil'")
    assert len(server.requests) == 1
    assert CANARY not in repr(result)


async def test_what_each_provider_is_asked_and_where_the_key_travels():
    asked = {}
    for backend in PATHS:
        async with _asking(backend, _json(_answer(backend)), top_k=7) as (ask, server):
            await ask("谁 is & who")
        (head,), (body,) = server.requests, server.bodies
        line, _, headers = head.partition("\r\n")
        method, target, _ = line.split(" ")
        path, _, query = target.partition("?")
        found = [header.split(":")[0].lower() for header in headers.split("\r\n") if CANARY in header]
        assert CANARY not in line + body.decode()
        asked[backend] = (method, path, {name: value for name, (value,) in parse_qs(query).items()} or json.loads(body), found)
    question = "谁 is & who"
    assert asked == {
        "retrieve": ("POST", "/retrieve", {"queries": [question], "topk": 7, "return_scores": True}, []),
        "serper": ("POST", "/search", {"q": question, "num": 7, "gl": "cn"}, ["x-api-key"]),
        "brave": (
            *("GET", "/res/v1/web/search"),
            {"q": question, "count": "7", "text_decorations": "false", "result_filter": "web"},
            ["x-subscription-token"],
        ),
        "tavily": ("POST", "/search", {"query": question, "max_results": 7, "search_depth": "basic"}, ["authorization"]),
        "searxng": ("GET", "/search", {"q": question, "format": "json", "pageno": "1"}, []),
    }


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    ("handler", "code"),
    [
        (response("<html>Sign in</html>"), "bad_response"),
        (response("{", content_type="application/json"), "bad_response"),
        (response('"text"', content_type="application/json"), "bad_response"),
        (response("[" * 100_000, content_type="application/json"), "bad_response"),
        (_json({"result": 1, "organic": 1, "web": 1, "results": 1}), "bad_response"),
        (_json({"result": [[1]], "organic": [1], "web": {"results": [1]}, "results": [1]}), "bad_response"),
        (_json({"result": [[{"contents": 1}]], "organic": [{"title": 1}], "web": {"results": [{"url": []}]}, "results": [{"title": {}}]}),
         "bad_response"),
        (response("x" * 6_000_000, content_type="application/json"), "bad_response"),
        (_json({"message": f"Unauthorized: {CANARY}"}, status=401), "refused"),
        (_json({"message": f"credit of {CANARY} is used up"}, status=402), "refused"),
        (response(status=302, Location="http://127.0.0.1:1/"), "refused"),
        (_json({"message": CANARY}, status=429), "unavailable"),
        (response("down", status=503), "unavailable"),
        (raw(b"garbage\r\n\r\n"), "unavailable"),
    ],
    ids=range(14),
)  # fmt: skip
async def test_a_wrong_answer_is_an_outage_with_a_code_and_never_tells_the_key(backend, handler, code, caplog):
    async with _asking(backend, handler) as (ask, server):
        result = await ask("Karo Mil")
        found = open_backend(SearchConfig(backend=backend, url=server.origin))
        with pytest.raises(ProviderFailed) as caught:
            await found.search("Karo Mil")
        await found.aclose()
    assert (result.error, caught.value.code) == (code, code)
    assert code in INFRASTRUCTURE_ERRORS
    assert "is unavailable at the moment" in result.text
    assert CANARY not in result.text + str(caught.value) + repr(caught.value) + repr(vars(found)) + caplog.text


@pytest.mark.parametrize("backend", PATHS)
async def test_a_query_that_is_not_valid_unicode_is_still_asked(backend):
    async with _asking(backend, _json(_answer(backend))) as (ask, _):
        assert (await ask("Karo \ud800 Mil")).error is None


async def test_a_key_that_a_provider_repeats_does_not_even_get_into_what_is_remembered():
    backend = "brave"
    told = {**KARO, "title": f"You are {CANARY}", "text": f"{CANARY}{CANARY}."}
    async with hostile_server({PATHS[backend]: _json(_answer(backend, [told]))}) as server:
        found = open_backend(SearchConfig(backend=backend, url=server.origin))
        (hit,) = await found.search("Karo")
        await found.aclose()
    assert (hit.title, hit.snippet) == ("You are [key]", "[key][key].")


async def test_a_provider_that_hangs_is_unavailable():
    async with _asking("brave", endless(b"", b"", pause_s=0.01), timeout_s=0.3) as (ask, _):
        assert (await ask("x")).error == "unavailable"


@pytest.mark.parametrize("backend", PATHS)
async def test_no_hits_is_an_answer(backend):
    async with _asking(backend, _json(_answer(backend, ()))) as (ask, _):
        result = await ask("Karo")
    assert (result.text, result.error) == ("No results found for 'Karo'. Try with a more general query.", None)


async def test_what_providers_leave_out_when_there_is_nothing():
    for backend, answer in (("serper", {"searchParameters": {}}), ("brave", {"type": "search"})):
        async with _asking(backend, _json(answer)) as (ask, _):
            assert (await ask("Karo")).text.startswith("No results found")


async def test_dates_and_sources_are_shown_in_the_released_form():
    hit = {"title": "T", "link": "https://e.example/", "snippet": "S.", "date": "Jan 3, 2022", "source": "The Paper"}
    async with _asking("serper", _json({"organic": [hit]})) as (ask, _):
        result = await ask("x")
    assert result.text.endswith("1. [T](https://e.example/)\nDate published: Jan 3, 2022\nSource: The Paper\n\nS.")
    hit = {"title": "A &amp; B", "url": "https://e.example/", "description": "an <strong>a</strong> &lt; b", "age": "2 days ago"}
    async with _asking("brave", _json({"web": {"results": [hit]}})) as (ask, _):
        assert (await ask("x")).text.endswith("1. [A & B](https://e.example/)\nDate published: 2 days ago\n\nan a < b")


@pytest.mark.parametrize("query", ["word " * 150, "x" * 900, "a " * 40 + "y" * 500])
async def test_brave_and_tavily_get_a_query_that_they_take(query):
    async with _asking("brave", _json({})) as (ask, server):
        await ask(query)
    (asked,) = parse_qs(server.requests[0].split(" ")[1].partition("?")[2])["q"]
    assert len(asked.split()) <= 50
    async with _asking("tavily", _json({"results": []})) as (ask, server):
        await ask(query)
    for short in (asked, json.loads(server.bodies[0])["query"]):
        assert 0 < len(short) <= 400
        assert query.startswith(short)


async def test_an_instance_whose_engines_refuse_it_is_an_outage_that_passes():
    refused = {"results": [], "unresponsive_engines": [["google", "Suspended: too many requests"], ["brave", "timeout"]]}
    partly = {**_answer("searxng"), "unresponsive_engines": [["google", "CAPTCHA"]]}
    answers = [_json(refused), _json(partly)]

    async def in_turn(writer):
        await answers.pop(0)(writer)

    async with _asking("searxng", in_turn) as (ask, _):
        assert (await ask("Karo Mil")).error == "unavailable"
        assert (await ask("Karo Mil")).text == OBSERVATION


async def test_that_nothing_was_found_is_remembered_for_as_long_as_that_a_page_is_not_there():
    class Engine:
        async def search(self, query):
            return [Hit(title="T", url="/t", snippet="S.")] if query == "owl" else []

    tool = SearchTool(Engine(), SearchConfig(), Memory(ToolsConfig(cache_negative_hours=0.0)))
    found = [[(await tool({"query": query})).cached for _ in range(2)] for query in ("owl", "nothing")]
    assert found == [[False, True], [False, False]]


async def test_an_index_file_answers_without_a_server(tmp_path):
    documents = [Document(url=one["url"], title=" ".join(one["title"].split()), text=one["text"]) for one in (KARO, SCHOOL)]
    SearchIndex.build(documents, tmp_path / "web.db").close()
    search = SearchConfig(backend="index", index=str(tmp_path / "web.db"))
    async with WebToolbox(ToolsConfig(search=search, visit=VisitConfig(extraction_processes=0))) as toolbox:
        await toolbox.check()
        queries = ("Karo Mil person school", '"; DROP TABLE documents')
        results = [await toolbox.call(ToolCall(name="search", arguments={"query": query})) for query in queries]
    assert results[0].text == OBSERVATION.replace("'Karo Mil'", "'Karo Mil person school'")
    assert results[1].text.startswith("No results found")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"backend": "serper"}, ServiceError, "SERPER_API_KEY: must be set"),
        ({"backend": "brave"}, ServiceError, "BRAVE_API_KEY: must be set"),
        ({"backend": "tavily"}, ServiceError, "TAVILY_API_KEY: must be set"),
        ({"backend": "searxng"}, ConfigError, "tools.search.url: must be"),
        ({"backend": "retrieve"}, ConfigError, "tools.search.url: must be"),
        ({"backend": "index", "index": "/nowhere"}, DataError, "/nowhere"),
        ({"backend": "altavista"}, ConfigError, "tools.search.backend: must be"),
    ],
)
def test_what_is_missing_is_said_at_the_start(changes, error, says, monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable)
    with pytest.raises(error, match=says):
        open_backend(SearchConfig(**changes))


async def test_hits_of_ones_own_server_may_be_whole_articles():
    documents = [{"document": {"contents": f'"Owl {n}"\n' + "Owls hunt at night. " * 30_000, "url": f"/wiki/{n}"}} for n in range(10)]
    async with _asking("retrieve", _json({"result": [documents]}), timeout_s=60.0) as (ask, _):
        result = await ask("owl")
    assert result.error is None
    assert "Owls hunt at night." in result.text
