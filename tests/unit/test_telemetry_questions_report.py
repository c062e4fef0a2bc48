"""The page about made questions: how many came through and why others did not, of what kinds, and texts that may be hostile."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from webdancer.config import Config, SynthesisConfig
from webdancer.errors import DataError
from webdancer.synthesis.collect import Need, Outcome
from webdancer.synthesis.crawl import Crawl
from webdancer.synthesis.hygiene import described
from webdancer.synthesis.manifest import cost, provenance
from webdancer.synthesis.pools import PoolFiles
from webdancer.telemetry.data_report import Thinned, bins
from webdancer.telemetry.questions_report import _needed, render_questions_report, write_questions_report
from webdancer.types import Task

HOSTILE = "</h3><script>alert(1)</script>"
USAGE = {"answers": 60, "prompt_tokens": 1_000, "completion_tokens": 234, "usd": 1.25, "malformed": 3, "requests": 70}


def make_task(number, type_, *, hops=1, **metadata):
    facts = {"provenance": [f"/wiki/{HOSTILE}{page}" for page in range(hops)], "keys": ["river"] * hops} | metadata
    question = f"What is number {number} of {HOSTILE}?"
    task = Task(id=f"q{number}", question=question, answers=(f"{HOSTILE} {number}",), metadata={"type": type_, "hops": hops} | facts)
    return described(task, split="train")


def outcomes():
    hop, count, steps = Need("train", "hop2", 30), Need("heldout", "count", 5), [{"entity": HOSTILE, "description": HOSTILE}]
    yield from (Outcome(hop, make_task(number, "hop", hops=2)) for number in range(20))
    yield from (Outcome(count, make_task(number, "count", facts=[{"url": HOSTILE, "quote": HOSTILE}])) for number in range(30, 34))
    yield Outcome(hop, make_task(40, "e2hqa", steps=steps, seed_question=HOSTILE))
    for reason, number in (("quote_not_in_page", 4), ("model_declined", 2), ("unusable_reply", 2), ("miscounted", 1)):
        yield from (Outcome(hop, None, reason, HOSTILE) for _ in range(number))
    for reason, number in (("exact_duplicate", 3), ("evaluation_overlap", 1), ("near_duplicate", 1)):
        yield from (Outcome(hop, make_task(50 + again, "hop"), reason) for again in range(number))
    yield Outcome(hop, None, "closed_book", HOSTILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    settings = SynthesisConfig(num_sft=12, num_rl=18, num_dev=0, num_heldout=0, num_count=15, hop_shares=[0.0, 1.0, 0.0])
    folder = tmp_path_factory.mktemp("run") / "questions"
    files = PoolFiles(folder, settings)
    for outcome in outcomes():
        files.add(outcome)
    crawled = Crawl(pages=("a", "b"), failed={"/x": "robots.txt forbids it", f"/{HOSTILE}": f"{HOSTILE} {HOSTILE}"}, left=7)
    providers = {"serper": {"requests": 12, "usd": 0.5}}
    files.finish(provenance(Config(synthesis=settings), crawled) | {"cost": cost({"writer": USAGE}, providers)})
    return write_questions_report(folder).parent


@pytest.fixture
def page(folder):
    return (folder / "report.html").read_text()


def test_the_diagram_shows_every_check_and_why_questions_failed_it(page):
    assert re.findall(r'class="value"[^>]*>([^<]*)<', page)[:4] == ["40", "31 (78 %)", "26 (65 %)", "25 (62 %)"]
    lost = re.findall(r"<text class=\"tick\"[^>]*>([^<]*)<", page)
    assert lost == [
        "− 4 quote not in page · 2 model declined ·",
        "2 unusable reply · 1 miscounted",
        "− 3 exact duplicate · 1 evaluation overlap ·",
        "1 near duplicate",
        "− 1 closed book",
    ]


def test_every_question_is_in_the_table_by_kind_and_pool(page):
    rows = re.findall(r"<tr[^>]*><th>(.*?)</th>(.*?)</tr>", page)
    cells = {name: [int(cell) for cell in re.findall(r"<td>(\d+)</td>", row)] for name, row in rows if "<td>" in row}
    assert cells == {"1 hop": [1, 0, 1, 0], "2 hops": [20, 12, 8, 0], "COUNT": [4, 0, 0, 4], "all": [25, 12, 9, 4]}


def test_tokens_requests_and_money_are_told(page):
    tiles = dict(reversed(tile) for tile in re.findall(r"<b>([^<]*)</b><span>([^<]*)</span>", page))
    told = {"questions": "25", "left out": "15", "tokens of chat models": "1,234", "requests to serper": "12", "paid for them": "$1.75"}
    assert tiles.items() >= told.items()


def test_ten_questions_are_shown_some_of_them_left_out(page):
    fates = Counter(re.findall(r'<p class="facts">([^·]*) ·', page))
    assert fates == {"for the teacher": 4, "for RL": 3, "held out": 1, "left out: exact duplicate": 1, "left out: near duplicate": 1}


def test_a_fact_stands_beside_the_page_that_was_read_for_it():
    pages = ["/a", "/b", "/c"]
    assert _needed({"provenance": pages, "keys": ["x", "y", "z"]}) == ["/a: x", "/b: y", "/c: z"]
    assert _needed({"provenance": pages, "keys": ["z"]}) == ["/a", "/b", "/c: z"], "E2HQA: the last page is the seed's"
    assert _needed({"provenance": pages}) == pages


def test_no_text_becomes_markup(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 30
    assert "default-src 'none'" in page


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match="manifest"):
        render_questions_report(tmp_path)


def test_what_is_shown_lies_all_over_a_stream_of_unknown_length():
    for length in (0, 3, 10, 1_000, 12_345):
        thinned = Thinned(10)
        for number in range(length):
            thinned.add(number)
        shown = thinned.pick(10)
        assert len(shown) == min(length, 10)
        assert max((b - a for a, b in pairwise(shown)), default=0) <= max(1, length / 5)


def test_bins_are_round_and_leave_no_value_out():
    assert bins(Counter()) == []
    assert bins(Counter({3: 2, 5: 1})) == [("3", 2), ("4", 0), ("5", 1)]
    found = bins(Counter(range(7, 130)))
    assert (found[0], sum(count for _, count in found), len(found)) == (("0-19", 13), 123, 7)
