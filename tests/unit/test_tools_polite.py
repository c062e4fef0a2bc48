"""Manners over real HTTP: what is tried again and what is not, Retry-After, breakers, robots.txt, quotas, and what a call is billed."""

from __future__ import annotations

import asyncio
import itertools
import time
from email.utils import formatdate

import httpx
import pytest

from tests.hostile_server import hostile_server, response
from tests.virtual_time import run_virtual
from webdancer.config import PoliteConfig
from webdancer.tools import polite, robots
from webdancer.tools.fetch import BlockedUrl, Fetcher, FetchFailed, FetchPolicy
from webdancer.tools.ledger import Ledger, Provider, open_bill
from webdancer.tools.polite import NotAsked, PoliteFetcher, not_asked_code, retry_after_s
from webdancer.tools.robots import Answer, Robots


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(polite, "_BACKOFF_S", 0.001)


def in_turn(*handlers):
    """A handler that answers with each of these once, then with the last for ever."""
    left = list(handlers)

    async def write(writer):
        await (left.pop(0) if len(left) > 1 else left[0])(writer)

    return write


async def hang_up(writer):
    writer.close()


def fetcher_for(server, *, provider=None, quota=None, patience_s=5.0, **settings) -> PoliteFetcher:
    policy = FetchPolicy(allowed_origins=(server.origin,), timeout_s=5)
    return PoliteFetcher(policy, PoliteConfig(**settings), provider=provider, quota=quota, patience_s=patience_s)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 522, 529])
async def test_what_may_pass_is_tried_again(status):
    handlers = {"/x": in_turn(response(status=status), response("here"))}
    async with hostile_server(handlers) as server, fetcher_for(server) as fetcher:
        page = await fetcher.fetch(f"{server.origin}/x")
    assert (page.status, page.text, len(server.requests)) == (200, "here", 2)


async def test_a_broken_connection_is_tried_again():
    async with hostile_server({"/x": in_turn(hang_up, hang_up, response("here"))}) as server, fetcher_for(server) as fetcher:
        assert (await fetcher.post_json(f"{server.origin}/x", {})).text == "here"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501, 505])
async def test_what_will_not_change_is_asked_once(status):
    async with hostile_server({"/x": response(status=status)}) as server, fetcher_for(server) as fetcher:
        assert (await fetcher.fetch(f"{server.origin}/x")).status == status
    assert len(server.requests) == 1


async def test_attempts_are_bounded_and_the_last_answer_is_the_result():
    async with hostile_server({"/x": response(status=503), "/y": hang_up}) as server, fetcher_for(server, max_attempts=2) as fetcher:
        assert (await fetcher.get_json(f"{server.origin}/x")).status == 503
        assert len(server.requests) == 2
        with pytest.raises(FetchFailed):
            await fetcher.post_json(f"{server.origin}/y", {})
    assert len(server.requests) == 4


async def test_the_gate_is_not_asked_twice():
    async with hostile_server({"/x": response("x", content_type="image/png")}) as server, fetcher_for(server) as fetcher:
        with pytest.raises(BlockedUrl) as blocked:
            await fetcher.fetch(f"{server.origin}/x")
        assert blocked.value.code == "content_type"
        with pytest.raises(BlockedUrl):
            await fetcher.fetch("http://10.0.0.1/")
    assert len(server.requests) == 1


def test_retry_after_is_seconds_or_a_date_or_nothing():
    assert retry_after_s("7") == 7.0
    assert 58 < retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert [retry_after_s(text) for text in ("", "soon", "-3", "9" * 400, formatdate(0, usegmt=True), "Thu, 99 Foo")] == [0.0] * 6


async def test_a_call_is_billed_for_every_request_that_it_makes():
    provider = Provider(name="dear", usd_per_1000=5.0)
    handlers = {"/x": in_turn(response(status=429), response("{}"))}
    async with hostile_server(handlers) as server, fetcher_for(server, provider=provider, quota=Ledger()) as fetcher:
        bill = open_bill()
        await fetcher.post_json(f"{server.origin}/x", {})
    (use,) = bill.uses
    assert (use.provider, use.requests, use.hits) == ("dear", 2, 0)
    assert use.usd == pytest.approx(0.01)
    assert bill.throttled, "the provider said that it is asked too much"


async def test_a_budget_is_never_exceeded_and_then_nothing_is_asked():
    ledger, provider = Ledger(budget_usd=0.0101), Provider(name="dear", usd_per_1000=5.0)
    async with hostile_server({"/x": response("{}")}) as server, fetcher_for(server, provider=provider, quota=ledger) as fetcher:
        asked = await asyncio.gather(*(fetcher.post_json(f"{server.origin}/x", {}) for _ in range(5)), return_exceptions=True)
    assert [getattr(one, "reason", "ok") for one in asked] == ["ok", "ok", "budget", "budget", "budget"]
    assert (len(server.requests), ledger.usd) == (2, pytest.approx(0.01))


class Web:
    """The open web behind a transport: (status, text, headers) by path, or a list of them, of which the last stays. Notes who asks when."""

    def __init__(self, **pages):
        self.pages = pages
        self.asked: list[str] = []
        self.times: list[float] = []

    def _answer(self, request):
        self.asked.append(str(request.url))
        self.times.append(asyncio.get_running_loop().time())
        found = self.pages.get(request.url.path.strip("/").replace(".", "_"), (404, "none", {}))
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        status, text, headers = found
        return httpx.Response(status, text=text, headers={"content-type": "text/plain", **headers})

    def fetcher(self, *, provider=None, quota=None, patience_s=None, **settings) -> PoliteFetcher:
        return PoliteFetcher(
            FetchPolicy(),
            PoliteConfig(**{"host_requests_per_s": 0.0, **settings}),
            provider=provider,
            quota=quota,
            patience_s=patience_s,
            resolve=lambda host: ["93.184.216.34"],
            transport=httpx.MockTransport(self._answer),
        )


def test_retry_after_is_kept_by_everyone():
    """Neither the one who was told nor anybody else who asks this host comes earlier; other hosts do not wait."""
    web = Web(x=[(503, "", {"retry-after": "4"}), (200, "x", {})], y=(200, "y", {}))

    async def main():
        async with web.fetcher(robots=False) as fetcher:
            told = asyncio.create_task(fetcher.fetch("https://site.org/x"))
            await asyncio.sleep(1)
            await asyncio.gather(fetcher.fetch("https://site.org/y"), fetcher.fetch("https://other.org/y"))
            await told

    run_virtual(main())
    assert sorted(zip(web.times, web.asked, strict=True)) == [
        (0.0, "https://site.org/x"),
        (1.0, "https://other.org/y"),
        (4.0, "https://site.org/x"),
        (4.0, "https://site.org/y"),
    ]


def test_a_retry_after_beyond_the_patience_is_not_waited_for():
    web = Web(x=(503, "", {"retry-after": "3600"}))

    async def main():
        async with web.fetcher(robots=False, patience_s=60) as fetcher:
            page = await fetcher.fetch("https://site.org/x")
            return page.status, asyncio.get_running_loop().time()

    assert run_virtual(main()) == (503, 0.0)


def test_full_jitter_grows_with_the_attempts(monkeypatch):
    bounds = []
    monkeypatch.setattr(polite, "_BACKOFF_S", 0.5)
    monkeypatch.setattr(polite.random, "uniform", lambda low, high: bounds.append((low, high)) or high)
    web = Web(x=(500, "", {}))

    async def main():
        async with web.fetcher(robots=False, patience_s=1000, max_attempts=7, breaker_failures=99) as fetcher:
            await fetcher.fetch("https://site.org/x")

    run_virtual(main())
    assert bounds[:6] == [(0, 1.0), (0, 2.0), (0, 4.0), (0, 8.0), (0, 8.0), (0, 8.0)]
    assert web.times == [0.0, 1.0, 3.0, 7.0, 15.0, 23.0, 31.0]


def test_a_breaker_leaves_alone_who_fails_and_tries_again():
    web = Web(x=[(500, "", {})] * 4 + [(200, "back", {})])

    async def main():
        async with web.fetcher(robots=False, max_attempts=1, breaker_failures=4, breaker_open_s=30) as fetcher:
            for _ in range(4):
                assert (await fetcher.fetch("https://site.org/x")).status == 500
            bill = open_bill()
            with pytest.raises(NotAsked) as refused:
                await fetcher.fetch("https://site.org/x")
            assert (refused.value.reason, bill.uses) == ("breaker", ())
            assert (await fetcher.fetch("https://other.org/none")).status == 404
            await asyncio.sleep(30)
            assert (await fetcher.fetch("https://site.org/x")).text == "back"

    run_virtual(main())


def test_a_quota_is_waited_for_or_is_an_error_of_its_own():
    web, provider = Web(x=(200, "{}", {})), Provider(name="slow", requests_per_s=0.5)

    async def main():
        ledger = Ledger(clock=asyncio.get_running_loop().time)
        bill = open_bill()
        async with web.fetcher(provider=provider, quota=ledger, patience_s=5) as fetcher:
            asked = await asyncio.gather(*(fetcher.post_json("https://site.org/x", {}) for _ in range(5)), return_exceptions=True)
        return [getattr(one, "reason", "ok") for one in asked], bill

    reasons, bill = run_virtual(main())
    assert (reasons, web.times) == (["ok", "ok", "ok", "quota", "quota"], [0.0, 2.0, 4.0])
    assert bill.throttled


def test_a_crawl_delay_is_kept():
    web = Web(robots_txt=(200, "User-agent: *\nCrawl-delay: 7\n", {}), a=(200, "page", {}))

    async def main():
        async with web.fetcher(host_requests_per_s=100.0) as fetcher:
            for _ in range(3):
                await fetcher.fetch("https://site.org/a")

    run_virtual(main())
    assert [later - before for before, later in itertools.pairwise(web.times[1:])] == [7.0, 7.0]


async def test_robots_txt_is_asked_once_a_host_and_kept():
    rules = "User-agent: *\nDisallow: /private\nUser-agent: webdancer\nDisallow: /mine\n"
    web = Web(robots_txt=(200, rules, {}), a=(200, "page", {}), mine=(200, "page", {}))
    async with web.fetcher() as fetcher:
        await asyncio.gather(*(fetcher.fetch("https://site.org/a") for _ in range(4)))
        with pytest.raises(NotAsked) as refused:
            await fetcher.fetch("https://site.org/mine")
    assert refused.value.reason == "robots"
    assert web.asked.count("https://site.org/robots.txt") == 1
    assert "https://site.org/mine" not in web.asked


@pytest.mark.parametrize(
    ("status", "headers", "allowed"),
    [(404, {}, True), (401, {}, True), (200, {"content-type": "image/png"}, True), (500, {}, False), (429, {}, False)],
)
async def test_robots_txt_that_says_nothing(status, headers, allowed):
    """RFC 9309: no file allows all, a server that fails allows nothing, which may be otherwise in a minute."""
    web = Web(robots_txt=(status, "User-agent: *\nDisallow: /\n", headers), a=(200, "page", {}))
    async with web.fetcher(max_attempts=1) as fetcher:
        if allowed:
            assert (await fetcher.fetch("https://site.org/a")).text == "page"
        else:
            with pytest.raises(NotAsked) as refused:
                await fetcher.fetch("https://site.org/a")
            assert not_asked_code(refused.value, own_site=False) == "unreachable"


async def test_robots_txt_passes_the_gate_and_its_redirects_too():
    """A robots.txt that redirects to a metadata service is how a crawler was robbed in 2026: nothing is fetched there."""
    web = Web(robots_txt=(302, "", {"location": "http://169.254.169.254/latest"}), a=(200, "page", {}))
    async with web.fetcher() as fetcher:
        with pytest.raises(NotAsked):
            await fetcher.fetch("https://site.org/a")
    assert web.asked == ["https://site.org/robots.txt"]


async def test_robots_txt_in_a_circle_ends():
    web = Web(robots_txt=(301, "", {"location": "http://site.org/robots.txt"}), a=(200, "page", {}))
    async with web.fetcher() as fetcher:
        with pytest.raises(NotAsked):
            await fetcher.fetch("https://site.org/a")


async def test_robots_txt_may_be_elsewhere_on_its_own_host():
    """Whose rules, which are just being asked for, are not waited for."""
    rules = "User-agent: *\nDisallow: /b\n"
    web = Web(robots_txt=(301, "", {"location": "/rules"}), rules=(200, rules, {}), a=(200, "page", {}), b=(200, "page", {}))
    async with web.fetcher() as fetcher, asyncio.timeout(5):
        assert (await fetcher.fetch("https://site.org/a")).text == "page"
        with pytest.raises(NotAsked) as refused:
            await fetcher.fetch("https://site.org/b")
    assert refused.value.reason == "robots"
    assert web.asked == ["https://site.org/robots.txt", "https://site.org/rules", "https://site.org/a"]


async def test_a_redirect_obeys_the_rules_of_where_it_leads():
    web = Web(robots_txt=(200, "User-agent: *\nDisallow: /b\n", {}), a=(302, "", {"location": "https://other.org/b"}), b=(200, "x", {}))
    async with web.fetcher() as fetcher:
        with pytest.raises(NotAsked) as refused:
            await fetcher.fetch("https://site.org/a")
    assert refused.value.reason == "robots"
    assert "https://other.org/b" not in web.asked


async def test_robots_can_be_left_unasked():
    web = Web(robots_txt=(200, "User-agent: *\nDisallow: /\n", {}), a=(200, "page", {}))
    async with web.fetcher(robots=False) as fetcher:
        assert (await fetcher.fetch("https://site.org/a")).text == "page"
    assert web.asked == ["https://site.org/a"]


async def test_a_host_has_one_bucket_whatever_its_prefix():
    web = Web(a=(200, "page", {}))
    async with web.fetcher(robots=False, host_requests_per_s=0.01, patience_s=1) as fetcher:
        await fetcher.fetch("https://site.org/a")
        await fetcher.fetch("https://other.org/a")
        with pytest.raises(NotAsked) as refused:
            await fetcher.fetch("https://www.site.org/a")
    assert refused.value.reason == "quota"


async def test_origins_that_are_allowed_by_name_have_no_robots_and_no_limit():
    pages = {"/robots.txt": response("User-agent: *\nDisallow: /\n"), "/x": response("x")}
    async with hostile_server(pages) as server, fetcher_for(server, host_requests_per_s=0.1) as fetcher:
        await asyncio.gather(*(fetcher.fetch(f"{server.origin}/x") for _ in range(20)))
    assert not any("robots" in request for request in server.requests)


def test_a_fetcher_with_manners_is_a_fetcher():
    assert issubclass(PoliteFetcher, Fetcher)


def test_rules_that_failed_to_come_are_asked_for_again():
    answers, now = [Answer(500, ""), Answer(200, "User-agent: *\nAllow: /\n")], [0.0]

    async def ask(url):
        return answers.pop(0)

    async def main():
        robots, found = Robots(ask, clock=lambda: now[0]), []
        for now[0] in (0.0, 299.0, 301.0, 80_000.0):
            found.append((await robots.look_up("https://site.org/a"))[0])
        return found

    assert run_virtual(main()) == [None, None, True, True]


@pytest.mark.parametrize("handler", [response(b"x", Content_Encoding="br"), response(b"not gzip", Content_Encoding="gzip")])
async def test_what_cannot_be_read_is_not_asked_for_again_and_the_host_is_well(handler):
    async with hostile_server({"/x": handler, "/y": response("here")}) as server, fetcher_for(server, breaker_failures=2) as fetcher:
        for _ in range(4):
            with pytest.raises(FetchFailed):
                await fetcher.fetch(f"{server.origin}/x")
        assert (await fetcher.fetch(f"{server.origin}/y")).text == "here"
    assert len(server.requests) == 5


def test_a_host_that_answers_with_what_nobody_reads_is_well():
    web = Web(x=[(500, "", {})] * 2 + [(200, "x", {"content-type": "image/png"})], y=(200, "y", {}))

    async def main():
        async with web.fetcher(robots=False, max_attempts=1, breaker_failures=2, breaker_open_s=30) as fetcher:
            for _ in range(2):
                await fetcher.fetch("https://site.org/x")
            await asyncio.sleep(30)
            with pytest.raises(BlockedUrl):
                await fetcher.fetch("https://site.org/x")
            return (await fetcher.fetch("https://site.org/y")).text

    assert run_virtual(main()) == "y"


def test_every_redirect_waits_for_its_turn_and_is_its_own_hosts():
    """A crawl's too: to the same host, or to publishers that fail, for which the redirector is not left alone."""
    pages = {f"a{n}": (302, "", {"location": f"https://site.org/a{n + 1}"}) for n in range(4)} | {"a4": (200, "page", {})}
    pages |= {f"doi{n}": (302, "", {"location": f"https://p{n}.org/down"}) for n in range(6)} | {"down": (503, "", {})}
    web = Web(**pages)

    async def main():
        async with web.fetcher(robots=False, host_requests_per_s=0.5, patience_s=1e6, max_attempts=1) as fetcher:
            assert (await fetcher.fetch("https://site.org/a0")).text == "page"
            return [(await fetcher.fetch(f"https://doi.org/doi{n}")).status for n in range(6)]

    assert run_virtual(main()) == [503] * 6
    assert web.times[:5] == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_the_rules_of_many_hosts_are_kept_as_far_as_there_is_room(monkeypatch):
    monkeypatch.setattr(robots, "_MAX_CHARS_KEPT", 100_000)
    asked = []

    async def ask(url):
        asked.append(url)
        return Answer(200, "User-agent: *\nDisallow: /b\n" + "# padding\n" * 3_000)

    async def main():
        rules = Robots(ask)
        for _ in range(2):
            for n in range(4):
                assert await rules.look_up(f"https://s{n}.org/a") == (True, 0.0)
                assert await rules.look_up(f"https://s{n}.org/b") == (False, 0.0)

    asyncio.run(main())
    assert len(asked) == 8, "three of four fit"
