"""E2HQA with a model, as the paper does it: it chooses, searches are real, it rewrites, and it is asked again to check what it did.

The two checks that need reading are separate questions to the model, which sees neither the round that it checks nor, for the description,
the entity: it must name that entity and no other; and it must answer the new question as before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from webdancer.llm.client import ChatModel, ChatRefused, NoUsableReply
from webdancer.rewards.judge import MatchJudge
from webdancer.synthesis.e2hqa import LEAKED, NOT_FOUND, NOT_REWRITTEN, NOTHING_TO_DESCRIBE, Round, RoundFailed, Search
from webdancer.synthesis.prompts import ANSWER, IDENTIFY, PICK, REWRITE
from webdancer.synthesis.similar import words
from webdancer.tools.render import Hit
from webdancer.types import Task

_TEMPERATURE, _MAX_TOKENS = 0.7, 2_048
_HITS, _HIT_CHARS = 5, 1_200
_CHECK = 100
"""Added to the number of a sample, so that a check is never the answer to another request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Posed:
    """`used`: the entities that were replaced. `found`: what was found about the last one."""

    task: Task
    used: tuple[str, ...] = ()
    found: tuple[Mapping[str, str], ...] = ()


class ModelRounds:
    """Rounds over given simple questions; `seeds_by_split` are drawn in their order."""

    def __init__(self, seeds_by_split: Mapping[str, Sequence[Task]], model: ChatModel, search: Search) -> None:
        self._seeds = {split: iter(tasks) for split, tasks in seeds_by_split.items()}
        self._model = model
        self._search = search
        self._judge = MatchJudge()

    def draw(self, split: str, rng: random.Random) -> Posed | None:
        task = next(self._seeds.get(split, iter(())), None)
        return None if task is None else Posed(task=replace(task, metadata={"seed": task.id, "provenance": []}))

    def task(self, state: Posed) -> Task:
        return state.task

    async def harder(self, state: Posed, rng: random.Random, attempt: int) -> tuple[Posed, Round] | RoundFailed:
        task = state.task
        asked: dict[str, Any] = {"question": task.question, "answer": task.answers[0], "used": list(state.used)}
        picked = await self._ask(PICK, asked, ("entity", "query"), sample=attempt)
        if picked is None or not picked["entity"] or picked["entity"] not in task.question or picked["entity"] in state.used:
            return RoundFailed(NOTHING_TO_DESCRIBE)
        entity, query = picked["entity"], picked["query"] or picked["entity"]
        hits = [*await self._search(query)][:_HITS]
        found = tuple(_shown(hit) for hit in hits)
        if not found:
            return RoundFailed(NOT_FOUND)
        asked = {"question": task.question, "answer": task.answers[0], "entity": entity, "results": found}
        written = await self._ask(REWRITE, asked, ("description", "question"), sample=attempt)
        if written is None or not written["description"] or written["description"] not in written["question"]:
            return RoundFailed(NOT_REWRITTEN)
        if written["question"] != task.question.replace(entity, written["description"], 1) and entity in written["question"]:
            return RoundFailed(LEAKED)
        if _rest(written["question"], written["description"]) != _rest(task.question, entity):
            return RoundFailed(NOT_REWRITTEN)
        urls = tuple(hit.url for hit in hits)
        provenance = [*task.metadata["provenance"], *urls[:1]]
        after = replace(task, question=written["question"], metadata={**task.metadata, "provenance": provenance})
        made = Round(entity=entity, query=query, description=written["description"], question=written["question"], urls=urls)
        return Posed(task=after, used=(*state.used, entity), found=found), made

    async def is_one(self, state: Posed, made: Round) -> bool:
        hits = [*await self._search(made.description)][:_HITS]
        asked = {"description": made.description, "results": [_shown(hit) for hit in hits] + list(state.found)}
        named = await self._json(IDENTIFY, asked, _names, sample=_CHECK)
        if not named:
            return False
        entity = Task(id="", question="", answers=(made.entity,), source="")
        return all([(await self._judge.grade(entity, name)).status == "correct" for name in named])

    async def is_answered(self, state: Posed, made: Round) -> bool:
        fact = f"{made.description} is {made.entity}"
        asked = {"question": made.question, "evidence": state.found, "facts": [fact]}
        given = await self._ask(ANSWER, asked, ("answer",), sample=_CHECK)
        return given is not None and (await self._judge.grade(state.task, given["answer"])).status == "correct"

    async def _ask(self, system: str, case: Mapping[str, Any], names: Sequence[str], *, sample: int) -> dict[str, str] | None:
        found: dict[str, str] | None = await self._json(
            system, case, lambda fields: {name: _text(fields[name]) for name in names}, sample=sample
        )
        return found

    async def _json(self, system: str, case: Mapping[str, Any], parse: Any, *, sample: int) -> Any:
        """None for what the endpoint refuses, and for a model that does not keep to the form."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": json.dumps(case, ensure_ascii=False)}]
        try:
            return await self._model.chat_json(messages, parse, temperature=_TEMPERATURE, max_tokens=_MAX_TOKENS, sample=sample)
        except (ChatRefused, NoUsableReply):
            return None


def _rest(question: str, part: str) -> list[str]:
    """The words of the question but those of a part of it, and articles."""
    return [word for word in words(question.replace(part, " ", 1)) if word not in ("a", "an", "the")]


def _names(fields: Mapping[str, Any]) -> list[str]:
    if not isinstance(fields["entities"], list):
        raise TypeError(f"must be a list, got {type(fields['entities']).__name__}")
    return [_text(name) for name in fields["entities"]]


def _shown(hit: Hit) -> dict[str, str]:
    return {"title": hit.title, "url": hit.url, "text": hit.snippet[:_HIT_CHARS]}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be a text, got {type(value).__name__}")
    value.encode()  # half a surrogate pair is a ValueError: no file takes it
    return " ".join(value.split())
