"""A search whose results are kept on disk: a job that goes on builds on what it found before, and pays for no query twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from weakref import WeakValueDictionary

from webdancer.errors import ServiceError
from webdancer.synthesis.e2hqa import Search
from webdancer.telemetry.jsonl import KeyedRows
from webdancer.tools.provider import ProviderFailed
from webdancer.tools.render import Hit
from webdancer.tools.result import REFUSED

_REFUSES_THE_QUERY = frozenset({400, 413, 414, 422})


class KeptSearch:
    """Call it with a query; one that the search refuses finds nothing. Raises ServiceError where the search does not answer."""

    def __init__(self, search: Search, path: Path) -> None:
        """Raises DataError for a file that is not such a log."""
        self._search = search
        self._rows = KeyedRows(path, "query")
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, query: str) -> Sequence[Hit]:
        async with self._locks.setdefault(query, asyncio.Lock()):
            if (row := self._rows.get(query)) is not None:
                return [Hit(**hit) for hit in row["hits"]]
            hits: Sequence[Hit] = ()
            try:
                hits = await self._search(query)
            except ProviderFailed as error:
                if error.code == REFUSED and error.status in _REFUSES_THE_QUERY:
                    return hits  # a model wrote it: too long, perhaps
                raise ServiceError(f"tools.search: must be a search that answers, got: {error}") from error
            self._rows.add(query, {"hits": [asdict(hit) for hit in hits]})
            return hits

    def close(self) -> None:
        self._rows.close()
