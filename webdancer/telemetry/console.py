"""Progress for a person: bars with the numbers that matter on a terminal, now and then a plain line everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 10.0


class Progress:
    """One thing that is under way; `advance` moves it by one and replaces the numbers shown beside it."""

    def __init__(self, show: Callable[[Progress], None], hide: Callable[[Progress], None], name: str, total: int, start: int) -> None:
        self.name, self.total, self.done = name, total, start
        self.labels: dict[str, float] = {}
        self._start, self._started = start, time.monotonic()
        self._show, self._hide = show, hide

    def advance(self, **labels: float | None) -> None:
        """Labels that are None keep what they last showed."""
        self.done += 1
        self.labels |= {name: value for name, value in labels.items() if value is not None}
        self._show(self)

    @property
    def seconds_each(self) -> float | None:
        """None at first: where many things are under way together, the first to be done says little about the rest."""
        moved = self.done - self._start
        return (time.monotonic() - self._started) / moved if moved > 0.05 * (self.total - self._start) else None

    @property
    def seconds_left(self) -> float | None:
        each = self.seconds_each
        return None if each is None else each * (self.total - self.done)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._show(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._hide(self)


class Console:
    """`interactive` None: bars where the stream is a terminal. Bars that are open at the same time share the screen."""

    def __init__(self, stream: TextIO | None = None, *, interactive: bool | None = None) -> None:
        self._stream = stream or sys.stdout
        self._interactive = self._stream.isatty() if interactive is None else interactive
        self._bars: RichProgress | None = None
        self._tasks: dict[Progress, TaskID] = {}
        self._printed: dict[Progress, float] = {}

    def say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def write(self, text: str) -> None:
        """Text that goes on where the last one ended. Not while a bar is open."""
        print(text, end="", file=self._stream, flush=True)

    def progress(self, name: str, *, total: int, start: int = 0) -> Progress:
        show, hide = (self._show_bar, self._hide_bar) if self._interactive else (self._show_line, self._hide_line)
        return Progress(show, hide, name, total, start)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self._tasks.clear()

    def _show_line(self, progress: Progress) -> None:
        now = time.monotonic()
        last = self._printed.setdefault(progress, now)
        if progress.done >= progress.total or now - last >= PLAIN_INTERVAL_S:
            self._printed[progress] = now
            self.say(progress_line(progress))

    def _hide_line(self, progress: Progress) -> None:
        self._printed.pop(progress, None)

    def _show_bar(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = _rich_bars(self._stream)
            self._bars.start()
        if progress not in self._tasks:
            self._tasks[progress] = self._bars.add_task(progress.name, total=progress.total, numbers="")
        self._bars.update(self._tasks[progress], completed=progress.done, numbers=numbers(progress.labels))

    def _hide_bar(self, progress: Progress) -> None:
        task = self._tasks.pop(progress, None)
        if task is None or self._bars is None:
            return
        finished = progress_line(progress, ended=True)
        self._bars.remove_task(task)
        self.say(finished)
        if not self._tasks:
            self.close()


def progress_line(progress: Progress, *, ended: bool = False) -> str:
    parts = [f"{progress.name} {progress.done}/{progress.total}", numbers(progress.labels)]
    each, left = progress.seconds_each, progress.seconds_left
    if each is not None and each >= 1:
        parts.append(f"{each:.0f} s each")
    if left and not ended:
        parts.append(f"{duration(left)} left")
    return " · ".join(part for part in parts if part)


def numbers(labels: Mapping[str, float]) -> str:
    return " · ".join(f"{name} {number(float(value))}" for name, value in labels.items())


def number(value: float) -> str:
    """About three digits: 1,240 / 31.5 / 0.42 / 0.00012; whole numbers stay whole."""
    size = abs(value)
    if value.is_integer() or size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.01 else f"{value:.2g}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _rich_bars(stream: TextIO) -> RichProgress:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class BarsOverNumbers(Bars):
        """The numbers have a line of their own: beside the bar they would squeeze it to nothing at 80 columns."""

        def get_renderables(self) -> Iterable[RenderableType]:
            for task in self.tasks:
                yield self.make_tasks_table([task])
                if task.fields["numbers"]:
                    yield Text(f"  {task.fields['numbers']}", style="cyan")

    return BarsOverNumbers(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=RichConsole(file=stream),
    )
