"""Both methods without a model on a small encyclopedia, checked by code that shares nothing with theirs; and that code, checked."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from benchmarks.check_questions import World, Wrong, check, check_row, read_world
from webdancer.cli import parse
from webdancer.config import SynthesisConfig
from webdancer.data.tasks import task_row
from webdancer.offline_web.encyclopedia import Encyclopedia
from webdancer.offline_web.index import SearchIndex
from webdancer.offline_web.pages import EncyclopediaSite
from webdancer.synthesis.collect import collect
from webdancer.synthesis.e2hqa import EasyToHard
from webdancer.synthesis.hygiene import Hygiene
from webdancer.synthesis.infobox_rounds import InfoboxRounds
from webdancer.synthesis.page import parse_page
from webdancer.synthesis.page_questions import PageQuestions
from webdancer.synthesis.pools import PoolFiles, split_of
from webdancer.tools.render import Hit
from webdancer.types import Task

SMALL = {"num_sft": 60, "num_rl": 60, "num_dev": 12, "num_heldout": 20, "num_count": 12, "hop_shares": [0.25] * 4}


@pytest.fixture(scope="module")
def site():
    return EncyclopediaSite(Encyclopedia.generate(seed=4, num_entities=1450))


@pytest.fixture(scope="module")
def world(site):
    return World(read_world(lambda path: site.get(path)[0]))


@pytest.fixture(scope="module")
def by_split(site):
    found = {}
    for document in site.documents():
        page = parse_page(site.get(document.url)[0].decode(), url=document.url)
        found.setdefault(page.split, []).append(page)
    return found


def make(folder, config, source):
    async def write():
        files = PoolFiles(folder, config)
        async for outcome in collect(files.needs, source, Hygiene(near_duplicate=0.8)):
            files.add(outcome)
        return files.finish({"seed": 0})

    return asyncio.run(write())


def infobox_rounds(by_split, site):
    index = SearchIndex.build(site.documents())

    async def search(query):
        return [Hit(title=match.document.title, url=match.document.url) for match in index.search(query, 3)]

    return EasyToHard(InfoboxRounds(by_split, search), max_rounds=3, seed=3)


def test_crawlqa_of_all_types_and_1_to_4_hops_is_true(tmp_path, by_split, world):
    manifest = make(tmp_path, SynthesisConfig(**SMALL), PageQuestions(by_split, seed=3))
    table, faults = check(tmp_path, world)
    assert faults == []
    assert [row["questions"] for row in table] == [84, 60, 20, 28]
    assert table[0]["types"] == {"count": 12, "hop": 60, "intersection": 12}
    assert set(table[0]["hops"]) == {1, 2, 3, 4}
    assert manifest["missing"] == {}
    assert manifest["counts"]["sft"]["questions"] == manifest["files"]["sft.jsonl"]["rows"] == 84
    states = [json.loads(line)["state"] for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    assert states.count("left_out") == sum(manifest["left_out"].values())
    assert [states.count(row["pool"]) for row in table] == [84, 60, 20, 28]


def test_e2hqa_is_true_after_every_round(tmp_path, by_split, site, world):
    manifest = make(tmp_path, SynthesisConfig(method="e2hqa", **SMALL), infobox_rounds(by_split, site))
    table, faults = check(tmp_path, world)
    assert faults == []
    assert [row["questions"] for row in table] == [60, 60, 12, 20]
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert {row["metadata"]["rounds"] for row in rows} == {1, 2, 3}
    assert all(len(row["metadata"]["steps"]) == row["metadata"]["rounds"] for row in rows)
    again = make(tmp_path / "again", SynthesisConfig(method="e2hqa", **SMALL), infobox_rounds(by_split, site))
    assert again["files"] == manifest["files"]


def test_on_a_site_without_splits_answers_are_unique_on_all_of_it_and_entities_of_one_split(by_split, site, world):
    pages = [dataclasses.replace(page, split="") for pages in by_split.values() for page in pages]
    splits = {page.title: split_of(page.url) for page in pages}
    shared = {name: [page for page in pages if splits[page.title] == name] for name in ("train", "dev", "heldout")}
    harder, plain = infobox_rounds(shared, site), PageQuestions(shared, seed=3)
    num_made = 0
    for split in shared:
        drawn = [harder.draw(split, "e2hqa") for _ in range(40)]
        made = [asyncio.run(harder.write(one)) for one in drawn if one]
        made += [plain.draw(split, type_) for type_ in ("hop1", "hop2", "intersection") for _ in range(10)]
        for task in made:
            if isinstance(task, Task):
                num_made += 1
                assert world.answer(task.question) == task.answers[0]
                named = [title for title in splits if any(title == said or title in task.question for said in task.answers)]
                assert {splits[title] for title in named} <= {split}
    assert num_made > 90


def test_the_checker_finds_what_is_wrong(by_split, site, world):
    source = infobox_rounds(by_split, site)
    drawn = [source.draw("train", "e2hqa") for _ in range(20)]
    made = [asyncio.run(source.write(one)) for one in drawn]
    row = next(task_row(task) for task in made if hasattr(task, "question") and task.metadata["rounds"] == 2)
    row = json.loads(json.dumps(row))
    check_row(world, row, "train")
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    step = row["metadata"]["steps"][0]
    broken = [
        {"answer": "Nothing"},
        {"answer": [*answers, "Somebody"]},
        {"question": row["question"].replace("What is", "What was")},
        {"question": f"{row['question'][:-1]} and whose job is {answers[0]}?"},
        {"metadata": {**row["metadata"], "steps": [{**step, "entity": "Somebody"}]}},
        {"metadata": {**row["metadata"], "provenance": [page.url for page in by_split["dev"][:1]]}},
    ]
    for change in broken:
        with pytest.raises((Wrong, KeyError)):
            check_row(world, row | change, "train")
    with pytest.raises(Wrong, match="leaves its split"):
        check_row(world, row, "dev")


def test_pages_that_name_no_split_are_shared_out_by_their_address():
    splits = [split_of(f"http://host/{number}") for number in range(2900)]
    assert [round(splits.count(name) / 100) for name in ("train", "dev", "heldout")] == [20, 3, 6]
    assert split_of("http://host/1") == split_of("http://host/1")


def test_the_method_is_a_word_of_the_command():
    assert parse(["synthesize", "e2hqa", "--config", "x.yaml", "seed=1"]).overrides == ["seed=1", "synthesis.method=e2hqa"]
    assert parse(["synthesize", "crawlqa"]).overrides == ["synthesis.method=crawlqa"]
    assert parse(["synthesize", "seed=1"]).overrides == ["seed=1"]
