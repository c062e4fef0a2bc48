"""Quotas and money of a whole cluster in one place, and what is remembered of them when a run goes on."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webdancer.config import ToolsConfig, VisitConfig
from webdancer.tools.ledger import Ledger, Provider, bill, open_bill, providers

SERPER = Provider(name="serper", usd_per_1000=1.0)


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 2)), min_size=1, max_size=60), st.floats(0.5, 20))
def test_the_sum_over_all_who_ask_keeps_to_the_rate(asks, rate):
    """Three tool actors, one ledger: any n requests of them together span at least n - 1 intervals, also after an idle time."""
    now = [0.0]
    ledger, provider = Ledger(clock=lambda: now[0]), Provider(name="p", requests_per_s=rate)
    sent = []
    for _, gap in asks:
        now[0] += gap
        lease = asyncio.run(ledger.lease(provider, patience_s=3.0))
        assert lease.delay_s <= 3.0
        if not lease.refused:
            sent.append(now[0] + lease.delay_s)
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            assert sent[last] - sent[first] >= (last - first) / rate - 1e-6


async def test_money_is_counted_by_provider_and_survives_a_restart(tmp_path):
    now = [0.0]
    path = tmp_path / "spending.json"
    for _ in range(2):
        ledger = Ledger(budget_usd=0.005, path=path, clock=lambda: now[0])
        for provider in (SERPER, Provider(name="free", requests_per_s=5.0)):
            await ledger.lease(provider, patience_s=1)
        now[0] += 10
        await ledger.lease(SERPER, patience_s=1)
        ledger.write()
    assert Ledger(path=path).spent == {"free": {"requests": 2, "usd": 0.0}, "serper": {"requests": 4, "usd": pytest.approx(0.004)}}
    ledger = Ledger(budget_usd=0.005, path=path)
    assert [(await ledger.lease(SERPER, patience_s=1)).refused for _ in range(3)] == ["", "budget", "budget"]
    assert (await ledger.lease(Provider(name="free", requests_per_s=5.0), patience_s=9)).refused == "", "what costs nothing goes on"


async def test_a_quota_holds_over_a_crash(tmp_path, monkeypatch):
    """Those who hold the leases of the ledger that died still use them."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    provider, sent = Provider(name="p", requests_per_s=50.0), []
    for patience_s in (3.0, 30.0):
        ledger = Ledger(path=tmp_path / "spending.json", clock=lambda: 7.0)
        leases = [await ledger.lease(provider, patience_s=patience_s) for _ in range(300)]
        sent += [lease.delay_s for lease in leases if not lease.refused]
    assert len(sent) == 151 + 300
    assert all(later - before >= 1 / 50 - 1e-9 for before, later in itertools.pairwise(sorted(sent)))
    assert sent[151] <= 3.0 + 2.0, "nor is more of it lost than the file is ahead"
    monkeypatch.setattr(time, "time", lambda: 2000.0)
    assert (await Ledger(path=tmp_path / "spending.json").lease(provider, patience_s=0)).delay_s == 0.0


async def test_what_was_spent_at_once_is_in_the_file_soon_though_nothing_else_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("webdancer.tools.ledger._WRITE_EVERY_S", 0.3)
    path = tmp_path / "spending.json"
    ledger = Ledger(path=path)
    async with asyncio.timeout(20):
        for leases, total in ((1, 1), (40, 41)):
            for _ in range(leases):
                await ledger.lease(SERPER, patience_s=1)
            while not path.exists() or json.loads(path.read_text())["serper"]["requests"] != total:
                await asyncio.sleep(0.01)


async def test_a_budget_that_is_met_exactly_is_not_exceeded():
    ledger = Ledger(budget_usd=0.003)
    assert [(await ledger.lease(SERPER, patience_s=1)).refused for _ in range(4)] == ["", "", "", "budget"]


async def test_a_refused_quota_costs_nothing():
    now = [0.0]
    ledger, provider = Ledger(clock=lambda: now[0]), Provider(name="p", requests_per_s=0.1, usd_per_1000=1.0)
    assert [(await ledger.lease(provider, patience_s=5)).refused for _ in range(3)] == ["", "quota", "quota"]
    assert ledger.spent == {"p": {"requests": 1, "usd": 0.001}}


async def test_bills_are_of_their_own_call_and_of_what_it_starts():
    async def call(name):
        opened = open_bill()

        async def request():
            bill().add(name, requests=1)

        await asyncio.gather(*(asyncio.create_task(request()) for _ in range(3)))
        return opened.uses

    first, second = await asyncio.gather(asyncio.create_task(call("a")), asyncio.create_task(call("b")))
    assert [(use.provider, use.requests) for use in (*first, *second)] == [("a", 3), ("b", 3)]


def test_who_is_a_provider():
    direct = providers(ToolsConfig(visit=VisitConfig(requests_per_s=5.0, usd_per_1000=2.0)))
    assert [(one.name, one.leased) for one in direct] == [("retrieve", False), ("direct", False)]
    service = providers(ToolsConfig(visit=VisitConfig(backend="jina", requests_per_s=5.0)))
    assert [(one.name, one.leased) for one in service] == [("retrieve", False), ("jina", True)]
