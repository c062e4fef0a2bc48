"""Benchmarks in rounds: asked, written, resumed by question, summed up; and nothing invented where a verdict is missing."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.rollout_fakes import TimedRunner, make_member
from tests.runs_fakes import make_config, open_telemetry
from tests.virtual_time import run_virtual
from webdancer.errors import ConfigError, DataError, ServiceError
from webdancer.evaluation.attempts import NO_ANSWER, read_attempts, read_judged
from webdancer.evaluation.round_table import table
from webdancer.rewards.judge import NO_USE, MatchJudge
from webdancer.runs.benchmark import paper_sampling, run_benchmark
from webdancer.runs.judge_agreement import judge_again
from webdancer.telemetry.recorder import read_trajectories
from webdancer.telemetry.telemetry import read_metrics
from webdancer.tools.result import BUDGET_SPENT
from webdancer.types import EpisodeLost, JudgeUse, Sampling, StopReason, Task, Verdict

TASKS = tuple(
    Task(id=f"q{index}", question=f"Which school, {index}?", answers=("yes",), source="gaia", metadata={"level": 1 + index % 2})
    for index in range(4)
)


class Runner(TimedRunner):
    """Keeps who was run, with what; `lost`, `unknown`, `silent` hold (task, round); stops the run at episode `dies_at`."""

    def __init__(self, *, lost=(), unknown=(), silent=(), dies_at=None, use=NO_USE, **rest):
        super().__init__(**rest)
        self.use = use
        self.lost, self.unknown, self.silent, self.dies_at = set(lost), set(unknown), set(silent), dies_at
        self.ran: list[tuple[str, int]] = []
        self.sampling: set[Sampling] = set()

    async def run(self, task, *, member, attempt, sampling, resume_from=(), on_turn=None):
        key = task.id, member + 1
        self.sampling.add(sampling)
        if key in self.lost:
            return EpisodeLost(task_id=task.id, member=member, attempt=attempt, reason="gone")
        if len(self.ran) == self.dies_at:
            raise RuntimeError("stopped in the middle")
        self.ran.append(key)
        scored = await super().run(task, member=member, attempt=attempt, sampling=sampling)
        correct = scored.reward.answer > 0
        made = make_member(task, member=member, correct=correct, valid=key not in self.unknown)
        if key in self.unknown:
            made = dataclasses.replace(made, verdict=Verdict(status="unknown", reason="status 503", judge="m"))
        if key in self.silent:
            trajectory = dataclasses.replace(made.trajectory, answer=None, stop=StopReason.MAX_TOKENS)
            made = dataclasses.replace(made, trajectory=trajectory, verdict=Verdict(status="wrong", reason="no answer"))
        return dataclasses.replace(made, verdict=dataclasses.replace(made.verdict, use=self.use))


class CountingJudge(MatchJudge):
    def __init__(self, *, use=NO_USE, reason=""):
        self.asked, self.use, self.reason = [], use, reason

    async def grade(self, task, answer):
        self.asked.append(task.id)
        verdict = await super().grade(task, answer)
        return dataclasses.replace(verdict, use=self.use) if not self.reason else Verdict(status="unknown", reason=self.reason)


def make(tmp_path, *overrides):
    return make_config(tmp_path / "run", "model.path=builtin:tiny", "evaluation.benchmark=gaia", *overrides)


def evaluated(config, runner, *, tasks=TASKS, judge=None):
    with open_telemetry(config) as telemetry:
        return run_virtual(run_benchmark(config, tasks, runner, judge or MatchJudge(), telemetry))


def rows_of(tmp_path, round):
    return [json.loads(line) for line in (tmp_path / "run" / "benchmarks" / "gaia" / f"iter{round}.jsonl").read_text().splitlines()]


def test_every_question_is_asked_once_a_round_as_the_paper_samples(tmp_path):
    runner = Runner(correct=lambda task, attempt, member: task.id == "q0" or member == 1)
    figures = evaluated(make(tmp_path), runner)
    assert sorted(runner.ran) == sorted((task.id, round) for task in TASKS for round in (1, 2, 3))
    assert runner.sampling == {Sampling(temperature=0.6, top_p=0.95, repetition_penalty=1.0)}
    accuracy = figures.accuracy
    assert accuracy.pass_at_1 == (0.25, 1.0, 0.25)
    assert (accuracy.avg, accuracy.best) == (0.5, 1.0)
    assert (accuracy.pass_at_k.mean, accuracy.cons_at_k.mean, accuracy.majority_at_k.mean) == pytest.approx((1.0, 0.5, 0.25))
    assert {value: one.avg for value, one in figures.by["level"].items()} == pytest.approx({"1": 4 / 6, "2": 2 / 6})
    saved = json.loads((tmp_path / "run" / "benchmarks" / "gaia" / "result.json").read_text())
    assert saved["figures"]["accuracy"]["avg"] == 0.5
    assert read_metrics(tmp_path / "run")["evaluation"][0]["benchmark/gaia/majority@3"] == 0.25
    assert len(list(read_trajectories(tmp_path / "run"))) == 12


def test_rows_are_in_the_released_layout(tmp_path):
    evaluated(make(tmp_path), Runner(silent=[("q1", 2)], correct=lambda task, attempt, member: task.id == "q0"))
    (row,) = [row for row in rows_of(tmp_path, 2) if row["id"] == "q0"]
    assert {name: row[name] for name in ("question", "answer", "prediction", "termination", "rollout_id", "is_correct", "judgement")} == {
        "question": "Which school, 0?",
        "answer": "yes",
        "prediction": "yes",
        "termination": "answer",
        "rollout_id": 2,
        "is_correct": True,
        "judgement": "Correct",
    }
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    (silent,) = [row for row in rows_of(tmp_path, 2) if row["id"] == "q1"]
    assert (silent["prediction"], silent["termination"]) == (NO_ANSWER, "format error: generate an answer as token limit reached")
    assert silent["judgement"] == "Incorrect", "no answer is the policy's own fault"


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    first = Runner(dies_at=5)
    with pytest.raises(RuntimeError, match="stopped in the middle"):
        evaluated(make(tmp_path), first)
    done = {(row["id"], round) for round in (1, 2, 3) for row in rows_of(tmp_path, round)}
    path = tmp_path / "run" / "benchmarks" / "gaia" / "iter1.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "q3", "fig')  # torn by the crash
    second = Runner()
    figures = evaluated(make(tmp_path), second)
    assert set(second.ran) == {(task.id, round) for task in TASKS for round in (1, 2, 3)} - done
    assert figures.accuracy.num_questions == 4
    assert len(read_attempts(path.parent)) == 12
    third = Runner()
    assert evaluated(make(tmp_path), third) == figures
    assert third.ran == []


def test_a_missing_verdict_counts_nowhere_and_is_asked_for_again(tmp_path):
    runner = Runner(unknown=[("q0", 1)], lost=[("q1", 1)], correct=lambda *any: True)
    figures = evaluated(make(tmp_path, "evaluation.rounds=1"), runner)
    assert (figures.accuracy.pass_at_1, figures.accuracy.num_questions, figures.unknown) == ((1.0,), 4, 0.5)
    assert {row["judgement"] for row in rows_of(tmp_path, 1) if not row["is_correct"]} == {"Error"}
    runner, judge = Runner(correct=lambda *any: False), CountingJudge()
    figures = evaluated(make(tmp_path, "evaluation.rounds=1"), runner, judge=judge)
    assert runner.ran == [("q1", 1)], "the episode that was lost"
    assert judge.asked == ["q0"], "the answer that has no verdict"
    assert figures.unknown == 0.0
    assert figures.accuracy.pass_at_1 == (0.75,)
    assert evaluated(make(tmp_path, "evaluation.rounds=1"), Runner()) == figures
    (last,) = [row for row in rows_of(tmp_path, 1) if row["id"] == "q0"][1:]
    assert last["messages"], "its episode is still there"


def test_what_the_judge_took_is_in_rows_table_figures_and_metrics(tmp_path):
    use = JudgeUse(requests=1, prompt_tokens=900, completion_tokens=100, usd=0.25)
    runner = Runner(unknown=[("q0", 1)], use=use)
    judged = evaluated(make(tmp_path, "evaluation.rounds=1"), runner)
    assert (judged.judge_requests, judged.judge_tokens, judged.judge_usd) == (4, 4000, 1.0)
    assert "judge: 4 requests, 4,000 tokens, $1.00 in all" in table(judged)
    again = evaluated(make(tmp_path, "evaluation.rounds=1"), Runner(), judge=CountingJudge(use=use))
    assert (again.judge_requests, again.judge_usd, again.unknown) == (5, 1.25, 0.0), "what an earlier start paid counts too"
    saved = json.loads((tmp_path / "run" / "benchmarks" / "gaia" / "result.json").read_text())["figures"]
    assert (saved["judge_tokens"], saved["judge_usd"]) == (5000, 1.25)
    assert read_metrics(tmp_path / "run")["evaluation"][0]["benchmark/gaia/judge_usd"] == 1.25
    assert "judge:" not in table(evaluated(make(tmp_path / "free", "evaluation.rounds=1"), Runner()))


def test_a_verdict_that_nobody_can_pay_for_ends_the_run(tmp_path):
    evaluated(make(tmp_path, "evaluation.rounds=1"), Runner(unknown=[("q0", 1)]))
    with pytest.raises(ServiceError, match=r"tools\.budget_usd: must cover the run, but is spent"):
        evaluated(make(tmp_path, "evaluation.rounds=1"), Runner(), judge=CountingJudge(reason=BUDGET_SPENT))
    assert len(rows_of(tmp_path, 1)) == 4, "nothing is written about it"


def test_what_a_lost_attempt_cost_is_not_forgotten_when_it_is_made_again(tmp_path):
    use = JudgeUse(requests=1, prompt_tokens=10, usd=0.5)
    silent = {"unknown": [("q0", 1)], "silent": [("q0", 1)]}
    config = make(tmp_path, "evaluation.rounds=1", "evaluation.num_tasks=1")
    first = Runner(use=use, **silent)
    assert evaluated(config, first).judge_usd == 0.5
    second = Runner(use=use)
    found = evaluated(config, second)
    assert second.ran == [("q0", 1)]
    assert (found.judge_requests, found.judge_tokens, found.judge_usd) == (2, 20, 1.0)


def test_a_run_whose_judge_was_away_has_no_score(tmp_path):
    figures = evaluated(make(tmp_path, "evaluation.rounds=1"), Runner(unknown=[(task.id, 1) for task in TASKS]))
    assert figures.unknown == 1.0
    assert figures.as_dict()["accuracy"]["avg"] is None
    assert figures.as_dict()["accuracy"]["cons_at_k"]["mean"] is None


def test_more_rounds_and_more_questions_are_added_to_what_is_there(tmp_path):
    evaluated(make(tmp_path, "evaluation.rounds=1", "evaluation.num_tasks=2"), Runner())
    runner = Runner()
    evaluated(make(tmp_path, "evaluation.rounds=2"), runner)
    assert sorted(runner.ran) == [("q0", 2), ("q1", 2), ("q2", 1), ("q2", 2), ("q3", 1), ("q3", 2)]


def test_rounds_of_other_settings_or_questions_are_not_mixed(tmp_path):
    evaluated(make(tmp_path), Runner())
    with pytest.raises(ConfigError, match=r"holds rounds of other settings \(temperature: 0.6 there, 1.0 here\); choose another name"):
        evaluated(make(tmp_path, "evaluation.temperature=1.0"), Runner())
    changed = (dataclasses.replace(TASKS[0], answers=("no",)), *TASKS[1:])
    with pytest.raises(DataError, match=r"iter1\.jsonl, line 1: id: must be of the same question as in the benchmark's file, got 'q0'"):
        evaluated(make(tmp_path), Runner(), tasks=changed)


def test_what_was_published_encrypted_is_written_sealed(tmp_path):
    secret = [dataclasses.replace(task, metadata={**task.metadata, "canary": "the key"}) for task in TASKS]
    evaluated(make(tmp_path), Runner(), tasks=secret)
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"Which school" not in written
    assert {row["is_correct"] for row in rows_of(tmp_path, 1)} == {True}
    attempt, task = read_judged(tmp_path / "run" / "benchmarks" / "gaia")[0]
    assert (task.question, task.answers, attempt.answer) == ("Which school, 0?", ("yes",), "yes")
    runner = Runner()
    evaluated(make(tmp_path), runner, tasks=secret)
    assert runner.ran == []
    path = tmp_path / "run" / "benchmarks" / "gaia" / "iter1.jsonl"
    path.write_text(path.read_text().replace('"canary":"the key"', '"canary":"another"'))
    with pytest.raises(DataError, match=r"iter1\.jsonl, line 1: must be a row that was sealed"):
        evaluated(make(tmp_path), Runner(), tasks=secret)


@pytest.mark.parametrize(
    ("template", "penalty"),
    [("{{ messages }}<|im_start|>assistant\n<think>\n", 1.1), ("{{ messages }}<|im_start|>assistant\n", 1.0), (None, 1.0)],
)
def test_a_model_that_thinks_first_gets_the_papers_penalty(tmp_path, template, penalty):
    model = tmp_path / "model"
    model.mkdir()
    if template is not None:
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert paper_sampling(make_config(tmp_path, f"model.path={model}")).repetition_penalty == penalty
    (model / "chat_template.jinja").write_text("<think>")
    assert paper_sampling(make_config(tmp_path, f"model.path={model}")).repetition_penalty == 1.1
    assert paper_sampling(make_config(tmp_path, f"model.path={model}", "evaluation.repetition_penalty=1.05")).repetition_penalty == 1.05


def test_two_judges_are_compared_on_the_recorded_answers(tmp_path):
    evaluated(make(tmp_path), Runner(correct=lambda task, attempt, member: task.id == "q0", silent=[("q3", 1)]))
    judged = read_judged(tmp_path / "run" / "benchmarks" / "gaia")
    found = run_virtual(judge_again(judged, MatchJudge()))
    assert (found.num_decided, found.agreement.mean, found.kappa) == (11, 1.0, 1.0)


@pytest.mark.parametrize("content", ['{"id": "q0"}\n', '{"figures": {}}\n', '{"id": "q0", "figures": {"status": "correct"}}\n'])
def test_a_row_that_is_none_is_named(tmp_path, content):
    (tmp_path / "iter1.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"iter1\.jsonl, line 1: must be a row of a benchmark's round"):
        read_attempts(tmp_path)
    with pytest.raises(DataError, match=r"must be a benchmark's directory with iter1\.jsonl"):
        read_attempts(tmp_path / "nowhere")
