"""What is left out, under which name; what an answer is also called; which language a question is in."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webdancer.config import SynthesisConfig
from webdancer.errors import DataError
from webdancer.evaluation.benchmarks import load_evaluation_set
from webdancer.evaluation.ciphers import encrypt
from webdancer.synthesis.collect import LeftOut, Need, Outcome, collect
from webdancer.synthesis.hygiene import Hygiene, aliases, described, language
from webdancer.synthesis.in_order import in_order
from webdancer.synthesis.pools import PoolFiles, split_of
from webdancer.synthesis.seeds import sift_seeds
from webdancer.types import Task

LONG = "Which composer of the late nineteenth century wrote the music for the festival that the town of Bana holds in May?"


def task(question, *answers):
    return Task(id=question, question=question, answers=answers or ("Elgar",), source="test", metadata={"type": "hop", "hops": 1})


def reasons(*tasks, evaluation=(), near_duplicate=0.8):
    hygiene = Hygiene(near_duplicate=near_duplicate, evaluation=evaluation)
    found = []
    for one in tasks:
        found.append(hygiene.check(one))
        if not found[-1]:
            hygiene.add(one)
    return found


def test_duplicates_whatever_case_and_punctuation():
    assert reasons(task("Who wrote Bana?"), task("who wrote  BANA"), task("Who sang Bana?")) == ["", "exact_duplicate", ""]


def test_a_near_duplicate_has_the_same_answer():
    again = LONG.replace("May", "June")
    assert reasons(task(LONG), task(again), task(again, "Bax")) == ["", "near_duplicate", ""]
    assert reasons(task(LONG), task(again), near_duplicate=0.0) == ["", ""]


def test_questions_of_evaluation_sets_are_refused():
    thirteen = "wrote the music for the festival that the town of Bana holds in"
    sets = [LONG, "What is the river of Kani Soto?", "Who won?"]
    asked = [
        task(f"Tell me who {thirteen} June each year?"),
        task("Tell me who wrote the music for the festival that the town of Bana has"),
        task("Say, what is the river of kani soto, please?"),
        task("What is the river of Kani?"),
        task("Who won?"),
        task("Who won the Veka Prize?"),
    ]
    overlap = "evaluation_overlap"
    assert reasons(*asked, evaluation=sets) == [overlap, "", overlap, "", overlap, ""]


def test_a_question_made_of_one_of_an_evaluation_set_is_refused():
    harder = task("What is the river of the seat of the one that Bax wrote for?")
    seed = dataclasses.replace(harder, metadata={"seed_question": "What is the river of Kani Soto?", "steps": []})
    step = dataclasses.replace(harder, metadata={"seed_question": "What?", "steps": [{"question": LONG}]})
    sets = [LONG, "What is the river of Kani Soto?"]
    assert [reasons(one, evaluation=sets) for one in (harder, seed, step)] == [[""], ["evaluation_overlap"], ["evaluation_overlap"]]


def test_seeds_that_an_evaluation_set_has_or_that_come_twice_are_not_begun_with():
    def seed(question, answer):
        return Task(id=question, question=question, answers=(answer,), source="simple")

    given = [seed("Who painted the Bana gate?", "Veka"), seed(LONG, "Soto"), seed("who painted the Bana gate", "Kani")]
    by_split, unfit = sift_seeds(given, Hygiene(near_duplicate=0.8, evaluation=[LONG]))
    assert by_split == {split_of("veka"): given[:1]}
    assert [(found.task.question, found.reason) for found in unfit] == [
        (LONG, "evaluation_overlap"),
        ("who painted the Bana gate", "exact_duplicate"),
    ]


def test_what_overlaps_with_an_encrypted_set_is_written_nowhere(tmp_path):
    question, canary = "In which year did the twelve singers of the first choir of Bana leave for the coast of Veka?", "key"
    row = [encrypt(question, canary, "sha256"), encrypt("1954", canary, "sha256"), canary]
    (tmp_path / "set.csv").write_text("problem,answer,canary\n" + ",".join(row) + "\n")
    entry = f"browsecomp={tmp_path / 'set.csv'}"
    (sealed,) = load_evaluation_set(entry)
    hygiene = Hygiene(near_duplicate=0.8, evaluation=[sealed.question])
    files = PoolFiles(tmp_path / "questions", SynthesisConfig(evaluation_sets=[entry]))
    asked = dataclasses.replace(task(f"Tell me: {question}"), id="q1")
    files.add(Outcome(Need("train", "hop1", 1), asked, hygiene.check(asked)))
    assert files.finish({})["left_out"] == {"evaluation_overlap": 1}
    assert not any("choir" in path.read_text() for path in (tmp_path / "questions").iterdir())


@pytest.mark.parametrize("entry", ["webwalker=a.jsonl", "nothing.jsonl"])
def test_an_evaluation_set_that_is_not_there_is_one_line(entry):
    with pytest.raises(DataError, match=f"{entry}: must be a"):
        load_evaluation_set(entry)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), st.lists(st.sampled_from("abcdefgh"), min_size=13, max_size=40))
def test_overlap_is_thirteen_words_in_common(asked, known):
    runs = {tuple(known[i : i + 13]) for i in range(len(known) - 12)}
    expected = any(tuple(asked[i : i + 13]) in runs for i in range(len(asked) - 12))
    found = Hygiene(near_duplicate=0.0, evaluation=[" ".join(known)]).check(task(" ".join(asked), "zzz"))
    assert (found == "evaluation_overlap") == expected


def test_leaks_and_essays():
    assert reasons(task("北京大学在哪个城市，是北京还是上海？", "北京")) == ["leak"]
    assert reasons(task("Is it A) Bax or B) Elgar?", "A"), task("Who was Elgar?"), task("What?", "word " * 31)) == [
        "leak",
        "leak",
        "long_answer",
    ]


def test_what_an_answer_is_also_called():
    assert aliases("Violet Rays (The Smashing Pumpkins song)") == ["Violet Rays"]
    assert aliases("Psycinfo (APA)") == ["Psycinfo"]
    assert aliases("North Atlantic Treaty Organization (NATO)") == ["North Atlantic Treaty Organization", "NATO"]
    assert [aliases(text) for text in ("Paris", "(1)", "f(x)(y)", "a (b) c", "")] == [[]] * 5
    assert described(task("Who?", "A (B c)", "D"), split="dev").answers == ("A (B c)", "A", "D")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("What is the river of Kani Soto?", "en"),
        ("谁是美国总统?", "zh"),
        ("東京タワーの高さは?", "ja"),
        ("서울의 인구는 얼마입니까?", "ko"),
        ("Wer ist der Bürgermeister von Wien?", "de"),
        ('How many articles in the "新闻与评论" section were authored by Alexandra Witze?', "en"),
        ("", "und"),
    ],
)
def test_languages(text, code):
    assert language(text) == code


class Numbers:
    """A source of numbered questions; every third comes to nothing, and late ones come first."""

    def __init__(self, available=1000):
        self.available = available
        self.drawn = []

    def draw(self, split, type_):
        if len(self.drawn) >= self.available:
            return None
        self.drawn.append((split, type_))
        return len(self.drawn)

    async def write(self, number):
        await asyncio.sleep((number * 7 % 5) / 1000)
        return LeftOut("third") if number % 3 == 0 else task(f"Question number {number} of all that there are")


def collected(source, needs, **more):
    async def all_of_it():
        return [outcome async for outcome in collect(needs, source, Hygiene(near_duplicate=0.0), **more)]

    return asyncio.run(all_of_it())


def test_needs_are_met_exactly_in_an_order_that_timing_does_not_change():
    needs = [Need("train", "a", 10), Need("dev", "b", 3)]
    source = Numbers()
    outcomes = collected(source, needs)
    good = [outcome for outcome in outcomes if not outcome.reason]
    assert [sum(outcome.need == need for outcome in good) for need in needs] == [10, 3]
    assert all(outcome.task.metadata["split"] == outcome.need.split and outcome.task.metadata["language"] == "en" for outcome in good)
    assert {outcome.reason for outcome in outcomes} == {"", "third"}
    assert collected(Numbers(), needs) == outcomes
    assert len(source.drawn) == len(outcomes)


def test_a_source_that_runs_dry_or_gives_nothing_ends_it():
    dry = collected(Numbers(available=4), [Need("train", "a", 10)])
    assert [outcome.reason for outcome in dry] == ["", "", "third", ""]

    class Fruitless(Numbers):
        async def write(self, number):
            return LeftOut("nothing")

    assert 400 <= len(collected(Fruitless(), [Need("train", "a", 5)])) < 500


def test_what_is_known_closed_book_is_left_out():
    async def knows_even(one):
        return "closed_book" if int(one.question.split()[2]) % 2 == 0 else ""

    outcomes = collected(Numbers(available=6), [Need("train", "a", 10)], closed_book=knows_even)
    assert [outcome.reason for outcome in outcomes] == ["", "closed_book", "third", "closed_book", "", "third"]
    assert isinstance(outcomes[0], Outcome)


def test_closed_book_questions_are_told_from_repeated_ones_whoever_is_faster():
    class Twice(Numbers):
        """Every question two times; which of the two is written first depends on `late`."""

        late = 0

        async def write(self, number):
            await asyncio.sleep((number % 2 == self.late) / 100)
            return task(f"Question number {(number + 1) // 2} of all that there are")

    async def knows(one):
        return "closed_book" if "number 1 " in one.question else ""

    needs = [Need("train", "a", 10)]
    found = []
    for late in (0, 1):
        source = Twice(available=4)
        source.late = late
        found.append([outcome.reason for outcome in collected(source, needs, closed_book=knows)])
    assert found == [["closed_book", "closed_book", "", "exact_duplicate"]] * 2


def test_what_an_answer_is_also_called_must_not_stand_in_the_question():
    class One(Numbers):
        async def write(self, number):
            return task("Is Psycinfo the database?", "Psycinfo (APA)")

    assert [outcome.reason for outcome in collected(One(available=1), [Need("train", "a", 1)])] == ["leak"]


def test_in_order_cancels_what_is_under_way_and_raises_errors_in_their_turn():
    ended = []

    async def work(number):
        try:
            await asyncio.sleep(0.001 if number < 3 else 60)
        finally:
            ended.append(number)
        if number == 2:
            raise KeyError(number)
        return number

    async def run(found):
        numbers = iter(range(10))
        try:
            async for number, _ in in_order(lambda: next(numbers, None), work, window=4):
                found.append(number)
        finally:
            assert len(asyncio.all_tasks()) == 1

    found = []
    with pytest.raises(KeyError):
        asyncio.run(run(found))
    assert found == [0, 1]
    assert sorted(ended) == [0, 1, 2, 3]
