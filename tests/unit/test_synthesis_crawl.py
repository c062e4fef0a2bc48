"""The crawler: budgets, order, robots.txt, failures that stay one page's, and a real crawl through the real gate."""

import asyncio
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtual_time import run_virtual
from webdancer.errors import DataError, ServiceError
from webdancer.offline_web.encyclopedia import Encyclopedia
from webdancer.offline_web.server import running_server
from webdancer.synthesis.crawl import FORBIDDEN, crawl
from webdancer.synthesis.frontier import CrawlBudget, Frontier, Visit, link_score
from webdancer.synthesis.page import FactValue, parse_page
from webdancer.tools.fetch import BlockedUrl, Fetcher, FetchFailed, FetchPolicy

SITE = "http://web.test"


@dataclass
class Answer:
    url: str
    status: int
    content_type: str
    text: str


class FakeWeb:
    """Pages by path: html, an Answer, or an exception. Answers come in an order of their own."""

    def __init__(self, pages):
        self.pages = pages
        self.asked = []
        self.open = self.most_open = 0

    async def fetch(self, url):
        self.asked.append(url.removeprefix(SITE))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0.001 * (len(url) * 7 % 5))
        self.open -= 1
        page = self.pages.get(url.removeprefix(SITE))
        if isinstance(page, Exception):
            raise page
        if page is None:
            return Answer(url, 404, "text/html", "gone")
        return page if isinstance(page, Answer) else Answer(url, 200, "text/html", page)


def links(*paths):
    return "<h1>x</h1>" + "".join(f'<a href="{path}">{path}</a>' for path in paths)


def run(web, roots=("/",), **budget):
    return asyncio.run(crawl(roots, fetch=web.fetch, site=SITE, budget=CrawlBudget(**budget)))


def test_breadth_first_each_page_once_and_in_an_order_that_timing_does_not_change():
    web = FakeWeb({"/": links("/b", "/a", "/b#part"), "/b": links("/", "/c"), "/a": links("/d"), "/c": links(), "/d": links("/c")})
    found = run(web)
    assert [page.url for page in found.pages] == ["/", "/b", "/a", "/c", "/d"]
    assert sorted(web.asked) == sorted(["/robots.txt", "/", "/b", "/a", "/c", "/d"])
    assert (found.failed, found.left) == ({}, 0)


def test_budgets_hold_and_what_is_left_is_counted():
    web = FakeWeb({"/": links("/1", "/2", "/3"), "/1": links("/11"), "/2": links(), "/3": links(), "/11": links()})
    assert [page.url for page in run(web, max_depth=0).pages] == ["/"]
    assert run(web, max_depth=0).left == 3
    shallow = run(web, max_depth=1)
    assert (len(shallow.pages), shallow.left) == (4, 1)
    small = run(web, max_pages=2)
    assert ([page.url for page in small.pages], small.left) == (["/", "/1"], 3)


def test_concurrency_is_bounded():
    web = FakeWeb({"/": links(*(f"/{i}" for i in range(40)))})
    run(web, concurrency=3)
    assert 1 < web.most_open <= 3


def test_a_failing_page_is_listed_with_its_reason_and_the_crawl_goes_on():
    web = FakeWeb(
        {
            "/": links("/boom", "/gone", "/pdf", "/moved", "/ok", "http://[", "mailto:a@b", "http://other.test/"),
            "/boom": RuntimeError("reset"),
            "/pdf": Answer(SITE + "/pdf", 200, "application/pdf", "%PDF"),
            "/moved": Answer("http://other.test/", 200, "text/html", "elsewhere"),
            "/ok": links(),
        }
    )
    found = run(web)
    assert [page.url for page in found.pages] == ["/", "/ok"]
    reasons = {url.removeprefix(SITE): reason for url, reason in found.failed.items()}
    assert set(reasons) == {"/boom", "/gone", "/pdf", "/moved"}
    assert reasons["/boom"] == "RuntimeError: reset"
    assert "404" in reasons["/gone"]
    assert not any("other" in asked for asked in web.asked)


def test_a_redirect_to_a_page_that_is_there_already_counts_once():
    web = FakeWeb({"/": links("/old", "/new"), "/old": Answer(SITE + "/new", 200, "text/html", links()), "/new": links()})
    assert [page.url for page in run(web).pages] == ["/", "/new"]


def test_links_lead_to_the_addresses_that_answer(tmp_path):
    box = "<table class=infobox><tr><th>next</th><td><a href='{0}'>P</a></td></tr></table><a href='{0}'>P</a><a href='{0}/'>again</a>"
    pages = {"/": box.format("/1"), "/1": Answer(SITE + "/1/", 200, "text/html", box.format("/2")), "/1/": box.format("/2")}
    pages |= {"/2": Answer(SITE + "/2/", 200, "text/html", box.format("/3")), "/2/": box.format("/3")}
    found = asyncio.run(crawl(["/"], fetch=FakeWeb(pages).fetch, site=SITE, folder=tmp_path))
    assert [page.url for page in found.pages] == ["/", "/1/", "/2/"]
    assert [page.links for page in found.pages] == [("/1/",), ("/2/",), ("/3", "/3/")]
    assert [page.link_texts for page in found.pages] == [("P",), ("P",), ("P", "again")]
    assert [page.facts["next"][0].url for page in found.pages] == ["/1/", "/2/", "/3"]
    assert asyncio.run(crawl(["/"], fetch=FakeWeb({}).fetch, site=SITE, folder=tmp_path)).pages == found.pages


def test_robots_are_obeyed_and_a_site_that_does_not_say_its_rules_is_left_alone():
    pages = {"/": links("/private/x", "/public"), "/private/x": links(), "/public": links()}
    rules = Answer(SITE + "/robots.txt", 200, "text/plain", "User-agent: *\nDisallow: /private")
    found = run(FakeWeb({**pages, "/robots.txt": rules}))
    assert [page.url for page in found.pages] == ["/", "/public"]
    assert found.failed == {SITE + "/private/x": FORBIDDEN}
    web = FakeWeb({**pages, "/robots.txt": RuntimeError("down")})
    with pytest.raises(ServiceError, match=r"tools\.visit\.site: .*/ must answer with pages, got 'robots\.txt cannot be had'"):
        run(web)
    assert web.asked == ["/robots.txt"]


class Outage(FakeWeb):
    """Does not answer from one request to another, with or without its robots.txt."""

    def __init__(self, pages, away, error):
        super().__init__(pages)
        self.away, self.error = away, error

    async def fetch(self, url):
        page = await super().fetch(url)
        if len(self.asked) in self.away and not url.endswith("robots.txt"):
            if isinstance(self.error, Exception):
                raise self.error
            return Answer(url, self.error, "text/html", "later")
        return page


SILENCE = [FetchFailed("refused"), BlockedUrl("timeout"), BlockedUrl("dns_failure"), 503, 429]


@pytest.mark.parametrize("error", SILENCE, ids=str)
def test_a_site_that_goes_away_ends_the_crawl_and_the_next_start_goes_on(tmp_path, error):
    def crawl_into(name, web):
        return run_virtual(crawl(["/"], fetch=web.fetch, site=SITE, budget=CrawlBudget(concurrency=3), folder=tmp_path / name))

    whole = crawl_into("whole", FakeWeb(graph(40)))
    for away in (range(2, 10_000), range(9, 10_000), range(30, 10_000)):
        with pytest.raises(ServiceError, match=r"tools\.visit\.site: http://web\.test/.* must answer with pages"):
            crawl_into("parts", Outage(graph(40), away, error))
    assert crawl_into("parts", FakeWeb(graph(40))) == whole
    assert crawl_into("short", Outage(graph(40), range(9, 16), error)) == whole
    for name in ("parts", "short"):
        for file in ("pages.jsonl", "left_out.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_what_a_site_that_is_there_does_not_answer_is_that_pages_failure():
    web = FakeWeb({"/": links("/gone", "/slow", "/ok"), "/gone": Answer(SITE, 503, "", ""), "/slow": BlockedUrl("timeout"), "/ok": links()})
    found = run_virtual(crawl(["/"], fetch=web.fetch, site=SITE))
    assert [page.url for page in found.pages] == ["/", "/ok"]
    assert list(found.failed.values()) == ["status 503, no content type, from http://web.test", "BlockedUrl: timeout"]
    assert web.asked.count("/slow") == 2


def test_a_crawl_that_found_no_page_is_none_and_begins_anew(tmp_path):
    assert asyncio.run(crawl(["/", "/b"], fetch=FakeWeb({}).fetch, site=SITE, folder=tmp_path)).pages == ()
    web = FakeWeb({"/b": links("/")})
    assert [page.url for page in asyncio.run(crawl(["/", "/b"], fetch=web.fetch, site=SITE, folder=tmp_path)).pages] == ["/b"]
    web = FakeWeb({})
    assert [page.url for page in asyncio.run(crawl(["/", "/b"], fetch=web.fetch, site=SITE, folder=tmp_path)).pages] == ["/b"]
    assert web.asked == []


def test_an_infobox_of_any_site_is_read_and_other_tables_are_not():
    html = """<html><head><title> A  page </title><meta name="split" content="dev"></head><body><h1></h1>
      <table class="wikitable"><tr><th>no</th><td>x</td></tr></table>
      <table class="wide infobox vcard" data-kind="film"><tr><th colspan=2>Head</th></tr>
        <tr><th>cast</th><td><a href="/wiki/A_B">A <b>B</b></a>, <a href="C_D#top">C D</a></td></tr>
        <tr><th>year</th><td> 1990 </td></tr><tr><th>empty</th><td></td></tr></table>
      <script>bad()</script><!-- hidden --><p>Text <i>in</i>side.</p></body></html>"""
    page = parse_page(html, url=SITE + "/wiki/Here", site=SITE)
    assert (page.url, page.title, page.kind, page.split) == ("/wiki/Here", "A page", "film", "dev")
    assert page.facts == {
        "cast": (FactValue(text="A B", url="/wiki/A_B"), FactValue(text="C D", url="/wiki/C_D")),
        "year": (FactValue(text="1990"),),
    }
    assert page.links == ("/wiki/A_B", "/wiki/C_D")
    assert "Text inside." in page.text
    assert "bad" not in page.text
    assert "hidden" not in page.text


def test_a_table_of_keys_and_values_is_an_infobox_where_none_says_so():
    rows = "<tr><th>Seat:</th><td><a href='/b'>Bana</a></td></tr><tr><th>Founded</th><td>1990 in <a href='/b'>Bana</a></td></tr>"
    table = f"<table>{rows}<tr><th>Boards</th><td><a href='/x'>X</a> and <a href='/y'>Y</a></td></tr></table>"
    titles = [parse_page(f"<h1>{heading}</h1>", url=SITE + "/", site=SITE).title for heading in ("C#", "Tiro #", "C# ¶")]
    assert titles == ["C#", "Tiro", "C#"]
    page = parse_page(f"<h1>Tiro¶</h1>{table}", url=SITE + "/", site=SITE)
    assert page.title == "Tiro"
    assert page.facts == {
        "Seat": (FactValue(text="Bana", url="/b"),),
        "Founded": (FactValue(text="1990 in Bana"),),
        "Boards": (FactValue(text="X", url="/x"), FactValue(text="Y", url="/y")),
    }
    assert parse_page(f"<table>{rows}</table><table>{rows}<tr><td>1</td></tr></table>", url=SITE).facts == {}


def test_footnotes_are_no_values_and_what_stands_in_two_rows_is_two_values():
    html = """<table class=infobox>
      <tr><th>capital<sup>[a]</sup></th><td><a href="/Paris#old">Paris</a><sup><a href="#cite_note-1">[1]</a></sup></td></tr>
      <tr><th>leader</th><td><a href="/Bo">Bo</a><sup>[<a href="/Help">citation needed</a>]</sup></td></tr>
      <tr><th>area</th><td>12 km<sup>2</sup> <a href="#f2">2</a></td></tr><tr><th>law</th><td><a href="#law">civil</a></td></tr>
      <tr><th>spouse</th><td><a href="/Ann">Ann</a></td></tr><tr><th>spouse</th><td><a href="/Beth">Beth</a></td></tr>
      <tr><th>spouse</th><td><a href="/Ann">Ann</a></td></tr></table>"""
    page = parse_page(html, url=SITE + "/France", site=SITE)
    assert page.facts == {
        "capital": (FactValue(text="Paris", url="/Paris"),),
        "leader": (FactValue(text="Bo", url="/Bo"),),
        "area": (FactValue(text="12 km2"),),
        "law": (FactValue(text="civil"),),
        "spouse": (FactValue(text="Ann", url="/Ann"), FactValue(text="Beth", url="/Beth")),
    }
    assert "Paris[1]" in page.text


LONG = " ".join(f"word{i}" for i in range(300))


def test_a_page_that_says_what_another_says_is_left_out_and_leads_nowhere():
    pages = {
        "/": links("/a", "/b", "/c"),
        "/a": f"<p>{LONG}</p>",
        "/b": f"<p>{LONG} more</p><a href='/d'>d</a>",
        "/c": f"<p>{LONG[:900]}</p>",
    }
    found = asyncio.run(crawl(["/"], fetch=FakeWeb(pages).fetch, site=SITE, near_duplicate=0.8))
    assert [page.url for page in found.pages] == ["/", "/a", "/c"]
    assert found.failed == {SITE + "/b": "near-duplicate of /a"}


def test_the_promising_come_first_and_each_site_has_its_bound():
    budget = CrawlBudget(max_pages=10, max_pages_per_site=4, by_score=True)
    frontier = Frontier(["http://a/", "http://b/"], budget)
    assert [frontier.take().url, frontier.take().url] == ["http://a/", "http://b/"]
    frontier.add(
        [
            ("http://a/login", "log in"),
            ("http://a/x?page=2", "next"),
            ("http://c/", "c"),
            ("http://b/1", "one"),
            ("http://a/guide", "guide"),
        ],
        depth=1,
    )
    frontier.add([("http://a/login", "log in"), ("http://a/guide", "guide")], depth=1)
    frontier.add([("http://b/2", "two")], depth=2)
    assert [frontier.take().url for _ in range(5)] == ["http://a/guide", "http://b/1", "http://a/x?page=2", "http://b/2", "http://a/login"]
    frontier.add([("http://b/3", "b"), ("http://b/4", "b"), ("http://a/4", "a")], depth=2)
    assert [frontier.take(), frontier.take(), frontier.left] == [Visit(7, "http://b/3", 2), None, 2]
    assert link_score("http://a/en/genindex.html", "Index", depth=1) < link_score("http://a/en/library/re.html", "re", depth=2)


def graph(size):
    """Pages that link to each other in some order, some of which fail."""
    pages = {f"/{i}": links(*(f"/{(i * 7 + k * k) % size}" for k in range(5))) for i in range(size)}
    return {**pages, "/": links("/1", "/2", "/3"), "/9": RuntimeError("reset"), "/5": Answer(SITE + "/6", 200, "text/html", "x")}


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 7, 30, 200])
def test_a_crawl_that_was_stopped_anywhere_ends_with_the_same_files(tmp_path, by_score, stop):
    budget = CrawlBudget(concurrency=3, by_score=by_score, max_pages=60)

    def crawl_into(name, **more):
        return crawl(["/"], fetch=FakeWeb(graph(80)).fetch, site=SITE, budget=budget, near_duplicate=0.9, folder=tmp_path / name, **more)

    visits = iter(range(10_000))

    def interrupt(left):
        if next(visits) == stop:
            raise KeyError("stopped")

    whole = asyncio.run(crawl_into("whole"))
    try:
        asyncio.run(crawl_into("parts", on_visit=interrupt))
    except KeyError:
        with (tmp_path / "parts" / "pages.jsonl").open("ab") as file:
            file.write(b'{"visit": 99, "torn')
    again = asyncio.run(crawl_into("parts"))
    assert again.pages == whole.pages
    for name in ("pages.jsonl", "left_out.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with (tmp_path / "parts" / "left_out.jsonl").open("r+b") as file:  # as after a power cut, when one file has lost more than the other
        file.truncate((tmp_path / "whole" / "left_out.jsonl").stat().st_size // 3)
    assert asyncio.run(crawl_into("parts")) == again
    for name in ("pages.jsonl", "left_out.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(DataError, match="must hold a crawl of the same roots and settings"):
        asyncio.run(crawl(["/2"], fetch=FakeWeb(graph(80)).fetch, site=SITE, budget=budget, folder=tmp_path / "parts"))


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))) | st.lists(st.sampled_from(["<table class=infobox>", "<tr>", "<th>", "<td>", "<a href=", "'x'", "'#x'", "<sup>", ">", "</table>", "k", "<!--", "\0"])).map("".join))  # fmt: skip  # noqa: E501
def test_parsing_never_raises(html):
    json.dumps(parse_page(html, url="http://h/p").text)


@pytest.fixture(scope="module")
def small_world():
    with running_server(seed=6, num_entities=290) as origin:
        yield origin


def test_a_real_crawl_of_one_split_finds_just_its_entities(small_world):
    async def crawl_split(split):
        async with Fetcher(FetchPolicy(allowed_origins=(small_world,))) as fetcher:
            return await crawl([f"/index/{split}"], fetch=fetcher.fetch, site=small_world)

    world = Encyclopedia.generate(seed=6, num_entities=290)
    for split in ("dev", "heldout"):
        found = asyncio.run(crawl_split(split))
        assert found.failed == {}
        entities = [page for page in found.pages if page.facts]
        assert {page.url for page in entities} == {entity.url for entity in world.of(split)}
        assert {page.split for page in entities} == {split}


def test_the_gate_is_not_bypassed(small_world):
    async def blocked():
        async with Fetcher(FetchPolicy()) as fetcher:
            return await crawl(["/"], fetch=fetcher.fetch, site=small_world)

    with pytest.raises(ServiceError, match=r"must answer with pages, got 'robots\.txt cannot be had'"):
        asyncio.run(blocked())
