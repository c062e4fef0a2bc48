"""The agent's tools behind one `call` that never raises: what went wrong is a code and a text that the agent can act on.

Codes: `invalid_arguments`, `unknown_tool`; the gate's own (tools.fetch.BLOCK_CODES); `not_found`, `http_error`, `unreachable`,
`empty_page`, `no_summary`, `extraction_timeout`, `extraction_failed` for a page; and INFRASTRUCTURE_ERRORS, which are never the policy's
fault. A new tool is one class and one line in `open_tools`: docs/extending.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from webdancer.config import ToolsConfig
from webdancer.tools.arguments import InvalidArguments
from webdancer.tools.extract import without_controls
from webdancer.tools.extraction import Extraction
from webdancer.tools.hops import Hop
from webdancer.tools.keys import redacted
from webdancer.tools.ledger import Ledger, Provider, Quota, open_bill, providers
from webdancer.tools.polite import Manners
from webdancer.tools.provider import ProviderFailed
from webdancer.tools.readers import open_reader
from webdancer.tools.replay import ReplayToolbox
from webdancer.tools.result import INFRASTRUCTURE_ERRORS, INTERNAL, UNAVAILABLE
from webdancer.tools.search import SearchTool
from webdancer.tools.search_backends import open_backend
from webdancer.tools.shelf import Memory, ShelfFile
from webdancer.tools.store import Recording, RecordingFile
from webdancer.tools.summarize import Writer, open_summarizer
from webdancer.tools.visit import VisitTool
from webdancer.types import ToolCall, ToolResult

__all__ = ["INFRASTRUCTURE_ERRORS", "Tool", "WebToolbox"]

_LOG = logging.getLogger(__name__)


class Tool(Protocol):
    """Raises InvalidArguments for arguments that it cannot use, and ProviderFailed for an outage; else all that can happen is a result."""

    usage: str
    """A call of it, as the agent would write it."""

    async def __call__(self, arguments: Mapping[str, Any]) -> ToolResult: ...

    async def check(self) -> None:
        """Once before a run. Raises ServiceError where the tool cannot work at all."""

    async def aclose(self) -> None: ...


def open_tools(
    config: ToolsConfig, *, shard: int = 0, quota: Quota | None = None, shelf: ShelfFile | None = None, engine: Writer | None = None
) -> dict[str, Tool]:
    """The tools by the names that the agent calls; the line of a new one goes here. Raises ConfigError or ServiceError.

    quota: leases requests to providers with a quota or price; its own by default. shelf: where what is found outlives the run, if anywhere.
    engine: what summarizes with the summarizer's backend engine.
    """
    manners, memory = Manners(config.polite, quota or Ledger(budget_usd=config.budget_usd)), Memory(config, shelf)
    searcher, page_server = providers(config)
    backend = open_backend(config.search, manners.to(searcher))
    extraction = Extraction(config.visit.extraction_processes)
    to_pages = manners.web if config.visit.backend == "direct" else manners.to(page_server)
    reader = open_reader(config.visit, config.fetch, to_pages, extraction=extraction)
    to_summarizer = manners.to(Provider(name="summarizer"))
    summarizer = open_summarizer(config.visit, to_summarizer, cache_entries=config.cache_entries, extraction=extraction, engine=engine)
    return {
        "search": SearchTool(backend, config.search, memory, tries=shard == 0 or not searcher.leased),
        "visit": VisitTool(reader, summarizer, config.visit, memory, config.fetch),
    }


def open_toolbox(
    config: ToolsConfig,
    *,
    call_timeout_s: float = 120.0,
    shard: int = 0,
    quota: Quota | None = None,
    writer: Recording | None = None,
    engine: Writer | None = None,
) -> ReplayToolbox | WebToolbox:
    """The tools of tool actor number `shard` as the config wants them: live, remembered, recorded or replayed.

    quota, writer: a ledger and a recording that others share; of its own where there are none. engine: see `open_tools`.
    Raises ConfigError, DataError or ServiceError.
    """
    mode = config.replay.mode
    if mode == "replay":
        return ReplayToolbox(config, live=None)
    shelf = ShelfFile(Path(config.cache_dir) / f"shard-{shard}.sqlite") if config.cache_dir else None
    tools = open_tools(config, shard=shard, quota=quota, shelf=shelf, engine=engine)
    live = WebToolbox(config, tools=tools, shelf=shelf, call_timeout_s=call_timeout_s)
    if mode == "live":
        return live
    if mode == "record" and writer is None:
        writer = RecordingFile(config.replay.path, writable=True)
    return ReplayToolbox(config, live=live, writer=writer if mode == "record" else None)


class WebToolbox:
    """The tools of one tool actor (interfaces.Toolbox). `search.url` and `visit.site` are already filled in.

    tools: instead of those that the config names. shelf: theirs, closed with them. call_timeout_s bounds one call with all its queries
    or pages, waiting for a place among `max_concurrent` included. Raises ConfigError or ServiceError at construction.
    """

    def __init__(
        self,
        config: ToolsConfig,
        *,
        tools: Mapping[str, Tool] | None = None,
        shelf: ShelfFile | None = None,
        call_timeout_s: float = 120.0,
    ) -> None:
        self._tools = open_tools(config) if tools is None else tools
        self._shelf = shelf
        self._places = {name: asyncio.Semaphore(config.max_concurrent) for name in self._tools}
        self._call_timeout_s = call_timeout_s

    async def call(self, call: ToolCall, hop: Hop | None = None) -> ToolResult:
        """hop: of a visit of one page, for a caller that takes over at the next host (tools.pieces.ask_owners)."""
        started = time.monotonic()
        bill = open_bill()
        result = await self._answer(call.name, call.arguments, hop)
        return dataclasses.replace(
            result,
            text=redacted(without_controls(result.text)),
            latency_s=time.monotonic() - started,
            uses=bill.uses,
            throttled=bill.throttled,
        )

    async def check(self) -> None:
        """Once before a run. Raises ServiceError where a tool cannot work at all."""
        for tool in self._tools.values():
            await tool.check()

    async def aclose(self) -> None:
        for tool in self._tools.values():
            await tool.aclose()
        if self._shelf is not None:
            await self._shelf.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _answer(self, name: object, arguments: Mapping[str, Any], hop: Hop | None) -> ToolResult:
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            return ToolResult(text=f"There is no tool {str(name)[:80]!r}. The tools are: {', '.join(self._tools)}.", error="unknown_tool")
        try:
            async with asyncio.timeout(self._call_timeout_s), self._places[str(name)]:
                return await (tool.visit(arguments, hop) if hop and isinstance(tool, VisitTool) else tool(arguments))
        except InvalidArguments as error:
            return ToolResult(text=f"Invalid arguments: {error}. Write {tool.usage}.", error="invalid_arguments")
        except ProviderFailed as error:
            return ToolResult(text=f"The tool {name} is unavailable at the moment. Please try again later.", error=error.code)
        except TimeoutError:
            return ToolResult(text=f"The tool {name} took too long. Please try again later.", error=UNAVAILABLE)
        except ImportError:  # a broken installation is never a page's doing
            raise
        except Exception:  # tolerated: one broken page must not end a run of thousands; it is logged, marked and counted by its code
            _LOG.exception("the tool %s failed", name)
            return ToolResult(text=f"The tool {name} failed. Please try again later.", error=INTERNAL)
