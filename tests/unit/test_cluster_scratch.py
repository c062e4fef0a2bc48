"""Directories in memory go with their owners, and never with anybody else's word that these are dead."""

from __future__ import annotations

import subprocess
import sys

from webdancer.cluster import scratch
from webdancer.cluster.scratch import RECEIVED, WEIGHTS, make_scratch, remove_orphans

LEAVE_ONE = "import sys; from webdancer.cluster.scratch import *; print(make_scratch(WEIGHTS, sys.argv[1]))"


def test_what_the_dead_have_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    (left,) = subprocess.run([sys.executable, "-c", LEAVE_ONE, str(tmp_path)], capture_output=True, text=True, check=True).stdout.split()
    mine, received = make_scratch(WEIGHTS, str(tmp_path)), make_scratch(RECEIVED, str(tmp_path))
    (tmp_path / f"{WEIGHTS}notes").mkdir()
    monkeypatch.setattr(scratch, "_mark", lambda: "elsewhere")
    remove_orphans(WEIGHTS, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 4, "another machine, or another container, cannot know"
    monkeypatch.undo()
    remove_orphans(WEIGHTS, str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([mine, received, tmp_path / f"{WEIGHTS}notes"])
    assert str(mine) != left
