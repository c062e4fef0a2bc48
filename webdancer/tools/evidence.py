"""What of a page bears on a goal: an extractive summarizer that needs no model.

Sentences and table rows are ranked by BM25 against the words of the goal within the page; a row whose key the goal names comes first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# An end mark and a space before a capital, a digit or a `key:`, but not after an initial or a common title.
_SENTENCE = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs|No)\.)[\"')\]]*\s+(?=[\"'(\[]?[^\W_a-z]|[a-z][\w -]{0,40}: )|(?<=[。！？])"
)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
_KEY = re.compile(r"([^:.]{1,60}): \S")
_ORNAMENT = re.compile(r"^(?:[-*+]|\d{1,3}\.)\s+|[*_`]{2,}")
_STOP = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "by", "did", "do", "does", "for", "from", "had", "has", "have", "how", "in", "is",
    "it", "its", "of", "on", "or", "that", "the", "their", "this", "to", "was", "were", "what", "when", "where", "which", "who",
    "whom", "whose", "why", "with", "find", "information", "about", "page", "get", "give", "list", "name",
})  # fmt: skip
_K1, _B = 1.2, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """`evidence`: the best sentences and rows in page order, one a line. `summary`: the best one. `rational`: a model's reason for them;
    the agent does not see it."""

    evidence: str
    summary: str
    rational: str = ""


def find_evidence(text: str, goal: str, *, max_sentences: int, max_chars: int) -> Evidence:
    """The page's best sentences for the goal, at most so many and so long together; both empty only for an empty page.

    Ties go to what stands first, so that a goal without a match yields the page's beginning.
    """
    units = _units(text)
    if not units:
        return Evidence(evidence="", summary="")
    scores = _scores(units, goal)
    ranked = sorted(range(len(units)), key=lambda index: (-scores[index], index))
    best = _cut(units[ranked[0]], max_chars)
    chosen, room = {ranked[0]: best}, max_chars - len(best)
    for index in ranked[1:]:
        if len(chosen) >= max_sentences:
            break
        if len(units[index]) + 1 <= room:
            chosen[index] = units[index]
            room -= len(units[index]) + 1
    return Evidence(evidence="\n".join(chosen[index] for index in sorted(chosen)), summary=best)


def first_sentences(text: str, *, max_sentences: int, max_chars: int) -> str:
    """The beginning of a text, cut where a sentence ends, or between words if the first one is too long. 0 sentences: no limit."""
    words = text.split(None, max_chars + 1)[: max_chars + 1]  # no more fit, and the text may be a whole article
    sentences = [sentence for sentence in _SENTENCE.split(" ".join(words)) if sentence]
    kept = ""
    for sentence in sentences[: max_sentences or None]:
        longer = f"{kept} {sentence}".strip()
        if len(longer) > max_chars:
            return kept or _cut(sentence, max_chars)
        kept = longer
    return kept


def _units(text: str) -> list[str]:
    """Sentences and rows in page order, without headings and repeats."""
    units: dict[str, None] = {}
    headings: dict[str, None] = {}
    for line in text.split("\n"):
        line = line.strip()
        if line.startswith("#"):
            headings[line.lstrip("# ")] = None
            continue
        for sentence in _SENTENCE.split(_ORNAMENT.sub("", line)):
            if sentence and sentence.strip():
                units[sentence.strip()] = None
    return list(units or headings)


def _scores(units: Sequence[str], goal: str) -> list[float]:
    wanted = set(_words(goal))
    wanted = (wanted - _STOP) or wanted
    bags = [Counter(_words(unit)) for unit in units]
    lengths = [max(1, bag.total()) for bag in bags]
    mean = sum(lengths) / len(lengths)
    frequency = Counter(word for bag in bags for word in bag if word in wanted)
    idf = {word: math.log(1 + (len(units) - n + 0.5) / (n + 0.5)) for word, n in frequency.items()}
    top = sum(idf.values()) * (_K1 + 1)  # more than any overlap alone can reach
    scores = []
    for unit, bag, length in zip(units, bags, lengths, strict=True):
        norm = _K1 * (1 - _B + _B * length / mean)
        score = sum(idf[word] * bag[word] * (_K1 + 1) / (bag[word] + norm) for word in wanted if word in bag)
        scores.append(score + top if _key_named(unit, wanted) else score)
    return scores


def _key_named(unit: str, wanted: set[str]) -> bool:
    match = _KEY.match(unit)
    key = set(_words(match.group(1))) - _STOP if match else set()
    return bool(key) and key <= wanted


def _words(text: str) -> list[str]:
    words = _WORD.findall(text.casefold())
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return text[: max(0, max_chars - 4)].rsplit(" ", 1)[0] + " ..." if max_chars > 4 else text[:max_chars]
