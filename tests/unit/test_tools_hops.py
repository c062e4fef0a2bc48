"""A page that moves to another host is asked for by the tool actor that owns that host: its bucket, breaker, robots.txt and memory."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.virtual_time import run_virtual
from webdancer.config import FetchConfig, PoliteConfig, ReplayConfig, SearchConfig, ToolsConfig, VisitConfig
from webdancer.tools.evidence import Evidence
from webdancer.tools.fetch import FetchPolicy
from webdancer.tools.hops import Hop, Moved
from webdancer.tools.pieces import ask_owners, owner_key, owners
from webdancer.tools.polite import PoliteFetcher
from webdancer.tools.readers import DirectReader
from webdancer.tools.replay import ReplayToolbox
from webdancer.tools.shelf import Memory
from webdancer.tools.store import RecordingFile
from webdancer.tools.summarize import ExtractiveSummarizer
from webdancer.tools.toolbox import WebToolbox
from webdancer.tools.visit import VisitTool
from webdancer.types import ToolCall


class AtOnce:
    """An extraction that takes no time; a page is its own evidence."""

    async def lines(self, body, **options):
        return body.decode()

    async def evidence(self, page, goal, **limits):
        return Evidence(evidence=page, summary=page)

    async def aclose(self):
        """Nothing is open."""


def visit(url) -> ToolCall:
    return ToolCall(name="visit", arguments={"url": url, "goal": "owl"})


def owner(url, count=2) -> int:
    return owners(owner_key(visit(url)), count)[0]


A = next(f"https://a{n}.org" for n in range(99) if owner(f"https://a{n}.org") == 0)
B = next(f"https://b{n}.org" for n in range(99) if owner(f"https://b{n}.org") == 1)


class Pool:
    """Two tool actors over one web of `pages`: text, or (status, location). Notes which actor asks for what, and when."""

    def __init__(self, pages, *, robots="", rate=0.0, recording=None, **fetch):
        self.pages = {**pages, f"{A}/robots.txt": robots, f"{B}/robots.txt": robots}
        self.asked: list[tuple[float, int, str]] = []
        self.config = ToolsConfig(
            search=SearchConfig(url="http://127.0.0.1:9"),
            visit=VisitConfig(extraction_processes=0),
            fetch=FetchConfig(**fetch),
            polite=PoliteConfig(host_requests_per_s=rate, max_attempts=1),
            replay=ReplayConfig(mode="record", path=str(recording)) if recording else ReplayConfig(),
        )
        self.writer = RecordingFile(recording, writable=True) if recording else None
        self.boxes = [self._box(index) for index in (0, 1)]

    def _box(self, index):
        def answer(request):
            self.asked.append((asyncio.get_running_loop().time(), index, str(request.url)))
            found = self.pages.get(str(request.url))
            if isinstance(found, list):
                found = found.pop(0) if len(found) > 1 else found[0]
            if isinstance(found, tuple):
                return httpx.Response(found[0], headers={"location": found[1]})
            return httpx.Response(404 if found is None else 200, text=found or "", headers={"content-type": "text/plain"})

        config, memory = self.config, Memory(self.config)
        policy = FetchPolicy(max_redirects=config.fetch.max_redirects, timeout_s=config.fetch.timeout_s)
        transport = httpx.MockTransport(answer)
        fetcher = PoliteFetcher(policy, config.polite, patience_s=1e6, resolve=lambda host: ["93.184.216.34"], transport=transport)
        reader, summarizer = DirectReader(fetcher, config.visit, AtOnce()), ExtractiveSummarizer(config.visit, AtOnce())
        tool = VisitTool(reader, summarizer, config.visit, memory, config.fetch)
        live = WebToolbox(config, tools={"visit": tool}, call_timeout_s=1e6)
        return ReplayToolbox(config, live=live, writer=self.writer) if self.writer is not None else live

    async def _ask(self, piece, hop, order):
        return await self.boxes[order[0]].call(piece, hop)

    async def visit(self, url):
        return await ask_owners(visit(url), self._ask, count=2)

    @asynccontextmanager
    async def opened(self):
        try:
            yield self
        finally:
            for box in self.boxes:
                await box.aclose()

    @property
    def pages_asked(self):
        return [(index, url) for _, index, url in self.asked if not url.endswith("robots.txt")]


def run(pool, *urls):
    async def main():
        async with pool.opened():
            return await asyncio.gather(*map(pool.visit, urls))

    return run_virtual(main())


def test_each_host_is_asked_by_its_owner_and_what_many_are_led_to_is_asked_once():
    pool = Pool({**{f"{A}/{n}": (302, f"{B}/y") for n in range(16)}, f"{B}/y": "About the owl."})
    results = run(pool, *(f"{A}/{n}" for n in range(16)), f"{B}/y")
    assert all(result.error is None and "About the owl." in result.text for result in results)
    assert [f"{A}/{n} for user goal" in results[n].text for n in range(16)] == [True] * 16, "the agent reads the address that it asked for"
    assert {(index, url[: len(A)]) for _, index, url in pool.asked} == {(0, A), (1, B)}
    assert Counter(url for _, url in pool.pages_asked)[f"{B}/y"] == 1
    assert sum(use.requests for result in results for use in result.uses) == len(pool.asked), "every request is somebody's"


def test_a_hosts_limit_holds_for_those_who_are_led_there_too():
    pages = {f"{A}/{n}": (302, f"{B}/{n}") for n in range(5)} | {f"{B}/{n}": "page" for n in range(10)}
    pool = Pool(pages, rate=0.5)
    run(pool, *(f"{A}/{n}" for n in range(5)), *(f"{B}/{n}" for n in range(5, 10)))
    for host in (A, B):
        times = sorted(at for at, _, url in pool.asked if url.startswith(host))
        assert all(later - before >= 2.0 - 1e-9 for before, later in itertools.pairwise(times)), times


def test_the_rules_of_the_other_host_are_kept():
    pool = Pool({f"{A}/x": (302, f"{B}/private"), f"{B}/private": "secret"}, robots="User-agent: *\nDisallow: /private\n")
    (result,) = run(pool, f"{A}/x")
    assert result.error == "robots"
    assert pool.pages_asked == [(0, f"{A}/x")]


def test_a_host_that_fails_is_left_alone_whoever_leads_there():
    pages = {f"{A}/{n}": (302, f"{B}/{n}") for n in range(9)} | {f"{B}/{n}": (503, "") for n in range(9)}
    pool = Pool(pages)

    async def main():
        async with pool.opened():
            return [(await pool.visit(f"{A}/{n}")).error for n in range(9)]

    assert run_virtual(main()) == ["unreachable"] * 9, "nor is a 503 remembered"
    assert len([url for _, url in pool.pages_asked if url.startswith(B)]) == 5


@pytest.mark.parametrize("max_redirects", [0, 1, 4, 5])
def test_redirects_are_counted_over_all_hosts(max_redirects):
    pages = {f"{host}/{n}": (302, f"{other}/{n + 1}") for host, other in ((A, B), (B, A)) for n in range(4)}
    pages |= {f"{host}/4": "the end" for host in (A, B)}
    pool = Pool(pages, max_redirects=max_redirects)
    (result,) = run(pool, f"{A}/0")
    assert result.error == (None if max_redirects >= 4 else "too_many_redirects")
    assert len(pool.pages_asked) == 1 + min(max_redirects, 4)


def test_a_circle_ends_and_nobody_waits_for_anybody():
    pool = Pool({f"{A}/x": (301, f"{B}/x"), f"{B}/x": (308, f"{A}/x")})
    results = run(pool, *[f"{A}/x", f"{B}/x"] * 8)  # a loop without anything to do raises here: see virtual_time
    assert {result.error for result in results} == {"too_many_redirects"}
    assert Counter(pool.pages_asked) == {(0, f"{A}/x"): 1, (1, f"{B}/x"): 1}


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://169.254.169.254/latest", "private_address"),
        (f"{B}:22/", "port"),
        (f"http{B.removeprefix('https')}/y", "scheme"),
        ("file:///etc/passwd", "scheme"),
    ],
)
def test_the_gate_stands_before_every_host(location, code):
    pool = Pool({f"{A}/x": (302, location)})
    (result,) = run(pool, f"{A}/x")
    assert result.error == code
    assert len(pool.pages_asked) == 1


def test_nobody_is_led_past_the_gate_by_whoever_asks_on():
    pool = Pool({})

    async def main():
        async with pool.opened():
            return await pool.boxes[0].call(visit(f"{A}/x"), Hop(url="http://127.0.0.1/", redirects=1))

    assert run_virtual(main()).error == "private_address"


def test_a_chain_has_the_time_of_one_fetch():
    hop, limits = Hop(url=f"{A}/0"), FetchConfig(max_redirects=5, timeout_s=20.0)
    for _ in range(3):
        hop = hop.onward(f"{B}/x", took_s=9.0, limits=limits)
    assert hop.elapsed_s == 18.0, "the first request had its own"
    with pytest.raises(Exception, match="no whole answer within 20 s"):
        hop.onward(f"{A}/y", took_s=9.0, limits=limits)


def test_what_was_asked_is_recorded_and_not_the_way(tmp_path):
    pool = Pool({f"{A}/x": (302, f"{B}/y"), f"{B}/y": "About the owl."}, recording=tmp_path / "recording")
    (live,) = run(pool, f"{A}/x")
    pool.writer.close()
    replay = ToolsConfig(visit=pool.config.visit, replay=ReplayConfig(mode="replay", path=str(tmp_path / "recording")))

    async def again():
        toolbox = ReplayToolbox(replay, live=None)
        answers = [await toolbox.call(visit(f"{A}/x"), hop) for hop in (None, Hop(url=f"{A}/x"))]
        miss = await toolbox.call(visit(f"{B}/y"))
        await toolbox.aclose()
        return answers, miss

    answers, miss = asyncio.run(again())
    assert [(answer.text, answer.error) for answer in answers] == [(live.text, None)] * 2
    assert (miss.error, len(RecordingFile(tmp_path / "recording", writable=False))) == ("replay_miss", 1)


@pytest.mark.parametrize(("status", "asked"), [(301, 1), (308, 1), (302, 2), (303, 2), (307, 2)])
def test_only_a_move_for_good_is_remembered(status, asked):
    """Addresses that are signed for a minute, consent pages and maintenance are not where a page is tomorrow."""
    pool = Pool({f"{A}/x": [(status, f"{B}/signed-1"), (status, f"{B}/signed-2")], f"{B}/signed-1": "the owl", f"{B}/signed-2": "the owl"})

    async def main():
        async with pool.opened():
            return [await pool.visit(f"{A}/x") for _ in range(2)]

    assert [result.error for result in run_virtual(main())] == [None, None]
    assert Counter(pool.pages_asked)[0, f"{A}/x"] == asked


def test_rules_that_are_elsewhere_are_found_without_waiting_for_oneself():
    """A site without a robots.txt that sends everybody to its front page, and two whose rules are said to be each other's."""
    pool = Pool({f"{A}/": "front page", f"{A}/x": "page", f"{B}/x": "page"})
    pool.pages |= {f"{A}/robots.txt": (302, "/"), f"{B}/robots.txt": (302, f"{A}/robots.txt")}
    assert [result.error for result in run(pool, f"{A}/x", f"{B}/x")] == [None, None]
    circle = Pool({f"{A}/x": "page", f"{B}/x": "page"})
    circle.pages |= {f"{A}/robots.txt": (302, f"{B}/robots.txt"), f"{B}/robots.txt": (302, f"{A}/robots.txt")}
    assert [result.error for result in run(circle, f"{A}/x", f"{B}/x")] == ["unreachable"] * 2


def test_an_owner_says_where_a_page_went_and_keeps_what_is_on_its_own_host():
    pool = Pool({f"{A}/x": (301, "/y"), f"{A}/y": (302, f"{B}/z")})

    async def main():
        async with pool.opened():
            return await pool.boxes[0].call(visit(f"{A}/x"), Hop(url=f"{A}/x"))

    moved = run_virtual(main())
    assert isinstance(moved, Moved)
    assert (moved.hop.url, moved.hop.redirects) == (f"{B}/z", 2)
