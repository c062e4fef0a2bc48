"""What sites ask of robots (RFC 9309): robots.txt, asked through the same gate as every page and remembered for a day."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from protego import Protego

from webdancer.tools.cache import SingleFlightCache
from webdancer.tools.gate import BlockedUrl
from webdancer.tools.limits import NotAsked
from webdancer.tools.network import FetchFailed

T = TypeVar("T")
AGENT = "webdancer"
ROBOTS_PATH = "/robots.txt"
_DAY_S = 86_400.0
_UNKNOWN_S = 300.0
"""Until a host that did not say its rules is asked again."""
_MAX_CHARS = 500_000
"""Of one file; RFC 9309 asks for 500 KiB."""
_MAX_CHARS_KEPT = 4_000_000
"""Of all files that are remembered: parsed they take 25 times as much."""
_QUICK_CHARS = 20_000
_ALL, _NONE = "", "User-agent: *\nDisallow: /\n"
_MAX_DELAY_S = 60.0
_MAX_ORIGINS = 10_000


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a server, to the request for its robots.txt."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class _Rules:
    parsed: Protego
    lifetime_s: float
    num_chars: int = 0

    @property
    def known(self) -> bool:
        return self.lifetime_s == _DAY_S


class Robots:
    """Rules by origin. `ask(url)` requests a robots.txt; it raises BlockedUrl or FetchFailed, and NotAsked, which `look_up` passes on.

    No such file (4xx), or one that is no text: all is allowed. A server that fails, or that the gate refuses: nothing is, until it answers.
    """

    def __init__(self, ask: Callable[[str], Awaitable[Answer]], *, clock: Callable[[], float] = time.time) -> None:
        self._ask = ask
        self._rules: SingleFlightCache[str, _Rules] = SingleFlightCache(
            max_entries=_MAX_ORIGINS,
            max_size=_MAX_CHARS_KEPT,
            size_of=lambda rules: rules.num_chars,
            lifetime_s=lambda rules: rules.lifetime_s,
            clock=clock,
        )

    async def look_up(self, url: str) -> tuple[bool | None, float]:
        """Whether this page may be fetched, None where its host did not say, and the seconds that it wants between two requests."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        rules, _ = await self._rules.get(origin, lambda: self._load(origin))
        delay = rules.parsed.crawl_delay(AGENT) or 0.0
        allowed = await _aside(rules.num_chars, rules.parsed.can_fetch, url, AGENT) if rules.known else None
        return allowed, min(float(delay), _MAX_DELAY_S)

    async def aclose(self) -> None:
        await self._rules.aclose()

    async def _load(self, origin: str) -> _Rules:
        try:
            answer = await self._ask(origin + ROBOTS_PATH)
        except BlockedUrl as error:
            known = error.code == "content_type"
            return _Rules(Protego.parse(_ALL if known else _NONE), _DAY_S if known else _UNKNOWN_S)
        except NotAsked:  # yet, by our own limits: the host said nothing, and nothing is remembered of it
            raise
        except FetchFailed:
            return _Rules(Protego.parse(_NONE), _UNKNOWN_S)
        if 400 <= answer.status < 500 and answer.status != 429:
            return _Rules(Protego.parse(_ALL), _DAY_S)
        if not 200 <= answer.status < 300:
            return _Rules(Protego.parse(_NONE), _UNKNOWN_S)
        text = answer.text[:_MAX_CHARS]
        return _Rules(await _aside(len(text), Protego.parse, text), _DAY_S, len(text))


async def _aside(num_chars: int, work: Callable[..., T], *arguments: str) -> T:
    """Not on the event loop where it may take longer than everything else there."""
    return work(*arguments) if num_chars <= _QUICK_CHARS else await asyncio.to_thread(work, *arguments)
