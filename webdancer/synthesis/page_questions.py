"""CRAWLQA without a model: questions out of infoboxes, as a source for `collect`. Works on every site whose pages have such tables."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from webdancer.synthesis.collect import LeftOut
from webdancer.synthesis.page import CrawledPage
from webdancer.synthesis.questions import draw_question, graphs
from webdancer.types import Task

NO_QUESTION = "no_question"
"""A random walk that led nowhere: no fact to go on, a circle, a shortcut, an answer that the question says."""
_DRAWS = 50


class PageQuestions:
    """Draws and writes questions over each split's own pages, so that no path leads from one split into another."""

    def __init__(self, pages_by_split: Mapping[str, Sequence[CrawledPage]], *, seed: int) -> None:
        self._graphs = graphs(pages_by_split)
        self._rng: dict[tuple[str, str], random.Random] = {}
        self._seed = seed

    def draw(self, split: str, type_: str) -> Task | LeftOut | None:
        graph = self._graphs.get(split)
        if graph is None or not graph.entities:
            return None
        rng = self._rng.setdefault((split, type_), random.Random(f"{self._seed} {split} {type_}"))
        for _ in range(_DRAWS):
            if task := draw_question(graph, type_, rng):
                return task
        return LeftOut(NO_QUESTION)

    async def write(self, drawn: Task | LeftOut) -> Task | LeftOut:
        return drawn
