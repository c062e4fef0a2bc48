"""The report: one page that loads nothing, runs nothing and escapes everything, with numbers that agree with the files."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import make_evaluation, make_run

from webdancer.config import load
from webdancer.errors import DataError
from webdancer.evaluation.metrics import wilson_interval
from webdancer.evaluation.results import write_evaluation
from webdancer.telemetry.charts import Bar, Series, bar_chart, line_chart, stacked_chart, ticks
from webdancer.telemetry.report import write_report
from webdancer.telemetry.report_data import accuracy, gather, kinds, stage_order
from webdancer.telemetry.telemetry import Telemetry

HOSTILE = "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> <style>*{display:none}</style> \udc80\x00"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text; raises when tags are not closed in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(html)
        assert self._open == [], self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run")


def test_the_page_is_whole_and_has_every_section(run_dir):
    path = write_report(run_dir)
    assert path == (run_dir / "report.html").resolve()
    page = Page(path.read_text())
    headings = {"Held-out questions", "By type and hops", "Training", "Do engines and learner hold", "Time per phase", "Two trajectories"}
    charts = {"Accuracy of rollouts", "Reward", "Tool calls", "Entropy", "Groups", "Held-out accuracy", "Step time", "SFT loss"}
    charts |= {"Clipped tokens", "Effective sample size"}
    examples = {"Solved: What is the school of Karo Mil", "Failed: What is the school of Karo Mil"}
    assert {text for text in headings | charts | examples | {"Canary, max"} if text not in page.text} == set()


def test_the_headline_says_what_the_evaluations_say(run_dir):
    data = gather(run_dir)
    stages = {one.stage: accuracy(one.rows) for one in data.evaluations}
    text = Page(write_report(run_dir).read_text()).text
    gain = 100 * (stages["rl-13"].mean - stages["sft"].mean)
    assert f"from {100 * stages['sft'].mean:.0f} % to {100 * stages['rl-13'].mean:.0f} %" in text
    assert f"({gain:+.0f} points over its warm start)" in text
    assert "104trajectories scored" in text


def test_nothing_is_loaded_or_run_even_when_every_text_is_hostile(tmp_path):
    html = write_report(make_run(tmp_path / "run", num_steps=2, observation=HOSTILE)).read_text()
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "a", "base"} & set(page.tags)
    assert page.tags.count("style") == 1
    assert all(name not in ("src", "href", "style", "srcset") and not name.startswith("on") for name, _ in page.attributes)
    assert "alert(1)</script>" in page.text


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(run_dir):
    html = write_report(run_dir).read_text()
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"content=\"default-src 'none'; style-src 'sha256-{digest}'; " in html
    assert "url(" not in style
    assert "@import" not in style


def test_a_run_that_has_hardly_begun_still_has_a_report(tmp_path):
    (tmp_path / "run").mkdir()
    assert "0 steps of RL so far" in Page(write_report(tmp_path / "run").read_text()).text
    write_evaluation(tmp_path / "run" / "evaluations", make_evaluation("base", num_tasks=3, num_samples=0))
    assert "greedy accuracy on 3 held-out questions" in Page(write_report(tmp_path / "run").read_text()).text


def test_money_is_said_where_any_was_spent(run_dir, tmp_path):
    assert "for tools and judge" not in Page(write_report(run_dir).read_text()).text
    with Telemetry.open(tmp_path, load([], ["telemetry.wandb_mode=disabled"])) as telemetry:
        telemetry.log("rl", 1, {"tools/usd": 1.25, "judge/usd": 0.5})
        telemetry.log("rl", 1, {"tools/usd": 1.5, "judge/usd": 0.5})  # the step, made again
        telemetry.log("evaluation", 1, {"judge/usd": 10.0})
    assert "$12.00for tools and judge" in Page(write_report(tmp_path).read_text()).text


def test_rl_by_itself_is_compared_with_where_it_began(tmp_path):
    make_run(tmp_path, num_steps=12)
    for stage in ("base", "sft", "rl-13"):
        (tmp_path / "evaluations" / f"{stage}.json").unlink()
    assert "12 steps of RL so far" in Page(write_report(tmp_path).read_text()).text
    write_evaluation(tmp_path / "evaluations", replace(make_evaluation("sft"), stage="rl-0"))
    stages = {one.stage: accuracy(one.rows) for one in gather(tmp_path).evaluations}
    text = Page(write_report(tmp_path).read_text()).text
    told = f"In 10 steps of DAPO the agent went from {100 * stages['rl-0'].mean:.0f} % to {100 * stages['rl-10'].mean:.0f} % on 200"
    assert told in text, "the steps before the last evaluation"
    assert "points over where it began)." in text
    assert "Before RL" in text


def test_an_evaluation_without_a_verdict_is_in_no_figure_and_named(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    before = replace(make_evaluation("sft", num_tasks=3), stage="rl-9")
    rows = tuple(replace(row, greedy_correct=None, samples_correct=(), num_tool_calls=None, format_ok=None) for row in before.rows)
    write_evaluation(tmp_path / "run" / "evaluations", replace(before, rows=rows))
    write_evaluation(tmp_path / "run" / "evaluations", replace(before, stage="sft", rows=rows))
    html = write_report(tmp_path / "run").read_text()
    assert "nan" not in Page(html).text.casefold()
    assert not re.search(r'="[^"]*\bnan\b', html)
    assert "without a single verdict, and left out: After SFT, RL, step 9" in Page(html).text


def test_a_missing_run_or_a_broken_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="must exist"):
        write_report(tmp_path / "none")
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "base.json").write_text("{}")
    with pytest.raises(DataError, match=r"base\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_it_can_be_made_again_from_the_command_line(run_dir, tmp_path):
    command = [sys.executable, "-m", "webdancer.telemetry.report"]
    done = subprocess.run([*command, str(run_dir)], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("report.html")
    assert subprocess.run([*command, str(tmp_path / "none")], capture_output=True, check=False).returncode == 2


def test_kinds_are_rows_with_the_counts_of_the_evaluation():
    evaluation = make_evaluation("sft")
    table = kinds([evaluation])
    assert [label for label, _ in table] == ["1 hop", "2 hops", "3 hops", "COUNT", "INTERSECTION"]
    assert sum(len(split[0]) for _, split in table) == len(evaluation.rows)


def test_stages_are_in_the_order_of_the_run():
    assert sorted(["rl-13", "other", "rl-5", "sft", "base"], key=stage_order) == ["base", "sft", "rl-5", "rl-13", "other"]


def test_the_wilson_interval_has_its_known_values():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(points=st.lists(st.tuples(st.integers(0, 500).map(float), numbers), min_size=1, max_size=20))
def test_line_charts_draw_any_numbers_inside_their_frame(points):
    svg = line_chart([Series(name="<&>", points=points)], floor=0.0)
    Page(svg)
    coordinates = [float(value) for value in re.findall(r'c[xy]="([^"]+)"', svg)]
    assert len(coordinates) == 2 * len(points)
    assert all(0 <= value <= 341 for value in coordinates)


@given(low=numbers, span=st.floats(1e-9, 1e6))
def test_ticks_are_inside_and_few(low, span):
    if low + span > low and span > abs(low) * 1e-9:
        found = ticks(low, low + span, 4)
        assert 1 <= len(found) <= 6


def test_bars_and_stacks_are_well_formed():
    Page(bar_chart([Bar(label="<b>", value=0.0, text="0 & 1", interval=(0.0, 2.0))], limit=1.0))
    Page(stacked_chart([1.0], [Series(name="kept", points=[(1.0, 0.0)])]))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_shows_it_without_a_complaint(run_dir, tmp_path):
    picture = tmp_path / "report.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--screenshot={picture}"]
    command += ["--window-size=1180,2400", f"--user-data-dir={tmp_path / 'profile'}", write_report(run_dir).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert picture.stat().st_size > 50_000
    assert "CONSOLE" not in done.stderr
    assert "Refused" not in done.stderr
