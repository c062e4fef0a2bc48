"""The visit tool: pages, their text (tools.readers), and what of it bears on the goal (tools.summarize). What goes wrong is text.

Redirects are followed here, one remembered place after the other, or by whoever asked (tools.hops) where the next host is another's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from webdancer.config import FetchConfig, VisitConfig
from webdancer.tools.arguments import string, strings
from webdancer.tools.fetch import BlockedUrl
from webdancer.tools.hops import Hop, Moved
from webdancer.tools.pieces import host_of
from webdancer.tools.polite import WEB
from webdancer.tools.provider import ProviderFailed
from webdancer.tools.readers import PageError, PageMoved, PageReader
from webdancer.tools.render import SEPARATOR, render_page
from webdancer.tools.result import Part, join_parts
from webdancer.tools.shelf import Memory, is_local
from webdancer.tools.summarize import Summarizer, SummaryFailed
from webdancer.types import ToolResult

_NO_EVIDENCE = "The provided webpage content could not be accessed. Please check the URL or file format."
_NO_SUMMARY = "The webpage content could not be processed, and therefore, no information is available."
_LATER = "no proper answer at the moment, please try again later"
_MAX_CACHED_CHARS = 100_000_000
_LASTING = frozenset(
    {"not_found", "http_error", "empty_page", "robots", "content_type", "body_too_large", "extraction_failed", "extraction_timeout"}
)
"""Codes of pages that will not be better in a minute. All others are forgotten at once."""
_MOVED = "moved"


@dataclass(frozen=True, slots=True)
class _Found:
    """A page's text; or, with a code, why there is none; with the code _MOVED, where it is instead."""

    text: str
    code: str = ""


class _Elsewhere(Exception):
    def __init__(self, hop: Hop, *, cached: bool) -> None:
        super().__init__(hop.url)
        self.hop = hop
        self.cached = cached


class VisitTool:
    """`visit(url, goal)`: evidence and summary of each page, in the order of the URLs. A page's text is remembered by its place."""

    usage = '{"name": "visit", "arguments": {"url": ["...", "..."], "goal": "..."}}'

    def __init__(self, reader: PageReader, summarizer: Summarizer, config: VisitConfig, memory: Memory, fetch: FetchConfig) -> None:
        self._limits = fetch
        self._reader = reader
        self._summarizer = summarizer
        self._texts = memory.of(
            f"pages {config.backend} {config.url} {config.max_page_chars}",
            provider=WEB if config.backend == "direct" else config.backend,
            max_size=_MAX_CACHED_CHARS,
            size_of=lambda found: len(found.text),
            encode=dataclasses.astuple,
            decode=lambda fields: _Found(*fields),
            is_negative=lambda found: found.code not in ("", _MOVED),
            on_shelf=lambda place: not is_local(place) and not is_local(config.url),
        )

    async def __call__(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Raises InvalidArguments only."""
        urls, goal = strings(arguments, "url"), string(arguments, "goal")
        return join_parts(await asyncio.gather(*(self._one(url, goal) for url in urls)), SEPARATOR)

    async def visit(self, arguments: Mapping[str, Any], hop: Hop) -> ToolResult:
        """One page, from here on: its observation, or Moved where it leads to another host. Raises InvalidArguments only."""
        (url,), goal = strings(arguments, "url"), string(arguments, "goal")
        try:
            return join_parts([await self._one(url, goal, hop)], SEPARATOR)
        except _Elsewhere as moved:
            return Moved(text=f"The page has moved to {moved.hop.url}", cached=moved.cached, hop=moved.hop)

    async def check(self) -> None:
        """Raises ServiceError where pages cannot be read or summarized at all."""
        await self._reader.check()
        await self._summarizer.check()

    async def aclose(self) -> None:
        await self._texts.aclose()
        await self._reader.aclose()
        await self._summarizer.aclose()

    async def _read(self, place: str) -> _Found:
        try:
            return _Found(await self._reader.read(place))
        except (PageError, BlockedUrl) as error:
            if error.code not in _LASTING:
                raise
            return _Found(str(error), error.code)
        except PageMoved as moved:
            if not moved.for_good:
                raise
            return _Found(moved.url, _MOVED)

    async def _arrive(self, hop: Hop, *, alone: bool) -> tuple[_Found, bool]:
        """What is at the end of all redirects, and whether none of it took work. Raises _Elsewhere at another host's, unless `alone`."""
        all_cached = True
        while True:
            began, place = time.monotonic(), self._reader.locate(hop.url)
            try:
                found, cached = await self._texts.get(place, partial(self._read, place))
            except PageMoved as moved:
                found, cached = _Found(moved.url, _MOVED), False
            all_cached = all_cached and cached
            if found.code != _MOVED:
                return found, all_cached
            hop = hop.onward(found.text, took_s=time.monotonic() - began, limits=self._limits)
            if not alone and host_of(hop.url) != host_of(place):
                raise _Elsewhere(hop, cached=all_cached)

    async def _one(self, url: str, goal: str, hop: Hop | None = None) -> Part:
        """hop: where to begin, for a caller that takes over at the next host."""
        try:
            page, cached = await self._arrive(hop or Hop(url=url), alone=hop is None)
            if page.code:
                raise PageError(page.code, page.text)
            found = await self._summarizer.summarize(page.text, goal)
        except (PageError, BlockedUrl, SummaryFailed, ProviderFailed) as error:
            shown = url if len(url) <= 200 else url[:200] + "..."
            reason = error if isinstance(error, PageError | BlockedUrl) else _LATER
            text = render_page(shown, goal, evidence=f"{_NO_EVIDENCE} ({reason})", summary=_NO_SUMMARY)
            return Part(text=text, error=error.code)
        return Part(text=render_page(url, goal, evidence=found.evidence, summary=found.summary), cached=cached)
