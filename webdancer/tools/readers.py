"""How an address becomes the text of a page: fetched here, or by a reader elsewhere; `open_reader` makes the configured one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol

from webdancer.config import FetchConfig, VisitConfig
from webdancer.errors import ConfigError, ServiceError
from webdancer.tools import keys
from webdancer.tools.extract import PDF_TYPE, page_lines
from webdancer.tools.extraction import Extraction, ExtractionFailed
from webdancer.tools.fetch import BlockedUrl, Fetcher, FetchFailed, FetchPolicy, OpenFetcher, check_url
from webdancer.tools.gate import check_characters, parse_target
from webdancer.tools.limits import NotAsked
from webdancer.tools.network import check_host
from webdancer.tools.polite import PASSING, not_asked_code
from webdancer.tools.provider import ProviderFailed, WrongShape, ask, items
from webdancer.tools.result import UNAVAILABLE

JINA_ORIGIN = "https://r.jina.ai"
_TARGET_ERROR = re.compile(r"returned error (\d{3})")
_OUR_FAULT = frozenset({401, 402, 403})
"""Statuses by which a reader refuses the run; other refusals are about the page."""


class PageError(Exception):
    """No text can be shown of a page. `code` is the result's error."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class PageMoved(Exception):
    """The page is elsewhere. `url` has passed the gate; for good: it will be there next week too (301, 308)."""

    def __init__(self, url: str, *, for_good: bool) -> None:
        super().__init__(url)
        self.url = url
        self.for_good = for_good


class PageReader(Protocol):
    """`locate` gives what a page is remembered by, without I/O; `read` takes that. Both raise BlockedUrl, `read` PageError, PageMoved and
    ProviderFailed too; `check` raises ServiceError where nothing can be read at all."""

    def locate(self, url: str) -> str: ...

    async def read(self, place: str) -> str: ...

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...


class DirectReader:
    """Over HTTP through the gate, and to text here: HTML, PDF and what is text already. `/x` is a page of `visit.site`."""

    def __init__(self, fetcher: Fetcher, config: VisitConfig, extraction: Extraction) -> None:
        self._fetcher = fetcher
        self._config = config
        self._site = check_url(config.site, fetcher.policy).rstrip("/") if config.site else ""
        self._extraction = extraction

    def locate(self, url: str) -> str:
        if url.startswith("/") and not url.startswith("//") and self._site:
            url = self._site + url
        return check_url(url, self._fetcher.policy)

    async def read(self, place: str) -> str:
        own_site = bool(self._site) and place.startswith(self._site + "/")
        try:
            page = await self._fetcher.fetch(place, follow=False)
        except NotAsked as error:
            raise PageError(not_asked_code(error, own_site=own_site), str(error)) from error
        except FetchFailed as error:
            raise PageError(UNAVAILABLE if own_site else "unreachable", "the server did not answer properly") from error
        except BlockedUrl as error:
            if own_site and error.code in ("timeout", "dns_failure"):
                raise PageError(UNAVAILABLE, "the server did not answer in time") from error
            raise
        if page.moved_to:
            raise PageMoved(page.moved_to, for_good=page.status in (301, 308))
        if not page.ok:
            raise _status_error(page.status, own_site=own_site)
        limit = self._config.max_page_chars
        try:
            text = await self._extraction.lines(page.body, content_type=page.content_type, charset=page.charset, max_chars=limit)
        except ExtractionFailed as error:
            raise PageError(error.code, str(error)) from error
        return _readable(text)

    async def check(self) -> None:
        await self._extraction.check()  # an extractor that does not import ends the run here
        try:
            if self._site:
                await self._fetcher.fetch(f"{self._site}/")
        except FetchFailed as error:
            raise ServiceError(f"tools.visit.site: must be a site that answers, got {self._site!r}: {error}") from error
        except BlockedUrl as error:
            if error.code in ("timeout", "dns_failure"):
                raise ServiceError(f"tools.visit.site: must be a site that answers, got {self._site!r}: {error}") from error

    async def aclose(self) -> None:
        await self._extraction.aclose()
        await self._fetcher.aclose()


class JinaReader:
    """Jina's reader, or one's own instance of it: POST {"url"} -> JSON with the page as markdown. The key may be missing, at 20 pages
    a minute. Addresses pass the gate here too: what is private is not told to others, and an instance of one's own, which may see the
    inside of the network, is not sent there by a name."""

    def __init__(self, fetcher: Fetcher, config: VisitConfig, policy: FetchPolicy) -> None:
        self._fetcher = fetcher
        self._url = (config.url or JINA_ORIGIN).rstrip("/") + "/"
        self._own = bool(config.url)
        self._policy = policy
        self._max_chars = config.max_page_chars
        self._key = keys.optional_key(keys.JINA)

    def locate(self, url: str) -> str:
        return check_url(url, self._policy)

    async def read(self, place: str) -> str:
        if self._own:
            await check_host(parse_target(place, self._policy), timeout_s=self._policy.timeout_s)
        headers = {"Authorization": f"Bearer {self._key.reveal()}"} if self._key else {}
        try:
            answer = await ask(self._fetcher, self._url, payload={"url": place}, headers=headers)
        except ProviderFailed as error:
            if 400 <= error.status < 500 and error.status not in _OUR_FAULT and error.code != UNAVAILABLE:
                raise PageError("http_error", f"the reader answered with status {error.status}") from error
            raise
        data = answer.get("data")
        if not isinstance(data, Mapping) or not isinstance(data.get("content"), str):
            raise WrongShape("there is no data.content")
        if found := _TARGET_ERROR.search(str(data.get("warning") or "")):
            raise _status_error(int(found.group(1)), own_site=False)
        return _readable(_clean(data["content"], self._max_chars))

    async def check(self) -> None:
        """Every page costs: the first visit tells."""

    async def aclose(self) -> None:
        await self._fetcher.aclose()


class AccessReader:
    """An ASearcher-compatible server: POST /access {"urls"} -> {"result": [{"url", "contents"} or null]}.

    An address is only a key there, so it is sent as the agent wrote it and not fetched by anyone.
    """

    def __init__(self, fetcher: Fetcher, config: VisitConfig, *, max_url_length: int) -> None:
        self._fetcher = fetcher
        self._origin = config.url.rstrip("/")
        self._max_chars = config.max_page_chars
        self._max_url_length = max_url_length

    def locate(self, url: str) -> str:
        if len(url) > self._max_url_length:
            raise BlockedUrl("too_long", f"the URL has {len(url)} characters, at most {self._max_url_length} are allowed")
        check_characters(url)
        return url

    async def read(self, place: str) -> str:
        (found,) = await self._access([place])
        if found is None:
            raise PageError("not_found", "there is no such page")
        return _readable(_clean(found, self._max_chars))

    async def check(self) -> None:
        try:
            await self._access([])
        except ProviderFailed as error:
            raise ServiceError(f"tools.visit.url: must be an /access server that answers, got {self._origin!r}: {error}") from error

    async def aclose(self) -> None:
        await self._fetcher.aclose()

    async def _access(self, urls: list[str]) -> list[str | None]:
        answer = await ask(self._fetcher, f"{self._origin}/access", payload={"urls": urls})
        results = items(answer, "result")
        if len(results) != len(urls):
            raise WrongShape(f"{len(results)} results for {len(urls)} addresses")
        return [None if result is None else _contents(result) for result in results]


def open_reader(
    visit: VisitConfig, fetch: FetchConfig, open_fetcher: OpenFetcher = Fetcher, *, extraction: Extraction | None = None
) -> PageReader:
    """The configured reader; close it. extraction: the processes that read pages, to be shared. Raises ConfigError or ServiceError."""
    policy = page_policy(visit, fetch)
    match visit.backend:
        case "direct":
            return DirectReader(open_fetcher(policy), visit, extraction or Extraction(visit.extraction_processes))
        case "jina":
            return JinaReader(open_fetcher(_reader_policy(visit.url, fetch)), visit, policy)
        case "access":
            if not visit.url:
                raise ConfigError("tools.visit.url: must be the origin of an /access server for backend 'access', got ''")
            return AccessReader(open_fetcher(_reader_policy(visit.url, fetch)), visit, max_url_length=fetch.max_url_length)
        case _:
            raise ConfigError(f"tools.visit.backend: must be a visit backend, got {visit.backend!r}")


def page_policy(visit: VisitConfig, fetch: FetchConfig) -> FetchPolicy:
    """What the agent may open: public addresses, the configured origins, and the site."""
    site = visit.site.rstrip("/")
    if site and site.count("/") != 2:
        raise ConfigError(f"tools.visit.site: must be an origin such as http://127.0.0.1:8080, got {visit.site!r}")
    options = {field.name: getattr(fetch, field.name) for field in dataclasses.fields(fetch)}
    options["allowed_origins"] = (*fetch.allowed_origins, *([site] if site else []))
    return FetchPolicy(content_types=(*FetchPolicy().content_types, PDF_TYPE), **options)


def _reader_policy(origin: str, fetch: FetchConfig) -> FetchPolicy:
    limits: dict[str, Any] = {"max_redirects": 0, "max_bytes": fetch.max_bytes, "timeout_s": fetch.timeout_s}
    if origin:
        return FetchPolicy(allowed_origins=(origin.rstrip("/"),), allowed_ports=(), **limits)
    return FetchPolicy(allowed_schemes=("https",), **limits)


def _status_error(status: int, *, own_site: bool) -> PageError:
    """`http_error` lasts (tools.visit); what may be otherwise in a minute is a server that cannot be reached for now."""
    if status in PASSING:
        code = UNAVAILABLE if own_site else "unreachable"
    else:
        code = UNAVAILABLE if own_site and status >= 500 else "not_found" if status in (404, 410) else "http_error"
    return PageError(code, f"the server answered with status {status}")


def _contents(result: Any) -> str:
    contents = result.get("contents") if isinstance(result, Mapping) else None
    if not isinstance(contents, str):
        raise WrongShape("a page has no contents")
    return contents


def _clean(text: str, max_chars: int) -> str:
    return page_lines(text, content_type="text/plain", max_chars=max_chars)


def _readable(text: str) -> str:
    if not text:
        raise PageError("empty_page", "the page has no readable text")
    return text
