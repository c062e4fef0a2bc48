"""What the caller got wrong: one clear line within seconds, exit code 2, before Ray starts, and nothing left behind.

What needs a cluster to go wrong (an outage in the middle, a server that only the actors cannot reach) is in tests/cluster.
"""

from __future__ import annotations

import shutil
import socket
import sys
import types
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import answer, search
from tests.rollout_fakes import CountingTasks, ListRecorder, TimedRunner, make_member, make_task
from tests.runs_fakes import FakeLearner, make_config, make_services, open_telemetry
from tests.small_disk import small_disk
from tests.virtual_time import run_virtual
from webdancer import cli, preflight
from webdancer.agent.prompt import Message
from webdancer.config import Config, load
from webdancer.data.demonstrations import Demonstration, demonstration_row, write_demonstrations
from webdancer.data.tasks import TaskStream, read_tasks, write_tasks
from webdancer.errors import ConfigError, ServiceError
from webdancer.model_location import model_path
from webdancer.rollout.collector import GroupCollector
from webdancer.rollout.outage import OutageGuard
from webdancer.runs import rl
from webdancer.runs.evaluate import evaluate
from webdancer.runs.sample import try_all
from webdancer.runs.teacher import Teacher
from webdancer.synthesis.attempts import AttemptLog
from webdancer.types import EpisodeLost, Sampling
from webdancer.whole_file import write_whole

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "ray_configs" / "quickstart.yaml")


@pytest.fixture
def no_cluster(monkeypatch):
    """Nothing here may get as far as Ray."""

    class Untouchable(types.ModuleType):
        def __getattr__(self, name):
            raise AssertionError(f"{name}: the cluster must not be opened")

    monkeypatch.setitem(sys.modules, "webdancer.cluster.launch", Untouchable("launch"))


@pytest.fixture
def closed_port():
    """Bound and not listening: whoever connects is refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def taken_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def refused(capsys, *arguments: str, run_dir: Path) -> str:
    """The one line of a command that must fail; nothing may be there afterwards."""
    before = sorted(run_dir.rglob("*"))
    assert cli.main([arguments[0], "--config", QUICKSTART, f"run_dir={run_dir}", *arguments[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("webdancer: ")
    assert sorted(run_dir.rglob("*")) == before
    assert run_dir.exists() == bool(before)
    return line.removeprefix("webdancer: ")


@pytest.mark.parametrize("program", ["quickstart", "rl", "evaluate", "chat"])
@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "a/b/c", "nowhere", "builtin:huge"])
def test_a_missing_model(no_cluster, capsys, tmp_path, program, path):
    questions = tmp_path / "questions.jsonl"
    write_tasks(questions, [make_task(1)])
    data = [f"rl.data={questions}", f"evaluation.data={questions}"]
    assert refused(capsys, program, f"model.path={path}", *data, run_dir=tmp_path / "run").startswith("model.path: must be ")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_directory_that_is_no_whole_model(no_cluster, capsys, tmp_path, missing):
    shutil.copytree(model_path("builtin:tiny"), tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    line = refused(capsys, "quickstart", f"model.path={tmp_path}/model", run_dir=tmp_path / "run")
    assert line.startswith("model.path: must be a model's directory")
    assert line.endswith("without *.safetensors" if missing.startswith("model") else f"without {missing}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "must have at least one row, got an empty file"),
        ("\n\n", "must have at least one row, got an empty file"),
        ('{"question": "a", "answer": "b"}\n\n{"question": bad}\n', "line 3: must be JSON in UTF-8"),
        ('{"question": "a"}\n', "line 1: answer: must be"),
        (None, "must be a readable file"),
    ],
)
@pytest.mark.parametrize("key", ["rl.data", "evaluation.data", "sft.data"])
def test_files_of_questions_and_demonstrations(no_cluster, capsys, tmp_path, key, content, problem):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    program = {"rl.data": "rl", "evaluation.data": "evaluate", "sft.data": "sft"}[key]
    line = refused(capsys, program, f"{key}={path}", run_dir=tmp_path / "run")
    assert line.startswith(str(path))
    assert problem in line or (key == "sft.data" and "line 1: messages" in line)


def test_a_demonstration_longer_than_the_budget(no_cluster, capsys, tmp_path):
    path, page = tmp_path / "data.jsonl", "<tool_response>\n{}\n</tool_response>"
    said = [("system", "Search."), ("user", "Who?"), ("assistant", search(["x"])), ("user", page), ("assistant", answer("Karo Mil"))]
    rows = []
    for name, words in (("short", 1), ("long", 20_000)):
        messages = tuple(Message(role=role, content=content.replace("{}", "page " * words)) for role, content in said)
        rows.append(demonstration_row(Demonstration(id=name, messages=messages, answers=("x",), source="")))
    write_demonstrations(path, rows)
    line = refused(capsys, "sft", f"sft.data={path}", run_dir=tmp_path / "run")
    assert line.startswith("learner.token_budget: must hold the longest sample, got 8192 for 'long' of ")
    drops = load([QUICKSTART], [f"sft.data={path}", "learner.too_long=drop"])
    run_virtual(preflight.check(drops, "sft"))


@pytest.mark.parametrize(
    ("words", "settings", "line"),
    [
        (3000, [], "episode.max_tokens: must hold the longest prompt and an episode, got 2048 for a prompt of "),
        (
            3,
            ["prompt.style=released", "learner.too_long=drop", "learner.token_budget=300"],
            "learner.token_budget: must hold the longest prompt",
        ),
        (3, [], ""),
    ],
)
def test_a_prompt_that_leaves_no_room_for_an_episode(tmp_path, words, settings, line):
    questions = tmp_path / "questions.jsonl"
    write_tasks(questions, [make_task(1), replace(make_task(2), question="where " * words)])
    config = load([QUICKSTART], [f"rl.data={questions}", f"run_dir={tmp_path}/run", *settings])
    if not line:
        preflight._check_prompts(config)
        return
    with pytest.raises(ConfigError, match=line):
        preflight._check_prompts(config)


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("sample", "sample.data: must name a file of questions where the run directory has none"),
        ("sft", "sft.data: must name a file of demonstrations"),
        ("rl", "rl.data: must name a file of questions"),
        ("evaluate", "evaluation.data: must name a file of questions"),
    ],
)
def test_a_program_before_the_one_that_it_builds_on(no_cluster, capsys, tmp_path, program, line):
    assert line in refused(capsys, program, run_dir=tmp_path / "run")


def test_an_export_without_a_checkpoint(no_cluster, capsys, tmp_path):
    line = refused(capsys, "export", "--to", str(tmp_path / "model"), run_dir=tmp_path / "run")
    assert line.startswith("run_dir: must hold a checkpoint to export")
    assert not (tmp_path / "model").exists()


def test_a_taken_port(no_cluster, capsys, tmp_path, taken_port):
    line = refused(capsys, "quickstart", f"web.port={taken_port}", run_dir=tmp_path / "run")
    assert line.startswith(f"web.port: must be a port that is free on 127.0.0.1, got {taken_port}")


def test_a_search_that_does_not_answer(no_cluster, capsys, tmp_path, closed_port):
    origin = f"http://127.0.0.1:{closed_port}"
    line = refused(capsys, "quickstart", f"tools.search.url={origin}", run_dir=tmp_path / "run")
    assert line.startswith(f"tools.search.url: must be a search that answers, got {origin!r}")


def test_a_site_that_does_not_answer(no_cluster, capsys, tmp_path, closed_port):
    from webdancer.offline_web.server import running_server

    site = f"http://127.0.0.1:{closed_port}"
    with running_server(num_entities=600) as origin:
        settings = [f"tools.search.url={origin}", f"tools.visit.site={site}"]
        line = refused(capsys, "quickstart", *settings, run_dir=tmp_path / "run")
    assert line.startswith(f"tools.visit.site: must be a site that answers, got {site!r}")


def test_a_search_without_its_key(no_cluster, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    assert refused(capsys, "quickstart", "tools.search.backend=serper", run_dir=tmp_path / "run").startswith("SERPER_API_KEY: must be set")


def test_a_judge_that_does_not_answer(no_cluster, capsys, tmp_path, closed_port):
    settings = ["judge.backend=openai", f"judge.base_url=http://127.0.0.1:{closed_port}/v1", "judge.max_attempts=1"]
    line = refused(capsys, "quickstart", *settings, run_dir=tmp_path / "run")
    assert line.startswith("judge.base_url: must be a judge that answers")


def test_a_run_directory_of_another_configuration_stays_as_it_was(no_cluster, capsys, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("name: other\nrollout: {group_size: 4}\n")
    line = refused(capsys, "quickstart", "model.path=builtin:tiny", run_dir=run_dir)
    assert "belongs to another configuration" in line
    assert "rollout.group_size: 4 there, 8 here" in line
    assert (run_dir / "config.yaml").read_text().startswith("name: other")


# ---------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_keeps_what_was_there_and_leaves_nothing_half_written(tmp_path):
    with small_disk(tmp_path / "disk", kib=64) as disk:
        write_whole(disk / "a.json", b"old")
        write_tasks(disk / "t.jsonl", [make_task(1)])
        with pytest.raises(OSError, match="No space left on device"):
            write_whole(disk / "a.json", b"x" * 200_000)
        with pytest.raises(OSError, match="No space left on device"):
            write_tasks(disk / "t.jsonl", map(make_task, range(9999)))
        assert (disk / "a.json").read_bytes() == b"old"
        assert len(read_tasks(disk / "t.jsonl")) == 1
        assert {path.name for path in disk.iterdir()} == {"a.json", "t.jsonl"}


def test_a_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    module = types.ModuleType("fake_program")

    async def check(config, name):
        return None

    async def run(config, telemetry, open_services):
        with open("/dev/full", "w") as full:
            full.write("x")

    module.check, module.run = check, run
    launch = types.ModuleType("launch")
    launch.services = None
    monkeypatch.setitem(sys.modules, "fake_program", module)
    monkeypatch.setitem(sys.modules, "webdancer.cluster.launch", launch)
    monkeypatch.setitem(cli.PROGRAMS, "rl", ("fake_program:run", "a fake"))
    assert cli.main(["rl", f"run_dir={tmp_path / 'run'}", "telemetry.wandb_mode=disabled"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "webdancer: disk: must have room for what the run writes, got: [Errno 28] No space left on device"


# ------------------------------------------------------------------------------------------ outage in the middle of a run


class Fragile:
    """An EpisodeRunner whose tools are gone from the `good`-th episode on, but for those numbered in `well_again`."""

    def __init__(self, runner, *, good: int, well_again: range = range(0)) -> None:
        self._runner = runner
        self._good = good
        self._well_again = well_again
        self.num_run = 0

    async def run(self, task, *, member, attempt, **options):
        outcome = await self._runner.run(task, member=member, attempt=attempt, **options)
        self.num_run += 1
        if self.num_run <= self._good or self.num_run in self._well_again:
            return outcome
        return make_member(task, member=member, attempt=attempt, valid=False)


async def test_a_short_outage_passes_and_a_lasting_one_ends():
    fragile = Fragile(TimedRunner(), good=5, well_again=range(9, 12))
    guarded = OutageGuard(fragile, limit=4)
    for index in range(5 + 3 + 3 + 3):
        await guarded.run(make_task(index), member=0, attempt=0, sampling=Sampling())
    with pytest.raises(ServiceError, match="the last 4 episodes were all lost to an outage"):
        await guarded.run(make_task(99), member=0, attempt=0, sampling=Sampling())


def test_an_outage_in_rl_ends_the_run_with_its_finished_steps_saved(tmp_path):
    config = make_config(tmp_path, "rl.num_steps=50", "rl.save_every=100")
    learner = FakeLearner([])
    # Mixed groups only: two steps of two groups of four, then nothing but invalid members.
    runner = OutageGuard(Fragile(TimedRunner(correct=lambda task, attempt, member: member % 2 == 0), good=16), limit=16)
    tasks = TaskStream([make_task(index) for index in range(9)], seed=1)
    with open_telemetry(config) as telemetry:
        program = rl.train(config, tasks, (), make_services(learner, runner=runner), telemetry)
        with pytest.raises(ServiceError, match="16 episodes were all lost"):
            run_virtual(program)
    assert learner.events[-1] == ("save", 2), "the steps that were finished are not lost"


class Unlucky:
    """Of two members in three, the tools are gone; the others never used one. No row of lost episodes is long."""

    async def run(self, task, *, member, attempt, **options):
        return make_member(task, member=member, attempt=attempt, correct=False, valid=member % 3 == 0)


async def test_groups_that_an_outage_thins_out_are_not_blamed_on_the_questions(tmp_path):
    config = make_config(tmp_path, "rollout.group_size=3")
    async with GroupCollector(config.rollout, CountingTasks(), OutageGuard(Unlucky(), limit=99), ListRecorder()) as collector:
        with pytest.raises(ServiceError, match=r"most groups lost members to outages; 0 of 2 mixed groups found; .* 100% too_few_valid"):
            await collector.next_batch()


async def test_engines_that_fail_everyone_are_named_and_not_the_tools(tmp_path):
    class Garbage:
        async def run(self, task, *, member, attempt, **options):
            return EpisodeLost(task_id=task.id, member=member, attempt=attempt, reason="generate: the engine gave the log-probability nan")

    config = make_config(tmp_path)
    async with GroupCollector(config.rollout, CountingTasks(), OutageGuard(Garbage(), limit=99), ListRecorder()) as collector:
        with pytest.raises(ServiceError, match=r"engines: must answer, .* most often to: lost 4 times: generate: .* nan; 0"):
            await collector.next_batch()


async def test_an_outage_in_an_evaluation_leaves_nothing_running():
    runner = TimedRunner(latency_s=lambda task, member: 0.01 if task.id == "t0" else 60.0)
    with pytest.raises(ServiceError):
        await evaluate(
            [make_task(index) for index in range(3)],
            OutageGuard(Fragile(runner, good=0), limit=1),
            stage="base",
            version=0,
            num_samples=2,
            sampling=Sampling(),
        )
    assert runner.running == 0


async def test_an_outage_in_sampling_leaves_nothing_running(tmp_path):
    runner = TimedRunner(latency_s=lambda task, member: 0.01 if task.id == "t0" else 60.0)
    teacher = Teacher(runner=OutageGuard(Fragile(runner, good=0), limit=1))
    with closing(AttemptLog(tmp_path / "attempts.jsonl", keep="quality")) as log, pytest.raises(ServiceError):
        await try_all(Config(), [make_task(index) for index in range(3)], teacher, log)
    assert runner.running == 0
