"""Host names by the system's resolver: dead ones hold up nothing else, are looked up once, and are not asked for again at once."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections import Counter

import pytest

from webdancer.tools import network


class Resolver:
    """Names with `dead` in them fail when `end` is set, and not before; all others are there at once."""

    def __init__(self):
        self.end = threading.Event()
        self.asked = Counter()

    def getaddrinfo(self, host, port, **options):
        self.asked[host] += 1
        if "dead" in host:
            self.end.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 0))] * 2


@pytest.fixture
def resolver(monkeypatch):
    resolver = Resolver()
    monkeypatch.setattr(network.socket, "getaddrinfo", resolver.getaddrinfo)
    monkeypatch.setattr(network, "_NAMES", network._Names())
    yield resolver
    resolver.end.set()


async def test_dead_names_hold_up_no_other_name_and_no_thread_of_others(resolver):
    """More of them than the loop's own executor has threads, and all of their callers have given up."""
    for number in range(min(32, (os.cpu_count() or 1) + 4) + 4):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(network.resolve_name(f"dead{number}.org"), 0.001)
    async with asyncio.timeout(20):
        assert await asyncio.to_thread(lambda: "free") == "free"
        assert await network.resolve_name("site.org") == ["93.184.216.34"]


async def test_a_dead_name_is_looked_up_once_for_all_and_not_again_at_once(resolver):
    waiting = [asyncio.create_task(network.resolve_name("dead.org")) for _ in range(5)]
    await asyncio.sleep(0)
    waiting.pop().cancel()
    resolver.end.set()
    assert [type(result) for result in await asyncio.gather(*waiting, return_exceptions=True)] == [socket.gaierror] * 4
    with pytest.raises(OSError, match="a moment ago"):
        await network.resolve_name("dead.org")
    assert resolver.asked["dead.org"] == 1
    network._NAMES._failed["dead.org"] -= network._FAILED_S
    with pytest.raises(socket.gaierror):
        await network.resolve_name("dead.org")
    assert resolver.asked["dead.org"] == 2
