"""The files of a run: whole lines or none, whatever dies in between; every trajectory with what became of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import make_group, make_scored

from webdancer.config import load
from webdancer.errors import DataError, ServiceError
from webdancer.telemetry import Telemetry
from webdancer.telemetry.jsonl import JsonlWriter, KeyedRows, read_jsonl
from webdancer.telemetry.recorder import TrajectoryRecorder, read_trajectories, unpack_array
from webdancer.telemetry.telemetry import PHASES_FILE, read_metrics
from webdancer.types import Task

QUIET = load([], ["telemetry.wandb_mode=disabled"])


@settings(max_examples=50, deadline=None)
@given(keep=st.integers(0, 60), rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2), max_size=4))
def test_a_file_cut_anywhere_reads_as_its_whole_lines_and_goes_on_after_them(tmp_path_factory, keep, rows):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    writer = JsonlWriter(path)
    for row in rows:
        writer.write(row)
    writer.close()
    data = path.read_bytes()[:keep]
    path.write_bytes(data)
    whole = rows[: data.count(b"\n")]
    assert list(read_jsonl(path)) == whole
    writer = JsonlWriter(path)
    writer.write({"after": 1})
    writer.close()
    assert list(read_jsonl(path)) == [*whole, {"after": 1}]


def test_rows_by_key_are_those_of_whole_lines_wherever_the_job_was_killed(tmp_path):
    path = tmp_path / "a.jsonl"
    said = {"a": "Zürich\n\u2028", "b\udc80": "", "c": "x" * 50}

    def write():
        rows = KeyedRows(path, "asked")
        known = [key for key in said if rows.get(key)]
        for key, value in said.items():
            if rows.get(key) is None:
                rows.add(key, {"said": value})
        assert [rows.get(key)["said"] for key in said] == list(said.values())
        rows.close()
        return len(known)

    assert write() == 0
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert write() == whole[:end].count(b"\n")
        assert path.read_bytes() == whole
    path.write_text('{"asked": 1}\n')
    with pytest.raises(DataError, match="asked: must be a text in every row, got int"):
        KeyedRows(path, "asked")


def test_a_torn_line_longer_than_the_read_block_is_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":"' + b"x" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b'{"a":1}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a":1}\n{"b":\n{"c":1}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_jsonl(path))


def test_what_json_cannot_say_becomes_null_and_lone_surrogates_survive(tmp_path):
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.write({"nan": float("nan"), "deep": [{"inf": float("inf")}], "text": "a\udc80b\n"})
    writer.close()
    (row,) = read_jsonl(tmp_path / "a.jsonl")
    assert row == {"nan": None, "deep": [{"inf": None}], "text": "a\udc80b\n"}


def test_a_full_disk_is_one_clear_error_and_leaves_whole_lines(tmp_path):
    """A file size limit stands in for the disk: the kernel cuts the write short in the same way."""
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from webdancer.errors import ServiceError\nfrom webdancer.telemetry.jsonl import JsonlWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "writer = JsonlWriter(Path(sys.argv[1]))\n"
        "try:\n    for index in range(100):\n        writer.write({'row': index, 'text': 'x' * 90})\n"
        "except ServiceError as error:\n    print(error)\n"
    )
    path = tmp_path / "a.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "must be writable" in done.stdout
    rows = list(read_jsonl(path))
    assert path.read_bytes().endswith(b"\n")
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 5


def test_an_unwritable_file_is_a_service_error(tmp_path):
    writer = JsonlWriter(tmp_path / "a.jsonl")
    os.close(writer._file)
    writer._file = os.open(tmp_path / "a.jsonl", os.O_RDONLY)
    with pytest.raises((ServiceError, OSError)):
        writer.write({"a": 1})


def test_every_member_of_kept_and_dropped_groups_is_recorded_with_its_decision(tmp_path):
    with Telemetry.open(tmp_path, QUIET) as telemetry, telemetry.phase("RL"):
        telemetry.record_group(make_group(0, num_right=0, version=3), "all_wrong")
        telemetry.record_group(make_group(1, num_right=2, version=3), "kept")
    rows = list(read_trajectories(tmp_path))
    assert [row["decision"] for row in rows] == ["all_wrong"] * 4 + ["kept"] * 4
    assert {row["phase"] for row in rows} == {"RL"}
    row = rows[4]
    assert (row["task"]["id"], row["task"]["answers"], row["task"]["hops"]) == ("q1", ["Bana School"], 1)
    assert (row["verdict"]["status"], row["reward"]["total"], row["stop"], row["answer"]) == ("correct", 1.0, "answered", "Bana School")
    assert (row["versions"], row["start_version"], row["num_policy_tokens"], row["num_tool_calls"]) == ([3, 3], 3, 20, 1)
    assert [turn["action"] for turn in row["turns"]] == ["search", "answer"]
    assert "Karo Mil" in row["turns"][0]["observation"]
    assert "token_ids" not in row


def test_token_ids_and_mask_can_be_recorded_and_read_back(tmp_path):
    scored = make_scored(Task(id="q", question="?", answers=("a",)))
    recorder = TrajectoryRecorder(tmp_path, token_ids=True)
    recorder.record(scored, decision="teacher", phase="sample")
    recorder.close()
    (row,) = read_trajectories(tmp_path)
    np.testing.assert_array_equal(unpack_array(row["token_ids"], "<i4"), scored.trajectory.token_ids)
    np.testing.assert_array_equal(unpack_array(row["loss_mask"], "<i1"), scored.trajectory.loss_mask)


def test_a_step_repeated_after_a_resume_counts_as_its_last_row(tmp_path):
    with Telemetry.open(tmp_path, QUIET) as telemetry:
        for step in (1, 2, 3):
            telemetry.log("rl", step, {"x": step})
    with Telemetry.open(tmp_path, QUIET) as telemetry:
        telemetry.log("rl", 3, {"x": 30, "nan": float("nan")})
        telemetry.log("sft", 1, {"y": 1})
    assert read_metrics(tmp_path) == {"rl": {1: {"x": 1}, 2: {"x": 2}, 3: {"x": 30}}, "sft": {1: {"y": 1}}}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_phases_are_timed_even_when_they_fail_and_timings_are_drained(tmp_path):
    with Telemetry.open(tmp_path, QUIET) as telemetry:
        with telemetry.timed("rollout"), telemetry.timed("rollout"):
            pass
        assert set(telemetry.timings()) == {"time/rollout_s"}
        assert telemetry.timings() == {}
        with pytest.raises(RuntimeError), telemetry.phase("RL"):
            raise RuntimeError
        with telemetry.phase("RL"):
            pass
    rows = [json.loads(line) for line in (tmp_path / PHASES_FILE).read_text().splitlines()]
    assert [(row["phase"], row["finished"]) for row in rows] == [("RL", False), ("RL", True)]
