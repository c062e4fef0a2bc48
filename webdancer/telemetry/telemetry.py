"""`Telemetry`: the one object through which a program tells what it does. Files in the run directory:

metrics.jsonl        {"phase", "step", "time", "metrics"} a step; a step repeated after a resume counts as its last row
phases.jsonl         {"phase", "started", "seconds", "finished"} a phase and start of the program
trajectories.jsonl   every scored trajectory (recorder.py)
wandb/               the same metrics for W&B, offline unless the configuration says online
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from webdancer.config import Config
from webdancer.telemetry.console import Console, Progress, duration
from webdancer.telemetry.jsonl import JsonlWriter, read_jsonl
from webdancer.telemetry.recorder import TrajectoryRecorder
from webdancer.telemetry.wandb_sink import WandbSink
from webdancer.types import Group, ScoredTrajectory

METRICS_FILE = "metrics.jsonl"
PHASES_FILE = "phases.jsonl"


class Telemetry:
    def __init__(self, run_dir: Path, config: Config, *, console: Console | None = None) -> None:
        self.run_dir = run_dir
        self.console = console or Console()
        last_steps = {phase: max(steps) for phase, steps in _steps(run_dir).items()}
        self._metrics = JsonlWriter(run_dir / METRICS_FILE)
        self._phases = JsonlWriter(run_dir / PHASES_FILE)
        self._recorder = TrajectoryRecorder(run_dir, token_ids=config.telemetry.record_token_ids)
        self._seconds: dict[str, float] = {}
        self._phase = ""
        self._wandb = None if config.telemetry.wandb_mode == "disabled" else self._open_wandb(config, last_steps)

    @classmethod
    def open(cls, run_dir: Path | str, config: Config, *, console: Console | None = None) -> Self:
        """Creates the directory; appends where an earlier start of the same run left off."""
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        return cls(Path(run_dir), config, console=console)

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """`step` counts within the phase (`sft`, `rl`, `evaluation`). Raises ServiceError when the disk is full."""
        plain = {name: float(value) for name, value in metrics.items() if value is not None}
        self._metrics.write({"phase": phase, "step": step, "time": time.time(), "metrics": plain})
        if self._wandb is not None:
            self._wandb.log(phase, step, plain)

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        self.console.say(text)

    def progress(self, name: str, *, total: int, start: int = 0) -> Progress:
        """A context manager; its `advance(**numbers)` moves the bar by one."""
        return self.console.progress(name, total=total, start=start)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce and time one phase of the program; trajectories recorded meanwhile carry its name."""
        before, self._phase = self._phase, name
        started, clock = time.time(), time.monotonic()
        finished = False
        self.say(f"{name} ...")
        try:
            yield
            finished = True
        finally:
            self._phase = before
            seconds = time.monotonic() - clock
            self._phases.write({"phase": name, "started": started, "seconds": round(seconds, 3), "finished": finished})
            self.say(f"{name}: {'done' if finished else 'stopped'} after {duration(seconds)}")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add to what `timings` returns as `time/<name>_s`."""
        clock = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - clock

    def timings(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}

    def record_group(self, group: Group, decision: str) -> None:
        """Every finished group, kept or not, before anything may drop it."""
        self._recorder.record_group(group, decision=decision, phase=self._phase)

    def record(self, scored: ScoredTrajectory, decision: str) -> None:
        """A trajectory outside a group: a teacher's, an evaluation's."""
        self._recorder.record(scored, decision=decision, phase=self._phase)

    def close(self) -> None:
        self.console.close()
        if self._wandb is not None:
            self._wandb.close()
        for sink in (self._metrics, self._phases, self._recorder):
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _open_wandb(self, config: Config, last_steps: Mapping[str, int]) -> WandbSink:
        return WandbSink(
            self.run_dir,
            name=config.name,
            project=config.telemetry.wandb_project,
            mode=config.telemetry.wandb_mode,
            config=asdict(config),
            last_steps=last_steps,
            warn=self.say,
        )


def read_metrics(run_dir: Path) -> dict[str, dict[int, dict[str, float]]]:
    """phase -> step -> metrics, steps in order; of a repeated step the last row."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in read_jsonl(run_dir / METRICS_FILE):
        metrics = {name: value for name, value in row["metrics"].items() if value is not None}
        found.setdefault(row["phase"], {})[int(row["step"])] = metrics
    return {phase: dict(sorted(steps.items())) for phase, steps in found.items()}


def _steps(run_dir: Path) -> dict[str, set[int]]:
    return {phase: set(steps) for phase, steps in read_metrics(run_dir).items()}
