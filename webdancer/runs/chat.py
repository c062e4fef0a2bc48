"""A conversation at the terminal: each question is one episode, whose thoughts and calls appear as they are written. Ctrl-C gives up the
question, and at the prompt ends the conversation."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from types import FrameType

from webdancer.demo.session import Answered, ask
from webdancer.demo.turns import ShownTurn
from webdancer.demo.writing import Writing
from webdancer.interfaces import EpisodeRunner
from webdancer.types import Sampling

SHOWN_CHARS = 600  # of an observation

Say = Callable[[str], None]


async def converse(runner: EpisodeRunner, *, say: Say, write: Say | None = None, sampling: Sampling, site: str = "") -> None:
    """Until an empty line or the end of input. `say` prints lines, `write` text that goes on; without it turns are said when they are
    finished. `site`: where site-relative sources lead."""
    say("Ask a question; Ctrl-C gives one up, an empty line ends.")
    while question := await _read():
        asking = asyncio.ensure_future(_answer(runner, question, Screen(say, write), sampling=sampling, site=site))
        with _interrupting(asking) as interrupted:
            try:
                await asking
            except asyncio.CancelledError:
                asking.cancel()
                if not interrupted.is_set():
                    raise
                say("[given up]")


async def _answer(runner: EpisodeRunner, question: str, screen: Screen, *, sampling: Sampling, site: str) -> None:
    try:
        async with aclosing(ask(runner, question, sampling=sampling, site=site)) as told:
            async for one in told:
                screen.show(one)
    finally:
        screen.end_line()


class Screen:
    """What a terminal can show of turns that are being written: it is only ever added to. An answer is said at the end."""

    def __init__(self, say: Say, write: Say | None) -> None:
        self._say = say
        self._write = write
        self._thought = self._call = self._written = ""

    def show(self, one: Writing | ShownTurn | Answered) -> None:
        if isinstance(one, Writing):
            self._go_on(one)
        elif isinstance(one, ShownTurn):
            self._finish(one)
        else:
            self.end_line()
            self._say(end_text(one))

    def end_line(self) -> None:
        """After what was being written."""
        if self._written and self._write is not None:
            self._write("\n")
        self._thought = self._call = self._written = ""

    def _go_on(self, more: Writing) -> None:
        if self._write is None:
            return
        if more.anew:
            self.end_line()
        self._thought += more.thought
        self._call = more.call or self._call
        self._write_up_to(head_text(self._thought, self._call))

    def _finish(self, turn: ShownTurn) -> None:
        if not self._written or self._write is None:
            self._say(turn_text(turn))
            return
        head = head_text(turn.thought, turn.call)
        if not head.startswith(self._written):
            self.end_line()
        self._write_up_to(head)
        self.end_line()
        if rest := rest_text(turn):
            self._say(rest)

    def _write_up_to(self, text: str) -> None:
        """A text that is no longer what it began as waits until the turn is finished."""
        if self._write is not None and text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text


def head_text(thought: str, call: str) -> str:
    return "\n".join(filter(None, (thought, f"> {call}" if call else "")))


def turn_text(turn: ShownTurn) -> str:
    """Thought, call and the beginning of what came of it; an answer is said at the end."""
    return "\n".join(filter(None, (head_text(turn.thought, turn.call), rest_text(turn))))


def rest_text(turn: ShownTurn) -> str:
    lines = [f"> {turn.problem}"] if turn.problem else []
    if turn.observation:
        seen = turn.observation if len(turn.observation) <= SHOWN_CHARS else f"{turn.observation[:SHOWN_CHARS]} ..."
        lines += [f"    {line}" for line in seen.strip().splitlines()]
    return "\n".join(lines)


def end_text(end: Answered) -> str:
    if end.problem:
        return f"[{end.stop}: {end.problem}]"
    calls = f"{end.num_tool_calls} tool call{'' if end.num_tool_calls == 1 else 's'}"
    sources = "".join(f"\n   {source.title}: {source.url}" for source in end.sources)
    return f"=> {end.answer or 'no answer'}   [{end.stop}, {calls}, {end.seconds:.1f} s]{sources}"


async def _read() -> str:
    """A line of input, empty at its end. On a thread that nobody waits for: Ctrl-C ends the program, not the reading."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        try:
            text = input("? ").strip()
        except EOFError:
            text = ""
        loop.call_soon_threadsafe(_settle, line, text)

    threading.Thread(target=read, daemon=True, name="prompt").start()
    return await line


def _settle(line: asyncio.Future[str], text: str) -> None:
    if not line.done():  # nobody waits for it any more
        line.set_result(text)


@contextmanager
def _interrupting(asking: asyncio.Future[None]) -> Iterator[threading.Event]:
    """Meanwhile Ctrl-C cancels the future and not the program; the event says that it came. SIGTERM stays the program's."""
    came = threading.Event()
    loop = asyncio.get_running_loop()
    before, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def give_up(*unused: object) -> None:
        came.set()
        loop.call_soon_threadsafe(asking.cancel)

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)  # which the program's own handler may raise
        if callable(terminate):
            terminate(number, frame)

    signal.signal(signal.SIGINT, give_up)
    if callable(terminate):
        signal.signal(signal.SIGTERM, end)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminate)
