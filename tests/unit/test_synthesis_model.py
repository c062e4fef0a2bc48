"""Questions by a model: what it writes is believed only as far as the pages bear it out. E2HQA: each check stops a round that fails it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random

import httpx
import pytest

from tests.scripted_model import write_question
from webdancer.config import LlmConfig
from webdancer.errors import ServiceError
from webdancer.llm.client import ChatModel
from webdancer.synthesis.closed_book import closed_book
from webdancer.synthesis.collect import LeftOut
from webdancer.synthesis.e2hqa import EasyToHard
from webdancer.synthesis.kept_search import KeptSearch
from webdancer.synthesis.model_questions import Bundle, ModelQuestions, Written, find_fault
from webdancer.synthesis.model_rounds import ModelRounds
from webdancer.synthesis.page import CrawledPage
from webdancer.synthesis.prompts import question_prompt
from webdancer.synthesis.questions import QUESTION_TYPES
from webdancer.tools.fetch import Fetcher
from webdancer.tools.provider import ProviderFailed
from webdancer.tools.render import Hit
from webdancer.types import Task


def model(answer):
    """A chat model that `answer(system, case)` speaks for; a string is its whole text."""

    def handle(request):
        system, user = (message["content"] for message in json.loads(request.content)["messages"])
        said = answer(system, json.loads(user) if user.startswith("{") else user)
        text = said if isinstance(said, str) else json.dumps(said)
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})

    config = LlmConfig(base_url="http://127.0.0.1:9/v1", model="m")
    return ChatModel(config, open_fetcher=lambda policy: Fetcher(policy, transport=httpx.MockTransport(handle)))


PAGES = ("Marie was born in Warsaw, in 1867.", "Warsaw stands on the Vistula. It has the Old Town, Praga and Wola.")
GOOD = Written("On which river is the town where Marie was born?", ("Vistula",), ((1, "born in Warsaw"), (2, "stands on the Vistula")), ())


def fault(type_="hop2", pages=PAGES, **changes):
    return find_fault(dataclasses.replace(GOOD, **changes), type_, pages)


def test_a_question_is_believed_as_far_as_its_pages_bear_it_out():
    assert fault() == ""
    assert fault(facts=((1, "born in Paris"), (2, "stands on the Vistula"))) == "quote_not_in_page"
    assert fault(facts=((3, "born in Warsaw"), (2, "stands on the Vistula"))) == "quote_not_in_page"
    assert fault(facts=((1, "orn in Warsaw"), (2, "stands on the Vistula"))) == "quote_not_in_page"
    assert fault(facts=((2, "stands on the Vistula"),)) == "page_not_used"
    assert fault(facts=((1, "born in Warsaw"), (2, "It has the Old Town"))) == "answer_not_in_facts"
    assert fault(answers=("Danube", "Vistula")) == "answer_not_in_facts", "an alias alone proves another answer"
    assert fault(question="Is the Vistula the river?") == "leak"
    assert fault(answers=("word " * 13,)) == "long"
    one = PAGES[1:]
    counted = {"facts": ((1, "the Old Town, Praga and Wola"),), "question": "How many quarters has the capital?"}
    assert fault("count", one, **counted, answers=("3",), items=("Old Town", "Praga", "Wola")) == ""
    assert fault("count", one, **counted, answers=("3",), items=("Old Town", "Praga", "Praga")) == "miscounted"
    assert fault("count", one, **counted, answers=("3",), items=("Old Town", "Praga", "Ursus")) == "miscounted"
    both = ("Karo Mil was there.", "1999: Karo Mil")
    facts = ((1, "Karo Mil was there"), (2, "1999: Karo Mil"))
    assert fault("intersection", both, answers=("Karo Mil",), facts=facts) == ""
    assert fault("intersection", both, answers=("1999",), facts=facts) == "answer_not_in_facts"


def page(name, *links, **facts):
    lines = [f"{key}: {value}." for key, value in facts.items()]
    text = "\n".join([*lines, *(f"See {link}." for link in links), "It has a history. " * 20])
    urls = tuple(f"/{link}" for link in links)
    return CrawledPage(url=f"/{name}", title=name, kind="", split="", aliases=(), facts={}, links=urls, text=text, link_texts=links)


WEB = [
    page("Bana", "Tiro", seat="Soto"),
    page("Tiro", "Veka", born="1931"),
    page("Veka", "Tiro", river="Kani"),
    page("Alone", cast="A B, C D, E F"),
]


def test_bundles_are_linked_pages_and_come_once():
    source = ModelQuestions({"train": WEB}, model(lambda system, case: ""), seed=1)
    drawn = [source.draw("train", "hop2") for _ in range(9)]
    paths = [tuple(found.title for found in bundle.pages) for bundle in drawn if bundle]
    assert sorted(paths) == [("Bana", "Tiro"), ("Tiro", "Veka"), ("Veka", "Tiro")]
    assert [source.draw("train", "hop4"), source.draw("dev", "hop1")] == [None, None]
    pair = source.draw("train", "intersection")
    assert (pair.about, [found.title for found in pair.pages]) == ("Tiro", ["Bana", "Veka"])


@pytest.mark.parametrize("type_", QUESTION_TYPES)
def test_every_type_has_a_prompt_of_its_own(type_):
    assert "Reply with one JSON object" in question_prompt(type_)
    assert "%" not in question_prompt(type_)


def test_what_the_model_writes_becomes_a_task_with_its_facts_or_a_reason():
    source = ModelQuestions({"train": WEB}, model(lambda system, case: write_question(json.dumps(case), "0" * 64)), seed=1)
    made = asyncio.run(source.write(Bundle("train", "hop2", (WEB[0], WEB[1]))))
    assert (made.question, made.answers) == ("Starting from Bana, 2 pages on, what is the born?", ("1931",))
    assert made.metadata["provenance"] == ["/Bana", "/Tiro"]
    assert made.metadata["facts"] == [{"url": "/Bana", "quote": "See Tiro."}, {"url": "/Tiro", "quote": "born: 1931"}]
    assert asyncio.run(source.write(Bundle("train", "count", (WEB[3],)))).answers == ("3",)
    for said, reason in [
        ('{"question": ""}', "model_declined"),
        ("no", "unusable_reply"),
        ('{"question": "x", "answer": 1.5}', "unusable_reply"),
        ('{"question": "\\ud83d?", "answer": "x", "facts": []}', "unusable_reply"),
    ]:
        source = ModelQuestions({"train": WEB}, model(lambda system, case, said=said: said), seed=1)
        assert asyncio.run(source.write(Bundle("train", "hop1", (WEB[0],)))).reason == reason


def test_of_a_models_aliases_only_those_of_the_pages_are_right_answers():
    said = {"question": "In which year?", "answer": "1931", "aliases": ["year of Tiro", "Tiro", "the past"]}
    said["facts"] = [{"page": 1, "quote": "born: 1931"}]
    source = ModelQuestions({"train": WEB}, model(lambda system, case: said), seed=1)
    assert asyncio.run(source.write(Bundle("train", "hop1", (WEB[1],)))).answers == ("1931",)
    assert asyncio.run(source.write(Bundle("train", "hop1", (page("Tiro", "Tiro", born="1931"),)))).answers == ("1931", "Tiro")


def test_an_answer_that_is_a_page_of_another_split_is_none_of_this_one():
    said = {"question": "What is the seat of Bana?", "answer": "Soto", "facts": [{"page": 1, "quote": "seat: Soto."}]}
    writer = model(lambda system, case: said)
    for other, reason in (("soto!", "page_of_other_split"), ("Sotos", None)):
        source = ModelQuestions({"train": WEB, "heldout": [page(other)]}, writer, seed=1)
        made = asyncio.run(source.write(Bundle("train", "hop1", (WEB[0],))))
        assert getattr(made, "reason", None) == reason


SEED = Task(id="s", question="Which river does Warsaw stand on?", answers=("Vistula",), source="simple")
HARDER = "Which river does the town where Marie was born stand on?"
STEPS = {
    "pick": {"entity": "Warsaw", "query": "Warsaw town"},
    "rewrite": {"description": "the town where Marie was born", "question": HARDER},
    "identify": {"entities": ["warsaw"]},
    "answer": {"answer": "The Vistula."},
}


def easy_to_hard(searched=None, max_rounds=1, seed=0, **changes):
    steps = STEPS | changes

    def answer(system, case):
        name = "pick" if "used" in case else "rewrite" if "entity" in case else "identify" if "description" in case else "answer"
        return steps[name](case) if callable(steps[name]) else steps[name]

    async def search(query):
        if searched is not None:
            searched.append(query)
        return [Hit(title="Warsaw", url="http://w/Warsaw", snippet="Marie was born in Warsaw.")]

    source = EasyToHard(ModelRounds({"train": [SEED]}, model(answer), search), max_rounds=max_rounds, seed=seed)
    return asyncio.run(source.write(source.draw("train", "e2hqa")))


def test_a_round_chooses_searches_rewrites_and_is_checked():
    searched = []
    made = easy_to_hard(searched)
    assert (made.question, made.answers, made.source) == (HARDER, ("Vistula",), "e2hqa")
    assert searched == ["Warsaw town", "the town where Marie was born"]
    assert (made.metadata["rounds"], made.metadata["hops"], made.metadata["provenance"]) == (1, 2, ["http://w/Warsaw"])
    assert made.metadata["seed_question"] == SEED.question


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pick": {"entity": "", "query": ""}}, "nothing_to_describe"),
        ({"pick": {"entity": "Paris", "query": "Paris"}}, "nothing_to_describe"),
        ({"rewrite": {"description": "", "question": ""}}, "not_rewritten"),
        ({"rewrite": {"description": "the town", "question": "Which river?"}}, "not_rewritten"),
        ({"rewrite": {"description": "the town", "question": "Which sea does the town stand on?"}}, "not_rewritten"),
        ({"rewrite": {"description": "the \ud83d town", "question": "Which river does the \ud83d town stand on?"}}, "not_rewritten"),
        ({"rewrite": {"description": "the town of Warsaw", "question": "Which river does the town of Warsaw stand on?"}}, "leak"),
        ({"rewrite": {"description": "the Vistula town", "question": "Which river does the Vistula town stand on?"}}, "leak"),
        ({"identify": {"entities": ["Warsaw", "Cracow"]}}, "not_one_entity"),
        ({"identify": {"entities": []}}, "not_one_entity"),
        ({"identify": {"entities": "Warsaw"}}, "not_one_entity"),
        ({"answer": {"answer": "Oder"}}, "answer_changed"),
        ({"answer": "no JSON"}, "answer_changed"),
    ],
)
def test_a_round_that_fails_a_check_is_not_taken(changes, reason):
    assert easy_to_hard(**changes) == LeftOut(reason, SEED.question)


def test_a_later_round_does_not_bring_back_what_an_earlier_one_replaced():
    seed = next(seed for seed in range(99) if random.Random(f"{seed} train e2hqa").randint(1, 3) > 1)
    picks = {SEED.question: "Warsaw", HARDER: "Marie"}
    again = {"Warsaw": STEPS["rewrite"]["description"], "Marie": "the daughter of Warsaw"}

    def rewrite(case):
        description = again[case["entity"]]
        return {"description": description, "question": case["question"].replace(case["entity"], description)}

    changes = {"pick": lambda case: {"entity": picks[case["question"]], "query": "q"}, "rewrite": rewrite}
    made = easy_to_hard(max_rounds=3, seed=seed, **changes)
    assert (made.metadata["rounds"], made.metadata["stopped_by"]) == (1, "leak")


def test_the_rounds_that_passed_are_kept_with_what_stopped_the_next():
    drawn = [random.Random(f"{seed} train e2hqa").randint(1, 3) for seed in range(1)]
    made = easy_to_hard(max_rounds=3)
    assert made.metadata["rounds"] == 1
    assert made.metadata["rounds_wanted"] == drawn[0]
    assert made.metadata["stopped_by"] == ("nothing_to_describe" if drawn[0] > 1 else "")


def test_closed_book_asks_until_one_answer_is_right():
    said = iter(["unknown", "Oder", "vistula"])
    asked = closed_book(model(lambda system, case: next(said)), attempts=3)
    assert asyncio.run(asked(SEED)) == "closed_book"
    assert asyncio.run(closed_book(model(lambda system, case: "unknown"), attempts=3)(SEED)) == ""


def test_a_search_is_made_once_and_an_outage_ends_the_job(tmp_path):
    searched = []

    async def search(query):
        searched.append(query)
        if query in ("down", "key"):
            raise ProviderFailed("unavailable" if query == "down" else "refused", "status 503", status=503 if query == "down" else 401)
        if query == "too long":
            raise ProviderFailed("refused", "status 400", status=400)
        return [Hit(title=query, url="http://w/", snippet="found")]

    async def twice(kept):
        found = await asyncio.gather(kept("a"), kept("a"), kept("b"))
        kept.close()
        return found

    first = asyncio.run(twice(KeptSearch(search, tmp_path / "s.jsonl")))
    again = asyncio.run(twice(KeptSearch(search, tmp_path / "s.jsonl")))
    assert first == again
    assert sorted(searched) == ["a", "b"]
    assert list(asyncio.run(KeptSearch(search, tmp_path / "s.jsonl")("too long"))) == []
    for query in ("down", "key"):
        with pytest.raises(ServiceError, match=r"tools\.search: must be a search that answers, got: status 503"):
            asyncio.run(KeptSearch(search, tmp_path / "s.jsonl")(query))
