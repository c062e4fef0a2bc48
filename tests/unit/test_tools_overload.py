"""More is asked than may be, or than is answered: what is paid for is delivered, pauses hold for all, and our limits are nobody's fault."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import httpx
import pytest

from tests.virtual_time import run_virtual
from webdancer.config import PoliteConfig, SearchConfig, ToolsConfig
from webdancer.tools.fetch import FetchPolicy
from webdancer.tools.ledger import Ledger, Provider, open_bill
from webdancer.tools.limits import NotAsked
from webdancer.tools.polite import PoliteFetcher, not_asked_code
from webdancer.tools.search import SearchTool
from webdancer.tools.search_backends import RetrieveSearch, _policy
from webdancer.tools.shelf import Memory


class World:
    """Whatever is asked for answers like this, or 404 where `pages` has no such path. Notes when it is asked for what."""

    def __init__(self, answer=(200, {}), *, pages=None, takes_s=0.0):
        self.answer, self.pages, self.takes_s = answer, pages, takes_s
        self.asked: list[tuple[float, str]] = []

    async def __call__(self, request):
        self.asked.append((asyncio.get_running_loop().time(), request.url.path))
        status, headers = self.answer if self.pages is None else self.pages.get(request.url.path, (404, {}))
        await asyncio.sleep(self.takes_s)
        return httpx.Response(status, headers={"content-type": "application/json", **headers}, text='{"result": [[]]}')

    def fetcher(self, policy=None, *, provider=None, quota=None, patience_s=None, **polite) -> PoliteFetcher:
        return PoliteFetcher(
            policy or FetchPolicy(timeout_s=20.0),
            PoliteConfig(**{"max_attempts": 1, "robots": False, **polite}),
            provider=provider,
            quota=quota,
            patience_s=patience_s,
            resolve=lambda host: ["93.184.216.34"],
            transport=httpx.MockTransport(self),
        )


async def outcome(fetcher, url) -> str:
    """What became of it, and, with a star, whether the run is told that it asks too much."""
    bill = open_bill()
    try:
        said = str((await fetcher.fetch(url)).status)
    except NotAsked as error:
        said = not_asked_code(error, own_site=False)
    return said + "*" * bill.throttled


async def at_once(fetcher, urls) -> Counter[str]:
    return Counter(await asyncio.gather(*(asyncio.create_task(outcome(fetcher, url)) for url in urls)))


def test_a_search_that_is_paid_for_is_delivered():
    """Four times the quota is offered: whoever gets the last turn that he can wait for waits for his answer too."""
    world = World(takes_s=0.9)

    async def main():
        config = SearchConfig(url="http://10.0.0.5:8000", timeout_s=3.0)
        ledger = Ledger(clock=asyncio.get_running_loop().time)
        provider = Provider(name="retrieve", requests_per_s=5.0, usd_per_1000=1.0)
        backend = RetrieveSearch(world.fetcher(_policy(config), provider=provider, quota=ledger), config.url, top_k=3)
        tool, searches = SearchTool(backend, config, Memory(ToolsConfig())), []
        for number in range(200):
            searches.append(asyncio.create_task(tool({"query": f"q{number}"})))
            await asyncio.sleep(0.05)
        delivered = [result.error for result in await asyncio.gather(*searches)].count(None)
        return delivered, ledger.spent["retrieve"]["requests"]

    delivered, paid = run_virtual(main())
    assert delivered == paid == len(world.asked)
    assert delivered >= 5 * 10


@pytest.mark.parametrize(("retry_after", "most_paid"), [(3, 60), (60, 21)])
def test_a_pause_is_kept_by_who_has_a_lease_already_and_nothing_is_paid_for_in_vain(retry_after, most_paid):
    world = World((429, {"retry-after": str(retry_after)}), takes_s=1.0)

    async def main():
        ledger = Ledger(clock=asyncio.get_running_loop().time)
        fetcher = world.fetcher(provider=Provider(name="p", requests_per_s=20.0, usd_per_1000=1.0), quota=ledger, patience_s=10)
        asking = [asyncio.create_task(outcome(fetcher, "https://p.org/x")) for _ in range(60)]
        await asyncio.sleep(1.5)
        world.answer = (200, {})
        await asyncio.gather(*asking)
        return ledger.spent["p"]["requests"]

    paid = run_virtual(main())
    times = sorted(at for at, _ in world.asked)
    assert paid == len(times) <= most_paid
    paused_until = 1.95 + retry_after  # told to the last of those who were on the way when the first was told
    assert not [at for at in times if 1.0 < at < paused_until - 1e-6]
    assert min(later - before for before, later in itertools.pairwise(times)) >= 1 / 20 - 1e-6, "no burst, neither then nor after it"


def test_a_host_that_asks_for_years_is_asked_again_and_is_the_web_as_it_is():
    world = World((503, {"retry-after": "99999999"}))

    async def main():
        fetcher, found = world.fetcher(), []
        for pause_s in (0, 250, 60):
            await asyncio.sleep(pause_s)
            found.append(await outcome(fetcher, "https://site.org/x"))
            world.answer = (200, {})
        return found

    assert run_virtual(main()) == ["503", "unreachable", "200"]


def test_a_host_that_wants_to_be_asked_slowly_is_not_our_outage():
    """Sixteen members open sixteen pages of one host: what cannot be had in time is as if the host were slow, which it is."""
    world = World(pages={"/robots.txt": (200, {"content-type": "text/plain"})})

    async def main():
        fetcher = world.fetcher(robots=True)
        fetcher._robots._ask = lambda url: asyncio.sleep(0, _Delay())
        return await at_once(fetcher, [f"https://slow.org/{n}" for n in range(16)])

    assert run_virtual(main()) == {"404": 3, "unreachable": 13}


class _Delay:
    status, text = 200, "User-agent: *\nCrawl-delay: 10\n"


def test_our_own_limit_is_nobodys_fault_and_slows_the_run():
    world = World(pages={})

    async def main():
        return await at_once(world.fetcher(host_requests_per_s=0.1), [f"https://site.org/{n}" for n in range(5)])

    assert run_virtual(main()) == {"404": 1, "404*": 2, "unavailable*": 2}


def test_a_dead_site_does_not_slow_the_run_and_a_dead_provider_does():
    world = World((503, {"retry-after": "0"}))

    async def main():
        site, provider = world.fetcher(), world.fetcher(provider=Provider(name="p"))
        return [[await outcome(fetcher, "https://site.org/x") for _ in range(7)] for fetcher in (site, provider)]

    assert run_virtual(main()) == [["503"] * 5 + ["unreachable"] * 2, ["503*"] * 5 + ["unreachable*"] * 2]


def test_our_own_limit_while_robots_txt_is_asked_says_nothing_about_the_host():
    world = World(pages={})

    async def main():
        fetcher = world.fetcher(robots=True, host_requests_per_s=1.0)
        busy = asyncio.create_task(at_once(fetcher, [f"https://site.org/{n}" for n in range(30)]))
        await asyncio.sleep(0.1)
        refused = await at_once(fetcher, ["http://site.org/x"])
        await busy
        await asyncio.sleep(30)
        return refused, await outcome(fetcher, "http://site.org/later")

    assert run_virtual(main()) == ({"unavailable*": 1}, "404")
