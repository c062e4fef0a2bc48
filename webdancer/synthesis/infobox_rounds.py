"""E2HQA without a model: an entity is described by facts of its infobox that no other entity of the crawl has together.

    What is the school of Karo Mil?
    What is the school of the person whose spouse is Tess Ode?
    What is the school of the person whose spouse is the person whose home is Bana and whose born is 1931?

A description is a term; it is resolved over all pages of the site, from the inside out, without looking at how it was made. It names
entities of the question's own split only.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from webdancer.synthesis.e2hqa import AMBIGUOUS, NOT_FOUND, NOTHING_TO_DESCRIBE, SOURCE, Round, RoundFailed, Search
from webdancer.synthesis.page import CrawledPage
from webdancer.synthesis.questions import graphs, leaks
from webdancer.types import Task

_SEED_DRAWS = 200


@dataclass(frozen=True, slots=True)
class Named:
    """An entity by its title."""

    url: str
    title: str


@dataclass(frozen=True, slots=True)
class Described:
    """The one of a kind that has these plain values, and for `key` the entity of `inner` (or nothing more)."""

    kind: str
    plain: tuple[tuple[str, str], ...]
    key: str = ""
    inner: Named | Described | None = None


Term = Named | Described


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`key` of the entity of `term`. `urls`: of the entities so far, the one asked about first; none comes twice."""

    split: str
    key: str
    term: Term
    answers: tuple[str, ...]
    answer_url: str | None
    urls: tuple[str, ...]


class InfoboxRounds:
    """Rounds over infobox facts. search: where the entity is looked up before it is described."""

    def __init__(self, pages_by_split: Mapping[str, Sequence[CrawledPage]], search: Search) -> None:
        self._graphs = graphs(pages_by_split)
        self._search = search
        self._drawn: set[tuple[str, str]] = set()
        self._titles = {page.url: page.title for pages in pages_by_split.values() for page in pages}
        self._having = _having(page for pages in pages_by_split.values() for page in pages)

    def draw(self, split: str, rng: random.Random) -> Asked | None:
        graph = self._graphs.get(split)
        if graph is None or not graph.entities:
            return None
        for _ in range(_SEED_DRAWS):
            page = rng.choice(graph.entities)
            keys = graph.single_keys(page)
            key = rng.choice(keys) if keys else ""
            if not key or (page.url, key) in self._drawn:
                continue
            self._drawn.add((page.url, key))
            value = page.facts[key][0]
            answers = graph.names(value)
            if not leaks(page.title, answers):
                term = Named(page.url, page.title)
                return Asked(split=split, key=key, term=term, answers=answers, answer_url=value.url, urls=(page.url,))
        return None

    def task(self, state: Asked) -> Task:
        question = f"What is the {state.key} of {said(state.term)}?"
        metadata = {"provenance": [*reversed(state.urls)], "keys": [state.key], "split": state.split}
        return Task(id="", question=question, answers=state.answers, source=SOURCE, metadata=metadata)

    async def harder(self, state: Asked, rng: random.Random, attempt: int) -> tuple[Asked, Round] | RoundFailed:
        named = _innermost(state.term)
        if named is None:
            return RoundFailed(NOTHING_TO_DESCRIBE)
        hits = await self._search(named.title)
        page = self._graphs[state.split].pages.get(named.url)
        if page is None or all(hit.url != named.url for hit in hits):
            return RoundFailed(NOT_FOUND)
        described = self._describe(state, page, rng)
        if described is None:
            return RoundFailed(AMBIGUOUS)
        inner = _innermost(described)
        after = replace(state, term=_put(state.term, described), urls=(*state.urls, *([inner.url] if inner else [])))
        made = Round(
            entity=named.title, query=named.title, description=said(described), question=self.task(after).question, urls=(page.url,)
        )
        return after, made

    async def is_one(self, state: Asked, made: Round) -> bool:
        described = _smallest(state.term, made.description)
        return described is not None and len(self._resolve(described)) == 1

    async def is_answered(self, state: Asked, made: Round) -> bool:
        graph = self._graphs[state.split]
        pages = [graph.pages.get(url) for url in self._resolve(state.term)]
        return len(pages) == 1 and pages[0] is not None and graph.names(pages[0].facts[state.key][0]) == state.answers

    def _describe(self, state: Asked, page: CrawledPage, rng: random.Random) -> Described | None:
        """By one entity that its page names and as few plain values as it takes; by plain values alone where there is no such entity."""
        graph = self._graphs[state.split]
        taken = {*state.urls, state.answer_url}
        said_already = {key for key in page.facts if any(value.text in state.answers for value in page.facts[key])}
        keys = [key for key in graph.single_keys(page) if key not in said_already]
        plain = [(key, page.facts[key][0].text) for key in keys if page.facts[key][0].url not in graph.pages]
        linked = [(key, onward) for key in keys if (onward := graph.next_page(page, key)) is not None and onward.url not in taken]
        rng.shuffle(plain)
        rng.shuffle(linked)
        for count in range(3):
            for key, onward in linked:
                for values in combinations(plain, count):
                    found = Described(page.kind, tuple(values), key, Named(onward.url, onward.title))
                    if self._resolve(found) == {page.url}:
                        return found
        alone = (Described(page.kind, tuple(values)) for count in (1, 2) for values in combinations(plain, count))
        return next((found for found in alone if self._resolve(found) == {page.url}), None)

    def _resolve(self, term: Term) -> set[str]:
        """The pages of the site that a term may stand for."""
        if isinstance(term, Named):
            return {term.url}  # a title that two pages share names none: Graph
        conditions = [self._having.get((term.kind, key, text), set()) for key, text in term.plain]
        if term.inner is not None:
            names = {name for url in self._resolve(term.inner) for name in (url, self._titles[url])}
            conditions.append({url for name in names for url in self._having.get((term.kind, term.key, name), set())})
        return set.intersection(*conditions) if conditions else set()


def said(term: Term) -> str:
    """The term in words."""
    if isinstance(term, Named):
        return term.title
    conditions = [f"whose {key} is {text}" for key, text in term.plain]
    if term.inner is not None:
        conditions.append(f"whose {term.key} is {said(term.inner)}")
    return f"the {term.kind or 'one'} {' and '.join(conditions)}"


def _innermost(term: Term | None) -> Named | None:
    while isinstance(term, Described):
        term = term.inner
    return term


def _put(term: Term, described: Described) -> Term:
    """The term with its named entity described."""
    if isinstance(term, Named) or term.inner is None:
        return described
    return replace(term, inner=_put(term.inner, described))


def _smallest(term: Term | None, words: str) -> Described | None:
    """The part of the term that is said so."""
    while isinstance(term, Described) and said(term) != words:
        term = term.inner
    return term if isinstance(term, Described) else None


def _having(pages: Iterable[CrawledPage]) -> dict[tuple[str, str, str], set[str]]:
    """(kind, key, value) -> pages that have it, by the value's page and by its text; and without the kind, for `the one whose`."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for page in pages:
        for key, values in page.facts.items():
            for value, kind in product(values, {page.kind, ""}):
                for name in {value.text, value.url or value.text}:
                    found.setdefault((kind, key, name), set()).add(page.url)
    return found
