"""Where questions go: four pools in the released layout, a line for every candidate, and a manifest that says how they came about.

    questions/sft.jsonl, rl.jsonl, dev.jsonl, heldout.jsonl
    questions/candidates.jsonl    everything that was written or tried, with its pool or the reason why it is in none
    questions/manifest.json       settings, counts, reasons, cost, and the SHA-256 of every file

Nothing here depends on when or how often the program was started, so that a job that was killed ends with the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from webdancer.config import SynthesisConfig
from webdancer.data.tasks import task_row, write_tasks
from webdancer.synthesis.collect import Need, Outcome
from webdancer.synthesis.hygiene import OVERLAP
from webdancer.synthesis.manifest import described
from webdancer.telemetry.jsonl import JsonlWriter
from webdancer.types import Task
from webdancer.whole_file import write_whole

POOLS = ("sft", "rl", "dev", "heldout")
CANDIDATES_FILE, MANIFEST_FILE = "candidates.jsonl", "manifest.json"
TRAIN, DEV, HELDOUT = "train", "dev", "heldout"
LEFT_OUT = "left_out"
_SPLIT_OF_29 = ((20, TRAIN), (23, DEV), (29, HELDOUT))
"""As the offline web shares its entities out, for pages that name no split themselves."""


def split_of(url: str) -> str:
    """The split of a page that names none: by its address alone, so that another crawl of the page puts it there, too."""
    number = int.from_bytes(hashlib.sha256(url.encode()).digest()[:8]) % 29
    return next(split for bound, split in _SPLIT_OF_29 if number < bound)


def hop_counts(total: int, config: SynthesisConfig) -> dict[str, int]:
    """Whole numbers that add up to total, each the rounded share or next to it (rounding of the cumulative shares)."""
    bounds = [round(total * share) for share in accumulate(config.hop_shares, initial=0.0)]
    return {f"hop{hops}": end - start for hops, (start, end) in enumerate(pairwise(bounds), start=1)}


class PoolFiles:
    """Takes outcomes one at a time, as `collect` gives them. Of the training split, the first of each type are the teacher's."""

    def __init__(self, folder: Path, config: SynthesisConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._config = config
        self._for_sft, self._needs = _shares(config)
        self._pools: dict[str, list[Task]] = {pool: [] for pool in POOLS}
        self._reasons: Counter[str] = Counter()
        self._met: Counter[Need] = Counter()
        (folder / CANDIDATES_FILE).unlink(missing_ok=True)
        self._candidates = JsonlWriter(folder / CANDIDATES_FILE)

    @property
    def needs(self) -> tuple[Need, ...]:
        return self._needs

    @property
    def num_made(self) -> int:
        return sum(map(len, self._pools.values()))

    def add(self, outcome: Outcome) -> None:
        pool = LEFT_OUT
        if not outcome.reason and outcome.task is not None:
            pool = self._pool(outcome.need)
            self._pools[pool].append(outcome.task)
            self._met[outcome.need] += 1
        else:
            self._reasons[outcome.reason] += 1
        row: dict[str, Any] = {"state": pool, "split": outcome.need.split, "type": outcome.need.type}
        if outcome.reason:
            row |= {"reason": outcome.reason, "detail": outcome.detail[:500]}
        if outcome.task is not None:
            # A question of an evaluation set is not written down once more: it may be one that is published encrypted.
            row |= {"id": outcome.task.id} if outcome.reason == OVERLAP else task_row(outcome.task)
        self._candidates.write(row)

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Write pools and manifest; `more` goes into it. Gives the manifest."""
        self._candidates.close()
        for name, tasks in self._pools.items():
            # By their ids, which are hashes: the first N of a pool are then a fair sample of it.
            write_tasks(self._folder / f"{name}.jsonl", sorted(tasks, key=lambda task: task.id))
        names = (*(f"{name}.jsonl" for name in POOLS), CANDIDATES_FILE)
        manifest = {
            "format": 1,
            **more,
            "counts": {name: _counts(tasks) for name, tasks in self._pools.items()},
            "left_out": dict(sorted(self._reasons.items())),
            "missing": {f"{n.split} {n.type}": n.count - self._met[n] for n in self._needs if n.count > self._met[n]},
            "files": {name: described(self._folder / name) for name in names},
        }
        write_whole(self._folder / MANIFEST_FILE, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
        return manifest

    def close(self) -> None:
        self._candidates.close()

    def _pool(self, need: Need) -> str:
        if need.split != TRAIN:
            return need.split
        return "sft" if self._met[need] < self._for_sft.get(need.type, need.count) else "rl"


def _shares(config: SynthesisConfig) -> tuple[dict[str, int], tuple[Need, ...]]:
    """How many of a type are the teacher's, and all that is needed."""
    if config.method == "e2hqa":
        counts = {TRAIN: config.num_sft + config.num_rl, DEV: config.num_dev, HELDOUT: config.num_heldout}
        return {"e2hqa": config.num_sft}, tuple(Need(split, "e2hqa", count) for split, count in counts.items())
    sft, rl = hop_counts(config.num_sft, config), hop_counts(config.num_rl, config)
    hops = {TRAIN: {name: sft[name] + rl[name] for name in sft}}
    hops |= {DEV: hop_counts(config.num_dev, config), HELDOUT: hop_counts(config.num_heldout, config)}
    fewer = -(-config.num_count // 3)
    lists = {TRAIN: config.num_count, DEV: fewer, HELDOUT: fewer}
    needs = [Need(split, name, count) for split, counts in hops.items() for name, count in counts.items()]
    needs += [Need(split, name, count) for split, count in lists.items() for name in ("count", "intersection")]
    return sft, tuple(need for need in needs if need.count)


def _counts(tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "questions": len(tasks),
        "by_type": dict(sorted(Counter(str(task.metadata["type"]) for task in tasks).items())),
        "by_hops": {str(hops): n for hops, n in sorted(Counter(task.metadata["hops"] for task in tasks).items())},
        "by_language": dict(sorted(Counter(str(task.metadata["language"]) for task in tasks).items())),
    }
