"""Pages are read in processes: what kills one fails its own page with a code, and nothing else ever notices."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from webdancer.errors import ServiceError
from webdancer.tools import extraction
from webdancer.tools.evidence import find_evidence
from webdancer.tools.extract import body_lines
from webdancer.tools.extraction import Extraction, ExtractionFailed

PAGE = "<html><body><article><h1>Owl</h1><p>Owls hunt at night, é.</p></article></body></html>".encode("latin-1")
STALLING = b"<p " + b" ".join(b"a%d=1" % i for i in range(100_000)) + b">x</p>"
"""Quadratic in libxml2: minutes."""


async def read(pool, body=PAGE, **changes):
    return await pool.lines(body, **{"content_type": "text/html", "charset": "latin-1", "max_chars": 1000, **changes})


@pytest.fixture
async def pool():
    pool = Extraction(2)
    yield pool
    await pool.aclose()


async def test_a_process_reads_what_a_thread_reads(pool):
    thread = Extraction(0)
    for body, kind in ((PAGE, "text/html"), (b"a\n\nb", "text/plain"), (b"", "text/html"), (b"%PDF-1.4 broken", "application/pdf")):
        expected = body_lines(body, content_type=kind, charset="latin-1", max_chars=1000)
        assert await read(pool, body, content_type=kind) == await read(thread, body, content_type=kind) == expected
    await pool.check()
    limits = {"max_sentences": 1, "max_chars": 100}
    expected = find_evidence("Owls hunt at night. Bees do not.", "bees", **limits)
    assert await pool.evidence("Owls hunt at night. Bees do not.", "bees", **limits) == expected
    assert await thread.evidence("Owls hunt at night. Bees do not.", "bees", **limits) == expected
    assert len(pool._idle) == 1  # one after the other needs no second


async def test_a_page_that_stalls_is_killed_and_only_that_page_fails(pool, monkeypatch):
    monkeypatch.setattr(extraction, "CPU_DEADLINE_S", 0.3)
    pages = [read(pool, STALLING), *(read(pool) for _ in range(20))]
    stalled, *others = await asyncio.gather(*pages, return_exceptions=True)
    assert (type(stalled), stalled.code) == (ExtractionFailed, "extraction_timeout")
    assert set(others) == {"# Owl\nOwls hunt at night, é."}


async def test_waiting_for_nothing_ends_too(pool, monkeypatch):
    await read(pool)
    os.kill(pool._idle[0].process.pid, signal.SIGSTOP)
    monkeypatch.setattr(extraction, "_CLOCK_DEADLINE_S", 0.2)
    with pytest.raises(ExtractionFailed) as caught:
        await read(pool)
    assert caught.value.code == "extraction_timeout"
    monkeypatch.undo()
    assert "Owls" in await read(pool)


async def test_a_worker_that_died_while_nobody_looked_costs_no_page(pool):
    await asyncio.gather(read(pool), read(pool))
    for worker in pool._idle:
        os.kill(worker.process.pid, signal.SIGKILL)
    assert "Owls" in await read(pool)


async def test_a_page_whose_worker_was_killed_for_want_of_memory_is_read_again(pool):
    """It is the kernel that chose, and not always the one who wanted much."""
    page = asyncio.ensure_future(read(pool, b"<p>Owls.</p>" * 20_000))
    while not pool._busy:
        await asyncio.sleep(0.001)
    os.kill(next(iter(pool._busy)).process.pid, signal.SIGKILL)
    assert "Owls." in await page


@pytest.mark.parametrize("sign", [signal.SIGSEGV, signal.SIGABRT])
async def test_a_worker_that_crashes_is_replaced(pool, sign):
    page = asyncio.ensure_future(read(pool, STALLING))
    while not pool._busy:
        await asyncio.sleep(0.01)
    (worker,) = pool._busy
    while worker.jobs == 0:
        await asyncio.sleep(0.01)
    os.kill(worker.process.pid, sign)
    with pytest.raises(ExtractionFailed) as caught:
        await page
    assert caught.value.code == "extraction_failed"
    assert "Owls" in await read(pool)


async def test_a_caller_that_gives_up_leaves_no_half_read_answer(pool):
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await read(pool, b"<p>" + b"word " * 200_000, max_chars=100_000)
        assert await read(pool) == "# Owl\nOwls hunt at night, é."


async def test_a_large_page_and_a_large_answer_cross_whole(pool):
    body = "\n".join(f"line {i} é" for i in range(200_000)).encode()
    text = await read(pool, body, content_type="text/plain", charset="utf-8", max_chars=1_500_000)
    assert text == body.decode()[:1_500_000].strip()


async def test_a_worker_has_no_secrets_and_little_memory(pool, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "canary-of-this-test")
    await read(pool)
    process = Path(f"/proc/{pool._idle[0].process.pid}")
    assert b"canary-of-this-test" not in (process / "environ").read_bytes()
    assert int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < 120 << 20
    limits = (process / "limits").read_text()
    assert str(2 << 30) in limits.split("Max address space")[1].split("\n")[0]


async def test_a_worker_is_replaced_after_many_pages_and_ended_on_closing(pool, monkeypatch):
    monkeypatch.setattr(extraction, "_JOBS_A_WORKER", 2)
    for _ in range(2):
        await read(pool)
    assert pool._idle == []
    await read(pool)
    (worker,) = pool._idle
    await pool.aclose()
    assert await asyncio.to_thread(worker.process.wait, 10) == -signal.SIGKILL


async def test_workers_that_cannot_start_are_the_installations_fault(pool, monkeypatch):
    monkeypatch.setattr(extraction.sys, "executable", "/bin/false")
    with pytest.raises(ServiceError, match=r"tools\.visit\.extraction_processes: must be workers that can start"):
        await pool.check()


def test_workers_end_with_a_killed_parent():
    code = (
        "import asyncio\nfrom webdancer.tools.extraction import Extraction\n"
        "async def main():\n    pool = Extraction(1)\n    await pool.check()\n    print(pool._idle[0].process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\nasyncio.run(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while _is_running(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False
