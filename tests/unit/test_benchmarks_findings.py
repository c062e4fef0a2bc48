"""The harness of the findings: which commands a cell is, what is resumed, what the figures and verdicts say, and the alterations."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch

from benchmarks import findings, findings_data
from benchmarks.altered_program import ALTERATIONS, all_tokens, no_correction
from benchmarks.findings_cells import BY_NAME, CELLS
from benchmarks.findings_claims import CLAIMS, arm, cells_of, disagreement, first_sample, pass_at_1, pass_at_3, result_row, versus
from benchmarks.findings_report import difference, verdict, write_report
from benchmarks.reward_curves import compare
from benchmarks.shaky_web import build_app, is_lost, redrawn
from tests.fakes import answer, search
from webdancer.agent.prompt import Message
from webdancer.algorithm.losses import dapo_loss
from webdancer.config import load
from webdancer.data.demonstrations import Demonstration, demonstration_row, read_demonstrations, write_demonstrations
from webdancer.types import TrainSample


def episode(question, member, *, right, said="x", calls=2, valid=True):
    return {
        "decision": "evaluated",
        "task": {"id": question, "hops": 2},
        "member": member,
        "reward": {"answer": float(right), "format": 1.0, "valid": valid},
        "answer": said,
        "num_tool_calls": calls,
        "num_policy_tokens": 10 * calls,
    }


def result(rights, **about):
    """A cell in which question i has the verdicts rights[i]."""
    rows = [episode(f"q{i}", 1 + j, right=value, said=f"{value}") for i, row in enumerate(rights) for j, value in enumerate(row)]
    return result_row(rows, [f"q{i}" for i in range(len(rights))], about={"steps": 0, "minutes": 1.0, "commit": "c"} | about)


def test_a_result_is_kept_question_by_question():
    rows = [
        episode("a", 0, right=True),
        episode("a", 1, right=False, said="no"),
        episode("a", 1, right=True, said=" Yes"),  # of an evaluation that was stopped and run again
        episode("a", 2, right=True, said="yes", calls=4),
        episode("a", 3, right=False, said="no"),
        episode("b", 1, right=True, valid=False),
        episode("b", 2, right=False, said=None, calls=0),
    ]
    found = result_row(rows, ["a", "b", "c"], about={})
    assert found["greedy"] == [1, None, None]
    assert found["samples"] == [[1, 1, 0], [0], []]
    assert found["majority"] == [1, 0, None]
    assert found["calls"] == [2.667, 0.0, None]
    assert found["invalid"] == [0.0, 1.0, None]
    assert found["pass_at_1"] == pytest.approx((2 / 3 + 0) / 2)


def test_measures_have_a_value_a_question():
    cell = result([(1, 0, 0), (1, 1, 1), (0, 0, 0)])
    assert pass_at_1([cell]).tolist() == pytest.approx([1 / 3, 1, 0])
    assert pass_at_3([cell]).tolist() == [1, 1, 0]
    other = result([(0, 0, 0), (1, 1, 1), (1, 0, 0)])
    assert disagreement(first_sample)([cell, other]).tolist() == [1, 0, 1]


def test_a_difference_is_paired_and_the_verdict_follows_its_interval():
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # of the questions: what makes pairing worth it
    draw = [[int(rng.random() < 0.8 * (1 - h)) for _ in range(3)] for h in hard]
    better = [[1 if rng.random() < 0.2 else value for value in row] for row in draw]
    results = {"sft_rl-0": result(better), "sft-0": result(draw), "sft_rl-1": result(draw), "rl_only-0": result(draw)}
    up = versus(arm("a", "sft_rl"), arm("b", "sft"))
    found = difference(results, up)
    assert len(found.by_seed) == 1  # seed 1 has only one of both
    assert found.difference.mean == pytest.approx(np.mean(better) - np.mean(draw))
    assert 0 < found.detectable < found.difference.mean
    assert verdict(up, found) == "as in the paper (on 1 seed)"
    assert verdict(
        versus(arm("b", "sft"), arm("a", "sft_rl")), difference(results, versus(arm("b", "sft"), arm("a", "sft_rl")))
    ).startswith("the opposite")
    same = versus(arm("a", "sft"), arm("b", "rl_only"))
    assert verdict(same, difference(results, same)) == "no resolved difference (on 1 seed)"
    assert verdict(replace(same, expected="same"), difference(results, same)) == "no resolved difference, as in the paper (on 1 seed)"
    assert verdict(replace(up, expected="same"), found) == "differs, not as in the paper (on 1 seed)"
    assert verdict(up, difference({}, up)) == "not measured yet"


def test_with_three_seeds_they_must_agree():
    up = versus(arm("a", "sft_rl"), arm("b", "sft"))
    good, bad = result([(1, 1, 1)] * 30), result([(0, 0, 0)] * 30)
    results = {f"sft_rl-{seed}": good for seed in range(3)} | {f"sft-{seed}": bad for seed in range(3)}
    assert verdict(up, difference(results, up)) == "as in the paper"
    assert verdict(up, difference(results | {"sft_rl-2": bad, "sft-2": good}, up)) == "no resolved difference"


def test_every_claim_is_made_of_cells_that_exist():
    assert {name for claim in CLAIMS for name in cells_of(claim)} == set(BY_NAME)
    assert len(BY_NAME) == len(CELLS)
    assert all(cell.model_of in (*BY_NAME, "warm", "base") and cell.alter in ("", *ALTERATIONS) for cell in CELLS)
    for cell in CELLS:
        load([findings.CONFIG], [*cell.train_settings, *cell.evaluate_settings])


def test_the_page_says_what_is_not_measured(tmp_path):
    page = write_report({}, tmp_path).read_text()
    assert f"0 of {3 * len(CELLS)} cells" in page
    assert page.count("not measured yet") >= len(CLAIMS) - 1
    page = write_report({"sft_rl-0": result([(1, 1, 1)] * 20), "sft-0": result([(0, 1, 0)] * 20)}, tmp_path).read_text()
    assert "+0.667 [+0.667, +0.667]" in page
    plot = (tmp_path / "images" / "findings" / "rl.svg").read_text()
    assert plot.startswith("<svg ")
    assert "script" not in plot


def test_a_plot_shows_an_arm_with_all_its_seeds_and_says_where_they_are_few(tmp_path):
    """`both` is compared with CRAWLQA on three seeds and with E2HQA on one, of another value."""
    alone = {f"rl_crawlqa-{seed}": result([(0, 0, 1)] * 20) for seed in range(3)} | {"rl_e2hqa-2": result([(0, 0, 0)] * 20)}
    both = {f"rl_both_sets-{seed}": result([(1, 1, 1) if seed == 2 else (0, 0, 0)] * 20) for seed in range(3)}
    write_report(alone | both, tmp_path)
    plot = (tmp_path / "images" / "findings" / "both_sets.svg").read_text()
    assert re.findall(r">([^<>]+)</text>", plot)[1:] == ["both", "0.333", "CRAWLQA alone", "0.333", "E2HQA alone", "0.000 (1 seed)"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Commands are written down instead of run, and leave what the harness looks for."""
    made = findings.Bench(tmp_path / "runs", tmp_path / "results.json")
    made.commands = []

    def command(program, run_dir, seed, settings, *, alter="", may_stop=False):
        made.commands.append((program[0], run_dir.relative_to(made.runs).as_posix(), [one for one in settings if "/" not in one], alter))
        run_dir.mkdir(parents=True, exist_ok=True)
        if program[0] == "evaluate":
            rows = [episode(f"q{index}", 1, right=True) for index in range(2)]
            (run_dir / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (run_dir / "phases.jsonl").write_text('{"phase": "evaluate", "started": 0, "seconds": 60.0, "finished": true}\n')
            return
        (run_dir / "model").mkdir()
        groups = {"rollout/groups_kept": 16, "rollout/groups_dropped": 16, "rollout/rollouts": 256}
        steps = [json.dumps({"phase": "rl", "step": step, "time": 0, "metrics": groups}) + "\n" for step in range(1, 14)]
        (run_dir / "metrics.jsonl").write_text("".join(steps))

    monkeypatch.setattr(made, "_command", command)
    made.questions.parent.mkdir()
    rows = [{"question": f"Q{i}?", "answer": "a", "tag": "", "id": f"q{i}"} for i in range(2)]
    made.questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_a_cell_is_its_commands_and_runs_once(bench):
    bench.run(BY_NAME["no_dynamic_rollouts"], 0)
    programs = [(program, where) for program, where, _, _ in bench.commands]
    assert programs == [
        ("quickstart", "warm-0"),
        ("rl", "sft_rl-0/train"),
        ("evaluate", "sft_rl-0/evaluate"),
        ("rl", "no_dynamic_rollouts-0/train"),
        ("evaluate", "no_dynamic_rollouts-0/evaluate"),
    ]
    assert "rl.num_steps=26" in bench.commands[3][2]  # 13 steps admitted twice the groups of a step
    assert bench.results["no_dynamic_rollouts-0"]["about"]["minutes"] == 1.0
    again = findings.Bench(bench.runs, bench.path)
    assert set(again.results) == {"sft_rl-0", "no_dynamic_rollouts-0"}
    bench.run(BY_NAME["no_dynamic_rollouts"], 0)
    assert len(bench.commands) == 5


def test_the_pools_of_questions_are_of_one_size(bench):
    bench.warm_start(0)
    for where, name in (("warm-0/questions", "crawlqa"), ("e2hqa-0/questions", "e2hqa")):
        (bench.runs / where).mkdir(parents=True)
        rows = [json.dumps({"question": f"{name} {i}?", "answer": "a", "tag": name, "id": f"{name}-{i}"}) + "\n" for i in range(2500)]
        (bench.runs / where / "rl.jsonl").write_text("".join(rows))
    bench.run(BY_NAME["rl_both_sets"], 0)
    assert [program for program, _, _, _ in bench.commands] == ["quickstart", "rl", "evaluate"]
    tags = [json.loads(line)["tag"] for line in (bench.runs / "rl_both_sets-0" / "questions.jsonl").read_text().splitlines()]
    assert (tags.count("crawlqa"), tags.count("e2hqa")) == (1200, 1200)


def test_what_was_finished_before_the_harness_stopped_is_not_run_again(bench):
    bench.run(BY_NAME["sft_rl"], 0)
    bench.results.clear()
    bench.run(BY_NAME["sft_rl"], 0)
    assert len(bench.commands) == 3


def test_alterations_and_models_reach_the_commands(bench):
    bench.run(BY_NAME["rl_all_tokens"], 0)
    assert bench.commands[1][0] == "rl"
    assert bench.commands[1][3] == "all-tokens"
    bench.run(BY_NAME["temperature_0.3"], 0)
    assert "evaluation.temperature=0.3" in bench.commands[-1][2]
    assert bench._model("sft_rl", 0).endswith("sft_rl-0/train/model")
    assert bench._model("rl_only", 0) == "builtin:tiny"  # it never came to a model of its own


def test_rl_that_stops_in_the_middle_is_evaluated_as_far_as_it_came(bench, monkeypatch):
    command = bench._command

    def stops(program, run_dir, seed, settings, **options):
        command(program, run_dir, seed, settings, **options)
        if program[0] == "rl":
            (run_dir / "model").rmdir()
            (run_dir / "checkpoints" / "step_000011").mkdir(parents=True)
        elif program[0] == "export":
            assert program[1:] == ["--to", str(run_dir / "model")]

    monkeypatch.setattr(bench, "_command", stops)
    bench.run(BY_NAME["sft_rl"], 0)
    assert [program for program, _, _, _ in bench.commands] == ["quickstart", "rl", "export", "evaluate"]
    assert bench._model("sft_rl", 0).endswith("sft_rl-0/train/model")


def sample():
    mask = np.array([False, False, True, True, False, True])
    logprobs = np.where(mask, -0.5, 0.0).astype(np.float32)
    return TrainSample(id="s", token_ids=np.arange(6), loss_mask=mask, logprobs=logprobs, advantages=np.full(6, 2.0, np.float32))


def loss_of(one, old_T):
    tensors = {"old_logprobs_T": old_T, "rollout_logprobs_T": torch.tensor(one.logprobs), "advantages_T": torch.tensor(one.advantages)}
    mask_T = torch.tensor(one.loss_mask)
    return dapo_loss(logprobs_T=old_T.clone(), loss_mask_T=mask_T, num_loss_tokens=int(mask_T.sum()), tis_cap=1.0, **tensors)


def test_with_all_tokens_every_token_weighs_the_same():
    altered = all_tokens(sample())
    assert altered.loss_mask.tolist() == [False, True, True, True, True, True]
    old_T = torch.tensor([0.0, -3.0, -0.5, -0.5, -2.0, -0.5])
    assert float(loss_of(altered, old_T).loss) == pytest.approx(-2.0)  # ratio and weight are 1 everywhere


def test_without_correction_stale_tokens_weigh_the_same():
    old_T = torch.tensor([0.0, 0.0, -5.0, -0.1, 0.0, -4.0])
    assert float(loss_of(no_correction(sample()), old_T).loss) == pytest.approx(-2.0)
    assert float(loss_of(sample(), old_T).loss) > -1.0


MESSAGES = (
    Message(role="system", content="You are a web agent."),
    Message(role="user", content="Who?"),
    Message(role="assistant", content=search("Karo", thought="Need home.")),
    Message(role="user", content="<tool_response>\nx\n</tool_response>"),
    Message(role="assistant", content=answer("Bana", thought="home: Bana.")),
)


def test_verbose_thoughts_restate_and_can_be_read_back(tmp_path):
    long = findings_data.verbose(Demonstration(id="d", messages=MESSAGES, answers=("Bana",), source=""))
    assert "<think>\nWho? Need home.\n</think>" in long.messages[2]["content"]
    assert "<think>\nWho? Need home. home: Bana.\n</think>" in long.messages[4]["content"]
    write_demonstrations(tmp_path / "d.jsonl", [demonstration_row(long)])
    assert read_demonstrations(tmp_path / "d.jsonl")[0].messages == long.messages


def test_unfiltered_is_the_first_well_formed_attempt_of_a_question(tmp_path):
    whole = demonstration_row(Demonstration(id="d", messages=MESSAGES, answers=("Bana",), source=""))
    broken = {**whole, "messages": [*whole["messages"][:4], {"role": "assistant", "content": "no action"}]}
    rows = [(broken, "a", 1), (whole, "a", 2), (whole, "a", 3), (whole, "b", 1), (broken, "c", 1), (whole, "d", 1)]
    path = tmp_path / "sampling" / "attempts.jsonl"
    path.parent.mkdir()
    lines = [row | {"id": f"{task}/{attempt}", "sampling": {"task": task, "attempt": attempt}} for row, task, attempt in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [one.id for one in findings_data.first_attempts(tmp_path, limit=3)] == ["a/2", "b/1", "d/1"]
    assert [one.id for one in findings_data.first_attempts(tmp_path, limit=1)] == ["a/2"]


def test_a_draw_of_the_web_has_the_same_documents_and_is_the_same_each_time():
    hits = [
        {"document": {"id": str(i), "contents": f'"T{i}"\nperson. home: A{i}. job: B{i}. born: 19{i}0.', "url": f"/{i}"}} for i in range(5)
    ]
    drawn = redrawn(hits, "q", seed=1)
    assert drawn == redrawn(hits, "q", seed=1) != redrawn(hits, "q", seed=2)
    assert sorted(hit["document"]["id"] for hit in drawn) == list("01234")
    for hit in drawn:
        text = hit["document"]["contents"].partition("\n")[2]
        assert sorted(text.removesuffix(".").split(". ")) == sorted(
            hits[int(hit["document"]["id"])]["document"]["contents"].partition("\n")[2].removesuffix(".").split(". ")
        )
        assert text.startswith("person. ")


def test_a_share_of_the_pages_is_lost():
    lost = [is_lost(f"/wiki/{index}", seed=1, page_loss=0.1) for index in range(2000)]
    assert 0.08 < np.mean(lost) < 0.12


def test_the_proxy_passes_on_what_is_not_lost(monkeypatch):
    gone = next(f"/wiki/{i}" for i in range(1000) if is_lost(f"/wiki/{i}", seed=1, page_loss=0.1))
    there = next(f"/wiki/{i}" for i in range(1000) if not is_lost(f"/wiki/{i}", seed=1, page_loss=0.1))

    def upstream(request):
        if request.url.path == "/retrieve":
            return httpx.Response(200, json={"result": [[{"document": {"id": "1", "contents": "T\nperson. a: b."}}]]})
        return httpx.Response(200, text=f"page {request.url.path}")

    real = httpx.AsyncClient
    monkeypatch.setattr(
        "benchmarks.shaky_web.httpx.AsyncClient", lambda **settings: real(transport=httpx.MockTransport(upstream), **settings)
    )
    app = build_app("http://up", seed=1, page_loss=0.1)

    async def ask():
        async with real(transport=httpx.ASGITransport(app), base_url="http://shaky") as client:
            pages = [(await client.get(path)).status_code for path in (gone, there, "/health")]
            found = (await client.post("/retrieve", json={"queries": ["x"], "topk": 1})).json()
            return pages, found

    pages, found = asyncio.run(ask())
    assert pages == [404, 200, 200]
    assert found["result"][0][0]["document"]["contents"] == "T\nperson. a: b."


def test_reward_curves_are_compared_seed_by_seed_over_the_steps_that_all_have():
    found = compare([[0.5, 0.7, 0.9], [0.4, 0.4]], [[0.4, 0.6], [0.4, 0.6]])
    assert [row["step"] for row in found["steps"]] == [1, 2]
    assert np.allclose(found["by_seed"], [0.1, -0.1])
    assert np.isclose(found["difference"], 0.0)
    half = 12.706 * 0.1  # Student with one degree of freedom, times the standard error of +0.1 and -0.1
    assert np.allclose(found["interval"], [-half, half])
    assert "interval" not in compare([[1.0]], [[0.5]])
