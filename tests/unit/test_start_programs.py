"""What the commands do with what an earlier one left in the run directory."""

from __future__ import annotations

import dataclasses
from contextlib import asynccontextmanager

import pytest

from tests.fakes import answer, make_tokenizer, search
from tests.rollout_fakes import TimedRunner, make_task
from tests.runs_fakes import FakeLearner, make_config, make_services, open_telemetry
from tests.virtual_time import run_virtual
from webdancer import start
from webdancer.agent.prompt import Message
from webdancer.data.demonstrations import Demonstration, demonstration_row, write_demonstrations
from webdancer.data.tasks import write_tasks
from webdancer.errors import ConfigError
from webdancer.evaluation.results import read_evaluation

MESSAGES = (
    Message(role="system", content="You are a web agent."),
    Message(role="user", content="What is the school of Karo Mil?"),
    Message(role="assistant", content=search(["Karo Mil"])),
    Message(role="user", content="<tool_response>\nNothing.\n</tool_response>"),
    Message(role="assistant", content=answer("Bana School")),
)


def run_sft(config, learner):
    @asynccontextmanager
    async def open_services(config, *, parts=frozenset()):
        yield dataclasses.replace(make_services(learner), tokenizer=make_tokenizer())

    with open_telemetry(config) as telemetry:
        return run_virtual(start.sft(config, telemetry, open_services))


@pytest.fixture
def config(tmp_path):
    rows = [demonstration_row(Demonstration(id=f"d{index}", messages=MESSAGES, answers=("x",), source="")) for index in range(4)]
    write_demonstrations(tmp_path / "demonstrations.jsonl", rows)
    return make_config(tmp_path, "sft.epochs=2", "sft.validation_fraction=0")


def test_a_warm_start_that_is_done_is_not_done_again(config, tmp_path):
    learner = FakeLearner([])
    run_sft(config, learner)
    assert [event[0] for event in learner.events] == ["begin", "step", "step", "save", "export"]
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    learner.events.clear()
    run_sft(config, learner)
    assert learner.events == [("export", 2)]


@pytest.mark.parametrize("num_heldout", [2, 0])
def test_rl_asks_the_held_out_questions_before_and_after(tmp_path, capsys, num_heldout):
    tasks = [make_task(index) for index in range(5)]
    write_tasks(tmp_path / "rl.jsonl", tasks[1:])
    again = dataclasses.replace(tasks[1], id="again", question=f"{tasks[1].question.upper()} ?")
    write_tasks(tmp_path / "heldout.jsonl", [tasks[0], again][:num_heldout])
    settings = [
        "rl.num_steps=2",
        f"rl.evaluate_every={0 if num_heldout else 1}",
        "tools.search.url=http://127.0.0.1:9",
        "tools.visit.site=http://127.0.0.1:9",
    ]
    files = [f"rl.data={tmp_path}/rl.jsonl"] + [f"evaluation.data={tmp_path}/heldout.jsonl"] * bool(num_heldout)
    learner = FakeLearner([])

    @asynccontextmanager
    async def open_services(config, *, parts=frozenset()):
        yield make_services(learner, runner=TimedRunner())

    config = make_config(tmp_path / "run", *settings, *files)
    with open_telemetry(config) as telemetry:
        run_virtual(start.rl(config, telemetry, open_services))
    found = {path.stem: read_evaluation(path) for path in (tmp_path / "run" / "evaluations").glob("*.json")}
    assert {stage: len(one.rows) for stage, one in found.items()} == ({"rl-0": 2, "rl-2": 2} if num_heldout else {})
    assert all(one.version == (learner.version if stage == "rl-2" else 0) for stage, one in found.items())
    shown = capsys.readouterr().out
    assert ("no held-out questions" in shown) == (num_heldout == 0)
    assert ("note: 1 of 2 held-out questions are trained on as well" in shown) == (num_heldout == 2)


def test_a_run_that_went_on_to_rl_has_no_warm_start_to_resume(config, tmp_path):
    """RL's step number is not a place in the demonstrations."""
    learner = FakeLearner([])
    run_virtual(learner.save(tmp_path, {"phase": "rl", "step": 1}))
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="run_dir: must be new or in its warm start"):
        run_sft(config, learner)
    assert learner.events == [("save", 1)]
