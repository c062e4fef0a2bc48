"""`webdancer synthesize crawlqa` with a model that answers 429, 500, 400, nonsense and not at all, killed in crawl and writing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripted_model import TOKENS, ScriptedModel
from webdancer.data.tasks import read_tasks

ROOT = Path(__file__).parents[2]
COUNTS = ["synthesis.num_sft=24", "synthesis.num_rl=16", "synthesis.num_dev=6", "synthesis.num_heldout=8", "synthesis.num_count=6"]
MODEL = ["synthesis.llm.timeout_s=2", "synthesis.llm.usd_per_million_prompt=10", "synthesis.llm.usd_per_million_completion=100"]
CONCURRENT = 4


def start(run_dir, model):
    words = ["synthesize", "crawlqa", f"run_dir={run_dir}", "web.num_entities=290", "telemetry.wandb_mode=disabled", *COUNTS, *MODEL]
    words += [f"synthesis.llm.base_url={model.url}", f"synthesis.llm.max_concurrent={CONCURRENT}", "tools.visit.extraction_processes=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "webdancer.cli", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def kill_when(process, ready):
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return killed


def finish(process):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()[-2000:]


def files(run_dir):
    parts = [*(run_dir / "questions").glob("*.json*"), *(run_dir / "crawl").iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}


def test_killed_twice_the_job_ends_with_the_same_files_and_asks_nothing_twice(tmp_path):
    with ScriptedModel() as calm:
        finish(start(tmp_path / "whole", calm))
    with ScriptedModel() as model:
        pages = tmp_path / "parts" / "crawl" / "pages.jsonl"
        in_crawl = kill_when(start(tmp_path / "parts", model), lambda: pages.exists() and pages.stat().st_size > 20_000)
        in_writing = kill_when(start(tmp_path / "parts", model), lambda: model.replies.total() >= 25)
        assert in_crawl or in_writing
        finish(start(tmp_path / "parts", model))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")

    manifest = json.loads((tmp_path / "parts" / "questions" / "manifest.json").read_text())
    assert {"unusable_reply", "model_refused"} <= set(manifest["left_out"])
    assert {"429", "500", "hang", "refused", "malformed"} <= set(model.met)
    for name, described in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "parts" / "questions" / name).read_bytes()).hexdigest() == described["sha256"]

    # Asked again is only what was under way when the job was killed, or what was asked for again because it did not parse.
    asked_again = sum(number - 1 for number in model.replies.values()) - sum(number - 1 for number in calm.replies.values())
    assert 0 <= asked_again <= 2 * CONCURRENT
    answers = len((tmp_path / "whole" / "answers.jsonl").read_text().splitlines())
    assert 0 <= calm.replies.total() - answers <= CONCURRENT, "on a busy machine an answer may come too late to be read"
    price = (TOKENS["prompt_tokens"] * 10 + TOKENS["completion_tokens"] * 100) / 1e6
    cost = manifest["cost"]["models"]["writer"]
    assert (cost["answers"], cost["prompt_tokens"]) == (answers, answers * TOKENS["prompt_tokens"])
    assert cost["usd"] == manifest["cost"]["usd"] == pytest.approx(answers * price)
    assert "unusable reply" in (tmp_path / "parts" / "questions" / "report.html").read_text()

    tasks = [task for pool in ("sft", "rl", "dev", "heldout") for task in read_tasks(tmp_path / "parts" / "questions" / f"{pool}.jsonl")]
    assert len({task.question for task in tasks}) == len(tasks) > 30
    assert {task.metadata["type"] for task in tasks} >= {"hop", "count"}
