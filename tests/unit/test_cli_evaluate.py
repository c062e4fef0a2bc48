"""The options of `webdancer evaluate`, and one line with exit code 2 for what cannot be."""

from __future__ import annotations

import json

import pytest

from webdancer import cli
from webdancer.config import load


def config_of(*words):
    return load([], cli.parse(["evaluate", *words]).overrides)


def test_named_options_are_overrides():
    config = config_of("--model", "Qwen/QwQ-32B", "--benchmark", "gaia", "--rounds", "5", "evaluation.temperature=1")
    assert (config.model.path, config.evaluation.benchmark, config.evaluation.rounds) == ("Qwen/QwQ-32B", "gaia", 5)
    assert (config.name, config.evaluation.temperature) == ("eval-QwQ-32B-gaia", 1.0)
    assert (config.evaluation.top_p, config.episode.max_turns) == (0.95, 50)


def test_questions_of_ones_own_and_names_of_ones_own():
    config = config_of("--model", "runs/first/model", "--benchmark", "data/mine.jsonl")
    assert (config.name, config.evaluation.benchmark, config.evaluation.data) == ("eval-first-mine", "jsonl", "data/mine.jsonl")
    assert config_of("--benchmark", "gaia", "name=here").name == "here"
    assert config_of("--benchmark", "gaia", "run_dir=there").run_dir == "there"
    assert config_of("name=here").evaluation.benchmark == ""


def write_round(directory, right):
    directory.mkdir()
    rows = [
        {
            "id": id,
            "question": "Q?",
            "answer": "x",
            "verdict": {"answer": "x"},
            "figures": {"status": "correct" if ok else "wrong", "stop": "answered"},
        }
        for id, ok in right.items()
    ]
    (directory / "iter1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def test_two_evaluations_are_compared(tmp_path, capsys):
    first = write_round(tmp_path / "a", dict.fromkeys("pqrst", False))
    second = write_round(tmp_path / "b", dict.fromkeys("pqrst", True))
    assert cli.main(["evaluate", "--compare", first, second]) == 0
    said = capsys.readouterr().out
    assert "5 questions: first 0.0 %, second 100.0 %" in said
    assert "p = 0.0625 (exact McNemar test)" in said


def test_what_else_differs_is_said(tmp_path, capsys):
    first, second = (write_round(tmp_path / name, {"p": True}) for name in "ab")
    (tmp_path / "a" / "settings.json").write_text('{"model": "x", "judge": "match", "temperature": 0.6}')
    (tmp_path / "b" / "settings.json").write_text('{"model": "y", "judge": "72b", "temperature": 0.6}')
    assert cli.main(["evaluate", "--compare", first, second]) == 0
    assert capsys.readouterr().out.rstrip().endswith("they differ in judge: 'match' and '72b'")


def test_one_id_for_two_questions_is_no_comparison(tmp_path, capsys):
    first, second = (write_round(tmp_path / name, {"p": True}) for name in "ab")
    path = tmp_path / "b" / "iter1.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "question": "Another?"}) + "\n")
    assert cli.main(["evaluate", "--compare", first, second]) == 2
    assert "--compare: must be of the same questions, got id 'p'" in capsys.readouterr().err


def test_two_judges_are_compared_without_starting_anything(tmp_path, capsys):
    directory = write_round(tmp_path / "a", {"p": True, "q": False})
    assert cli.main(["evaluate", "--judge-agreement", directory]) == 0
    assert "2 answers that both judges decide: 50.0 % alike" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "gaya"], "evaluation.benchmark: must be one of gaia, "),
        (["--benchmark", "gaia"], "evaluation.data: must name the file of gaia"),
        (["--benchmark", "/no/such.jsonl"], "/no/such.jsonl: must be a readable file"),
        (["--rounds", "3"], "--rounds: must come with --benchmark, got 3"),
        (["--benchmark", "gaia", "--rounds", "0"], "evaluation.rounds: must be positive, got 0"),
        (["--compare", "/no/such", "/neither"], "/no/such: must be a benchmark's directory with iter1.jsonl"),
        (["--judge-agreement", "/no/such"], "/no/such: must be a benchmark's directory with iter1.jsonl"),
        (["--compare", "a", "b", "--model", "m"], "--compare, --judge-agreement: must stand without --model"),
        (["--benchmark", "gaia", "judge.backend=oracle"], "judge.backend: must be one of match, openai, vllm"),
        (["--benchmark", "gaia", "judge.prompt=kind"], "judge.prompt: must be one of auto, hle"),
        (["--benchmark", "gaia", "judge.max_concurrent=0"], "judge.max_concurrent: must be positive, got 0"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not any(tmp_path.iterdir()), "nothing is left behind"
