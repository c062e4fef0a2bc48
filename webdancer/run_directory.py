"""A run directory belongs to one configuration and to one process at a time.

    with run_directory.claim(config) as run_dir: ...

The first start writes `config.yaml`; every later one must agree with it in all that shapes the result, and is otherwise refused with
the keys that differ. What only says where or how fast things run (`MAY_CHANGE`) may differ, so that a run can go on elsewhere.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from webdancer.config import Config
from webdancer.config_loading import differences, load, resolved_yaml
from webdancer.errors import ConfigError, ServiceError, UserError
from webdancer.whole_file import write_whole

CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"

MAY_CHANGE = (
    "name",
    "run_dir",
    "cluster.",
    "telemetry.",
    "engine.",
    "evaluation.",
    "web.port",
    "episode.timeout_s",
    "episode.turn_timeout_s",
    "episode.tool_timeout_s",
    "tools.num_servers",
    "tools.max_concurrent",
    "tools.cache_entries",
    "tools.cache_dir",
    "tools.cache_days",
    "tools.cache_negative_hours",
    "tools.budget_usd",
    "tools.polite.",
    "tools.replay.path",
    "tools.search.requests_per_s",
    "tools.search.usd_per_1000",
    "tools.visit.requests_per_s",
    "tools.visit.usd_per_1000",
    "tools.search.url",
    "tools.search.timeout_s",
    "tools.search.index",
    "tools.visit.site",
    "tools.visit.url",
    "tools.visit.summarizer.base_url",
    "tools.visit.summarizer.timeout_s",
    "tools.fetch.",
    "synthesis.llm.base_url",
    "synthesis.llm.max_concurrent",
    "synthesis.llm.max_attempts",
    "synthesis.llm.timeout_s",
    "synthesis.llm.budget_usd",
    "judge.base_url",
    "judge.num_servers",
    "judge.max_concurrent",
    "judge.requests_per_s",
    "judge.cache_entries",
    "judge.engine.",
    "judge.usd_",
    "judge.max_attempts",
    "judge.timeout_s",
    "rollout.num_workers",
    "rollout.episodes_per_worker",
    "rollout.max_lost",
    "rollout.max_admitted_per_step",
    "rollout.stall_timeout_s",
    "rollout.start_timeout_s",
    "rollout.heartbeat_timeout_s",
    "rollout.drain_timeout_s",
    "rollout.weights.directory",
    "rollout.weights.timeout_s",
    "sample.llm.base_url",
    "sample.llm.max_",
    "sample.llm.timeout_s",
    "sample.llm.usd_",
    "sample.llm.budget_usd",
    "sample.quality.llm.base_url",
    "sample.quality.llm.max_",
    "sample.quality.llm.timeout_s",
    "sample.quality.llm.usd_",
    "sample.quality.llm.budget_usd",
    "sample.concurrent_questions",
    "learner.",  # any number of ranks reads a checkpoint, and the loss is a mean over the whole step however it is packed
    "rl.num_steps",
    "rl.evaluate_every",
    "rl.save_every",
    "rl.drift_alarm",
)
"""Keys, or whole sections (ending in a dot), in which a resumed run may differ from its first start."""


@contextmanager
def claim(config: Config) -> Iterator[Path]:
    """Create or re-enter `config.run_dir`; raises UserError if it is another run's, in use, or not writable. Nothing is written then."""
    directory = Path(config.run_dir)
    _check_owner(directory, config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ServiceError(f"run_dir: must be a writable directory, got {config.run_dir!r}: {error.strerror}") from error
    try:
        _lock(lock, directory)
        _write_config(directory, config)
        yield directory
    finally:
        os.close(lock)


def _check_owner(directory: Path, config: Config) -> None:
    saved = directory / CONFIG_FILE
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"run_dir: must be a directory, got the file {config.run_dir!r}")
    if not saved.exists():
        if any(entry.name != LOCK_FILE for entry in directory.iterdir()):
            raise ConfigError(f"run_dir: must be new, empty, or a run's own, got {config.run_dir!r} with other files in it")
        return
    changed = {key: pair for key, pair in differences(_saved_config(saved), config).items() if not _may_change(key, config)}
    if changed:
        listed = "; ".join(f"{key}: {before!r} there, {now!r} here" for key, (before, now) in changed.items())
        raise ConfigError(f"run_dir: {config.run_dir!r} belongs to another configuration ({listed}); choose another name or run_dir")


def _may_change(key: str, config: Config) -> bool:
    if key == "learner.too_long" or (key == "learner.token_budget" and config.learner.too_long == "drop"):
        return False  # they say which samples are trained on
    return key.startswith(MAY_CHANGE)


def _saved_config(path: Path) -> Config:
    try:
        return load([path])
    except ConfigError as error:
        raise ConfigError(f"run_dir: holds a run whose configuration this version cannot read ({error}); choose another run_dir") from error


def _lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise UserError(f"run_dir: must not be in use, got {str(directory)!r}, which process {owner} is working in") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _write_config(directory: Path, config: Config) -> None:
    """Whole or not at all; the latest start's values, which differ from the first's only in MAY_CHANGE."""
    write_whole(directory / CONFIG_FILE, resolved_yaml(config).encode())
