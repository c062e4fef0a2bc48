"""Rejection sampling: what is accepted, how often is tried, where the rest goes, and that a killed job ends with the same files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
from collections import Counter

import pytest

from tests.rollout_fakes import TimedRunner, make_member, make_task, make_turn
from tests.runs_fakes import make_config, open_telemetry
from tests.virtual_time import run_virtual
from webdancer.data.demonstrations import read_demonstrations
from webdancer.data.tasks import read_tasks, write_tasks
from webdancer.errors import ConfigError
from webdancer.runs.quickstart import dated, questions_for_teacher
from webdancer.runs.sample import make_demonstrations
from webdancer.runs.teacher import Teacher
from webdancer.synthesis.sampling_files import SampleFiles
from webdancer.types import EpisodeLost, MalformedAction, ToolCall, ToolResult

TASKS = [make_task(index) for index in range(40)]
CALL = dataclasses.replace(
    make_turn('<think>\nx\n</think>\n<tool_call>\n{"name": "search", "arguments": {"query": ["a"]}}\n</tool_call>'),
    action=ToolCall(name="search", arguments={"query": ["a"]}),
    result=ToolResult(text="Nothing."),
)
MALFORMED = dataclasses.replace(make_turn("nothing"), action=MalformedAction(reason="neither"), result=ToolResult(text="[invalid action]"))


class Runner(TimedRunner):
    """One search and an answer; right where `correct` says so, or as the task's `outcomes` say, attempt by attempt.

    Dies once `stops_after` episodes were run.
    """

    def __init__(self, *, stops_after: int | None = None, **settings) -> None:
        super().__init__(**settings)
        self.stops_after = stops_after

    async def run(self, task, *, member, attempt, sampling, resume_from=(), on_turn=None):
        done = await super().run(task, member=member, attempt=attempt, sampling=sampling)
        if self.stops_after is not None and len(self.started) > self.stops_after:
            raise RuntimeError("killed")
        if "outcomes" not in task.metadata:
            right = done.reward.answer == 1
            return make_member(task, member=member, attempt=attempt, correct=right, turns=(CALL, make_turn()))
        kind = task.metadata["outcomes"][attempt]
        if kind == "lost":
            return EpisodeLost(task_id=task.id, member=member, attempt=attempt, reason="gone")
        turns = {"malformed": (MALFORMED, make_turn()), "redundant_call": (CALL, CALL, make_turn()), "too_few_actions": (make_turn(),)}
        scored = make_member(task, member=member, attempt=attempt, correct=kind != "wrong", turns=turns.get(kind, (CALL, make_turn())))
        if kind == "no_verdict":
            return dataclasses.replace(scored, verdict=dataclasses.replace(scored.verdict, status="unknown"))
        if kind == "outage":
            broken = dataclasses.replace(CALL, result=ToolResult(text="", error="tool_timeout"))
            return dataclasses.replace(scored, trajectory=dataclasses.replace(scored.trajectory, turns=(broken, make_turn())))
        return scored


def sample(run_dir, runner, *overrides, tasks=TASKS, reserved=()):
    config = make_config(run_dir, *(f"sample.{override}" for override in overrides))
    with open_telemetry(config) as telemetry:
        return run_virtual(make_demonstrations(config, tasks, reserved, Teacher(runner=runner), telemetry))


def states(run_dir):
    rows = [json.loads(line) for line in SampleFiles(run_dir=run_dir).questions.read_text().splitlines()]
    return {row["id"]: (row["state"], *row["attempts"]) for row in rows}


def demonstrations(run_dir):
    return [shown.id for shown in read_demonstrations(run_dir / "demonstrations.jsonl")]


def test_the_first_right_attempt_is_kept_and_ends_the_tries(tmp_path):
    runner = Runner(correct=lambda task, attempt, member: attempt == int(task.id[1:]) % 3)
    told = sample(tmp_path, runner, "attempts=2", tasks=TASKS[:6], reserved=[make_task(90)])
    assert demonstrations(tmp_path) == ["t0/0/0", "t1/1/1", "t3/0/0", "t4/1/1"]
    assert [task.id for task in read_tasks(tmp_path / "questions" / "rl_pool.jsonl")] == ["t90", "t2", "t5"]
    assert states(tmp_path) == {
        "t0": ("demonstrated", "passed"),
        "t1": ("demonstrated", "wrong", "passed"),
        "t2": ("unsolved", "wrong", "wrong"),
        "t3": ("demonstrated", "passed"),
        "t4": ("demonstrated", "wrong", "passed"),
        "t5": ("unsolved", "wrong", "wrong"),
        "t90": ("reserved",),
    }
    assert told == "10 episodes: 6 wrong; 4 kept; 2 questions join the RL pool"


KINDS = ("outage", "lost", "malformed", "wrong", "no_verdict", "redundant_call", "too_few_actions")
KEPT = {"all": 2, "valid": 3, "correct": 5, "quality": 7}
"""sample.keep -> the first of these kinds that is a demonstration."""


@pytest.mark.parametrize("keep", KEPT)
def test_a_demonstration_comes_as_far_as_it_must(tmp_path, keep):
    tasks = [dataclasses.replace(make_task(index), metadata={"outcomes": [kind]}) for index, kind in enumerate((*KINDS, "right"))]
    sample(tmp_path, Runner(), f"keep={keep}", "attempts=1", tasks=tasks)
    rows = [json.loads(line)["id"] for line in (tmp_path / "demonstrations.jsonl").read_text().splitlines()]
    assert rows == [f"t{index}/0/0" for index in range(KEPT[keep], 8)]
    found = states(tmp_path)
    assert [found[task.id][1] for task in tasks] == ["outage", "outage", "malformed", "wrong", "no_verdict", *KINDS[5:], "passed"]
    undecided = {"t0", "t1", "t4"} & {f"t{index}" for index in range(KEPT[keep])}
    assert {id for id, (state, *_) in found.items() if state == "undecided"} == undecided
    assert len(rows) + len(read_tasks(tmp_path / "questions" / "rl_pool.jsonl")) == len(tasks)
    manifest = json.loads((tmp_path / "sampling" / "manifest.json").read_text())
    assert manifest["attempts"]["outage"] == {"outage": 2}
    assert manifest["attempts"]["passed"] == {"passed": 1}


def test_the_manifest_says_what_models_and_providers_cost(tmp_path):
    usage = {"answers": 3, "prompt_tokens": 100, "completion_tokens": 10, "usd": 0.5, "malformed": 0, "requests": 4}

    async def spent():
        return {"serper": {"requests": 250, "usd": 0.25}, "judge": {"requests": 2, "usd": 0.125}}

    config = make_config(tmp_path)
    with open_telemetry(config) as telemetry:
        teacher = Teacher(runner=Runner(), usage=lambda: {"teacher": usage}, spent=spent)
        run_virtual(make_demonstrations(config, TASKS[:2], (), teacher, telemetry))
    cost = json.loads((tmp_path / "sampling" / "manifest.json").read_text())["cost"]
    assert (cost["usd"], cost["models"]["teacher"]["prompt_tokens"]) == (0.875, 100)
    assert cost["providers"] == {"judge": {"requests": 2, "usd": 0.125}, "serper": {"requests": 250, "usd": 0.25}}
    assert "requests to serper" in (tmp_path / "sampling" / "report.html").read_text()


def test_several_demonstrations_of_a_question_can_be_kept(tmp_path):
    runner = Runner(correct=lambda task, attempt, member: attempt != 1)
    sample(tmp_path, runner, "attempts=5", "accepted_per_question=2", tasks=TASKS[:2])
    assert demonstrations(tmp_path) == ["t0/0/0", "t0/2/2", "t1/0/0", "t1/2/2"]


@pytest.mark.parametrize("seed", range(3))
def test_the_limit_is_exact_and_no_file_depends_on_who_is_fast(tmp_path, seed):
    def latency_s(task, member):
        return random.Random(f"{seed}/{task.id}").expovariate(1.0)

    runner = Runner(latency_s=latency_s, correct=lambda task, attempt, member: int(task.id[1:]) % 4 != 0)
    sample(tmp_path / "a", runner, "attempts=2", "max_demonstrations=7")
    assert demonstrations(tmp_path / "a") == [f"{name}/0/0" for name in ("t1", "t2", "t3", "t5", "t6", "t7", "t9")]
    assert Counter(state for state, *_ in states(tmp_path / "a").values()) == {"demonstrated": 7, "unsolved": 3, "not_needed": 30}
    sample(tmp_path / "b", Runner(correct=runner.correct), "attempts=2", "max_demonstrations=7")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_tasks_beyond_the_limit_are_not_tried(tmp_path):
    runner = Runner(correct=lambda task, attempt, member: True)
    sample(tmp_path, runner, "attempts=1", "max_demonstrations=2", "concurrent_questions=4")
    assert len({name for name, _, _ in runner.started}) < 8


def files(run_dir):
    """The bytes of all that sampling is for; cost and report alone may tell how it went."""
    manifest = json.loads((run_dir / "sampling" / "manifest.json").read_text())
    assert {name: (run_dir / name).read_bytes().count(b"\n") for name in manifest["files"]} == {
        name: entry["rows"] for name, entry in manifest["files"].items()
    }
    return {name: (run_dir / name).read_bytes() for name in manifest["files"]} | {"counts": {**manifest, "cost": None}}


@pytest.mark.parametrize("stops_after", [1, 17, 41])
def test_a_job_that_died_goes_on_and_ends_with_the_same_files(tmp_path, stops_after):
    def correct(task, attempt, member):
        return random.Random(f"{task.id}/{attempt}").random() < 0.3

    settings = ("attempts=3", "max_demonstrations=20", "concurrent_questions=8")
    whole = Runner(correct=correct)
    sample(tmp_path / "whole", whole, *settings)
    with pytest.raises(RuntimeError, match="killed"):
        sample(tmp_path / "cut", Runner(correct=correct, stops_after=stops_after), *settings)
    assert not (tmp_path / "cut" / "demonstrations.jsonl").exists()
    rest = Runner(correct=correct)
    sample(tmp_path / "cut", rest, *settings)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(rest.started) <= len(whole.started) + 8 - max(0, stops_after - 8)
    again = Runner(correct=correct)
    sample(tmp_path / "cut", again, *settings)
    assert again.started == []
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_was_accepted_without_a_verdict_is_not_tried_again(tmp_path):
    tasks = [dataclasses.replace(make_task(0), metadata={"outcomes": ["no_verdict", "right"]})]
    sample(tmp_path, Runner(), "attempts=2", "keep=valid", tasks=tasks)
    again = Runner()
    sample(tmp_path, again, "attempts=2", "keep=valid", tasks=tasks)
    assert (again.started, demonstrations(tmp_path)) == ([], ["t0/0/0"])


def test_a_question_of_both_the_teacher_and_rl_is_refused(tmp_path):
    same = dataclasses.replace(make_task(7), id="other")
    for reserved in (make_task(7), same):
        write_tasks(tmp_path / "sample.jsonl", TASKS[:9])
        write_tasks(tmp_path / "rl.jsonl", [make_task(50), reserved])
        config = make_config(tmp_path / "run", f"sample.data={tmp_path / 'sample.jsonl'}", f"rl.data={tmp_path / 'rl.jsonl'}")
        with pytest.raises(ConfigError, match=f"rl.data: must share no question .* got '{reserved.id}' in both"):
            questions_for_teacher(config)


def test_the_date_of_a_prompt_is_that_of_the_first_start(tmp_path):
    config = make_config(tmp_path, "prompt.style=released")
    first = dated(config)
    assert first.prompt.current_date == datetime.date.today().isoformat()
    (tmp_path / "date").write_text("2026-01-31")
    assert dated(config).prompt.current_date == "2026-01-31"
    assert dated(make_config(tmp_path, "prompt.style=released", "prompt.current_date=2026-02-01")).prompt.current_date == "2026-02-01"
    assert dated(make_config(tmp_path, "prompt.style=brief")).prompt.current_date == ""


def test_what_an_outage_took_is_tried_again_by_the_next_start(tmp_path):
    tasks = [dataclasses.replace(make_task(0), metadata={"outcomes": ["outage", "wrong"]})]
    sample(tmp_path, Runner(), "attempts=2", tasks=tasks)
    assert states(tmp_path) == {"t0": ("unsolved", "outage", "wrong")}
    tasks = [dataclasses.replace(make_task(0), metadata={"outcomes": ["right", "wrong"]})]
    sample(tmp_path, Runner(), "attempts=2", tasks=tasks)
    assert states(tmp_path) == {"t0": ("demonstrated", "passed", "wrong")}
    assert demonstrations(tmp_path) == ["t0/0/0"]
