"""Who owns what is asked: one owner each, few that move when the pool changes, and the same text as if nobody had divided the call."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webdancer.tools.pieces import join, owner_key, owners, split
from webdancer.tools.result import Part, join_parts
from webdancer.types import ToolCall, ToolResult, ToolUse

KEYS = st.text(min_size=1, max_size=20)
CODES = st.sampled_from([None, "not_found", "unavailable", "internal", "robots"])


def visit(url, goal="x") -> ToolCall:
    return ToolCall(name="visit", arguments={"url": url, "goal": goal})


@given(KEYS, st.integers(1, 12))
def test_everybody_finds_the_same_owner_and_the_same_heirs(key, count):
    assert sorted(owners(key, count)) == list(range(count))
    assert owners(key, count) == owners(key, count)


@given(KEYS, st.integers(1, 12))
def test_one_actor_more_takes_over_and_moves_nothing_else(key, count):
    assert [index for index in owners(key, count + 1) if index != count] == owners(key, count)


def test_keys_are_spread():
    shares = Counter(owners(f"search query {number}", 4)[0] for number in range(4000))
    assert all(900 < share < 1100 for share in shares.values())


def test_pages_of_a_host_are_together_and_those_of_the_own_site_are_not():
    hosts = ["https://Site.org/a", "http://www.site.org:80/b?x=1", " https://site.org "]
    assert {owner_key(visit(url)) for url in hosts} == {"visit site.org"}
    spellings = ["https://bücher.example.org/", "https://xn--bcher-kva.example.org./", "https://BÜCHER.example。org:443/x"]
    assert {owner_key(visit(url)) for url in spellings} == {"visit xn--bcher-kva.example.org"}
    own = {owner_key(visit(url), site="http://127.0.0.1:8000") for url in ("/wiki/A", "http://127.0.0.1:8000/wiki/A")}
    assert own == {"visit /wiki/A"}
    assert owner_key(visit("/wiki/B"), site="http://127.0.0.1:8000") not in own


def test_a_query_has_one_owner_however_it_is_written():
    keys = {owner_key(ToolCall(name="search", arguments={"query": query})) for query in ("Karo Mil", " karo  mil ")}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "call",
    [
        ToolCall(name="search", arguments={}),
        ToolCall(name="search", arguments={"query": 7}),
        ToolCall(name="search", arguments={"query": []}),
        ToolCall(name="search", arguments={"query": ["x"] * 100}),
        ToolCall(name="visit", arguments={"url": ["http://[bad", "x"], "goal": {"a": 1}}),
        ToolCall(name="clock", arguments={"zone": "UTC"}),
        visit("http://[bad"),
    ],
)
def test_whatever_is_asked_has_an_owner(call):
    pieces = split(call)
    assert 1 <= len(pieces) <= 10
    assert all(owner_key(piece) for piece in pieces)


def test_a_list_of_one_and_a_text_are_the_same_piece():
    assert split(ToolCall(name="search", arguments={"query": [" a "]})) == split(ToolCall(name="search", arguments={"query": "a"}))


@given(st.lists(st.tuples(st.text(max_size=8), CODES, st.booleans()), min_size=1, max_size=5))
def test_divided_and_joined_reads_as_if_never_divided(parts):
    whole = join_parts([Part(text=text, error=error, cached=cached) for text, error, cached in parts], "\n=======\n")
    joined = join([ToolResult(text=text, error=error, cached=cached) for text, error, cached in parts])
    assert (joined.text, joined.error, joined.cached) == (whole.text, whole.error, whole.cached)


def test_what_the_pieces_cost_adds_up():
    use = ToolUse(provider="serper", requests=1, usd=0.5)
    results = [ToolResult(text="a", latency_s=1.0, uses=(use,)), ToolResult(text="b", latency_s=3.0, uses=(use,), throttled=True)]
    joined = join([*results, ToolResult(text="c", uses=(ToolUse(provider="web", hits=1),))])
    assert joined.uses == (ToolUse(provider="serper", requests=2, usd=1.0), ToolUse(provider="web", hits=1))
    assert (joined.latency_s, joined.throttled) == (3.0, True)


def test_invalid_arguments_are_said_once():
    invalid = ToolResult(text='Invalid arguments: "goal" is missing.', error="invalid_arguments")
    assert join([invalid, invalid]) == invalid
