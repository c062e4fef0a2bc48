"""One call of the agent as several of one query or page each, and which tool actor owns each of them.

Whatever is asked, asked by anyone, is asked of the same actor: there its answer is remembered, its flight shared, its host's bucket and
breaker held. Owners are found by rendezvous hashing: one actor more or less moves only what that one owns. A page that moves to another
host is asked of that host's owner next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from webdancer.tools.arguments import InvalidArguments, strings
from webdancer.tools.gate import BlockedUrl, FetchPolicy, parse_target
from webdancer.tools.hops import Hop, Moved
from webdancer.tools.render import SEPARATOR
from webdancer.tools.result import INFRASTRUCTURE_ERRORS
from webdancer.types import ToolCall, ToolResult, by_provider

LISTS = {"search": "query", "visit": "url"}
"""Tool -> its argument that may be a list. Calls of other tools stay whole."""
_INVALID = "invalid_arguments"
_ANYWHERE = FetchPolicy(allowed_ports=tuple(range(1, 65536)))
Ask = Callable[[ToolCall, Hop | None, Sequence[int]], Awaitable[ToolResult]]
"""A piece, where its page is by now if it is a visit, and the actors in the order in which they may be asked."""


async def ask_owners(call: ToolCall, ask: Ask, *, count: int, site: str = "") -> ToolResult:
    """The call's result by the `count` actors, each piece by its owner. `site` is the run's own."""
    return join(await asyncio.gather(*(_ask_owner(piece, ask, count, site) for piece in split(call))))


async def _ask_owner(piece: ToolCall, ask: Ask, count: int, site: str) -> ToolResult:
    """Of a page that moves: the last observation, with what all of the way took."""
    url = piece.arguments.get("url") if piece.name == "visit" else None
    hop = Hop(url=url) if isinstance(url, str) else None
    way: list[ToolResult] = []
    while True:
        key = owner_key(piece, site=site) if hop is None else f"visit {host_of(hop.url, site)}"
        result = await ask(piece, hop, owners(key, count))
        way.append(result)
        if not isinstance(result, Moved):
            return result if len(way) == 1 else dataclasses.replace(join(way), text=result.text, error=result.error)
        hop = result.hop


def split(call: ToolCall) -> list[ToolCall]:
    """The call itself where it has one item, or none that the tool could use."""
    name = LISTS.get(call.name)
    if name is None:
        return [call]
    try:
        items = strings(call.arguments, name)
    except InvalidArguments:
        return [call]
    return [ToolCall(name=call.name, arguments={**call.arguments, name: item}) for item in items]


def join(results: Sequence[ToolResult]) -> ToolResult:
    """The results of a call's pieces as the tool itself would have joined them (tools.result.join_parts)."""
    if len(results) == 1 or all(result.error == _INVALID for result in results):
        return results[0]
    errors = [result.error for result in results if result.error is not None]
    infrastructure = [error for error in errors if error in INFRASTRUCTURE_ERRORS]
    shown = infrastructure or (errors if len(errors) == len(results) else [])
    return ToolResult(
        text=SEPARATOR.join(result.text for result in results),
        error=shown[0] if shown else None,
        latency_s=max(result.latency_s for result in results),
        cached=all(result.cached for result in results),
        uses=tuple(by_provider(use for result in results for use in result.uses).values()),
        throttled=any(result.throttled for result in results),
    )


def owner_key(piece: ToolCall, *, site: str = "") -> str:
    """What is to be together: all pages of a host, except those of the run's own site, which has no limits and may be spread."""
    value = piece.arguments.get(LISTS.get(piece.name, ""))
    if piece.name == "visit" and isinstance(value, str):
        return f"visit {host_of(value, site)}"
    if piece.name == "search" and isinstance(value, str):
        return f"search {' '.join(value.split()).casefold()}"
    return f"{piece.name} {json.dumps(piece.arguments, sort_keys=True, default=str)}"


def owners(key: str, count: int) -> list[int]:
    """All `count` actors, the owner of the key first, then who takes over where it is gone."""
    return sorted(range(count), key=lambda index: hashlib.blake2b(f"{index} {key}".encode("utf-8", "replace"), digest_size=8).digest())


def host_of(url: str, site: str = "") -> str:
    """Whom a page belongs to: its host, whatever the scheme, the port and `www.`; on the run's own site, itself."""
    url = url.strip()
    if url.startswith("/") or (site and url.startswith(site.rstrip("/") + "/")):
        return url.removeprefix(site.rstrip("/")) if site else url
    try:
        host = parse_target(url, _ANYWHERE).host
    except BlockedUrl:  # nobody will be asked for it, or only as an origin that is allowed by name
        try:
            host = urlsplit(url).hostname or url
        except ValueError:
            host = url
    return host.removeprefix("www.")
