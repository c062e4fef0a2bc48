"""Pages over HTTP, by a reader service and from an /access server: the same observation, and who is to blame when there is none."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import pytest

from tests.hostile_server import endless, hostile_server, raw, response
from tests.pdf_files import make_pdf
from webdancer.config import FetchConfig, PoliteConfig, SearchConfig, ToolsConfig, VisitConfig
from webdancer.errors import ConfigError, ServiceError
from webdancer.tools import keys, network
from webdancer.tools.render import SEPARATOR
from webdancer.tools.result import INFRASTRUCTURE_ERRORS
from webdancer.tools.toolbox import WebToolbox
from webdancer.types import ToolCall

CANARY = "canary-0123456789abcdef"
URL = "https://e.example/karo?page=1"
CONTENT = "# Karo Mil\n\nKaro Mil is a person.\n\nschool: Bana School."
OBSERVATION = """The useful information in {url} for user goal school as follows: \n
Evidence in page: \nKaro Mil is a person.\nschool: Bana School.\n
Summary: \nschool: Bana School.\n\n"""


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """No test asks a real resolver."""

    async def resolve(host):
        return {"e.example": ["93.184.216.34"], "inside.nip.io": ["169.254.169.254"], "mixed.org": ["93.184.216.34", "10.0.0.1"]}[host]

    monkeypatch.setattr(network, "resolve_name", resolve)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(keys.JINA, CANARY)


def _json(answer, status=200):
    return response(json.dumps(answer), status=status, content_type="application/json")


def _jina(**data):
    return _json({"code": 200, "status": 20000, "data": {"title": "Karo Mil", "url": URL, "content": CONTENT, **data}})


def _access(*results):
    return _json({"result": list(results)})


@asynccontextmanager
async def _visiting(backend, handlers, **changes):
    async with hostile_server(handlers) as server:
        visit = {"backend": backend, "url": server.origin, "site": server.origin if backend == "direct" else "", "extraction_processes": 0}
        config = ToolsConfig(
            search=SearchConfig(url="http://127.0.0.1:9"),
            visit=VisitConfig(**{**visit, **changes}),
            fetch=FetchConfig(timeout_s=1.0),
            polite=PoliteConfig(max_attempts=1),
        )
        async with WebToolbox(config) as toolbox:

            async def visit(url, goal="school"):
                return await toolbox.call(ToolCall(name="visit", arguments={"url": url, "goal": goal}))

            yield visit, server


async def test_the_reader_service_is_asked_for_the_address_with_the_key_in_a_header():
    async with _visiting("jina", {"/": _jina()}) as (visit, server):
        result = await visit(f"{URL}#there")
        again = await visit(URL)
    assert (result.text, result.error) == (OBSERVATION.format(url=f"{URL}#there"), None)
    assert again.cached
    assert json.loads(server.bodies[0]) == {"url": URL}
    assert f"authorization: bearer {CANARY}" in server.requests[0].lower()
    assert CANARY not in server.requests[0].split("\r\n")[0]


async def test_the_reader_service_works_without_a_key(monkeypatch):
    monkeypatch.delenv(keys.JINA)
    async with _visiting("jina", {"/": _jina()}) as (visit, server):
        assert (await visit(URL)).error is None
    assert "authorization" not in server.requests[0].lower()


async def test_a_reader_of_ones_own_is_not_sent_inside_by_a_name():
    async with _visiting("jina", {"/": _jina()}) as (visit, server):
        codes = [(await visit(f"http://{host}/latest/meta-data")).error for host in ("inside.nip.io", "mixed.org", "nowhere.org")]
    assert codes == ["private_address", "private_address", "dns_failure"]
    assert not server.requests


async def test_private_addresses_are_not_told_to_a_reader_service():
    async with _visiting("jina", {"/": _jina()}) as (visit, server):
        results = [await visit(url) for url in ("http://10.0.0.1/", "http://wiki.corp/", "file:///etc/passwd", "http://u:p@e.example/")]
    assert [result.error for result in results] == ["private_address", "private_name", "scheme", "userinfo"]
    assert not server.requests


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (_jina(warning="Target URL returned error 404: Not Found"), "not_found"),
        (_jina(warning="Target URL returned error 403: Forbidden"), "http_error"),
        (_jina(warning="Target URL returned error 503: Service Unavailable"), "unreachable"),
        (_jina(warning="This is a cached snapshot"), None),
        (_jina(content=" \n"), "empty_page"),
        (_json({"code": 422, "message": "no such domain"}, status=422), "http_error"),
        (_json({"code": 451, "message": "blocked"}, status=451), "http_error"),
        (_json({"code": 401, "message": f"bad key {CANARY}"}, status=401), "refused"),
        (_json({"code": 402, "message": f"no credit for {CANARY}"}, status=402), "refused"),
        (_json({"code": 429}, status=429), "unavailable"),
        (_json({"code": 503}, status=503), "unavailable"),
        (_jina(content=None), "bad_response"),
        (_jina(content=["x"]), "bad_response"),
        (_json({"data": "text"}), "bad_response"),
        (response("# Karo Mil", content_type="text/plain"), "bad_response"),
        (raw(b"garbage\r\n\r\n"), "unavailable"),
        (endless(b"", b"", pause_s=0.05), "unavailable"),
    ],
    ids=range(17),
)
async def test_what_a_reader_service_says_is_the_pages_doing_or_an_outage(handler, error):
    async with _visiting("jina", {"/": handler}) as (visit, _):
        result = await visit(URL)
    assert result.error == error
    assert (error in INFRASTRUCTURE_ERRORS) == (error in ("refused", "unavailable", "bad_response"))
    assert CANARY not in result.text
    if error is not None:
        assert "Evidence in page: \nThe provided webpage content could not be accessed." in result.text


async def test_an_access_server_gets_the_address_as_it_was_written():
    urls = ["https://en.wikipedia.org/wiki/Köln", "/wiki/Karo_Mil"]
    async with _visiting("access", {"/access": _access({"url": "x", "contents": CONTENT})}) as (visit, server):
        results = [await visit(url) for url in urls]
    assert [result.text for result in results] == [OBSERVATION.format(url=url) for url in urls]
    assert [json.loads(body) for body in server.bodies] == [{"urls": [url]} for url in urls]


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (_access(None), "not_found"),
        (_access({"contents": ""}), "empty_page"),
        (_access(), "bad_response"),
        (_access({"contents": CONTENT}, None), "bad_response"),
        (_access({"contents": 1}), "bad_response"),
        (_access("text"), "bad_response"),
        (_json({"result": {}}), "bad_response"),
        (response("<html>"), "bad_response"),
        (response("no", status=404), "refused"),
        (response("down", status=502), "unavailable"),
    ],
    ids=range(10),
)
async def test_what_an_access_server_says(handler, error):
    async with _visiting("access", {"/access": handler}) as (visit, _):
        assert (await visit("/wiki/Karo_Mil")).error == error


@pytest.mark.parametrize(("status", "error"), [(429, "unreachable"), (503, "unreachable"), (403, "http_error"), (501, "http_error")])
async def test_a_status_that_may_pass_is_not_remembered(status, error):
    async with hostile_server({"/x": response(status=status)}) as server:
        config = ToolsConfig(
            search=SearchConfig(url="http://127.0.0.1:9"),
            visit=VisitConfig(extraction_processes=0),
            fetch=FetchConfig(allowed_origins=[server.origin]),
            polite=PoliteConfig(max_attempts=1),
        )
        async with WebToolbox(config) as toolbox:
            results = [await toolbox.call(ToolCall(name="visit", arguments={"url": f"{server.origin}/x", "goal": "g"})) for _ in range(2)]
    assert [result.error for result in results] == [error] * 2
    assert len(server.requests) == (2 if error == "unreachable" else 1)


async def test_addresses_that_no_server_needs_to_see():
    async with _visiting("access", {}) as (visit, server):
        assert [(await visit(url)).error for url in ("/" + "x" * 3_000, "/a\nb", "/a\\b")] == ["too_long", "control_char", "backslash"]
    assert not server.requests


async def test_a_pdf_is_read_like_a_page():
    lines = ["Karo Mil is a person.", "school: Bana School."]
    handlers = {
        "/karo.pdf": response(make_pdf([lines]), content_type="application/pdf"),
        "/broken.pdf": response(b"%PDF-1.4 and nothing else", content_type="application/pdf"),
        "/image.pdf": response(make_pdf([[]]), content_type="application/pdf"),
    }
    async with _visiting("direct", handlers) as (visit, _):
        result = await visit(["/karo.pdf", "/broken.pdf", "/image.pdf"])
        broken = await visit("/broken.pdf")
    first, second, third = result.text.split(SEPARATOR)
    assert first == OBSERVATION.format(url="/karo.pdf")
    assert "no readable text" in second
    assert "no readable text" in third
    assert (result.error, broken.error) == (None, "empty_page")


async def test_a_run_that_cannot_read_pages_does_not_start():
    search = SearchConfig(url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"tools\.visit\.url: must be the origin of an /access server"):
        WebToolbox(ToolsConfig(search=search, visit=VisitConfig(backend="access")))
    with pytest.raises(ConfigError, match=r"tools\.visit\.backend"):
        WebToolbox(ToolsConfig(search=search, visit=VisitConfig(backend="lynx")))
    handlers = {"/retrieve": _json({"result": [[]]}), "/access": response("down", status=503)}
    async with hostile_server(handlers) as server:
        config = ToolsConfig(
            search=SearchConfig(url=server.origin),
            visit=VisitConfig(backend="access", url=server.origin, extraction_processes=0),
            polite=PoliteConfig(max_attempts=1),
        )
        async with WebToolbox(config) as toolbox:
            with pytest.raises(ServiceError, match=r"tools\.visit\.url: must be an /access server that answers"):
                await toolbox.check()
