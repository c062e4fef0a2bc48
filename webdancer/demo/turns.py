"""A turn and an answer as a person reads them, at the terminal or on the demo's page: plain text and checked addresses, never markup.

Page text is hostile. What leaves this module is text without control characters (which could write to a terminal) and addresses that
are http or https; escaping for HTML is the page's own, which sets text only as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from webdancer.demo.writing import call_line, parts, plain, strings
from webdancer.types import FinalAnswer, MalformedAction, ToolCall, Turn

MAX_URL_CHARS = 2_000

_HIT = re.compile(r"^\d+\. \[(.*)\]\((\S+)\)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A page, with an absolute http or https address."""

    title: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTurn:
    """`call` is one line; `problem` why the action could not be run; `sources` the hits of a search or the pages of a visit."""

    thought: str = ""
    call: str = ""
    problem: str = ""
    observation: str = ""
    error: str = ""
    sources: tuple[Source, ...] = ()
    visited: bool = False
    answer: str | None = None


def shown_turn(turn: Turn, *, site: str = "") -> ShownTurn:
    """`site`: the origin that site-relative addresses belong to."""
    thought = parts(turn.completion.text).thought
    result = turn.result
    observation = plain(result.text) if result is not None else ""
    match turn.action:
        case FinalAnswer(text=text):
            return ShownTurn(thought=thought, answer=plain(text))
        case MalformedAction(reason=reason):
            return ShownTurn(thought=thought, problem=plain(reason), observation=observation)
        case ToolCall() as call:
            error = (result.error or "") if result is not None else ""
            sources = _sources(call, result.text if result is not None and not error else "", site)
            return ShownTurn(
                thought=thought, call=call_line(call), observation=observation, error=error, sources=sources, visited=call.name == "visit"
            )


def answer_sources(turns: Iterable[ShownTurn]) -> tuple[Source, ...]:
    """What an answer rests on: the pages that were read, named as the searches did, or where none was read, what the searches found."""
    turns = list(turns)
    found = {source.url: source for source in _once(source for turn in turns if not turn.visited for source in turn.sources)}
    read = _once(found.get(source.url, source) for turn in turns if turn.visited for source in turn.sources)
    return read or tuple(found.values())


def web_address(url: str, *, site: str = "") -> str | None:
    """The absolute address if it is one that a browser may be sent to (http or https, with a host), else None."""
    if len(url) > MAX_URL_CHARS or plain(url) != url or any(character.isspace() for character in url):
        return None
    try:
        absolute = urljoin(site, url) if site else url
        parts = urlsplit(absolute)
        has_host = bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return None
    return absolute if parts.scheme in ("http", "https") and has_host else None


def _sources(call: ToolCall, observation: str, site: str) -> tuple[Source, ...]:
    if not observation:
        return ()
    if call.name == "search":
        named = [(match[1], match[2]) for match in _HIT.finditer(observation)]
    else:
        named = [("", url) for url in strings(call.arguments.get("url"))] if call.name == "visit" else []
    checked = [(title, web_address(url, site=site)) for title, url in named]
    return _once(Source(title=plain(title) or url, url=url) for title, url in checked if url is not None)


def _once(sources: Iterable[Source]) -> tuple[Source, ...]:
    """By address; of several titles the first."""
    found: dict[str, Source] = {}
    for source in sources:
        found.setdefault(source.url, source)
    return tuple(found.values())
