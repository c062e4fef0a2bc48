"""What an agent may be tricked, or trick us, into opening: a table of addresses and servers with the code that each visit ends in.

All of it runs through the visit tool as a run has it, over real sockets: the host names below resolve, by a resolver of the test, to a
server that misbehaves, and 127.0.0.1 stands in for a public address. "" is a page that was read.
"""

from __future__ import annotations

import asyncio
import gzip
import re
import time
import zlib

import pytest

from tests.hostile_server import endless, hostile_server, raw, response
from tests.unit.test_tools_gate import BLOCKED
from webdancer.config import FetchConfig, PoliteConfig, SearchConfig, ToolsConfig, VisitConfig
from webdancer.tools import extraction, fetch, network
from webdancer.tools.address import is_public
from webdancer.tools.toolbox import open_toolbox
from webdancer.types import ToolCall

HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
TEXT = "Owls hunt at night and sleep by day, é."
FINE = f"<html><body><article><h1>Owl</h1><p>{TEXT}</p></article></body></html>"
MAX_BYTES = 12_000_000
METADATA = "http://169.254.169.254/latest/meta-data/"

ADDRESSES = {
    "site.example.com": ["127.0.0.1"],
    "two.example.com": ["127.0.0.1", "127.0.0.1"],
    "loopback.example.com": ["127.0.0.2"],
    "lan.example.com": ["192.168.1.7"],
    "mixed.example.com": ["127.0.0.1", "10.0.0.1"],
    "metadata.example.com": ["169.254.169.254"],
    "cgnat.example.com": ["100.100.100.200"],
    "multicast.example.com": ["224.0.0.251"],
    "azure.example.com": ["168.63.129.16"],
    "zero.example.com": ["0.0.0.0"],
    "mapped.example.com": ["::ffff:127.0.0.1"],
    "compatible.example.com": ["::7f00:1"],
    "sixtofour.example.com": ["2002:7f00:1::"],
    "nat64.example.com": ["64:ff9b::7f00:1"],
    "teredo.example.com": ["2001:0:53aa:64c:0:fbff:80ff:fffe"],
    "ula.example.com": ["fd00:ec2::254"],
    "linklocal.example.com": ["fe80::1%eth0"],
    "none.example.com": [],
    "nonsense.example.com": ["over there"],
}
UNRESOLVED = {
    "site.example.com": "", "two.example.com": "", "none.example.com": "dns_failure", "nonsense.example.com": "dns_failure",
    "unknown.example.com": "dns_failure", "broken.example.com": "dns_failure", "localhost": "private_name", "db": "private_name",
    "127.0.0.1": "private_address", "[::1]": "private_address", "2130706433": "noncanonical_ip", "0177.0.0.1": "noncanonical_ip",
    "0x7f.1": "noncanonical_ip",
}  # fmt: skip
"""Hosts that are not in ADDRESSES with a private one, which are all `private_address`."""


def encoded(data, encoding):
    return response(data, Content_Encoding=encoding)


def redirect(location, status=302):
    return response(status=status, Location=location)


BOMB = gzip.compress(b"x" * 200_000_000, 9)
ATTRIBUTES = "<p " + " ".join(f"a{i}=1" for i in range(100_000)) + ">x</p>"

SERVED = {
    # content types
    "html": (response(FINE), ""),
    "xhtml": (response(FINE, content_type="application/xhtml+xml"), ""),
    "upper": (response(FINE, content_type="TEXT/HTML;Charset=UTF-8;x"), ""),
    "plain": (response(TEXT, content_type="text/plain"), ""),
    "markdown": (response(TEXT, content_type="text/markdown"), ""),
    "json": (response('{"a": "b"}', content_type="application/json"), ""),
    "no type": (response(FINE, content_type=None), ""),
    "no type, binary": (response(b"\x89PNG\0\0", content_type=None), "content_type"),
    "png": (response(b"\x89PNG", content_type="image/png"), "content_type"),
    "octets": (response(b"MZ", content_type="application/octet-stream"), "content_type"),
    "zip": (response(b"PK", content_type="application/zip"), "content_type"),
    "video": (response(b"x", content_type="video/mp4"), "content_type"),
    "script": (response("alert(1)", content_type="text/javascript"), "content_type"),
    "almost": (response(FINE, content_type="text/htmlx"), "content_type"),
    "parameter": (response(b"x", content_type="application/x; y=text/html"), "content_type"),
    "no pdf": (response(b"%PDF-1.7 and nothing", content_type="application/pdf"), "empty_page"),
    "html as pdf": (response(FINE, content_type="application/pdf"), "empty_page"),
    "png as html": (response(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40), "" ),
    # statuses
    "gone": (response("gone", status=410), "not_found"),
    "forbidden": (response("no", status=403), "http_error"),
    "error": (response("no", status=500), "unreachable"),
    "no content": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "empty_page"),
    "empty": (response(""), "empty_page"),
    # bombs and encodings
    "gzip": (encoded(gzip.compress(FINE.encode()), "gzip"), ""),
    "deflate": (encoded(zlib.compress(FINE.encode()), "deflate"), ""),
    "raw deflate": (encoded(zlib.compress(FINE.encode())[2:-4], "deflate"), ""),
    "gzip bomb": (encoded(BOMB, "gzip"), "body_too_large"),
    "deflate bomb": (encoded(zlib.compress(b"x" * 200_000_000), "deflate"), "body_too_large"),
    "bomb of members": (encoded(gzip.compress(b"x" * 7_000_000) * 20, "gzip"), "body_too_large"),
    "bomb in a bomb": (encoded(gzip.compress(BOMB), "gzip, gzip"), "unreachable"),
    "brotli bomb": (encoded(b"\xcf\xff\xff\x7f\xf8\x2f\x9e\x02" * 100, "br"), "unreachable"),
    "zstd bomb": (encoded(b"\x28\xb5\x2f\xfd\xa4\x00\xc2\xeb\x0b" + b"\x02\x00\x10x" * 1000, "zstd"), "unreachable"),
    "compress": (encoded(b"\x1f\x9d\x90", "compress"), "unreachable"),
    "no gzip": (encoded(FINE.encode(), "gzip"), "unreachable"),
    "cut gzip": (encoded(gzip.compress(FINE.encode())[:-20], "gzip"), "unreachable"),
    "declared too large": (raw(HTML + b"Content-Length: 99999999999\r\n\r\nx"), "body_too_large"),
    "endless": (endless(HTML + b"\r\n", b"x" * 65536), "body_too_large"),
    "endless chunks": (endless(HTML + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"), "body_too_large"),
    # broken HTTP
    "garbage": (raw(b"\x16\x03\x01 what is this\r\n\r\n"), "unreachable"),
    "short": (raw(HTML + b"Content-Length: 100\r\n\r\nshort"), "unreachable"),
    "bad chunks": (raw(HTML + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "unreachable"),
    "large header": (raw(HTML + b"X: " + b"y" * 300_000 + b"\r\n\r\n"), "unreachable"),
    "many headers": (raw(HTML + b"X: y\r\n" * 50_000 + b"\r\n"), "unreachable"),
    # charsets
    "latin-1": (response(FINE.encode("latin-1"), content_type="text/html; charset=iso-8859-1"), ""),
    "wrong charset": (response(FINE.encode("latin-1"), content_type="text/html; charset=utf-8"), ""),
    "utf-16": (response(FINE.encode("utf-16")), ""),
    "no such charset": (response(FINE, content_type="text/html; charset=x-no-such"), ""),
    "codec": (response(FINE, content_type="text/html; charset=zlib_codec"), ""),
    "utf-7": (response(FINE, content_type="text/html; charset=utf-7"), ""),
    "nul bytes": (response(FINE.encode().replace(b"O", b"\0O")), ""),
    # redirects
    "followed": (redirect("/html"), ""),
    "relative": (redirect("html", 308), ""),
    "other host": (redirect("http://two.example.com:{port}/html"), ""),
    "loop": (redirect("/loop"), "too_many_redirects"),
    "to metadata": (redirect(METADATA), "private_address"),
    "to nowhere": (redirect("http://unknown.example.com:{port}/"), "dns_failure"),
    "to a private name": (redirect("http://lan.example.com:{port}/"), "private_address"),
    "to an allowed port": (redirect("http://site.example.com:22/"), "port"),
    "to localhost": (redirect("http://localhost:{port}/"), "private_name"),
    "to hex": (redirect("//0x7f000001:{port}/"), "noncanonical_ip"),
    "to a file": (redirect("file:///etc/passwd"), "scheme"),
    "to data": (redirect("data:text/html,x"), "scheme"),
    "to a user": (redirect("http://a:b@site.example.com:{port}/"), "userinfo"),
    "to a backslash": (redirect("http://site.example.com:{port}\\@10.0.0.1/"), "backslash"),
    "to a tab": (redirect("/a\tb"), "control_char"),
    "to no host": (redirect("http://[::1"), "invalid_url"),
    "to a long one": (redirect("/" + "a" * 3000), "too_long"),
    "without a place": (response("moved", status=302), "http_error"),
    # hostile markup
    "10 MB paragraph": (response(f"<p>{'word ' * 2_000_000}</p>"), ""),
    "10 MB word": (response(f"<p>{'a' * 10_000_000}</p>"), ""),
    "50k nested": (response("<div>" * 50_000 + "x" + "</div>" * 50_000), "empty_page"),
    "tables in tables": (response("<table>" * 2_000 + "<tr><td>k</td><td>v</td></tr>"), ""),
    "100k attributes": (response(ATTRIBUTES), "extraction_timeout"),
    "only scripts": (response("<script>" * 20_000), "empty_page"),
    "only a comment": (response("<!--" * 20_000), "empty_page"),
    "noscript": (response(f"<body><script>app()</script><noscript><p>{TEXT}</p></noscript></body>"), ""),
    "xml entities": (response('<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><p>&b; text</p>'), ""),
    "external entity": (response('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><p>&e; text</p>'), ""),
}  # fmt: skip


@pytest.fixture
def tools(monkeypatch):
    """Opens the tools over a server; the test's resolver decides where names lead."""
    answers = {name: list(addresses) for name, addresses in ADDRESSES.items()}

    async def resolve(host):
        if host == "broken.example.com":
            raise UnicodeError("label too long")
        return answers[host]

    monkeypatch.setattr(fetch, "resolve_name", resolve)
    monkeypatch.setattr(network, "is_public", lambda address: str(address) == "127.0.0.1" or is_public(address))
    monkeypatch.setattr(extraction, "CPU_DEADLINE_S", 1.5)

    def open_tools(server, timeout_s=60.0):
        config = ToolsConfig(
            search=SearchConfig(url=server.origin),
            visit=VisitConfig(extraction_processes=2),
            fetch=FetchConfig(allowed_ports=[80, int(server.origin.rpartition(":")[2])], timeout_s=timeout_s, max_bytes=MAX_BYTES),
            polite=PoliteConfig(robots=False, host_requests_per_s=0.0, max_attempts=1, breaker_failures=10_000),
        )
        return open_toolbox(config)

    open_tools.answers = answers
    return open_tools


async def visited(toolbox, url):
    result = await toolbox.call(ToolCall(name="visit", arguments={"url": url, "goal": "owl"}))
    return result.error or "", result.text


async def codes(toolbox, urls):
    results = await asyncio.gather(*(visited(toolbox, url) for url in urls.values()))
    return {name: code for name, (code, _) in zip(urls, results, strict=True)}


def test_the_table_is_large():
    urls = {url for urls in BLOCKED.values() for url in urls if isinstance(url, str)}
    assert len(urls) >= 180
    assert len(SERVED) + len(ADDRESSES) + len(UNRESOLVED) >= 100


async def test_addresses_that_are_refused_as_they_stand(tools):
    async with hostile_server({}) as server, tools(server) as toolbox:
        urls = [(url, code) for code, urls in BLOCKED.items() for url in urls if isinstance(url, str)]
        expected = {url: code for url, code in urls if url and url.strip() == url}  # the tool strips what stands around an address
        assert await codes(toolbox, {url: url for url in expected}) == expected
    assert server.requests == []


async def test_where_names_lead(tools):
    expected = dict.fromkeys(ADDRESSES, "private_address") | UNRESOLVED
    async with hostile_server({"/": response(FINE)}) as server, tools(server) as toolbox:
        port = server.origin.rpartition(":")[2]
        assert await codes(toolbox, {host: f"http://{host}:{port}/" for host in expected}) == expected
    assert len(server.requests) == 2


async def test_a_name_that_leads_elsewhere_the_second_time(tools):
    """The connection that was checked is used on; a new one is checked again."""
    closing = response(FINE, Connection="close")
    async with hostile_server({"/1": response(FINE), "/2": closing, "/3": response(FINE)}) as server, tools(server) as toolbox:
        site = f"http://site.example.com:{server.origin.rpartition(':')[2]}"
        assert (await visited(toolbox, f"{site}/1"))[0] == ""
        tools.answers["site.example.com"] = ["169.254.169.254"]
        assert [(await visited(toolbox, f"{site}/{page}"))[0] for page in (2, 3)] == ["", "private_address"]
    assert len(server.requests) == 2


async def test_what_servers_answer(tools):
    port = 0

    def with_port(handler):
        async def write(writer):
            class Filled:
                def write(self, data):
                    writer.write(re.sub(rb"\{port\}", str(port).encode(), data) if len(data) < 10_000 else data)

                drain = staticmethod(writer.drain)

            await handler(Filled())
            writer.close()

        return write

    handlers = {f"/{name.replace(' ', '%20')}": with_port(handler) for name, (handler, _) in SERVED.items()}
    async with hostile_server(handlers) as server, tools(server) as toolbox:
        port = int(server.origin.rpartition(":")[2])
        results = await codes(toolbox, {name: f"http://site.example.com:{port}/{name}" for name in SERVED})
        assert results == {name: code for name, (_, code) in SERVED.items()}
        fine, text = await visited(toolbox, f"http://site.example.com:{port}/html?again")
    assert (fine, TEXT in text) == ("", True)


async def test_slow_drips(tools):
    handlers = {
        "/body": endless(HTML + b"\r\n", b"x", pause_s=0.02),
        "/header": endless(b"HTTP/1.1 200 OK\r\nX: ", b"y", pause_s=0.02),
        "/silence": endless(b"", b"", pause_s=0.05),
        "/gzip": endless(HTML + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"x")[:10], b"", pause_s=0.05),
        "/continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.01),
        "/redirects": _slow_redirect,
    }
    async with hostile_server(handlers) as server, tools(server, timeout_s=0.5) as toolbox:
        site = f"http://site.example.com:{server.origin.rpartition(':')[2]}"
        assert set((await codes(toolbox, {path: f"{site}{path}" for path in handlers})).values()) == {"timeout"}


async def _slow_redirect(writer):
    await asyncio.sleep(0.2)
    await redirect(f"/redirects?{time.monotonic()}")(writer)
