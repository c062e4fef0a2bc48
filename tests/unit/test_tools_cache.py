"""The tool actor's memory: one flight for many callers, failures forgotten, bounds kept, a leaving caller takes nobody along."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtual_time import run_virtual
from webdancer.tools.cache import SingleFlightCache
from webdancer.tools.ledger import bill, open_bill
from webdancer.types import ToolUse


def _cache(max_entries=10, max_size=1_000):
    return SingleFlightCache(max_entries=max_entries, max_size=max_size, size_of=len)


class Source:
    def __init__(self, value="v", delay_s=0.0, failures=0):
        self.calls, self.value, self.delay_s, self.failures = 0, value, delay_s, failures

    async def __call__(self):
        self.calls += 1
        await asyncio.sleep(self.delay_s)
        if self.calls <= self.failures:
            raise OSError("down")
        return self.value


async def test_callers_at_once_share_one_flight():
    cache, source = _cache(), Source(delay_s=0.01)
    answers = await asyncio.gather(*(cache.get("k", source) for _ in range(16)))
    assert sorted(shared for _, shared in answers) == [False] + [True] * 15
    assert await cache.get("k", source) == ("v", True)
    assert source.calls == 1


async def test_a_failure_reaches_all_waiters_and_is_not_remembered():
    cache, source = _cache(), Source(delay_s=0.01, failures=1)
    answers = await asyncio.gather(*(cache.get("k", source) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(answer, OSError) for answer in answers)
    assert await cache.get("k", source) == ("v", False)


async def test_a_cancelled_caller_leaves_the_flight_to_the_others():
    cache, source = _cache(), Source(delay_s=0.05)
    first = asyncio.create_task(cache.get("k", source))
    await asyncio.sleep(0)
    second = asyncio.create_task(cache.get("k", source))
    await asyncio.sleep(0.01)
    first.cancel()
    assert await second == ("v", True)
    with pytest.raises(asyncio.CancelledError):
        await first
    assert source.calls == 1


async def test_least_recently_used_goes_first():
    cache = _cache(max_entries=2)
    for key in ("a", "b", "a", "c"):
        await cache.get(key, Source(key))
    assert [(await cache.get(key, Source("new")))[1] for key in ("a", "c", "b")] == [True, True, False]


async def test_the_sum_of_sizes_is_bounded():
    cache = _cache(max_size=100)
    for key in ("a", "b", "c"):
        await cache.get(key, Source("x" * 40))
    assert [(await cache.get(key, Source("y")))[1] for key in ("b", "c")] == [True, True]
    assert (await cache.get("a", Source("y")))[1] is False
    await cache.get("huge", Source("x" * 101))
    assert (await cache.get("huge", Source("x")))[1] is False


async def test_no_entries_still_shares_flights():
    cache, source = _cache(max_entries=0), Source(delay_s=0.01)
    await asyncio.gather(*(cache.get("k", source) for _ in range(4)))
    await cache.get("k", source)
    assert source.calls == 2


async def test_closing_ends_what_is_under_way():
    cache, source = _cache(), Source(delay_s=60)
    waiting = asyncio.create_task(cache.get("k", source))
    await asyncio.sleep(0.01)
    await cache.aclose()
    with pytest.raises(asyncio.CancelledError):
        await waiting


class DictShelf:
    """A shelf in memory that outlives the caches over it."""

    def __init__(self):
        self.kept = {}

    async def get(self, key):
        return self.kept.get(key)

    async def put(self, key, kept):
        self.kept[key] = kept


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 40), st.booleans()), min_size=1, max_size=40),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_value_is_never_older_than_its_lifetime_and_never_asked_for_twice_within_it(asks, max_entries, has_shelf):
    """Against a model: values hold 10 s, refusals 2 s, failures not at all; a restart of the process now and then costs memory only."""
    lifetimes = {"value": 10.0, "refusal": 2.0}
    now, shelf, asked = [0.0], DictShelf() if has_shelf else None, []

    def fresh():
        return SingleFlightCache(
            max_entries=max_entries,
            max_size=10**6,
            size_of=lambda found: 1,
            lifetime_s=lambda found: lifetimes[found[0]],
            shelf=shelf,
            clock=lambda: now[0],
        )

    async def compute():
        asked.append(now[0])
        kind = ("value", "refusal", "failure")[len(asked) % 3]
        if kind == "failure":
            raise OSError("down")
        return kind, now[0]

    async def main():
        cache, last = fresh(), {}
        for key, gap, restarts in asks:
            now[0] += gap
            if restarts:
                cache, last = fresh(), last if has_shelf else {}
            before = len(asked)
            try:
                (kind, made), cached = await cache.get(key, compute)
            except OSError:
                assert len(asked) == before + 1
                continue
            assert now[0] - made < lifetimes[kind] or made == now[0]
            assert cached == (len(asked) == before)
            holds = key in last and now[0] - last[key][1] < lifetimes[last[key][0]]
            if has_shelf:
                assert cached == holds, "on the shelf it holds exactly as long as it should"
            elif cached:
                assert holds
            last[key] = (kind, made)

    run_virtual(main())


async def test_hits_are_billed_to_the_provider():
    cache = SingleFlightCache(max_entries=10, max_size=100, size_of=len, name="serper")
    await cache.get("k", Source())
    bill = open_bill()
    await cache.get("k", Source())
    await cache.get("other", Source())
    assert bill.uses == (ToolUse(provider="serper", hits=1),)


async def test_who_starts_a_flight_that_others_share_pays_for_it():
    cache = SingleFlightCache(max_entries=10, max_size=100, size_of=len, name="serper")

    async def one():
        paid = open_bill()

        async def compute():
            bill().add("serper", requests=1, usd=0.5)
            await asyncio.sleep(0.01)
            return "v"

        await cache.get("k", compute)
        return paid.uses

    uses = await asyncio.gather(*(asyncio.create_task(one()) for _ in range(16)))
    assert sorted((use.requests, use.hits, use.usd) for (use,) in uses) == [(0, 1, 0.0)] * 15 + [(1, 0, 0.5)]


async def test_what_held_one_up_held_up_all_who_waited_for_the_same():
    cache = SingleFlightCache(max_entries=9, max_size=99, size_of=len)

    async def slow():
        await asyncio.sleep(0.01)
        bill().throttled = True
        return "found"

    async def call():
        mine = open_bill()
        await cache.get("key", slow)
        return mine.throttled

    assert await asyncio.gather(*(asyncio.create_task(call()) for _ in range(4))) == [True] * 4
    assert not await asyncio.create_task(call()), "it is remembered by now"
