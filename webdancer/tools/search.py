"""The search tool. A backend finds hits (tools.search_backends); what the agent reads of them is the same for all (tools.render)."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webdancer.config import SearchConfig
from webdancer.errors import ServiceError
from webdancer.tools.arguments import strings
from webdancer.tools.cache import SingleFlightCache
from webdancer.tools.evidence import first_sentences
from webdancer.tools.provider import ProviderFailed
from webdancer.tools.render import SEPARATOR, Hit, render_hits
from webdancer.tools.result import UNAVAILABLE, Part, join_parts
from webdancer.tools.search_backends import SearchBackend
from webdancer.tools.shelf import Memory, is_local
from webdancer.types import ToolResult

_MAX_CACHED_CHARS = 50_000_000
_FIELDS = tuple(field.name for field in dataclasses.fields(Hit))


class SearchTool:
    """`search(query)`: one result list a query, in the order of the queries. Hits are remembered by query."""

    usage = '{"name": "search", "arguments": {"query": ["...", "..."]}}'

    def __init__(self, backend: SearchBackend, config: SearchConfig, memory: Memory, *, tries: bool = True) -> None:
        """tries: whether `check` asks the backend; where that costs, one of a pool is enough."""
        self._tries = tries
        self._backend = backend
        self._config = config
        self._hits: SingleFlightCache[str, Sequence[Hit]] = memory.of(
            f"hits {config.backend} {config.url} {config.top_k}",
            provider=config.backend,
            max_size=_MAX_CACHED_CHARS,
            size_of=_num_chars,
            encode=lambda hits: [dataclasses.astuple(hit) for hit in hits],
            decode=lambda rows: [Hit(**dict(zip(_FIELDS, row, strict=True))) for row in rows],
            is_negative=lambda hits: not hits,
            on_shelf=lambda query: config.backend != "index" and not is_local(config.url),
        )

    async def __call__(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Raises InvalidArguments only."""
        return join_parts(await asyncio.gather(*map(self._one, strings(arguments, "query"))), SEPARATOR)

    async def check(self) -> None:
        """One query before a run. Raises ServiceError where nothing usable comes back."""
        if not self._tries:
            return
        try:
            await self._backend.search("WebDancer")
        except ProviderFailed as error:
            key = "tools.search.url" if self._config.url else "tools.search.backend"
            named = self._config.url or self._config.backend
            raise ServiceError(f"{key}: must be a search that answers, got {named!r}: {error}") from error

    async def aclose(self) -> None:
        await self._hits.aclose()
        await self._backend.aclose()

    async def _one(self, query: str) -> Part:
        normalised = " ".join(query.split())
        try:
            async with asyncio.timeout(2 * self._config.timeout_s):  # as long for its turn, so that the last one who gets it is answered
                hits, cached = await self._hits.get(normalised, lambda: self._backend.search(normalised))
        except (ProviderFailed, TimeoutError) as error:
            code = error.code if isinstance(error, ProviderFailed) else UNAVAILABLE
            return Part(text=f"The search for '{query}' is unavailable at the moment. Please try again later.", error=code)
        return Part(text=render_hits(query, self._shown(hits)), cached=cached)

    def _shown(self, hits: Sequence[Hit]) -> list[Hit]:
        config = self._config
        shown = []
        for rank, hit in enumerate(hits[: config.top_k]):
            whole = config.snippets == "all" or rank == 0
            snippet = first_sentences(hit.snippet, max_sentences=config.snippet_sentences if whole else 1, max_chars=config.snippet_chars)
            shown.append(Hit(title=hit.title, url=hit.url, snippet=snippet, date=hit.date, source=hit.source))
        return shown


def _num_chars(hits: Sequence[Hit]) -> int:
    return sum(len(hit.snippet) + 200 for hit in hits)
