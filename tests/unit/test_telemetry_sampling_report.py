"""The page about a teacher's sampling: counts, states, and texts that may be hostile."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.rollout_fakes import make_task
from tests.unit.test_runs_sample import Runner, sample
from webdancer.errors import DataError
from webdancer.telemetry.funnel_chart import Level, funnel_chart
from webdancer.telemetry.sampling_report import render_sampling_report

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    kinds = ["right"] * 30 + ["wrong"] * 8 + ["malformed"] * 4 + ["redundant_call", "outage"]
    tasks = [
        dataclasses.replace(make_task(index), question=HOSTILE, metadata={"outcomes": [kind], "type": "hop", "hops": 1 + index % 2})
        for index, kind in enumerate(kinds)
    ]
    reserved = [dataclasses.replace(make_task(100), metadata={"type": "count", "hops": 1})]
    sample(run_dir, Runner(), "attempts=1", tasks=tasks, reserved=reserved)
    return (run_dir / "sampling" / "report.html").read_text()


def test_the_funnel_shows_every_stage_and_why(page):
    assert re.findall(r'class="value"[^>]*>([^<]*)<', page)[:5] == ["44", "43 (98 %)", "39 (89 %)", "31 (70 %)", "30 (68 %)"]
    assert re.findall(r"− ([^<]*)<", page) == ["1 outage", "4 malformed", "8 wrong", "1 redundant call"]


def test_every_question_has_its_state(page):
    rows = re.findall(r"<tr[^>]*><th>(.*?)</th>(.*?)</tr>", page)
    cells = {name: [int(cell) for cell in re.findall(r"<td>(\d+)</td>", row)] for name, row in rows if "<td>" in row}
    assert cells == {
        "1 hop": [22, 15, 7, 0, 0],
        "2 hops": [22, 15, 6, 1, 0],
        "COUNT": [1, 0, 0, 0, 1],
        "all": [45, 30, 13, 1, 1],
    }


def test_ten_trajectories_are_shown_some_of_them_rejected(page):
    titles = re.findall(r"<h3>(Demonstration|Not kept, [a-z ]+)", page)
    assert len(titles) == 10
    assert sorted(titles)[6:] == ["Not kept, malformed ", "Not kept, outage ", "Not kept, redundant call ", "Not kept, wrong"]


def test_no_text_becomes_markup(page):
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match="manifest"):
        render_sampling_report(tmp_path)


def test_more_reasons_than_there_is_room_for_are_summed_up():
    lost = [(f"reason number {number} of many", 1_000 - number) for number in range(9)]
    drawn = funnel_chart([Level(label="Attempts", count=10_000, lost=lost), Level(label="Good", count=1_036)])
    told = re.findall(r'class="tick"[^>]*>([^<]*)<', drawn)
    assert (len(told), max(map(len, told)) <= 75, told[1].rpartition(" ")[2]) == (2, True, "others")
    numbers = re.findall(r"([\d,]+) (?:reason|others)", " ".join(told))
    assert sum(int(number.replace(",", "")) for number in numbers) == sum(number for _, number in lost)


def test_an_empty_funnel_can_be_drawn():
    assert "0" in funnel_chart([Level(label="Attempts", count=0), Level(label="Good", count=0)])
