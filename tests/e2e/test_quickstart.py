"""The quickstart in small through the command line, on real Ray, vLLM and FSDP2; then everything that one does with a run.

The run is made once (about two minutes); the tests go on from it in the order of this file.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from tests.e2e.command import CONFIGS, Command

pytest.importorskip("vllm")

import torch

from webdancer.data.tasks import read_tasks
from webdancer.telemetry.telemetry import read_metrics

START_S = 300.0
"""For Ray, engine and learner to start on a busy machine."""


class Run:
    """A run directory, and the commands that worked in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commands: list[Command] = []

    def start(self, program: str, *arguments: str, **settings: object) -> Command:
        command = Command(program, *CONFIGS, f"run_dir={self.directory}", *arguments, **settings)  # type: ignore[arg-type]
        self.commands.append(command)
        return command

    def metrics(self, phase: str) -> dict[int, dict[str, float]]:
        return read_metrics(self.directory).get(phase, {})

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]

    def evaluation(self, stage: str) -> list[dict]:
        return json.loads((self.directory / "evaluations" / f"{stage}.json").read_text())["rows"]

    def greedy(self, stage: str) -> float:
        rows = self.evaluation(stage)
        return sum(row["greedy_correct"] for row in rows) / len(rows)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def runs():
    """Makes runs, and ends what a failed test of theirs left running."""
    made: list[Run] = []

    def make(directory: Path) -> Run:
        made.append(Run(directory))
        return made[-1]

    yield make
    for run in made:
        for command in run.commands:
            command.kill()


@pytest.fixture(scope="module")
def run(directories, runs) -> Run:
    """A whole quickstart from nothing, at a terminal."""
    made = runs(directories / "run")
    quickstart = made.start("quickstart", terminal=True)
    assert quickstart.wait(600) == 0, quickstart.output[-3000:]
    return made


def test_a_person_sees_every_phase_and_nothing_else(run):
    shown = run.commands[0]
    assert not shown.noise()
    phases = ["synthesize", "start", "sample", "evaluate base", "warm start", "evaluate sft", "RL", "evaluate rl-2", "export"]
    finished = [line.split(": done after")[0] for line in shown.lines if ": done after" in line]
    assert finished == phases
    assert shown.lines[-1] == f"report: {run.directory}/report.html"
    assert shown.left_behind(5) == []


def test_it_learns(run):
    assert run.greedy("base") == 0
    assert run.greedy("sft") >= 0.3
    assert run.greedy("rl-2") >= 0.3
    assert {row["answer"] is None for row in run.evaluation("base")} == {True}


def test_every_step_of_rl_trains_what_the_engines_serve(run):
    steps = run.metrics("rl")
    assert list(steps) == [1, 2]
    for metrics in steps.values():
        assert metrics["canary/mean"] < 1e-5
        assert metrics["canary/max"] < 1e-3
        assert metrics["train/max_mismatch_abs"] < 1e-3  # on the trained tokens themselves
        assert metrics["rollout/staleness_max"] == 0
        assert metrics["rollout/groups_kept"] == 4
        assert metrics["train/tokens"] > 100
        assert metrics["train/skipped_updates"] == 0
        assert metrics["train/grad_norm"] > 0


def test_every_trajectory_is_recorded_with_decision_and_versions(run):
    rows = [row for row in run.rows("trajectories.jsonl") if row["phase"] == "RL"]
    decisions = {row["decision"] for row in rows}
    assert "kept" in decisions
    assert decisions <= {"kept", "all_correct", "all_wrong", "too_few_valid", "surplus"}
    first = min(row["start_version"] for row in rows)
    assert first == max(run.metrics("sft"))  # RL starts from the warm start's last version
    kept = [row for row in rows if row["decision"] == "kept"]
    assert len(kept) == 2 * 4 * 6
    for row in kept:
        assert row["versions"] == [row["start_version"]] * 2  # synchronous: one version from the first to the last token
        for turn in row["turns"]:
            assert turn["versions"] == [[row["start_version"], 0, turn["num_tokens"]]]
    assert {row["start_version"] for row in kept} == {first, first + 1}
    accuracies = {}
    for row in kept:
        accuracies.setdefault(row["id"].rsplit("/", 1)[0], set()).add(row["reward"]["answer"])
    assert all(len(values) == 2 for values in accuracies.values())  # mixed groups only


def test_what_a_run_leaves(run):
    directory = run.directory
    assert (directory / "config.yaml").read_text().startswith("name: small")
    (offline,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    assert offline.stat().st_size > 10_000
    page = (directory / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\(\s*['\"]?(https?:)?//", page)
    assert not re.search(r"\b(src|href)\s*=\s*['\"]?(https?:)?//", page)
    assert {path.name for path in (directory / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    pools = {name: read_tasks(directory / "questions" / f"{name}.jsonl") for name in ("rl", "sft", "heldout")}
    questions = {name: {task.question for task in tasks} for name, tasks in pools.items()}
    assert not questions["heldout"] & (questions["rl"] | questions["sft"])
    assert not questions["rl"] & questions["sft"]


def test_a_directory_of_another_configuration_is_refused(run):
    other = run.start("quickstart", "seed=5")
    assert other.wait(60) == 2
    assert len(other.lines) == 1
    assert "seed: 0 there, 5 here" in other.lines[0]


def test_ctrl_c_while_services_start(run):
    starting = run.start("quickstart", "rl.num_steps=40", terminal=True)
    starting.until(lambda: "start" in starting.output, 60)
    starting.until(lambda: any("LearnerActor" in line for line in starting.processes()), 60)
    stops_cleanly(starting)


def test_ctrl_c_in_rl_and_going_on(run):
    sft_rows = len(run.metrics("sft"))
    longer = run.start("quickstart", "rl.num_steps=40", terminal=True)
    longer.until(lambda: 4 in run.metrics("rl"), START_S)
    stops_cleanly(longer)
    assert not any("warm start" in line for line in longer.lines)
    steps = run.metrics("rl")
    assert list(steps) == list(range(1, len(steps) + 1))

    last = len(steps) + 1
    again = run.start("quickstart", f"rl.num_steps={last}")
    assert again.wait(START_S + 120) == 0, again.output[-3000:]
    assert not again.noise()
    assert len(run.metrics("sft")) == sft_rows
    steps = run.metrics("rl")
    assert list(steps) == list(range(1, last + 1))
    assert all(metrics["canary/mean"] < 1e-5 and metrics["canary/max"] < 1e-3 for metrics in steps.values())
    versions = {row["start_version"] for row in run.rows("trajectories.jsonl") if row["phase"] == "RL" and row["decision"] == "kept"}
    assert versions == set(range(sft_rows, sft_rows + last))
    assert run.greedy(f"rl-{last}") >= 0.3
    assert again.left_behind(5) == []


def stops_cleanly(command: Command) -> None:
    """Ctrl-C: the code 130 and one line within seconds, and no process left."""
    command.interrupt()
    assert command.wait(60) == 130, command.output[-3000:]
    assert command.left_behind(5) == []
    assert not command.noise()
    assert command.lines[-1] == "webdancer: stopped; the same command goes on where it was"


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """The newest checkpoint as a Hugging Face directory."""
    to = run.directory.parent / "exported"
    export = run.start("export", f"--to={to}")
    assert export.wait(START_S) == 0, export.output[-3000:]
    assert not export.noise()
    assert str(to) in export.lines[-1]
    return to


def test_the_export_is_the_run_and_loads_everywhere(run, exported):
    from safetensors.torch import load_file

    final, written = load_file(run.directory / "model" / "model.safetensors"), load_file(exported / "model.safetensors")
    assert final.keys() == written.keys()
    assert all(torch.equal(final[name], written[name]) for name in final)
    asyncio.run(check_engine_agrees_with_transformers(exported, run.evaluation("sft")[0]["question"]))


async def check_engine_agrees_with_transformers(directory: Path, question: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from webdancer.agent.tokenizer import load_tokenizer
    from webdancer.config import EngineConfig
    from webdancer.inference.engine import VllmEngine
    from webdancer.types import Sampling

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    text = f"<|im_start|>system\nYou are a web agent.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text)["input_ids"]
    ours = load_tokenizer(str(directory))
    assert prompt == ours.encode(text)
    engine = VllmEngine(str(directory), ours, EngineConfig(kv_cache_gib=0.25, max_num_seqs=8), dtype="float32", max_model_len=512)
    await engine.start()
    try:
        said = await engine.complete(prompt, sampling=Sampling(temperature=0.0), max_tokens=60, session="one")
        (scores,) = await engine.score([[*prompt, *said.token_ids]])
    finally:
        await engine.stop()
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=ours.eos_id)[0]
        logits = model(torch.tensor([[*prompt, *said.token_ids]])).logits[0].log_softmax(-1)
    assert [*prompt, *said.token_ids] == expected.tolist()
    targets = torch.tensor([*prompt[1:], *said.token_ids])
    wanted = logits[:-1].gather(1, targets[:, None])[:, 0]
    assert float((torch.tensor(scores) - wanted).abs().max()) < 1e-4
    assert '{"name": "search"' in said.text


def test_evaluate_says_what_the_run_said(run, runs, exported):
    data = run.directory / "questions" / "heldout.jsonl"
    evaluated = runs(exported.parent / "evaluated")
    evaluate = evaluated.start("evaluate", f"model.path={exported}", f"evaluation.data={data}")
    assert evaluate.wait(START_S + 60) == 0, evaluate.output[-3000:]
    assert not evaluate.noise()
    figures = dict(line.rsplit(None, 1) for line in evaluate.lines if re.fullmatch(r"\S+ +[\d.]+", line))
    last = max(run.metrics("rl"))
    assert float(figures["all/greedy"]) == pytest.approx(run.greedy(f"rl-{last}"), abs=0.05)  # near ties go by the batch
    assert {"all/pass@1", "hop_1/greedy", "hop_2/greedy"} <= figures.keys()
    assert evaluate.left_behind(5) == []


def test_chat_answers(run, runs, exported):
    last = max(run.metrics("rl"))
    solved = next(row for row in run.evaluation(f"rl-{last}") if row["greedy_correct"] and row["hops"] == 1)
    talk = runs(exported.parent / "chat").start("chat", f"model.path={exported}", stdin=f"{solved['question']}\n")
    assert talk.wait(START_S) == 0, talk.output[-3000:]
    assert not talk.noise()
    assert any(f"=> {answer}" in talk.output for answer in solved["answers"])
    assert re.search(r"^> (search|visit)\b", talk.output, re.MULTILINE)
    assert talk.left_behind(5) == []


def test_one_version_behind(run, runs, exported):
    """`webdancer rl` by itself, with rollout and learning overlapped, and a learner of two ranks."""
    behind = runs(exported.parent / "behind")
    data = run.directory / "questions" / "rl_pool.jsonl"
    settings = [f"model.path={exported}", f"rl.data={data}", "rl.num_steps=3", "rollout.max_staleness=1", "learner.num_ranks=2"]
    rl = behind.start("rl", *settings)
    assert rl.wait(START_S + 120) == 0, rl.output[-3000:]
    assert not rl.noise()
    steps = behind.metrics("rl")
    assert list(steps) == [1, 2, 3]
    assert all(metrics["rollout/staleness_max"] <= 1 for metrics in steps.values())
    assert any(metrics["rollout/staleness_max"] == 1 for metrics in steps.values())
    assert all(metrics["canary/mean"] < 1e-5 and metrics["canary/max"] < 1e-3 for metrics in steps.values())
    assert rl.left_behind(5) == []
