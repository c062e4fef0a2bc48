"""Questions with known answers and provenance, made of crawled pages alone (CRAWLQA: MULTI-HOP, COUNT, INTERSECTION; paper section 2).

    hop1..hop4      What is the town of the school of Karo Mil?
    count           How many winners does Tiro Award have?
    intersection    Who is in both the cast of Bana Story and the cast of Veka Song?

Each question has one right answer: a path goes through facts with one value only, and two lists share one entry only. No answer stands
in its question, no path comes back to a page, and no shorter path gives the same answer.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from webdancer.errors import DataError
from webdancer.synthesis.page import CrawledPage, FactValue
from webdancer.synthesis.similar import words
from webdancer.types import Task

QUESTION_TYPES = ("hop1", "hop2", "hop3", "hop4", "count", "intersection")
SOURCE = "crawlqa"

_MAX_KEY_CHARS, _MAX_VALUE_CHARS = 40, 80
"""Of what is asked for and of an answer: a longer row of a table is a paragraph."""
_ATTEMPTS_PER_QUESTION = 200  # random draws before a type counts as exhausted
_NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    question: str
    answers: tuple[str, ...]
    pages: tuple[CrawledPage, ...]
    keys: tuple[str, ...]


def make_questions(pages: Sequence[CrawledPage], *, counts_by_type: Mapping[str, int], seed: int = 0) -> list[Task]:
    """So many different questions of each type (see QUESTION_TYPES), in the order of the types asked for.

    metadata of a task: type (`hop`, `count`, `intersection`), hops (searches that it takes), provenance (page urls in order), keys (facts
    read, in order), split. Raises DataError for an unknown type, or if the pages do not hold so many.
    """
    unknown = sorted(set(counts_by_type) - set(QUESTION_TYPES))
    if unknown:
        raise DataError(f"counts_by_type: types must be of {', '.join(QUESTION_TYPES)}, got {', '.join(unknown)}")
    graph = Graph(pages)
    tasks: dict[str, Task] = {}
    for type_, count in counts_by_type.items():
        rng = random.Random(f"{seed} {type_}")
        made = 0
        for _ in range(_ATTEMPTS_PER_QUESTION * (count + 10)):
            if made >= count:
                break
            task = draw_question(graph, type_, rng)
            if task is not None and task.question not in tasks:
                tasks[task.question] = task
                made += 1
        if made < count:
            raise DataError(f"counts_by_type.{type_}: the {len(graph.pages)} pages must hold so many questions, found {made} of {count}")
    return list(tasks.values())


class Graph:
    """Entities of one split by url, and which of their facts are lists. `others`: the site's pages of other splits."""

    def __init__(self, pages: Sequence[CrawledPage], others: Sequence[CrawledPage] = ()) -> None:
        titles = Counter(page.title for page in (*pages, *others))
        # A title that two pages share names neither.
        self.pages = {page.url: page for page in pages if page.facts and page.title and titles[page.title] == 1}
        self.entities = list(self.pages.values())
        # A key that has several values on some page of the kind is a list on all of them.
        self._lists = {(page.kind, key) for page in (*pages, *others) for key, values in page.facts.items() if len(values) > 1}
        self._elsewhere = {page.url for page in others}
        self._titles_elsewhere = {page.title for page in others}
        self._single_keys = {page.url: [key for key in page.facts if self._is_askable(page, key)] for page in self.entities}
        # What has no page of its own may be several things in one.
        self.lists = [(page, key) for page in self.entities for key in page.facts if self._is_countable(page, key)]
        self.lists_by_entry: dict[str, list[tuple[CrawledPage, str]]] = {}
        for page, key in self.lists:
            for value in page.facts[key]:
                if value.url in self.pages:
                    self.lists_by_entry.setdefault(value.url, []).append((page, key))
        self.shared_entries = [url for url, lists in self.lists_by_entry.items() if len(lists) > 1]

    def is_list(self, page: CrawledPage, key: str) -> bool:
        return (page.kind, key) in self._lists

    def single_keys(self, page: CrawledPage) -> list[str]:
        """Keys short enough to ask for, whose one value is short enough to be an answer, and is no page of another split."""
        return self._single_keys[page.url]

    def next_page(self, page: CrawledPage, key: str) -> CrawledPage | None:
        url = page.facts[key][0].url
        return None if url is None else self.pages.get(url)

    def names(self, value: FactValue) -> tuple[str, ...]:
        """The value's text and what else its own page calls it."""
        page = self.pages.get(value.url or "")
        return tuple(dict.fromkeys((value.text, *((page.title, *page.aliases) if page else ()))))

    def _is_countable(self, page: CrawledPage, key: str) -> bool:
        return self.is_list(page, key) and all(value.url is not None for value in page.facts[key])

    def _is_askable(self, page: CrawledPage, key: str) -> bool:
        value = page.facts[key][0]
        elsewhere = value.url in self._elsewhere or (value.url not in self.pages and value.text in self._titles_elsewhere)
        return not elsewhere and not self.is_list(page, key) and 0 < len(key) <= _MAX_KEY_CHARS and len(value.text) <= _MAX_VALUE_CHARS


def graphs(pages_by_split: Mapping[str, Sequence[CrawledPage]]) -> dict[str, Graph]:
    """Each split's own; a title or a list is what it is on the whole site."""
    return {
        split: Graph(pages, [page for other, theirs in pages_by_split.items() if other != split for page in theirs])
        for split, pages in pages_by_split.items()
    }


def draw_question(graph: Graph, type_: str, rng: random.Random) -> Task | None:
    """A random question of a type; None where the draw led nowhere, or to a question that says its own answer."""
    if type_ == "count":
        draft = _count(*rng.choice(graph.lists)) if graph.lists else None
    elif type_ == "intersection":
        draft = _intersection(graph, rng) if graph.shared_entries else None
    else:
        draft = _chain(graph, int(type_.removeprefix("hop")), rng) if graph.entities else None
    return None if draft is None or leaks(draft.question, draft.answers) else _task(draft, type_)


def _chain(graph: Graph, hops: int, rng: random.Random) -> _Draft | None:
    page: CrawledPage | None = rng.choice(graph.entities)
    pages: list[CrawledPage] = []
    keys: list[str] = []
    for hop in range(hops):
        if page is None or page in pages:
            return None
        leads_on = hop < hops - 1
        free = [key for key in graph.single_keys(page) if not leads_on or graph.next_page(page, key)]
        if not free:
            return None
        pages.append(page)
        keys.append(rng.choice(free))
        page = graph.next_page(page, keys[-1])
    answer = pages[-1].facts[keys[-1]][0]
    if answer.url in {page.url for page in pages} or any(page.facts.get(keys[-1], ())[:1] == (answer,) for page in pages[:-1]):
        return None
    path = " of the ".join(reversed(keys))
    return _Draft(question=f"What is the {path} of {pages[0].title}?", answers=graph.names(answer), pages=tuple(pages), keys=tuple(keys))


def _count(page: CrawledPage, key: str) -> _Draft:
    number = len(page.facts[key])
    asked = f"people are in the cast of the {page.kind} {page.title}" if key == "cast" else f"{key} does {page.title} have"
    spelled = (_NUMERALS[number],) if number < len(_NUMERALS) else ()
    return _Draft(question=f"How many {asked}?", answers=(str(number), *spelled), pages=(page,), keys=(key,))


def _intersection(graph: Graph, rng: random.Random) -> _Draft | None:
    entry = rng.choice(graph.shared_entries)
    pair = rng.sample(graph.lists_by_entry[entry], 2)
    (one, one_key), (other, other_key) = sorted(pair, key=lambda item: (item[0].url, item[1]))  # one pair of lists, one question
    there = {value.url or value.text for value in other.facts[other_key]}
    shared = [value for value in one.facts[one_key] if (value.url or value.text) in there]
    if one is other or len(shared) != 1:
        return None
    who = "Who" if one.kind else "What"  # of an entity whose kind is known, a list is one of persons
    question = f"{who} is in both the {one_key} of {one.title} and the {other_key} of {other.title}?"
    return _Draft(question=question, answers=graph.names(shared[0]), pages=(one, other), keys=(one_key, other_key))


def leaks(question: str, answers: Sequence[str]) -> bool:
    """Whether the question itself says an answer, word for word."""
    asked = f" {' '.join(words(question))} "
    return any(f" {' '.join(words(answer))} " in asked for answer in answers)


def question_id(question: str, source: str = SOURCE) -> str:
    return f"{source}-{hashlib.sha256(question.encode()).hexdigest()[:16]}"


def _task(draft: _Draft, type_: str) -> Task:
    return Task(
        id=question_id(draft.question),
        question=draft.question,
        answers=draft.answers,
        source=SOURCE,
        metadata={
            "type": "hop" if type_.startswith("hop") else type_,
            "hops": len(draft.pages),
            "provenance": [page.url for page in draft.pages],
            "keys": list(draft.keys),
            "split": draft.pages[0].split,
        },
    )
