"""The one way out: every request of every tool, crawler and redirect passes the Fetcher.

`check_url` is the syntactic gate, `Network` connects to checked addresses only, and this module follows redirects (checking each), caps
time, bytes and media types, and hands back a Page. What a page says is untrusted text; nothing here interprets it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urljoin

from webdancer.tools.body import ACCEPT_ENCODING, read_body
from webdancer.tools.charset import decode_text
from webdancer.tools.gate import BLOCK_CODES, BlockedUrl, FetchPolicy, Target, check_characters, check_url, parse_target
from webdancer.tools.network import Exchange, FetchFailed, Network, Resolve, Transport, Unreadable, resolve_name

__all__ = [
    "BLOCK_CODES", "BlockedUrl", "FetchFailed", "FetchPolicy", "Fetcher", "OpenFetcher", "Page", "Resolve", "Transport", "Unreadable",
    "check_url",
]  # fmt: skip

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_USER_AGENT = "webdancer/0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole response, of any status. `url` is the one that answered, after redirects."""

    url: str
    status: int
    content_type: str
    """Media type in lower case without parameters; empty if the server named none."""
    body: bytes
    charset: str = ""
    retry_after: str = ""
    """The header of this name, as it came."""
    moved_to: str = ""
    """Of a redirect that was not followed: the checked URL it leads to."""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return decode_text(self.body, self.charset)


class Fetcher:
    """Fetches under one policy, with kept-alive connections; use it from one event loop and `aclose` it.

    resolve: host -> addresses, plain or async; the system's resolver by default. transport: an httpx transport instead of the network;
    names are still resolved and their addresses checked before it sees a request.
    """

    def __init__(self, policy: FetchPolicy, *, resolve: Resolve | None = None, transport: Transport | None = None) -> None:
        self.policy = policy
        self._network = Network(resolve=resolve or resolve_name, transport=transport)

    async def fetch(self, url: str, *, follow: bool = True) -> Page:
        """GET with redirects; without `follow` the first one is the Page. Raises BlockedUrl or FetchFailed; a 404 or 500 is a Page."""
        target = parse_target(url, self.policy)
        async with _deadline(self.policy.timeout_s):
            for _ in range(self.policy.max_redirects + 1):
                page = await self._get(target)
                if not page.moved_to or not follow:
                    return page
                target = parse_target(page.moved_to, self.policy)
        raise BlockedUrl("too_many_redirects", f"more than {self.policy.max_redirects} redirects")

    async def post_json(self, url: str, payload: Mapping[str, Any], *, headers: Mapping[str, str] | None = None) -> Page:
        """POST to an API. Redirects are not followed, so that headers with keys never travel on. Raises as `fetch` does."""
        content = json.dumps(payload, ensure_ascii=True).encode("ascii")
        return await self._ask("POST", url, {"Content-Type": "application/json", **(headers or {})}, content)

    async def get_json(self, url: str, *, headers: Mapping[str, str] | None = None) -> Page:
        """GET from an API, under the rules of `post_json`."""
        return await self._ask("GET", url, headers or {}, None)

    async def _ask(self, method: str, url: str, headers: Mapping[str, str], content: bytes | None) -> Page:
        target = parse_target(url, self.policy)
        sent = {**_headers("application/json"), **headers}
        async with _deadline(self.policy.timeout_s), self._network.exchange(method, target, headers=sent, content=content) as exchange:
            return await self._read(exchange, target)

    async def aclose(self) -> None:
        await self._network.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def _get(self, target: Target) -> Page:
        """The page, or a redirect that passes the gate."""
        async with self._network.exchange("GET", target, headers=_headers("text/html,text/plain;q=0.9,*/*;q=0.5")) as exchange:
            location = exchange.headers.get("location", "")
            if exchange.status in _REDIRECTS and location:
                check_characters(location.strip(" "))
                moved = parse_target(_join(target.url, location.strip(" ")), self.policy)
                if (target.scheme, moved.scheme) == ("https", "http"):
                    # Anybody on the way could answer in the page's place, and it would be remembered and recorded under the https address.
                    raise BlockedUrl("scheme", "the page leads from https to http")
                return Page(url=target.url, status=exchange.status, content_type="", body=b"", moved_to=moved.url)
            return await self._read(exchange, target)

    async def _read(self, exchange: Exchange, target: Target) -> Page:
        media, charset = _media_type(exchange.headers.get("content-type", ""))
        if media and media not in self.policy.content_types:
            raise BlockedUrl("content_type", f"{media[:80]} is not a type of page that can be read")
        limit = self.policy.max_bytes
        length = exchange.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > limit:
            raise BlockedUrl("body_too_large", f"the page has {length} bytes, at most {limit} are read")
        body = await read_body(exchange.chunks, encoding=exchange.headers.get("content-encoding", ""), max_bytes=limit)
        if not media and b"\0" in body[:1024]:
            raise BlockedUrl("content_type", "the server names no type and the content is binary")
        retry_after = exchange.headers.get("retry-after", "")
        return Page(url=target.url, status=exchange.status, content_type=media, charset=charset, body=body, retry_after=retry_after)


OpenFetcher = Callable[[FetchPolicy], Fetcher]
"""How a tool gets its way out: a plain Fetcher, or one with manners (tools.polite)."""


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise BlockedUrl("timeout", f"no whole answer within {seconds:g} s") from None


def _headers(accept: str) -> dict[str, str]:
    return {"User-Agent": _USER_AGENT, "Accept": accept, "Accept-Encoding": ACCEPT_ENCODING}


def _join(base: str, location: str) -> str:
    try:
        return urljoin(base, location)
    except ValueError:
        raise BlockedUrl("invalid_url", "the redirect's target is malformed") from None


def _media_type(header: str) -> tuple[str, str]:
    media, _, parameters = header.partition(";")
    charset = ""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip("\"'")[:40]
    return media.strip().lower(), charset
