"""The fetcher against a real server that misbehaves, and against resolvers that lie."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import shutil
import socket
import ssl
import subprocess
import zlib

import httpx
import pytest

from tests.hostile_server import endless, hostile_server, raw, response
from webdancer.tools import network
from webdancer.tools.body import _Inflater
from webdancer.tools.fetch import BlockedUrl, Fetcher, FetchFailed, FetchPolicy

PUBLIC = "93.184.216.34"
HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"


def _policy(server, **changes):
    return FetchPolicy(**{"allowed_origins": (server.origin,), "timeout_s": 5.0, "max_bytes": 10_000, **changes})


async def _code(url, fetcher):
    async with fetcher:
        with pytest.raises(BlockedUrl) as caught:
            await fetcher.fetch(url)
    return caught.value.code


async def test_a_page_and_its_text_over_kept_alive_connections():
    handlers = {"/p": response("<p>Grüße</p>".encode("latin-1"), content_type="Text/HTML; Charset=ISO-8859-1")}
    async with hostile_server(handlers) as server, Fetcher(_policy(server)) as fetcher:
        for _ in range(5):
            page = await fetcher.fetch(f"{server.origin}/p?q=1#frag")
        missing = await fetcher.fetch(f"{server.origin}/none")
    assert (page.url, page.status, page.content_type, page.text) == (f"{server.origin}/p?q=1", 200, "text/html", "<p>Grüße</p>")
    assert (missing.status, missing.ok) == (404, False)
    assert server.connections == 1
    assert "cookie" not in "".join(server.requests).lower()


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("gzip", gzip.compress(b"hello ", mtime=0) + gzip.compress(b"world", mtime=0)),
        ("deflate", zlib.compress(b"hello world")),
        ("deflate", zlib.compress(b"hello world")[2:-4]),
        ("identity", b"hello world"),
    ],
)
async def test_encodings(encoding, data):
    async with hostile_server({"/": response(data, Content_Encoding=encoding)}) as server, Fetcher(_policy(server)) as fetcher:
        assert (await fetcher.fetch(server.origin)).body == b"hello world"


@pytest.mark.parametrize(
    "handler",
    [
        response(b"x" * 10_001),
        endless(HTML + b"\r\n", b"x" * 4096),
        response(gzip.compress(b"x" * 50_000_000), Content_Encoding="gzip"),
        response(gzip.compress(b"x" * 6_000) + gzip.compress(b"x" * 6_000), Content_Encoding="gzip"),
        endless(HTML + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"")),
        raw(HTML + b"Content-Length: 999999999999\r\n\r\nx"),
        endless(HTML + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    ],
    ids=["length", "endless", "bomb", "members", "empty members", "declared", "chunked"],
)
async def test_bodies_are_capped_on_the_wire_and_decoded(handler):
    async with hostile_server({"/": handler}) as server:
        assert await _code(server.origin, Fetcher(_policy(server))) == "body_too_large"


@pytest.mark.parametrize(
    "handler",
    [
        endless(HTML + b"\r\n", b"x", pause_s=0.02),
        endless(b"HTTP/1.1 200 OK\r\nX: ", b"y", pause_s=0.02),
        endless(b"", b"", pause_s=0.05),
    ],
    ids=["body", "header", "silence"],
)
async def test_one_deadline_for_everything(handler):
    async with hostile_server({"/": handler}) as server:
        started = asyncio.get_running_loop().time()
        assert await _code(server.origin, Fetcher(_policy(server, timeout_s=0.3))) == "timeout"
        assert asyncio.get_running_loop().time() - started < 1.5


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "application/pdf", "text/htmlx", "a/zip; x=text/html"])
async def test_content_types(content_type):
    async with hostile_server({"/": response("x", content_type=content_type)}) as server:
        assert await _code(server.origin, Fetcher(_policy(server))) == "content_type"


async def test_a_missing_content_type_must_look_like_text():
    handlers = {"/text": response("plain", content_type=None), "/binary": response(b"\x89PNG\0\0", content_type=None)}
    async with hostile_server(handlers) as server:
        async with Fetcher(_policy(server)) as fetcher:
            assert (await fetcher.fetch(f"{server.origin}/text")).text == "plain"
        assert await _code(f"{server.origin}/binary", Fetcher(_policy(server))) == "content_type"


@pytest.mark.parametrize(
    "handler",
    [
        raw(b"not http at all\r\n\r\n"),
        raw(b""),
        raw(HTML + b"Content-Length: 100\r\n\r\nshort"),
        response(b"not gzip", Content_Encoding="gzip"),
        response(b"x", Content_Encoding="br"),
        raw(HTML + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"owl " * 1000)[:-9]),
    ],
    ids=["garbage", "hang-up", "short", "not gzip", "brotli", "cut off"],
)
async def test_broken_answers_are_failures_and_not_blocks(handler):
    async def then_close(writer):
        await handler(writer)
        writer.close()

    async with hostile_server({"/": then_close}) as server, Fetcher(_policy(server)) as fetcher:
        with pytest.raises(FetchFailed):
            await fetcher.fetch(server.origin)


async def test_a_refused_connection_is_a_failure():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with Fetcher(FetchPolicy(allowed_origins=(origin,))) as fetcher:
            with pytest.raises(FetchFailed):
                await fetcher.fetch(origin)


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://169.254.169.254/latest/meta-data/", "private_address"),
        ("http://127.0.0.1:1/", "port"),
        ("//127.0.0.1/", "private_address"),
        ("http://localhost/", "private_name"),
        ("http://0x7f.1/", "noncanonical_ip"),
        ("file:///etc/passwd", "scheme"),
        ("http://a:b@example.com/", "userinfo"),
        ("http://example.com\\@127.0.0.1/", "backslash"),
        ("/a\tb", "control_char"),
        ("http://[::1", "invalid_url"),
        ("/" + "a" * 3000, "too_long"),
    ],
)
async def test_redirects_are_checked_at_every_hop(location, code):
    handlers = {"/": response(status=302, Location="/next"), "/next": response(status=307, Location=location)}
    async with hostile_server(handlers) as server:
        assert await _code(server.origin, Fetcher(_policy(server))) == code


async def test_redirects_are_followed_to_a_limit():
    handlers = {f"/{i}": response(status=301, Location=f"/{i + 1}") for i in range(4)} | {"/4": response("there"), "/loop": response(
        status=302, Location="loop")}  # fmt: skip
    async with hostile_server(handlers) as server:
        async with Fetcher(_policy(server, max_redirects=4)) as fetcher:
            page = await fetcher.fetch(f"{server.origin}/0")
        assert (page.url, page.text) == (f"{server.origin}/4", "there")
        assert await _code(f"{server.origin}/0", Fetcher(_policy(server, max_redirects=3))) == "too_many_redirects"
        assert await _code(f"{server.origin}/loop", Fetcher(_policy(server))) == "too_many_redirects"
        assert await _code(f"{server.origin}/loop", Fetcher(_policy(server, max_redirects=0))) == "too_many_redirects"


def _mock(seen=None, answer=None):
    def handle(request):
        if seen is not None:
            seen.append(request)
        return answer or httpx.Response(200, html="<p>hi</p>")

    return httpx.MockTransport(handle)


@pytest.mark.parametrize(
    ("addresses", "code"),
    [
        (["10.0.0.1"], "private_address"),
        ([PUBLIC, "127.0.0.1"], "private_address"),
        ([PUBLIC, "::1"], "private_address"),
        (["::ffff:10.0.0.1"], "private_address"),
        (["fe80::1%eth0"], "private_address"),
        ([], "dns_failure"),
        (["nonsense"], "dns_failure"),
        (socket.gaierror(-2, "unknown"), "dns_failure"),
        (KeyError("h"), "dns_failure"),
        (UnicodeError("label too long"), "dns_failure"),
    ],
)
@pytest.mark.parametrize("with_transport", [True, False])
async def test_every_resolved_address_must_be_public(addresses, code, with_transport):
    def resolve(host):
        if isinstance(addresses, Exception):
            raise addresses
        return addresses

    seen = []
    fetcher = Fetcher(FetchPolicy(), resolve=resolve, transport=_mock(seen) if with_transport else None)
    assert await _code("http://evil.example.com/", fetcher) == code
    assert not seen


async def test_a_slow_resolver_is_a_timeout():
    async def resolve(host):
        await asyncio.sleep(30)

    assert await _code("http://example.com/", Fetcher(FetchPolicy(timeout_s=0.1), resolve=resolve)) == "timeout"


async def test_the_checks_precede_a_given_transport():
    async def resolve(host):
        return [ipaddress.ip_address(PUBLIC)]

    seen = []
    async with Fetcher(FetchPolicy(), resolve=resolve, transport=_mock(seen)) as fetcher:
        page = await fetcher.fetch("http://example.com./a")
    assert page.text == "<p>hi</p>"
    assert (str(seen[0].url), seen[0].headers["host"]) == ("http://example.com/a", "example.com")
    redirect = _mock(answer=httpx.Response(302, headers={"location": "http://10.0.0.1/"}))
    assert await _code("http://example.com/", Fetcher(FetchPolicy(), resolve=resolve, transport=redirect)) == "private_address"


@pytest.mark.parametrize(("error", "kind"), [(httpx.ReadTimeout("slow"), BlockedUrl), (httpx.ConnectError("no"), FetchFailed)])
async def test_a_transports_errors_keep_their_meaning(error, kind):
    def fail(request):
        raise error

    async with Fetcher(FetchPolicy(), resolve=lambda host: [PUBLIC], transport=httpx.MockTransport(fail)) as fetcher:
        with pytest.raises(kind):
            await fetcher.fetch("http://example.com/")


@pytest.fixture
def loopback_is_public(monkeypatch):
    """127.0.0.1 stands in for a public address, so that the guarded pool can be driven for real; every other rule stays."""
    real = network.is_public
    monkeypatch.setattr(network, "is_public", lambda address: str(address) == "127.0.0.1" or real(address))


async def test_it_connects_to_the_address_that_was_checked(loopback_is_public):
    """A rebinding resolver answers differently the second time; there is no second time, and Host still names the site."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    async with hostile_server({"/a": response("a"), "/b": response("b", Connection="close")}) as server:
        port = int(server.origin.rsplit(":", 1)[1])
        policy = FetchPolicy(allowed_ports=(port,))
        async with Fetcher(policy, resolve=lambda host: answers.pop(0)) as fetcher:
            assert (await fetcher.fetch(f"http://rebind.example.com:{port}/a")).text == "a"
            assert (await fetcher.fetch(f"http://rebind.example.com:{port}/b")).text == "b"  # the same connection
            with pytest.raises(BlockedUrl) as caught:  # a new one, resolved and checked again
                await fetcher.fetch(f"http://rebind.example.com:{port}/a")
    assert caught.value.code == "private_address"
    assert f"host: rebind.example.com:{port}" in server.requests[0].lower()
    assert (server.connections, answers) == (1, [])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for tls.example.com: (certificate file, key file)."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "cert.pem", folder / "key.pem"
    names = ["-subj", "/CN=tls.example.com", "-addext", "subjectAltName=DNS:tls.example.com"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", *names]
    subprocess.run([*command, "-out", str(paths[0]), "-keyout", str(paths[1])], check=True, capture_output=True)
    return paths


async def test_tls_names_and_verifies_the_host_and_not_the_address(loopback_is_public, certificate, monkeypatch):
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(*certificate)
    named = []
    server_side.sni_callback = lambda connection, name, context: named.append(name)
    client_side = ssl.create_default_context(cafile=str(certificate[0]))
    monkeypatch.setattr(network, "_ssl_context", lambda: client_side)
    async with hostile_server({"/": response("secret")}, tls=server_side) as server:
        port = int(server.origin.rsplit(":", 1)[1])
        async with Fetcher(FetchPolicy(allowed_ports=(port,)), resolve=lambda host: ["127.0.0.1"]) as fetcher:
            assert (await fetcher.fetch(f"https://tls.example.com:{port}/")).text == "secret"
            with pytest.raises(FetchFailed):
                await fetcher.fetch(f"https://other.example.com:{port}/")
    assert named == ["tls.example.com", "other.example.com"]


async def test_the_next_address_is_tried_where_one_does_not_answer(loopback_is_public, monkeypatch):
    tried = []
    inner = network.httpcore.AnyIOBackend.connect_tcp

    async def connect(self, host, *args, **kwargs):
        tried.append(host)
        if host != "127.0.0.1":
            raise network.httpcore.ConnectError("unreachable")
        return await inner(self, host, *args, **kwargs)

    monkeypatch.setattr(network.httpcore.AnyIOBackend, "connect_tcp", connect)
    async with hostile_server({"/": response("x")}) as server:
        port = int(server.origin.rsplit(":", 1)[1])
        async with Fetcher(FetchPolicy(allowed_ports=(port,)), resolve=lambda host: [PUBLIC, "127.0.0.1"]) as fetcher:
            assert (await fetcher.fetch(f"http://two.example.com:{port}/")).text == "x"
    assert tried == [PUBLIC, "127.0.0.1"]


async def test_an_allowed_origin_is_not_reached_through_another_name(loopback_is_public):
    """DNS that points at the offline web's address does not lend a stranger's name its rights."""
    async with hostile_server({"/": response("x")}) as server:
        port = server.origin.rsplit(":", 1)[1]
        assert await _code(f"http://stranger.example.com:{port}/", Fetcher(_policy(server), resolve=lambda host: ["127.0.0.1"])) == "port"


async def test_no_proxy_from_the_environment(monkeypatch):
    async with hostile_server({"/": response("direct")}) as server:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        async with Fetcher(_policy(server)) as fetcher:
            assert (await fetcher.fetch(server.origin)).text == "direct"


async def test_a_connection_that_the_server_dropped_while_idle_is_replaced():
    async def answer_then_drop(writer):
        await response("x")(writer)
        writer.close()

    async with hostile_server({"/": answer_then_drop}) as server, Fetcher(_policy(server)) as fetcher:
        for _ in range(4):
            assert (await fetcher.fetch(server.origin)).text == "x"
    assert server.connections == 4


async def test_many_at_once():
    async with hostile_server({"/": response("x" * 1000)}) as server, Fetcher(_policy(server, timeout_s=60.0)) as fetcher:
        pages = await asyncio.gather(*(fetcher.fetch(f"{server.origin}/?{i}") for i in range(300)))
    assert {page.status for page in pages} == {200}


async def test_post_json_sends_its_headers_and_follows_nothing():
    handlers = {"/api": response('{"ok": 1}', content_type="application/json"), "/moved": response(status=307, Location="/api")}
    async with hostile_server(handlers) as server, Fetcher(_policy(server)) as fetcher:
        page = await fetcher.post_json(f"{server.origin}/api", {"q": "ü"}, headers={"X-API-KEY": "k"})
        moved = await fetcher.post_json(f"{server.origin}/moved", {})
    assert (page.body, moved.status, len(server.requests)) == (b'{"ok": 1}', 307, 2)
    assert server.requests[0].startswith("POST /api")
    assert "x-api-key: k" in server.requests[0].lower()
    assert server.bodies[0] == b'{"q": "\\u00fc"}'


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        ("é".encode("utf-16"), "text/html", "é"),
        (b"\xef\xbb\xbfa", "text/html; charset=latin-1", "a"),
        ("é".encode(), "text/html", "é"),
        (b"\xe9", "text/html", "é"),
        (b"\xe9", "text/html; charset=utf-8", "é"),
        ('<meta charset="shift_jis">日'.encode("shift_jis"), "text/html", '<meta charset="shift_jis">日'),
        (b"abc", "text/html; charset=punycode", "abc"),
        (b"abc", "text/html; charset=zlib", "abc"),
        (b"abc", 'text/html; charset="no such"', "abc"),
        (b"\x93a\x94", "text/html; charset=iso-8859-1", "“a”"),
    ],
)
async def test_charsets(body, content_type, text):
    async with hostile_server({"/": response(body, content_type=content_type)}) as server, Fetcher(_policy(server)) as fetcher:
        assert (await fetcher.fetch(server.origin)).text == text


async def test_nothing_is_sent_twice_but_a_get_that_a_closed_connection_took():
    """What a server has seen is on its account, and on ours."""

    async def hang_up(writer):
        writer.close()

    async def once(writer):
        await response("here")(writer)
        writer.close()

    async with hostile_server({"/": hang_up, "/once": once}) as server, Fetcher(_policy(server)) as fetcher:
        for ask in (fetcher.post_json(server.origin, {}), fetcher.fetch(server.origin)):
            del server.requests[:]
            with pytest.raises(FetchFailed):
                await ask
            assert len(server.requests) == 1
        for _ in range(5):  # with a connection that may or may not be known to be closed by then
            assert (await fetcher.fetch(f"{server.origin}/once")).text == "here"


def test_a_bomb_is_never_inflated_beyond_the_cap():
    for data in (gzip.compress(b"x" * 20_000_000), gzip.compress(b"x" * 600) * 50):
        assert len(_Inflater("gzip").feed(data, 1_000)) == 1_000
