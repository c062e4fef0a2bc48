"""CRAWLQA with a model: it reads linked pages and writes a question of the type asked for, with the facts that the answer needs.

Nothing is believed that can be checked: every fact is a quotation, which must stand in its page word for word; every page must be needed by
a fact; the answer must come out of the facts. What the model says besides is dropped. Types after Mintaka (Sen et al. 2022), as the paper
names them: COUNT, MULTI-HOP (`hop1` to `hop4`) and INTERSECTION.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from webdancer.llm.client import ChatModel, ChatRefused, NoUsableReply
from webdancer.synthesis.collect import LeftOut
from webdancer.synthesis.page import CrawledPage
from webdancer.synthesis.prompts import question_prompt
from webdancer.synthesis.questions import SOURCE, leaks, question_id
from webdancer.synthesis.similar import words
from webdancer.types import Task

DECLINED, REFUSED, UNUSABLE = "model_declined", "model_refused", "unusable_reply"
QUOTE, UNUSED, UNSUPPORTED, MISCOUNTED, LONG, LEAK = (
    "quote_not_in_page",
    "page_not_used",
    "answer_not_in_facts",
    "miscounted",
    "long",
    "leak",
)
OTHER_SPLIT = "page_of_other_split"

_PAGE_CHARS = 6_000
_MIN_PAGE_CHARS = 200
_MAX_ANSWER_WORDS, _MAX_QUESTION_WORDS = 12, 120
_TEMPERATURE, _MAX_TOKENS = 0.7, 4_096
_DRAWS = 200


@dataclass(frozen=True, slots=True)
class Bundle:
    """Pages that one question is to be written about; `about`: what the two pages of an intersection have in common."""

    split: str
    type: str
    pages: tuple[CrawledPage, ...]
    about: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    question: str
    answers: tuple[str, ...]
    facts: tuple[tuple[int, str], ...]
    """(number of the page, what stands in it)"""
    items: tuple[str, ...]


class ModelQuestions:
    """Draws bundles of linked pages of one split, and has questions written about them."""

    def __init__(self, pages_by_split: Mapping[str, Sequence[CrawledPage]], model: ChatModel, *, seed: int) -> None:
        self._pages = {
            split: {page.url: page for page in pages if len(page.text) >= _MIN_PAGE_CHARS} for split, pages in pages_by_split.items()
        }
        self._order = {split: list(pages) for split, pages in self._pages.items()}
        self._linking = {split: _linking(pages) for split, pages in self._pages.items()}
        titles = {split: {" ".join(words(page.title)) for page in pages} for split, pages in pages_by_split.items()}
        self._elsewhere = {split: set[str]().union(*titles.values()) - titles[split] - {""} for split in titles}
        self._model = model
        self._seed = seed
        self._rng: dict[tuple[str, str], random.Random] = {}
        self._drawn: set[tuple[str, ...]] = set()

    def draw(self, split: str, type_: str) -> Bundle | None:
        """Pages that were not drawn for this type before; None once chance finds no more."""
        if not self._order.get(split):
            return None
        rng = self._rng.setdefault((split, type_), random.Random(f"{self._seed} {split} {type_}"))
        for _ in range(_DRAWS):
            bundle = self._bundle(split, type_, rng)
            key = (type_, *(page.url for page in bundle.pages)) if bundle else ()
            if bundle is not None and key not in self._drawn:
                self._drawn.add(key)
                return bundle
        return None

    async def write(self, drawn: Bundle) -> Task | LeftOut:
        shown = [page.text[:_PAGE_CHARS] for page in drawn.pages]
        pages = [
            {"page": number, "url": page.url, "title": page.title, "text": text}
            for number, (page, text) in enumerate(zip(drawn.pages, shown, strict=True), start=1)
        ]
        # JSON is the delimiter: nothing inside a page can end it.
        case = json.dumps({"type": drawn.type, "in_common": drawn.about, "pages": pages}, ensure_ascii=False)
        messages = [{"role": "system", "content": question_prompt(drawn.type)}, {"role": "user", "content": case}]
        try:
            written = await self._model.chat_json(messages, read_question, temperature=_TEMPERATURE, max_tokens=_MAX_TOKENS)
        except ChatRefused as error:
            return LeftOut(REFUSED, str(error))
        except NoUsableReply as error:
            return LeftOut(UNUSABLE, str(error))
        if written is None:
            return LeftOut(DECLINED)
        wrong = find_fault(written, drawn.type, shown)
        answers = {" ".join(words(answer)) for answer in written.answers}
        if not wrong and drawn.type != "count" and not answers.isdisjoint(self._elsewhere[drawn.split]):
            wrong = OTHER_SPLIT
        return LeftOut(wrong, written.question) if wrong else _task(written, drawn, shown)

    def _bundle(self, split: str, type_: str, rng: random.Random) -> Bundle | None:
        pages, order = self._pages[split], self._order[split]
        if type_ == "intersection":
            common = rng.choice(order)
            linking = self._linking[split].get(common, [])
            if len(linking) < 2:
                return None
            return Bundle(split, type_, tuple(pages[url] for url in sorted(rng.sample(linking, 2))), pages[common].title)
        length = 1 if type_ == "count" else int(type_.removeprefix("hop"))
        path = [pages[rng.choice(order)]]
        while len(path) < length:
            onward = [url for url in path[-1].links if url in pages and pages[url] not in path]
            if not onward:
                return None
            path.append(pages[rng.choice(onward)])
        return Bundle(split, type_, tuple(path))


def read_question(fields: Mapping[str, Any]) -> Written | None:
    """What the model wrote; None if it says that these pages give no such question. Raises ValueError, KeyError or TypeError."""
    question = _text(fields["question"])
    if not question:
        return None
    answers = (_text(fields["answer"]), *map(_text, fields.get("aliases") or ()))
    if not answers[0]:
        raise ValueError("answer: must not be empty")
    facts = tuple((int(fact["page"]), _text(fact["quote"])) for fact in fields["facts"])
    return Written(question, tuple(dict.fromkeys(filter(None, answers))), facts, tuple(map(_text, fields.get("items") or ())))


def find_fault(written: Written, type_: str, pages: Sequence[str]) -> str:
    """Why this is no question of that type about these texts; nothing if it is one."""
    told = [f" {' '.join(words(page))} " for page in pages]
    facts = [(page, f" {' '.join(words(quote))} ") for page, quote in written.facts]
    answers = [f" {' '.join(words(answer))} " for answer in written.answers]
    if len(words(written.answers[0])) > _MAX_ANSWER_WORDS or len(words(written.question)) > _MAX_QUESTION_WORDS:
        return LONG
    if leaks(written.question, written.answers):
        return LEAK
    if not all(1 <= page <= len(told) and quote.strip() and quote in told[page - 1] for page, quote in facts):
        return QUOTE
    if {page for page, _ in facts} != set(range(1, len(told) + 1)):
        return UNUSED
    if type_ == "count":
        items = {f" {' '.join(words(item))} " for item in written.items}
        all_there = all(item.strip() and item in told[0] for item in items)
        return "" if all_there and written.answers[0].strip() == str(len(items)) else MISCOUNTED
    # At the end of a path; of an intersection, from either page. The answer itself: an alias alone would prove another one.
    needed = set(range(1, len(told) + 1)) if type_ == "intersection" else {len(told)}
    found = {page for page, quote in facts if answers[0].strip() and answers[0] in quote}
    return "" if needed <= found else UNSUPPORTED


def _task(written: Written, bundle: Bundle, pages: Sequence[str]) -> Task:
    """An alias counts only where a page says it, as every one of them is a right answer."""
    hops, told = len(bundle.pages), " ".join(f" {' '.join(words(page))} " for page in pages)
    first, *aliases = written.answers
    answers = (first, *(alias for alias in aliases if words(alias) and f" {' '.join(words(alias))} " in told))
    metadata = {
        "type": "hop" if bundle.type.startswith("hop") else bundle.type,
        "hops": hops,
        "provenance": [page.url for page in bundle.pages],
        "facts": [{"url": bundle.pages[page - 1].url, "quote": quote} for page, quote in written.facts],
    }
    if bundle.type == "count":
        metadata["items"] = list(written.items)
    return Task(id=question_id(written.question), question=written.question, answers=answers, source=SOURCE, metadata=metadata)


def _linking(pages: Mapping[str, CrawledPage]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for url, page in pages.items():
        for link in page.links:
            if link in pages and link != url:
                found.setdefault(link, []).append(url)
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"must be a text, got {type(value).__name__}")
    str(value).encode()  # half a surrogate pair is a ValueError: no file takes it
    return " ".join(str(value).split())
