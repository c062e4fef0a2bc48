"""Questions about sites that are not the offline web, and questions that somebody else asked: whole programs, in this process."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.scripted_model import ScriptedModel
from webdancer.config import load
from webdancer.data.tasks import read_tasks, write_tasks
from webdancer.errors import ServiceError
from webdancer.offline_web.server import running_server
from webdancer.runs.questions import make_questions
from webdancer.synthesis.pools import split_of
from webdancer.telemetry import Telemetry
from webdancer.types import Task

COUNTS = ["synthesis.num_sft=20", "synthesis.num_rl=10", "synthesis.num_dev=3", "synthesis.num_heldout=5", "synthesis.num_count=3"]


@pytest.fixture(scope="module")
def origin():
    with running_server(seed=6, num_entities=290) as found:
        yield found


def make(run_dir, *overrides):
    config = load([], [f"run_dir={run_dir}", "telemetry.wandb_mode=disabled", *COUNTS, *overrides])
    with Telemetry.open(run_dir, config) as telemetry:
        return asyncio.run(make_questions(config, telemetry))


@pytest.mark.parametrize("method", ["crawlqa", "e2hqa"])
def test_a_site_with_tables_gives_questions_without_a_model_and_without_a_search(tmp_path, origin, method):
    roots = [f"synthesis.roots=[{origin}/index/train]", f"tools.fetch.allowed_origins=[{origin}]", "tools.visit.extraction_processes=0"]
    manifest = make(tmp_path, *roots, f"synthesis.method={method}", "synthesis.max_pages=150", "synthesis.hop_shares=[0.4,0.3,0.2,0.1]")
    assert manifest["crawl"]["pages"] + sum(manifest["crawl"]["left_out"].values()) == 150
    assert manifest["crawl"]["not_visited"] > 0
    assert manifest["counts"]["sft"]["questions"] > 0
    for task in read_tasks(tmp_path / "questions" / "sft.jsonl"):
        assert all(url.startswith(f"{origin}/wiki/") for url in task.metadata["provenance"])


def test_a_site_that_the_gate_does_not_let_through_is_one_line(tmp_path, origin):
    with pytest.raises(ServiceError, match=r"synthesis\.roots: .* must answer with pages"):
        make(tmp_path, f"synthesis.roots=[{origin}/]")


def harder(case, request):
    """Each round describes the entity that the question ends with by one of its facts, which the search has found."""
    asked = json.loads(case)
    if "used" in asked:
        entity = asked["question"].removesuffix("?").rpartition(" of ")[2]
        return {"entity": "" if entity.startswith("the one") else entity, "query": entity}
    if "entity" in asked:
        text = next((hit["text"] for hit in asked["results"] if hit["title"] == asked["entity"]), "nothing")
        description = f"the one of which is said: {text[:60]}"
        return {"description": description, "question": asked["question"].replace(asked["entity"], description)}
    if "description" in asked:
        told = asked["description"].partition(": ")[2]
        return {"entities": [hit["title"] for hit in asked["results"] if told in hit["text"]][:1]}
    return {"answer": "ninety"}


def test_given_questions_are_made_harder_by_a_model_and_a_real_search(tmp_path, origin):
    titles = [page["title"] for page in _crawled(tmp_path, origin)][:60]
    asked = [f"How old is the sign of {title}?" for title in titles]
    seeds = [Task(id=str(number), question=text, answers=("ninety",), source="simple") for number, text in enumerate([*asked, *asked[:2]])]
    write_tasks(tmp_path / "seeds.jsonl", seeds)
    write_tasks(tmp_path / "evaluation.jsonl", seeds[:1])
    overrides = ["synthesis.method=e2hqa", f"synthesis.seeds={tmp_path / 'seeds.jsonl'}", f"tools.search.url={origin}"]
    overrides += ["tools.search.usd_per_1000=1.0", f"synthesis.evaluation_sets=[{tmp_path / 'evaluation.jsonl'}]"]
    with ScriptedModel(harder, hang_s=0.1) as model:
        overrides.append(f"synthesis.llm.base_url={model.url}")
        first = make(tmp_path / "run", *overrides)
        asked = model.replies.total()
        assert make(tmp_path / "run", *overrides) == first
        assert model.replies.total() == asked
    searched = first["cost"]["providers"]["retrieve"]
    assert (searched["usd"], first["cost"]["usd"]) == (pytest.approx(searched["requests"] / 1000), searched["usd"])
    assert searched["requests"] == len((tmp_path / "run" / "searches.jsonl").read_text().splitlines()) > 0
    assert (first["left_out"]["evaluation_overlap"], first["left_out"]["exact_duplicate"]) == (2, 1)
    made = read_tasks(tmp_path / "run" / "questions" / "sft.jsonl")
    assert len(made) > 3
    for task in made:
        (title,) = [title for title in titles if task.metadata["seed_question"].endswith(f" {title}?")]
        assert title not in task.question
        assert (task.answers, task.metadata["split"]) == (("ninety",), split_of("ninety"))
        assert task.metadata["rounds"] == len(task.metadata["steps"]) == 1


def _crawled(tmp_path, origin):
    make(tmp_path / "crawled", f"tools.visit.site={origin}", "synthesis.max_pages=120")
    return [row for row in map(json.loads, (tmp_path / "crawled" / "crawl" / "pages.jsonl").read_text().splitlines()) if row["facts"]]
