"""Where hits come from: one class a provider, all behind `SearchBackend`; `open_backend` makes the configured one.

Request and answer of each provider are as its own documentation has them; a new provider is one class and one case below. An answer in
another shape is provider.WrongShape, never an empty result.
"""

from __future__ import annotations

import asyncio
import html
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlencode

from webdancer.config import SearchConfig
from webdancer.errors import ConfigError
from webdancer.tools import keys
from webdancer.tools.fetch import Fetcher, FetchPolicy, OpenFetcher
from webdancer.tools.provider import ProviderFailed, WrongShape, ask, items, text_of
from webdancer.tools.render import Hit
from webdancer.tools.result import UNAVAILABLE

if TYPE_CHECKING:
    from webdancer.offline_web.index import SearchIndex

_HAN = re.compile(r"[\u3400-\u9fff]")
_TAG = re.compile(r"</?[a-z]{1,10}>")
_BRAVE_WORDS, _MAX_CHARS = 50, 400  # of a query for Brave, for Brave and Tavily; more is an error there
_MAX_OWN_BYTES = 50_000_000  # of an answer of one's own server: a hit may be a whole article


class SearchBackend(Protocol):
    """Raises provider.ProviderFailed; no hits is an answer."""

    async def search(self, query: str) -> Sequence[Hit]: ...

    async def aclose(self) -> None: ...


class HttpSearch:
    """What the providers share: a fetcher of their own, as the agent's may not reach them."""

    def __init__(self, fetcher: Fetcher, url: str, *, top_k: int) -> None:
        self._fetcher = fetcher
        self._url = url.rstrip("/")
        self._top_k = top_k

    async def aclose(self) -> None:
        await self._fetcher.aclose()


class RetrieveSearch(HttpSearch):
    """A Search-R1 compatible server: POST /retrieve. Documents may carry `url` and `title`; else the title heads `contents`."""

    async def search(self, query: str) -> list[Hit]:
        payload = {"queries": [query], "topk": self._top_k, "return_scores": True}
        return _retrieved(await ask(self._fetcher, f"{self._url}/retrieve", payload=payload))


class SerperSearch(HttpSearch):
    """Google through serper.dev: POST /search."""

    def __init__(self, fetcher: Fetcher, url: str = "", *, top_k: int) -> None:
        super().__init__(fetcher, url or "https://google.serper.dev", top_k=top_k)
        self._key = keys.read_key(keys.SERPER, needed_for="tools.search.backend 'serper'")

    async def search(self, query: str) -> list[Hit]:
        payload = {"q": query, "num": self._top_k, "gl": "cn" if _HAN.search(query) else "us"}
        headers = {"X-API-KEY": self._key.reveal()}
        return _organic(await ask(self._fetcher, f"{self._url}/search", payload=payload, headers=headers))


class BraveSearch(HttpSearch):
    """Brave's own index: GET /res/v1/web/search. A longer query than it takes is cut between words."""

    def __init__(self, fetcher: Fetcher, url: str = "", *, top_k: int) -> None:
        super().__init__(fetcher, url or "https://api.search.brave.com", top_k=top_k)
        self._key = keys.read_key(keys.BRAVE, needed_for="tools.search.backend 'brave'")

    async def search(self, query: str) -> list[Hit]:
        short = _cut(" ".join(query.split()[:_BRAVE_WORDS]))
        asked = {"q": short, "count": self._top_k, "text_decorations": "false", "result_filter": "web"}
        headers = {"X-Subscription-Token": self._key.reveal()}
        return _brave(await ask(self._fetcher, f"{self._url}/res/v1/web/search?{_encoded(asked)}", headers=headers))


class TavilySearch(HttpSearch):
    """Tavily: POST /search, at its basic depth. A longer query than it takes is cut between words."""

    def __init__(self, fetcher: Fetcher, url: str = "", *, top_k: int) -> None:
        super().__init__(fetcher, url or "https://api.tavily.com", top_k=top_k)
        self._key = keys.read_key(keys.TAVILY, needed_for="tools.search.backend 'tavily'")

    async def search(self, query: str) -> list[Hit]:
        payload = {"query": _cut(query), "max_results": self._top_k, "search_depth": "basic"}
        headers = {"Authorization": f"Bearer {self._key.reveal()}"}
        return _results(await ask(self._fetcher, f"{self._url}/search", payload=payload, headers=headers), date="published_date")


class SearxngSearch(HttpSearch):
    """An instance of one's own: GET /search. `json` must be among its `search.formats`; it answers with one page of about 20."""

    async def search(self, query: str) -> list[Hit]:
        asked = {"q": query, "format": "json", "pageno": 1}
        answer = await ask(self._fetcher, f"{self._url}/search?{_encoded(asked)}")
        hits = _results(answer, date="publishedDate")
        if not hits and answer.get("unresponsive_engines"):
            # Suspended, asked for a captcha, too slow: SearXNG answers 200 with nothing, where a search engine hardly ever finds nothing.
            raise ProviderFailed(UNAVAILABLE, "the engines behind it do not answer")
        return hits


class IndexSearch:
    """A built web on the tool actor's own disk; no server, no request."""

    def __init__(self, index: SearchIndex, *, top_k: int) -> None:
        self._index = index
        self._top_k = top_k
        self._one_at_a_time = threading.Lock()

    async def search(self, query: str) -> list[Hit]:
        return await asyncio.to_thread(self._search, query)

    async def aclose(self) -> None:
        self._index.close()

    def _search(self, query: str) -> list[Hit]:
        with self._one_at_a_time:
            matches = self._index.search(query, self._top_k)
        documents = [match.document for match in matches]
        return [Hit(title=document.title, url=document.url, snippet=" ".join(document.text.split())) for document in documents]


def open_backend(config: SearchConfig, open_fetcher: OpenFetcher = Fetcher) -> SearchBackend:
    """The configured backend; close it. Raises ConfigError or ServiceError."""
    match config.backend:
        case "retrieve":
            return RetrieveSearch(open_fetcher(_policy(config)), _own_server(config), top_k=config.top_k)
        case "searxng":
            return SearxngSearch(open_fetcher(_policy(config)), _own_server(config), top_k=config.top_k)
        case "serper":
            return SerperSearch(open_fetcher(_policy(config)), config.url, top_k=config.top_k)
        case "brave":
            return BraveSearch(open_fetcher(_policy(config)), config.url, top_k=config.top_k)
        case "tavily":
            return TavilySearch(open_fetcher(_policy(config)), config.url, top_k=config.top_k)
        case "index":
            from webdancer.offline_web.index import SearchIndex

            return IndexSearch(SearchIndex(config.index), top_k=config.top_k)
        case _:
            raise ConfigError(f"tools.search.backend: must be a search backend, got {config.backend!r}")


def _own_server(config: SearchConfig) -> str:
    if not config.url:
        raise ConfigError(f"tools.search.url: must be the origin of the server for backend {config.backend!r}, got ''")
    return config.url


def _policy(config: SearchConfig) -> FetchPolicy:
    """To the configured origin and nowhere else, or to public https."""
    settings: dict[str, Any] = {"max_redirects": 0, "max_url_length": 16_384, "timeout_s": config.timeout_s}
    if config.url:
        return FetchPolicy(allowed_origins=(config.url.rstrip("/"),), allowed_ports=(), max_bytes=_MAX_OWN_BYTES, **settings)
    return FetchPolicy(allowed_schemes=("https",), **settings)


def _retrieved(answer: Any) -> list[Hit]:
    lists = items(answer, "result")
    if not lists or not isinstance(lists[0], list):
        raise WrongShape("result holds no list")
    return [_document(item) for item in lists[0]]


def _document(item: Any) -> Hit:
    document = item.get("document", item) if isinstance(item, Mapping) else item
    contents = document.get("contents") if isinstance(document, Mapping) else None
    if not isinstance(contents, str):
        raise WrongShape("a document has no contents")
    title, _, text = contents.partition("\n")
    title = text_of(document, "title") or title.strip().strip('"')
    return Hit(title=title, url=text_of(document, "url"), snippet=" ".join(text.split()))


def _organic(answer: Any) -> list[Hit]:
    return [
        Hit(
            title=text_of(item, "title"),
            url=text_of(item, "link"),
            snippet=text_of(item, "snippet"),
            date=text_of(item, "date"),
            source=text_of(item, "source"),
        )
        for item in items(answer, "organic", optional=True)
    ]


def _brave(answer: Any) -> list[Hit]:
    return [
        Hit(
            title=_plain(text_of(item, "title")),
            url=text_of(item, "url"),
            snippet=_plain(text_of(item, "description")),
            date=text_of(item, "age"),
        )
        for item in items(answer, "web", "results", optional=True)
    ]


def _results(answer: Any, *, date: str) -> list[Hit]:
    return [
        Hit(title=text_of(item, "title"), url=text_of(item, "url"), snippet=text_of(item, "content"), date=text_of(item, date))
        for item in items(answer, "results")
    ]


def _cut(query: str) -> str:
    return query if len(query) <= _MAX_CHARS else query[: _MAX_CHARS + 1].rpartition(" ")[0] or query[:_MAX_CHARS]


def _encoded(asked: Mapping[str, Any]) -> str:
    return urlencode(asked, errors="replace")  # what a policy writes need not be valid Unicode


def _plain(text: str) -> str:
    """Without the marks of matched words, which Brave may send all the same."""
    return html.unescape(_TAG.sub("", text))
