"""Where pages become text and evidence: in worker processes, so that a page that stalls or crashes a parser takes nothing with it.

A worker is a fresh Python that runs `extraction_worker` and talks over a socket pair: no fork of a process that has threads, and no second
import of whatever program this one is (a Ray worker's, for one). It gets no environment but what Python needs, so no keys. A job that
uses up its CPU seconds is killed by the kernel, one that takes too long on the clock by the pool; only that page fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from webdancer.errors import ServiceError
from webdancer.tools.evidence import Evidence, find_evidence
from webdancer.tools.extract import body_lines
from webdancer.tools.extraction_worker import ANSWER, EVIDENCE, JOB, LINES, READY

CPU_DEADLINE_S = 5.0
"""Of one page. Ordinary pages of the largest size take one or two. CPU seconds, so that a busy machine fails no page."""

_CLOCK_DEADLINE_S = 8 * CPU_DEADLINE_S  # for a worker that waits for a CPU, or for nothing
_START_S = 60.0
_EXIT_S = 10.0
_QUICK_CHARS = 20_000  # in threads: below it, ranking takes less than a few milliseconds and stays on the event loop
_JOBS_A_WORKER = 5_000  # parsers leak a little; then a fresh one takes over
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")

ExtractionCode = Literal["extraction_timeout", "extraction_failed"]


class ExtractionFailed(Exception):
    """Nothing of this page: its worker was killed at the deadline (`extraction_timeout`) or broke (`extraction_failed`)."""

    def __init__(self, code: ExtractionCode, message: str) -> None:
        super().__init__(message)
        self.code: ExtractionCode = code


class _Killed(ExtractionFailed):
    """Its worker was killed, and not by the page or for it."""


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    jobs: int = 0


class Extraction:
    """A pool of up to `processes` workers, each started when first needed. 0: a thread, for pages that are trusted.

    Use it from one event loop and `aclose` it; workers also end by themselves once the process that started them has.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._places = asyncio.Semaphore(max(processes, 1))
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    async def lines(self, body: bytes, *, content_type: str, charset: str, max_chars: int) -> str:
        """`extract.body_lines` of a page. Raises ExtractionFailed, or ServiceError where no worker can be started at all."""
        if self._processes == 0:
            return await asyncio.to_thread(body_lines, body, content_type=content_type, charset=charset, max_chars=max_chars)
        text: str = await self._do(body, kind=LINES, content_type=content_type, charset=charset, max_chars=max_chars)
        return text

    async def evidence(self, page: str, goal: str, *, max_sentences: int, max_chars: int) -> Evidence:
        """`evidence.find_evidence` of a page's text. Raises as `lines` does."""
        if self._processes == 0:
            if len(page) <= _QUICK_CHARS:
                return find_evidence(page, goal, max_sentences=max_sentences, max_chars=max_chars)
            return await asyncio.to_thread(find_evidence, page, goal, max_sentences=max_sentences, max_chars=max_chars)
        body = page.encode("utf-8", "replace")
        evidence, summary = await self._do(body, kind=EVIDENCE, goal=goal, max_sentences=max_sentences, max_chars=max_chars)
        return Evidence(evidence=evidence, summary=summary)

    async def _do(self, body: bytes, **options: Any) -> Any:
        job = json.dumps(options).encode()
        async with self._places:
            try:
                answer = await self._attempt(await self._worker(), job, body)
            except _Killed:  # by the kernel for want of memory, or by a person, perhaps while it was idle
                answer = await self._attempt(await self._start(), job, body)
        return json.loads(answer)

    async def _attempt(self, worker: _Worker, job: bytes, body: bytes) -> bytes:
        self._busy.add(worker)
        fine = False
        try:
            answer = await _ask(worker, job, body)
            fine = worker.jobs < _JOBS_A_WORKER
        finally:  # whatever it was, also a cancellation: a worker in the middle of a page must go
            self._busy.remove(worker)
            if fine:
                self._idle.append(worker)
            else:
                _end(worker)
        return answer

    async def _worker(self) -> _Worker:
        """One that lives, of those that wait or anew."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            _end(worker)
        return await self._start()

    async def check(self) -> None:
        """Raises ServiceError, or ImportError in a thread, where pages cannot be read at all."""
        await self.lines(b"<p>WebDancer</p>", content_type="text/html", charset="utf-8", max_chars=100)

    async def aclose(self) -> None:
        """Ends the workers; a page that is being read fails."""
        for worker in (*self._idle, *self._busy):
            _end(worker)
        self._idle.clear()

    async def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.to_thread(_spawn, theirs)
        worker = _Worker(process, *await asyncio.open_connection(sock=ours))
        try:
            async with asyncio.timeout(_START_S):
                await worker.reader.readexactly(len(READY))
        except BaseException as error:
            _end(worker)
            if isinstance(error, TimeoutError | asyncio.IncompleteReadError | ConnectionError):
                rule = "must be workers that can start, see their output above"
                raise ServiceError(f"tools.visit.extraction_processes: {rule}, got {self._processes}") from error
            raise
        return worker


async def _ask(worker: _Worker, job: bytes, body: bytes) -> bytes:
    worker.jobs += 1
    try:
        async with asyncio.timeout(_CLOCK_DEADLINE_S):
            worker.writer.writelines((JOB.pack(len(job), len(body)), job, body))
            (length,) = ANSWER.unpack(await worker.reader.readexactly(ANSWER.size))
            return await worker.reader.readexactly(length)
    except TimeoutError:
        raise ExtractionFailed("extraction_timeout", "the page took too long to read") from None
    except (asyncio.IncompleteReadError, ConnectionError):
        ended = await asyncio.to_thread(_wait, worker.process)  # it has hung up, so it is ending
        if ended == -signal.SIGPROF:
            raise ExtractionFailed("extraction_timeout", "the page took too long to read") from None
        kind = _Killed if ended == -signal.SIGKILL else ExtractionFailed
        raise kind("extraction_failed", "the page could not be read") from None


def _spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", "webdancer.tools.extraction_worker", str(CPU_DEADLINE_S)],
        stdin=connection.fileno(),
        stdout=subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys([root, *filter(None, sys.path)]))},
        start_new_session=True,  # Ctrl-C is for the program that started it
    )


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit status; None where it does not end by itself."""
    try:
        return process.wait(timeout=_EXIT_S)
    except subprocess.TimeoutExpired:
        return None


def _end(worker: _Worker) -> None:
    """Kills and reaps it. The wait is a thread's: the kernel takes a moment to free a large process."""
    worker.writer.close()
    worker.process.kill()
    asyncio.get_running_loop().run_in_executor(None, worker.process.wait)
