"""Questions and trajectories over vLLM's own OpenAI-compatible server: the transport is real, and the tiny model can do neither.

What it says instead is counted, paid for and left out with a reason; the same commands then go on without the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from tests import sampling_job
from webdancer.config import load
from webdancer.data.tasks import write_tasks
from webdancer.model_location import model_path
from webdancer.offline_web.server import running_server
from webdancer.runs.questions import make_questions
from webdancer.telemetry import Telemetry
from webdancer.types import Task

NAME, LONGEST = "tiny", 24
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
ENVIRONMENT |= {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # the teacher's prompt, with its schemas, is long


@contextmanager
def vllm_server(log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", model_path("builtin:tiny"), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--max-model-len", "12000"]
    words += ["--override-generation-config", json.dumps({"max_new_tokens": LONGEST})]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=out, stderr=out, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while not _is_up(url):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"{url}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def configured(run_dir, site, url, part, *overrides):
    llm = {"base_url": url, "model": NAME, "max_attempts": 2, "usd_per_million_prompt": 1, "usd_per_million_completion": 10}
    web = [f"tools.visit.site={site}", f"tools.search.url={site}", "tools.visit.extraction_processes=0"]
    asked = [f"{part}.llm.{name}={value}" for name, value in llm.items()]
    return load([], [f"run_dir={run_dir}", "telemetry.wandb_mode=disabled", *web, *asked, *overrides])


def make(run_dir, site, url):
    counts = [f"synthesis.num_{pool}=1" for pool in ("sft", "rl", "dev", "heldout", "count")]
    config = configured(run_dir, site, url, "synthesis", f"tools.fetch.allowed_origins=[{site}]", "synthesis.max_pages=12", *counts)
    with Telemetry.open(run_dir, config) as telemetry:
        return asyncio.run(make_questions(config, telemetry))


def sample(run_dir, site, url):
    tasks = run_dir.parent / "tasks.jsonl"
    write_tasks(tasks, [Task(id=f"q{number}", question=f"What is number {number}?", answers=("7",)) for number in range(2)])
    settings = ["sample.backend=openai", "sample.attempts=2", f"sample.data={tasks}", "model.path=builtin:tiny", "prompt.style=brief"]
    asyncio.run(sampling_job.run(configured(run_dir, site, url, "sample", *settings)))
    return json.loads((run_dir / "sampling" / "manifest.json").read_text())


def test_what_a_real_server_answers_is_counted_paid_and_not_asked_again(tmp_path):
    with running_server(seed=6, num_entities=290) as site:
        with vllm_server(tmp_path / "vllm.log") as url:
            made, sampled = make(tmp_path / "run", site, url), sample(tmp_path / "sampled", site, url)
        assert make(tmp_path / "run", site, url) == made, "the server is gone; every answer is on disk"
        again = sample(tmp_path / "sampled", site, url)
    check_questions(tmp_path / "run", made)
    taught = sampled["cost"]["models"]["teacher"]
    assert (sampled["questions"]["unsolved"], sampled["attempts"]) == (2, {"validity": {"malformed": 4}})
    assert taught["answers"] == taught["malformed"] > 4
    assert sampled["cost"]["usd"] == taught["usd"] == priced(taught) == again["cost"]["usd"]
    assert again["files"] == sampled["files"]


def priced(usage):
    return pytest.approx((usage["prompt_tokens"] + 10 * usage["completion_tokens"]) / 1e6)


def check_questions(run_dir, made):
    written = made["cost"]["models"]["writer"]
    assert made["crawl"]["pages"] == 12
    assert set(made["left_out"]) == {"unusable_reply"}
    assert written["answers"] == written["malformed"] == 3 * made["left_out"]["unusable_reply"] > 0
    assert 0 < written["completion_tokens"] <= LONGEST * written["answers"]
    assert written["usd"] == made["cost"]["usd"] == priced(written)
    rows = [json.loads(line) for line in (run_dir / "questions" / "candidates.jsonl").read_text().splitlines()]
    assert all(re.search("holds no JSON object|was cut", row["detail"]) for row in rows)
    assert "unusable reply" in (run_dir / "questions" / "report.html").read_text()
