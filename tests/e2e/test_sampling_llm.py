"""Sampling by a chat model from end to end: the real tools over HTTP, a scripted endpoint that fails in every way, and a SIGKILL."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import sampling_job
from tests.teacher_endpoint import FAULTS, REJECTED, SILENCE_S, TeacherEndpoint
from webdancer.config import load
from webdancer.data.demonstrations import read_demonstrations
from webdancer.data.tasks import write_tasks
from webdancer.offline_web.encyclopedia import Encyclopedia
from webdancer.offline_web.pages import EncyclopediaSite
from webdancer.offline_web.server import running_server
from webdancer.types import Task

ROOT = Path(__file__).parents[2]
WORLD = {"seed": 3, "num_entities": 600}
NUM_TASKS = 24
AT_ONCE = 6
USD_PER_MILLION = (2.0, 8.0)


def make_tasks() -> list[Task]:
    """A chain of two facts, or one, from what the pages' texts say."""
    facts = {
        document.title: dict(re.findall(r"(\S+): ([^.:]+)\.(?= |$)", document.text))
        for document in EncyclopediaSite(Encyclopedia.generate(**WORLD)).documents()
    }
    tasks = []
    for title, found in facts.items():
        for key, value in found.items():
            further = facts.get(value, {})
            last, answer = next(iter(further.items()), (key, value))
            question = f"What is the {last} of the {key} of {title}?" if further else f"What is the {key} of {title}?"
            kind = {"type": "hop", "hops": 1 + bool(further)}
            tasks.append(Task(id=f"q{len(tasks)}", question=question, answers=(answer,), metadata=kind))
    return tasks[:: len(tasks) // NUM_TASKS][:NUM_TASKS]


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    tasks = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    write_tasks(tasks, make_tasks())
    with running_server(**WORLD) as origin:
        yield origin, tasks


def write_config(run_dir: Path, web, endpoint: TeacherEndpoint) -> Path:
    origin, tasks = web
    llm = {
        "base_url": endpoint.url,
        "timeout_s": SILENCE_S - 1,
        "max_concurrent": AT_ONCE,
        "usd_per_million_prompt": USD_PER_MILLION[0],
        "usd_per_million_completion": USD_PER_MILLION[1],
    }
    sample = {"data": str(tasks), "backend": "openai", "style": endpoint.style, "attempts": 2, "temperature": 0.6}
    sample |= {"llm": llm | {"model": "teacher"}, "quality": {"llm": llm | {"model": "checker"}}}
    search = {"url": origin, "top_k": 3, "snippets": "first", "snippet_sentences": 3}
    tools = {"search": search, "visit": {"site": origin, "extraction_processes": 0}}
    settings = {"run_dir": str(run_dir), "model": {"path": "builtin:tiny", "dtype": "float32"}, "prompt": {"style": "brief"}}
    settings |= {"sample": sample, "tools": tools, "telemetry": {"wandb_mode": "disabled"}}
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(config: Path) -> dict:
    loaded = load([config])
    asyncio.run(sampling_job.run(loaded))
    return json.loads((Path(loaded.run_dir) / "sampling" / "manifest.json").read_text())


def run_until_killed(config: Path, endpoint: TeacherEndpoint, *, after: int) -> None:
    child = subprocess.Popen([sys.executable, "-m", "tests.sampling_job", str(config)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while sum(endpoint.answered.values()) < after:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()


@pytest.mark.parametrize("style", ["instruct", "reasoning"])
def test_faults_and_a_kill_change_nothing_but_the_bill(tmp_path, web, style):
    with TeacherEndpoint(style=style, faults=False) as calm:
        expected = run(write_config(tmp_path / "calm", web, calm))
    with TeacherEndpoint(style=style, faults=True) as rough:
        config = write_config(tmp_path / "rough", web, rough)
        run_until_killed(config, rough, after=40)
        assert not (tmp_path / "rough" / "demonstrations.jsonl").exists()
        found = run(config)
    assert calm.problems == rough.problems == []
    assert min(rough.met[fault] for fault in FAULTS) > 0
    assert found["files"] == expected["files"]
    for name in found["files"]:
        assert (tmp_path / "rough" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    assert {**found, "cost": 0, "config": 0} == {**expected, "cost": 0, "config": 0}
    # Answered in vain: only what could not be read, what came too late, and what was in flight when the job was killed.
    in_vain = sum(rough.answered.values()) - sum(calm.answered.values())
    assert 0 < in_vain <= rough.met["no step"] + rough.met["silence"] + 2 * AT_ONCE
    check_funnel(tmp_path / "calm", expected)
    check_cost(expected["cost"]["models"], calm)
    assert found["cost"]["usd"] >= expected["cost"]["usd"] > 0


def check_funnel(run_dir: Path, manifest: dict) -> None:
    assert set(manifest["attempts"]) == {"correctness", "quality", "passed"}
    assert manifest["attempts"]["quality"][REJECTED] > 0
    shown = read_demonstrations(run_dir / "demonstrations.jsonl")
    assert len(shown) == manifest["questions"]["demonstrated"] > NUM_TASKS // 4
    assert all("<think>\nNeed " in demonstration.messages[2]["content"] for demonstration in shown)
    assert manifest["files"]["questions/rl_pool.jsonl"]["rows"] == NUM_TASKS - len(shown)


def check_cost(cost: dict, endpoint: TeacherEndpoint) -> None:
    """What the job says it paid is what the endpoint answered, but for answers that a busy machine gave too late."""
    unread = sum(endpoint.answered.values()) - sum(usage["answers"] for usage in cost.values())
    assert 0 <= unread <= sum(usage["repeated"] for usage in cost.values())
    for usage in cost.values():
        price = usage["prompt_tokens"] * USD_PER_MILLION[0] + usage["completion_tokens"] * USD_PER_MILLION[1]
        assert usage["usd"] == pytest.approx(price / 1e6)
