"""The extractive summarizer: the row whose key is asked for comes first, evidence keeps the page's order and its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webdancer.tools import evidence
from webdancer.tools.evidence import find_evidence, first_sentences

PAGE = """# Karo Mil
born: 1934.
school: Bana School.
employer: Tiro Works.
home: Veltor Ridge.
Karo Mil is a person. The person works at a school in Veltor Ridge and was born to J. R. Mil.
Also written: Mil, Karo."""


def _find(goal, text=PAGE, max_sentences=3, max_chars=1_000):
    return find_evidence(text, goal, max_sentences=max_sentences, max_chars=max_chars)


@pytest.mark.parametrize(
    ("goal", "summary"),
    [
        ("school", "school: Bana School."),
        ("the school of Karo Mil", "school: Bana School."),
        ("Find the Schools that Karo Mil went to", "school: Bana School."),
        ("EMPLOYER", "employer: Tiro Works."),
        ("when was Karo Mil born?", "born: 1934."),
        ("home", "home: Veltor Ridge."),
    ],
)
def test_the_row_with_the_asked_key_is_the_summary(goal, summary):
    assert _find(goal).summary == summary


def test_evidence_is_the_best_in_page_order():
    assert _find("home").evidence == "born: 1934.\nschool: Bana School.\nhome: Veltor Ridge."
    assert _find("person Karo", max_sentences=2).evidence.startswith("Karo Mil is a person.\n")


def test_a_goal_without_a_match_yields_the_beginning():
    assert _find("zzz", max_sentences=2).evidence == "born: 1934.\nschool: Bana School."
    assert _find("???").summary == "born: 1934."


def test_prose_is_ranked_by_rare_words():
    text = "The club is old. The club is in the city. The club won the cup in 1987. The club likes tea."
    assert _find("in which year did the club win the cup", text).summary == "The club won the cup in 1987."


def test_chinese_sentences_are_told_apart():
    assert _find("首都", "法国位于欧洲。法国的首都是巴黎。它有河流。", max_sentences=1).evidence == "法国的首都是巴黎。"


def test_nothing_and_headings_only():
    assert _find("x", "").evidence == ""
    assert _find("x", "# Only a title").evidence == "Only a title"


@given(st.text(max_size=400), st.text(max_size=40), st.integers(1, 5), st.integers(1, 200))
def test_bounds_hold_and_nothing_is_invented(text, goal, max_sentences, max_chars):
    found = find_evidence(text, goal, max_sentences=max_sentences, max_chars=max_chars)
    assert len(found.evidence) <= max_chars
    assert len(found.summary) <= max_chars
    assert found.summary in found.evidence
    assert found.evidence.count("\n") < max_sentences
    assert all(line in text or line.endswith("...") or len(line) == max_chars for line in found.evidence.split("\n"))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_sentences": 1, "max_chars": 300}, "person."),
        ({"max_sentences": 3, "max_chars": 300}, "person. school: Bana School. employer: Tiro Works."),
        ({"max_sentences": 0, "max_chars": 30}, "person. school: Bana School."),
        ({"max_sentences": 0, "max_chars": 300}, "person. school: Bana School. employer: Tiro Works. cast: A B, C D. born: 1934."),
        ({"max_sentences": 0, "max_chars": 5}, "p ..."),
    ],
)
def test_a_snippet_is_cut_at_a_sentence_end(limits, expected):
    text = "person. school: Bana School. employer: Tiro Works. cast: A B, C D. born: 1934."
    assert first_sentences(text, **limits).strip() == expected


@given(st.text(max_size=300), st.integers(0, 4), st.integers(1, 100))
def test_a_snippet_is_never_longer_than_asked(text, max_sentences, max_chars):
    assert len(first_sentences(text, max_sentences=max_sentences, max_chars=max_chars)) <= max_chars


@given(
    st.lists(st.sampled_from(["Owl.", "owls", "\n", "  ", "a", "night!", "x" * 40]), max_size=60).map(" ".join),
    st.integers(0, 4),
    st.integers(1, 60),
)
def test_of_an_article_only_the_beginning_is_looked_at(text, max_sentences, max_chars):
    """As if all of it had been."""
    sentences = [sentence for sentence in evidence._SENTENCE.split(" ".join(text.split())) if sentence][: max_sentences or None]
    fitting = [" ".join(sentences[:n]) for n in range(len(sentences) + 1) if len(" ".join(sentences[:n])) <= max_chars]
    expected = fitting[-1] or (evidence._cut(sentences[0], max_chars) if sentences else "")
    assert first_sentences(text, max_sentences=max_sentences, max_chars=max_chars) == expected


def test_what_is_split_into_sentences_is_bounded(monkeypatch):
    seen = []
    monkeypatch.setattr(evidence, "_SENTENCE", Sees(evidence._SENTENCE, seen))
    assert first_sentences("Owls hunt. " * 100_000, max_sentences=0, max_chars=30) == "Owls hunt. Owls hunt."
    assert max(map(len, seen)) < 1000


class Sees:
    def __init__(self, pattern, seen):
        self.pattern, self.seen = pattern, seen

    def split(self, text):
        self.seen.append(text)
        return self.pattern.split(text)
