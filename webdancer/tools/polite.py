"""A Fetcher with manners: it asks robots.txt, keeps to quotas, tries again with care, and leaves alone who does not answer.

Two kinds of peers. A host of the open web has a bucket, a breaker and a robots.txt of its own, all held by the one tool actor that
owns the host. A provider has one breaker an actor and a quota that the cluster's ledger leases.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from webdancer.config import PoliteConfig
from webdancer.tools.fetch import BlockedUrl, Fetcher, FetchFailed, FetchPolicy, OpenFetcher, Page, Resolve, Transport, Unreadable
from webdancer.tools.gate import Target, parse_target
from webdancer.tools.ledger import Provider, Quota, bill
from webdancer.tools.limits import Breaker, Exhausted, NotAsked, Schedule, wait_for
from webdancer.tools.result import BUDGET_SPENT, UNAVAILABLE
from webdancer.tools.robots import ROBOTS_PATH, Answer, Robots

WEB = "web"
"""Hosts that are visited directly, as a name beside those of providers."""
PASSING = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
"""Statuses that may be another one next time: what a server will never do (501, 505) stays so."""
_TOO_MANY = 429
_DOWN = frozenset({"timeout", "dns_failure"})
_ANSWERED = frozenset({"content_type", "body_too_large"})
"""What the gate says of a host: that it did not answer, and that it did."""
_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 8.0
_MAX_RETRY_AFTER_S = 300.0
"""Who wants to be asked later than that is asked after it once more: a header may say years."""
_FELT_S = 1.0  # waiting for a quota that is worth telling
_MAX_PEERS = 10_000


def not_asked_code(error: NotAsked, *, own_site: bool) -> str:
    """As a page's error. A host that fails or wants to wait is the web as it is; that our own limits are used up is nobody's fault."""
    match error.reason:
        case "robots":
            return "robots"
        case "budget":
            return BUDGET_SPENT
        case "breaker" | "rules" | "slow":
            return UNAVAILABLE if own_site else "unreachable"
        case _:
            return UNAVAILABLE


@dataclass(slots=True)
class _Peer:
    schedule: Schedule
    breaker: Breaker


class PoliteFetcher(Fetcher):
    """Raises NotAsked besides what a Fetcher raises.

    provider: who is asked, or None for the open web. `patience_s` bounds the waiting for one request and all its repetitions.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        config: PoliteConfig,
        *,
        provider: Provider | None = None,
        quota: Quota | None = None,
        resolve: Resolve | None = None,
        transport: Transport | None = None,
        patience_s: float | None = None,
    ) -> None:
        super().__init__(policy, resolve=resolve, transport=transport)
        self._config = config
        self._provider = provider
        self._quota = quota
        self._patience_s = policy.timeout_s if patience_s is None else patience_s
        self._peers: dict[str, _Peer] = {}
        self._robots = Robots(self._ask_robots) if config.robots and provider is None else None

    async def fetch(self, url: str, *, follow: bool = True) -> Page:
        """A redirect is a request of its own, with a deadline of its own, to a host with rules of its own."""
        for _ in range(self.policy.max_redirects + 1):
            target = parse_target(url, self.policy)
            await self._check_robots(target)
            page = await self._politely(target, partial(super().fetch, target.url, follow=False))
            if not page.moved_to or not follow:
                return page
            url = page.moved_to
        raise BlockedUrl("too_many_redirects", f"more than {self.policy.max_redirects} redirects")

    async def post_json(self, url: str, payload: Mapping[str, Any], *, headers: Mapping[str, str] | None = None) -> Page:
        target = parse_target(url, self.policy)
        return await self._politely(target, lambda: super(PoliteFetcher, self).post_json(url, payload, headers=headers))

    async def get_json(self, url: str, *, headers: Mapping[str, str] | None = None) -> Page:
        target = parse_target(url, self.policy)
        return await self._politely(target, lambda: super(PoliteFetcher, self).get_json(url, headers=headers))

    async def aclose(self) -> None:
        if self._robots is not None:
            await self._robots.aclose()
        await super().aclose()

    async def _politely(self, target: Target, send: Callable[[], Awaitable[Page]]) -> Page:
        """Up to `max_attempts` requests; the last answer or error is the result."""
        loop = asyncio.get_running_loop()
        peer, ends = self._peer(target), loop.time() + self._patience_s
        attempt = 0
        while True:
            attempt += 1
            if not peer.breaker.lets_through(loop.time()):
                self._note_throttled(target)
                raise NotAsked("breaker", f"{target.host} has failed too often and is left alone for a while")
            await self._wait_turn(target, ends - loop.time())
            page, error = await _outcome(send)
            fine = page is not None and page.status not in PASSING
            if (answered := _answered(page, error)) is not None:
                peer.breaker.note(fine=answered, now=loop.time())
            pause_s = _pause(page, attempt)
            if page is not None and not fine and (page.status == _TOO_MANY or page.retry_after):
                self._note_throttled(target)
                peer.schedule.pause(loop.time() + pause_s)
            again = not fine and not isinstance(error, BlockedUrl | Unreadable) and attempt < self._config.max_attempts
            if again and loop.time() + pause_s <= ends:
                await asyncio.sleep(pause_s)
            elif page is None:
                assert error is not None
                raise error
            else:
                return page

    async def _wait_turn(self, target: Target, patience_s: float) -> None:
        """Until one request may be sent, which is then on the bill. Raises NotAsked at once where that takes longer than `patience_s`."""
        loop = asyncio.get_running_loop()
        began, schedule = loop.time(), self._peer(target).schedule
        ends, hosts_wish = began + patience_s, self._is_strange(target) and schedule.held_back(began)
        while True:
            try:
                await wait_for(schedule, patience_s=max(0.0, ends - loop.time()))
            except Exhausted:
                hosts_wish = self._is_strange(target) and schedule.held_back(loop.time())
                bill().throttled |= not hosts_wish
                raise NotAsked("slow" if hosts_wish else "quota", f"{target.host} is asked too often already") from None
            price = await self._lease(max(0.0, ends - loop.time()))
            if not schedule.paused(loop.time()):
                break
            # Somebody was told meanwhile to pause, which is meant for all: what was leased is not used.
            await self._give_back(price)
        if loop.time() - began > _FELT_S and not hosts_wish:
            bill().throttled = True
        bill().add(self._provider.name if self._provider else WEB, requests=1, usd=price)

    async def _lease(self, patience_s: float) -> float:
        """One request of a provider with a quota or price, when its time has come; gives the dollars. Nothing for all others."""
        if self._provider is None or not self._provider.leased:
            return 0.0
        if self._quota is not None:
            lease = await self._quota.lease(self._provider, patience_s=patience_s)
            if lease.refused:
                bill().throttled = True
                raise NotAsked(lease.refused, f"the {lease.refused} of {self._provider.name} is used up")
            await asyncio.sleep(lease.delay_s)
        return self._provider.usd_per_1000 / 1000

    async def _give_back(self, price: float) -> None:
        if self._provider is not None and self._provider.leased and self._quota is not None:
            await self._quota.pay(self._provider.name, requests=-1, usd=-price)

    def _is_strange(self, target: Target) -> bool:
        """A host of the open web, which may be as slow or dead as it likes: that says nothing about how much the run asks."""
        return self._provider is None and not target.trusted

    def _note_throttled(self, target: Target) -> None:
        if not self._is_strange(target):
            bill().throttled = True

    async def _check_robots(self, target: Target) -> None:
        if self._robots is None or target.trusted or urlsplit(target.url).path == ROBOTS_PATH:
            return
        allowed, delay_s = await self._robots.look_up(target.url)
        if delay_s:
            self._peer(target).schedule.slow_to(delay_s)
        if allowed is None:
            raise NotAsked("rules", "the site did not say what its robots.txt allows")
        if not allowed:
            raise NotAsked("robots", "the site's robots.txt does not allow this page")

    async def _ask_robots(self, url: str) -> Answer:
        """Wherever it leads, without asking what robots may: a robots.txt that is elsewhere on its own host would wait for itself."""
        for _ in range(self.policy.max_redirects + 1):
            target = parse_target(url, self.policy)
            page = await self._politely(target, partial(super().fetch, url, follow=False))
            if not page.moved_to:
                return Answer(page.status, page.text)
            url = page.moved_to
        raise BlockedUrl("too_many_redirects", f"more than {self.policy.max_redirects} redirects")

    def _name(self, target: Target) -> str:
        return target.host.removeprefix("www.") if self._provider is None else self._provider.name

    def _peer(self, target: Target) -> _Peer:
        name = self._name(target)
        if name in self._peers:
            self._peers[name] = self._peers.pop(name)
        else:
            if len(self._peers) >= _MAX_PEERS:
                self._peers.pop(next(iter(self._peers)))  # the one that was not asked for longest; what is known of it is only manners
            config = self._config
            rate = config.host_requests_per_s if self._provider is None and not target.trusted else 0.0
            breaker = Breaker(failures=config.breaker_failures, open_s=config.breaker_open_s)
            self._peers[name] = _Peer(schedule=Schedule(rate), breaker=breaker)
        return self._peers[name]


class Manners:
    """Makes the ways out of one tool actor's tools (fetch.OpenFetcher)."""

    def __init__(self, config: PoliteConfig, quota: Quota | None = None) -> None:
        self._config = config
        self._quota = quota

    def web(self, policy: FetchPolicy) -> Fetcher:
        return PoliteFetcher(policy, self._config)

    def to(self, provider: Provider) -> OpenFetcher:
        return lambda policy: PoliteFetcher(policy, self._config, provider=provider, quota=self._quota)


async def _outcome(send: Callable[[], Awaitable[Page]]) -> tuple[Page | None, BlockedUrl | FetchFailed | None]:
    try:
        return await send(), None
    except (BlockedUrl, FetchFailed) as error:
        return None, error


def _answered(page: Page | None, error: BlockedUrl | FetchFailed | None) -> bool | None:
    """Whether the peer is well, whatever it said; None where it was not asked."""
    if page is not None:
        return page.status not in PASSING
    if isinstance(error, BlockedUrl):
        return True if error.code in _ANSWERED else False if error.code in _DOWN else None
    return isinstance(error, Unreadable)


def _pause(page: Page | None, attempt: int) -> float:
    """Seconds until the next attempt: full jitter (AWS architecture blog, 2015), or as long as the server asks for."""
    jitter_s = random.uniform(0, min(_MAX_BACKOFF_S, _BACKOFF_S * 2**attempt))
    return max(jitter_s, min(_MAX_RETRY_AFTER_S, retry_after_s(page.retry_after))) if page is not None else jitter_s


def retry_after_s(header: str) -> float:
    """RFC 9110: seconds, or a date. 0 where it says nothing that can be understood."""
    header = header.strip()
    if header.isdecimal() and len(header) < 9:
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
