"""From root pages to parsed pages: a crawl over HTTP within a budget, where robots.txt allows, that can be killed at any moment.

Every request goes through the `fetch` that is given (`tools.polite.PoliteFetcher.fetch`), so through the same gate and manners as the
agent's. A page that fails is listed with its reason and the crawl goes on; a site that is away ends it, so that it can go on.
Which pages come in which order does not depend on which answer came first, and what is on disk is a prefix of it: a crawl that is started
again visits the rest, and ends as if it had never stopped.

    pages.jsonl       a page a line, as `webdancer web build --from` reads them
    left_out.jsonl    what was asked for and is no page of the crawl: failures, near-duplicates, redirects to what is known
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urldefrag, urljoin

from webdancer.errors import DataError, ServiceError
from webdancer.synthesis.frontier import CrawlBudget, Frontier, Visit
from webdancer.synthesis.in_order import in_order
from webdancer.synthesis.page import CrawledPage, FactValue, origin_of, parse_page, site_path
from webdancer.synthesis.similar import SimilarTexts
from webdancer.telemetry.jsonl import JsonlWriter, read_jsonl, read_placed
from webdancer.tools.gate import BlockedUrl
from webdancer.tools.limits import NotAsked
from webdancer.tools.network import FetchFailed
from webdancer.tools.robots import Answer, Robots

PAGES_FILE, LEFT_OUT_FILE = "pages.jsonl", "left_out.jsonl"
NEAR_DUPLICATE, KNOWN, FORBIDDEN = "near-duplicate of", "leads to", "robots.txt forbids it"
"""How the reason begins for a page that says what another one says, for one that is another one, and for one that may not be asked for."""
NO_RULES = "robots.txt cannot be had"

_LOOKAHEAD = 4
"""Visits begun ahead, as a multiple of those that run at once: so long may one page keep the others waiting."""
_RUN_LENGTH = 5  # words; near-duplicate pages share most of their runs
_AWAY = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses that say nothing about the page; a 500 may be its own."""
_PAUSES_S = (0.0, 5.0, 30.0, 60.0)
"""Before each time that a silent site is asked again; longer than a breaker leaves it alone (tools.polite.breaker_open_s)."""


class FetchedPage(Protocol):
    """What the crawler reads of a `tools.fetch.Page`; `url` is the one that answered, after redirects."""

    @property
    def url(self) -> str: ...

    @property
    def status(self) -> int: ...

    @property
    def content_type(self) -> str: ...

    @property
    def text(self) -> str: ...


Fetch = Callable[[str], Awaitable[FetchedPage]]
ReadText = Callable[[FetchedPage], Awaitable[str]]
"""The readable text of a page, where more is wanted than what `parse_page` takes of it (tools.extraction)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crawl:
    """`failed` gives a reason for each page that was not read; `left` counts the links that the budget left unvisited."""

    pages: tuple[CrawledPage, ...]
    failed: Mapping[str, str]
    left: int


async def crawl(
    roots: Sequence[str],
    *,
    fetch: Fetch,
    site: str = "",
    budget: CrawlBudget | None = None,
    near_duplicate: float = 0.0,
    read_text: ReadText | None = None,
    folder: Path | None = None,
    on_visit: Callable[[int], None] = lambda num_found: None,
) -> Crawl:
    """Crawl from the roots, to the hosts of the roots only and where their robots.txt allows.

    roots: URLs, or paths on `site` (an origin, `http://127.0.0.1:PORT`). Pages of `site` are named by their paths, so that what is made
    of them does not depend on a port. near_duplicate: Jaccard similarity from which a page counts as another one; 0: all are kept.
    folder: where the crawl is kept and from where it goes on. on_visit: called after each, with the number of addresses found so far.
    Raises DataError for a folder that holds another crawl, ServiceError for a root or a site that does not answer (any more).
    """
    budget = budget or CrawlBudget()
    frontier = Frontier((urldefrag(urljoin(site, root)).url for root in roots), budget)
    visitor = _Visitor(fetch, site, frontier=frontier, concurrency=budget.concurrency, read_text=read_text)
    similar = SimilarTexts(near_duplicate, run_length=_RUN_LENGTH) if near_duplicate else None
    kept = _Kept(folder, site)
    pages: dict[str, CrawledPage] = {}
    failed: dict[str, str] = {}
    moved: dict[str, str] = {}

    async def visit(visit: Visit) -> CrawledPage | str | Unanswered:
        known = kept.get(visit)
        return await visitor.visit(visit.url) if known is None else known

    try:
        async with aclosing(in_order(frontier.take, visit, window=_LOOKAHEAD * budget.concurrency)) as visits:
            async for drawn, answer in visits:
                found = await visitor.once_more(drawn.url, answer) if isinstance(answer, Unanswered) else answer
                outcome = found if isinstance(found, str) else _new(found, pages, similar)
                if isinstance(outcome, str):
                    failed[drawn.url] = outcome
                else:
                    pages[outcome.url] = outcome
                    visitor.has_answered(urljoin(site, outcome.url))
                    links = zip(outcome.links, outcome.link_texts, strict=True)
                    frontier.add(((urljoin(site, link), name) for link, name in links), depth=drawn.depth + 1)
                if target := _target(outcome):
                    moved[site_path(drawn.url, site)] = target
                kept.add(drawn, outcome)
                on_visit(frontier.num_found)
    finally:
        kept.close()
        await visitor.aclose()
    return Crawl(pages=tuple(_leading_on(page, moved) for page in pages.values()), failed=failed, left=frontier.left)


def _target(outcome: CrawledPage | str) -> str:
    """The page of the crawl that a visit led to, perhaps over redirects; nothing for one that failed."""
    if isinstance(outcome, CrawledPage):
        return outcome.url
    return outcome.removeprefix(f"{KNOWN} ") if outcome.startswith(KNOWN) else ""


def _leading_on(page: CrawledPage, moved: Mapping[str, str]) -> CrawledPage:
    """The page with links as its site writes them replaced by the addresses that answer, under which pages are known."""
    if all(moved.get(link, link) == link for link in page.links):
        return page
    linked: dict[str, str] = {}
    for link, name in zip(page.links, page.link_texts, strict=True):
        linked.setdefault(moved.get(link, link), name)
    facts = {
        key: tuple(value if value.url is None else replace(value, url=moved.get(value.url, value.url)) for value in values)
        for key, values in page.facts.items()
    }
    return replace(page, facts=facts, links=tuple(linked), link_texts=tuple(linked.values()))


def _new(page: CrawledPage, pages: Mapping[str, CrawledPage], similar: SimilarTexts | None) -> CrawledPage | str:
    """The page, or why it is none."""
    if page.url in pages:
        return f"{KNOWN} {page.url}"
    if similar is not None and page.text:
        like = similar.like(page.text)
        if like:
            return f"{NEAR_DUPLICATE} {like[0]}"
        similar.add(page.url, page.text)
    return page


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Nobody said what the page is, and another time somebody may."""

    reason: str


class _Visitor:
    """Fetches and parses many pages at once."""

    def __init__(self, fetch: Fetch, site: str, *, frontier: Frontier, concurrency: int, read_text: ReadText | None) -> None:
        self._fetch = fetch
        self._site = site
        self._frontier = frontier
        self._read_text = read_text
        self._robots = Robots(self._ask_robots)
        self._slots = asyncio.Semaphore(concurrency)
        self._answering: dict[str, str] = {}

    def has_answered(self, url: str) -> None:
        """A page by which its site can be known to be there."""
        self._answering.setdefault(origin_of(url), url)

    async def visit(self, url: str) -> CrawledPage | str | Unanswered:
        """The page, or why there is none. Raises as `once_more` does."""
        found = await self._visit(url)
        return await self.once_more(url, found) if isinstance(found, Unanswered) and origin_of(url) in self._answering else found

    async def once_more(self, url: str, first: Unanswered) -> CrawledPage | str:
        """Asks again once a page of the site that has answered before does so: what fails then is this page alone.

        Raises ServiceError where that one does not answer any more, or none ever has.
        """
        answering = self._answering.get(origin_of(url))
        for pause_s in _PAUSES_S if answering else ():
            await asyncio.sleep(pause_s)
            if not isinstance(await self._visit(answering or url), Unanswered):
                again = await self._visit(url)
                return again.reason if isinstance(again, Unanswered) else again
        name = "tools.visit.site" if origin_of(url) == self._site else "synthesis.roots"
        raise ServiceError(f"{name}: {url} must answer with pages, got {first.reason!r}; what was crawled before is kept")

    async def _visit(self, url: str) -> CrawledPage | str | Unanswered:
        allowed, _ = await self._robots.look_up(url)
        if not allowed:
            return Unanswered(NO_RULES) if allowed is None else FORBIDDEN
        try:
            async with self._slots:
                page = await self._fetch(url)
                if page.status != 200 or "html" not in page.content_type or not self._frontier.is_own(page.url):
                    reason = f"status {page.status}, {page.content_type or 'no content type'}, from {page.url}"
                    return Unanswered(reason) if page.status in _AWAY else reason
                text = await self._read_text(page) if self._read_text else ""
        except Exception as error:  # blocked, timed out, reset, unreadable: that page's failure, not the crawl's
            reason = f"{type(error).__name__}: {error}"
            return Unanswered(reason) if _is_silence(error) else reason
        parsed = parse_page(page.text, url=page.url, site=self._site)
        return replace(parsed, text=text) if text else parsed

    async def aclose(self) -> None:
        await self._robots.aclose()

    async def _ask_robots(self, url: str) -> Answer:
        try:
            page = await self._fetch(url)
        except (BlockedUrl, FetchFailed):
            raise
        except Exception as error:  # as in visit; a server that does not say its rules is left alone
            raise FetchFailed(f"{type(error).__name__}: {error}") from error
        return Answer(page.status, page.text)


def _is_silence(error: Exception) -> bool:
    if isinstance(error, NotAsked):
        return error.reason != "robots"
    return isinstance(error, FetchFailed) or (isinstance(error, BlockedUrl) and error.code in ("timeout", "dns_failure"))


class _Kept:
    """The crawl on disk: each visit is one line of one of two files, numbered, so that what a crash leaves is a prefix of the crawl.

    Nothing is written before there is a page: a crawl that found none begins anew the next time.
    """

    def __init__(self, folder: Path | None, site: str) -> None:
        self._rows: dict[int, tuple[str, CrawledPage | str]] = {}
        self._unwritten: list[tuple[int, dict[str, Any]]] = []
        self._writers: tuple[JsonlWriter, JsonlWriter] | None = None
        self._site = site
        self._folder = folder
        if folder is not None:
            for row in read_jsonl(folder / PAGES_FILE):
                self._rows[int(row["visit"])] = (str(row["asked"]), _page(row))
            for row in read_jsonl(folder / LEFT_OUT_FILE):
                self._rows[int(row["visit"])] = (str(row["asked"]), str(row["reason"]))
            self._cut_back(folder)
            self._writers = (JsonlWriter(folder / PAGES_FILE), JsonlWriter(folder / LEFT_OUT_FILE))
        self._has_page = any(isinstance(outcome, CrawledPage) for _, outcome in self._rows.values())

    def _cut_back(self, folder: Path) -> None:
        """To the visits before the first that is missing: when the power goes, one file may lose more than the other."""
        whole = next(number for number in itertools.count() if number not in self._rows)
        if whole == len(self._rows):
            return
        for path in (folder / PAGES_FILE, folder / LEFT_OUT_FILE):
            end = next((offset for offset, row in read_placed(path) if int(row["visit"]) >= whole), None)
            if end is not None:
                os.truncate(path, end)
        self._rows = {number: self._rows[number] for number in range(whole)}

    def get(self, visit: Visit) -> CrawledPage | str | None:
        """What came of this visit before. Raises DataError if the crawl on disk went another way."""
        if visit.number not in self._rows:
            return None
        asked, outcome = self._rows[visit.number]
        if asked != self._name(visit.url):
            rule = "must hold a crawl of the same roots and settings"
            raise DataError(f"{self._folder}: {rule}, got {asked!r} as visit {visit.number}, not {self._name(visit.url)!r}")
        return outcome

    def add(self, visit: Visit, outcome: CrawledPage | str) -> None:
        if self._writers is None or visit.number in self._rows:
            return
        head: dict[str, Any] = {"visit": visit.number, "asked": self._name(visit.url), "depth": visit.depth}
        if isinstance(outcome, str):
            self._unwritten.append((1, {**head, "reason": outcome.replace(self._site, "") if self._site else outcome}))
        else:
            self._has_page = True
            self._unwritten.append((0, {**asdict(outcome), **head}))
        if self._has_page:
            for file, row in self._unwritten:
                self._writers[file].write(row)
            self._unwritten.clear()

    def close(self) -> None:
        for writer in self._writers or ():
            writer.close()

    def _name(self, url: str) -> str:
        """Without the site, whose port may be another one when the crawl goes on."""
        return url[len(self._site) :] if self._site and origin_of(url) == self._site else url


def _page(row: Mapping[str, Any]) -> CrawledPage:
    facts = {key: tuple(FactValue(**value) for value in values) for key, values in row["facts"].items()}
    return CrawledPage(
        url=row["url"],
        title=row["title"],
        kind=row["kind"],
        split=row["split"],
        aliases=tuple(row["aliases"]),
        facts=facts,
        links=tuple(row["links"]),
        text=row["text"],
        link_texts=tuple(row["link_texts"]),
    )
