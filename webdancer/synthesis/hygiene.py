"""What makes a question unfit, whoever made it: each reason has a name, and everything left out is counted under it.

    exact_duplicate      the same words, whatever case and punctuation
    near_duplicate       nearly the same words and the same answer: questions that only look alike ask for different things
    evaluation_overlap   13 words in a row in common with a question of an evaluation set, or a shorter one of these whole; also of the
                         simpler question that it was made of
    leak                 the question says its answer
    long_answer          an answer that no rule could grade
    closed_book          a model knows it without looking (asked elsewhere: synthesis/closed_book.py)

The 13-gram rule is that of GPT-3's appendix C (Brown et al. 2020).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from webdancer.synthesis.questions import leaks
from webdancer.synthesis.similar import SimilarTexts, runs, words
from webdancer.types import Task

EXACT_DUPLICATE, NEAR_DUPLICATE, OVERLAP, LEAK, LONG_ANSWER = (
    "exact_duplicate",
    "near_duplicate",
    "evaluation_overlap",
    "leak",
    "long_answer",
)
CLOSED_BOOK = "closed_book"

_OVERLAP_WORDS = 13
_SHORT_OVERLAP_WORDS = 6  # a shorter evaluation question is a phrase that may stand in any other
_RUN_LENGTH = 2  # questions are short: one other word is two other runs
_MAX_ANSWER_WORDS = 30

_SCRIPTS = (("ja", re.compile(r"[\u3040-\u30ff]")), ("ko", re.compile(r"[\uac00-\ud7af]")), ("zh", re.compile(r"[\u3400-\u9fff]")))
_LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "uk", "ar", "he", "tr", "vi", "id", "hi", "th", "sv", "cs", "el", "fa")
_LIKELY = 0.5
UNKNOWN_LANGUAGE = "und"


class Hygiene:
    """Remembers every question that it let through. `near_duplicate`: the similarity from which two count as one; 0: never."""

    def __init__(self, *, near_duplicate: float, evaluation: Iterable[str] = ()) -> None:
        self._questions: set[str] = set()
        self._answers: dict[str, frozenset[str]] = {}
        self._similar = SimilarTexts(near_duplicate, run_length=_RUN_LENGTH) if near_duplicate else None
        self._runs: set[str] = set()
        self._short: dict[int, set[str]] = {}
        self._shortest: set[str] = set()
        for question in evaluation:
            self._refuse(question)

    def check(self, task: Task) -> str:
        """The reason to leave it out, or nothing."""
        asked = " ".join(words(task.question))
        if reason := self.fault(task):
            return reason
        if asked in self._questions:
            return EXACT_DUPLICATE
        return NEAR_DUPLICATE if self._is_near(task, asked) else ""

    def fault(self, task: Task) -> str:
        """A reason that has nothing to do with other questions that were made, or nothing."""
        if any(map(self._overlaps, _asked(task))):
            return OVERLAP
        if leaks(task.question, task.answers):
            return LEAK
        if len(words(task.answers[0])) > _MAX_ANSWER_WORDS:
            return LONG_ANSWER
        return ""

    def add(self, task: Task) -> None:
        """Let through: later ones are compared with it."""
        asked = " ".join(words(task.question))
        self._questions.add(asked)
        self._answers[asked] = _answers(task)
        if self._similar is not None:
            self._similar.add(asked, asked)

    def _is_near(self, task: Task, asked: str) -> bool:
        answers = _answers(task)
        return self._similar is not None and any(self._answers[other] & answers for other in self._similar.like(asked))

    def _refuse(self, question: str) -> None:
        found = words(question)
        if len(found) >= _OVERLAP_WORDS:
            self._runs |= runs(question, _OVERLAP_WORDS)
        elif len(found) >= _SHORT_OVERLAP_WORDS:
            self._short.setdefault(len(found), set()).add(" ".join(found))
        elif found:
            self._shortest.add(" ".join(found))

    def _overlaps(self, question: str) -> bool:
        return (
            " ".join(words(question)) in self._shortest
            or not self._runs.isdisjoint(runs(question, _OVERLAP_WORDS))
            or any(not known.isdisjoint(runs(question, length)) for length, known in self._short.items())
        )


def _asked(task: Task) -> list[str]:
    """The question, and what it was before it was made harder: that has the same answer."""
    earlier = [task.metadata.get("seed_question", ""), *(step["question"] for step in task.metadata.get("steps", ()))]
    return [task.question, *filter(None, earlier)]


def described(task: Task, **more: Any) -> Task:
    """The task with the aliases that its answer implies, its language, and `more` in its metadata."""
    answers = tuple(dict.fromkeys(alias for answer in task.answers for alias in (answer, *aliases(answer))))
    return replace(task, answers=answers, metadata={**task.metadata, "language": language(task.question), **more})


def aliases(answer: str) -> list[str]:
    """What else the same answer is called: without its qualification, and with what stands in brackets if that is an abbreviation.

    "Psycinfo (APA)" is also "Psycinfo"; "North Atlantic Treaty Organization (NATO)" also "NATO"; "Pall Mall, London" is not "Pall Mall".
    """
    found = re.fullmatch(r"\s*([^()]+?)\s*\(([^()]+)\)\s*", answer)
    if not found:
        return []
    name, note = found.groups()
    initials = "".join(word[0] for word in re.findall(r"[^\W\d_]+", name) if word[0].isupper())
    return [name, note] if note.isupper() and note == initials else [name]


def language(text: str) -> str:
    """ISO 639-1, or `und` where the words do not say it. By the script first: a short question in Chinese is no guess."""
    num_letters = len(re.findall(r"[^\W\d_]+", text))
    for code, script in _SCRIPTS:
        if len(script.findall(text)) >= max(1, num_letters / 2):  # an English question may well quote a Chinese title
            return code
    code, likely = _identifier().classify(text)
    return str(code) if likely >= _LIKELY else UNKNOWN_LANGUAGE


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(_LANGUAGES))
    return identifier


def _answers(task: Task) -> frozenset[str]:
    return frozenset(" ".join(words(answer)) for answer in task.answers)
