"""`webdancer synthesize`: crawl, make questions (CRAWLQA or E2HQA, with a model or without one), leave out what is unfit, share out.

crawl/                  pages.jsonl, left_out.jsonl    the crawl, from which a killed job goes on
questions/              the pools, every candidate, the manifest (synthesis/pools.py), report.html
answers.jsonl           what the model was paid for; nothing in it is asked again
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from webdancer.config import Config
from webdancer.data.tasks import read_tasks
from webdancer.errors import ConfigError, ServiceError
from webdancer.evaluation.benchmarks import load_evaluation_set
from webdancer.llm.answers import AnswerLog
from webdancer.llm.client import ChatModel
from webdancer.offline_web.index import Document, SearchIndex
from webdancer.synthesis.closed_book import closed_book
from webdancer.synthesis.collect import Source, collect
from webdancer.synthesis.crawl import Crawl, FetchedPage, crawl
from webdancer.synthesis.e2hqa import EasyToHard, Search
from webdancer.synthesis.frontier import CrawlBudget
from webdancer.synthesis.hygiene import Hygiene
from webdancer.synthesis.infobox_rounds import InfoboxRounds
from webdancer.synthesis.kept_search import KeptSearch
from webdancer.synthesis.manifest import cost, lasting, provenance
from webdancer.synthesis.model_questions import ModelQuestions
from webdancer.synthesis.model_rounds import ModelRounds
from webdancer.synthesis.page import CrawledPage
from webdancer.synthesis.page_questions import PageQuestions
from webdancer.synthesis.pools import PoolFiles, split_of
from webdancer.synthesis.seeds import sift_seeds
from webdancer.telemetry import Telemetry
from webdancer.telemetry.questions_report import write_questions_report
from webdancer.tools.extraction import Extraction
from webdancer.tools.ledger import FILE_NAME as SPENDING
from webdancer.tools.ledger import Ledger, providers
from webdancer.tools.polite import PoliteFetcher
from webdancer.tools.readers import page_policy
from webdancer.tools.render import Hit
from webdancer.tools.search_backends import open_backend
from webdancer.types import Task

_PATIENCE_S = 600.0
"""For one page of a site that asks to wait."""

PagesBySplit = dict[str, list[CrawledPage]]


async def make_questions(config: Config, telemetry: Telemetry) -> dict[str, Any]:
    """All of it, in the run directory; gives the manifest. Raises ServiceError for a web or model that does not answer, ConfigError."""
    run_dir = Path(config.run_dir)
    synthesis = config.synthesis
    seeds = read_tasks(synthesis.seeds) if has_seeds(config) else ()
    evaluation = [task.question for entry in synthesis.evaluation_sets for task in load_evaluation_set(entry)]
    hygiene, seed_hygiene = (Hygiene(near_duplicate=synthesis.near_duplicate, evaluation=evaluation) for _ in range(2))
    seeds_by_split, unfit = sift_seeds(seeds, seed_hygiene)
    crawled = Crawl(pages=(), failed={}, left=0) if seeds else await _crawl(config, telemetry, run_dir / "crawl")
    files = PoolFiles(run_dir / "questions", synthesis)
    ledger = Ledger(budget_usd=config.tools.budget_usd, path=run_dir / SPENDING)
    async with AsyncExitStack() as stack:
        stack.callback(files.close)
        for outcome in unfit:
            files.add(outcome)
        model = await stack.enter_async_context(_model(config, run_dir)) if synthesis.llm.base_url else None
        stack.callback(ledger.write)
        source = await _source(config, crawled.pages, seeds_by_split if seeds else None, model, ledger, stack)
        asked = closed_book(model, attempts=synthesis.closed_book_attempts) if model and synthesis.closed_book_attempts else None
        with telemetry.progress("questions", total=sum(need.count for need in files.needs)) as progress:
            num_left_out = 0
            async for outcome in collect(files.needs, source, hygiene, closed_book=asked):
                files.add(outcome)
                num_left_out += bool(outcome.reason)
                if not outcome.reason:
                    progress.advance(left_out=num_left_out, usd=model.usage.usd if model and model.usage.usd else None)
        usage = {"writer": lasting(asdict(model.usage))} if model else {}
        manifest = files.finish(provenance(config, crawled) | {"cost": cost(usage, ledger.spent)})
    write_questions_report(run_dir / "questions")
    return manifest


def has_seeds(config: Config) -> bool:
    """Whether questions begin with given ones; CRAWLQA has no use for any."""
    return bool(config.synthesis.seeds) and config.synthesis.method == "e2hqa"


async def _crawl(config: Config, telemetry: Telemetry, folder: Path) -> Crawl:
    synthesis, site = config.synthesis, config.tools.visit.site
    roots = synthesis.roots or ["/"]
    if not synthesis.roots and not site:
        raise ConfigError("synthesis.roots: must hold a URL where tools.visit.site names no site, got []")
    budget = CrawlBudget(
        max_pages=synthesis.max_pages,
        max_pages_per_site=synthesis.max_pages_per_site,
        max_depth=synthesis.max_depth,
        by_score=bool(synthesis.roots),
    )
    policy = page_policy(config.tools.visit, config.tools.fetch)
    read_whole = bool(synthesis.roots or synthesis.llm.base_url)  # infoboxes alone need no extraction
    extraction = Extraction(config.tools.visit.extraction_processes)

    async def read_text(page: FetchedPage) -> str:
        return await extraction.lines(
            page.text.encode(), content_type="text/html", charset="utf-8", max_chars=config.tools.visit.max_page_chars
        )

    async with PoliteFetcher(policy, config.tools.polite, patience_s=_PATIENCE_S) as fetcher:
        with telemetry.progress("crawl", total=1) as progress:

            def on_visit(num_found: int) -> None:
                progress.total = min(num_found, synthesis.max_pages)
                progress.advance()

            try:
                crawled = await crawl(
                    roots,
                    fetch=fetcher.fetch,
                    site=site,
                    budget=budget,
                    near_duplicate=synthesis.near_duplicate if synthesis.roots else 0.0,
                    read_text=read_text if read_whole else None,
                    folder=folder,
                    on_visit=on_visit,
                )
            finally:
                await extraction.aclose()
    if not crawled.pages:
        raise ServiceError(f"synthesis.roots: {', '.join(roots)} must answer with pages, got {dict(crawled.failed)}")
    return crawled


async def _source(
    config: Config,
    pages: Iterable[CrawledPage],
    seeds: Mapping[str, Sequence[Task]] | None,
    model: ChatModel | None,
    ledger: Ledger,
    stack: AsyncExitStack,
) -> Source:
    synthesis = config.synthesis
    by_split: PagesBySplit = {}
    for page in pages:
        by_split.setdefault(page.split or split_of(page.url), []).append(page)
    if synthesis.method == "crawlqa":
        return ModelQuestions(by_split, model, seed=config.seed) if model else PageQuestions(by_split, seed=config.seed)
    search = await stack.enter_async_context(_search(config, pages, ledger))
    if seeds is None:
        return EasyToHard(InfoboxRounds(by_split, search), max_rounds=synthesis.max_rounds, seed=config.seed)
    assert model is not None  # config_validation: seeds need one
    return EasyToHard(ModelRounds(seeds, model, search), max_rounds=synthesis.max_rounds, seed=config.seed)


@asynccontextmanager
async def _search(config: Config, pages: Iterable[CrawledPage], ledger: Ledger) -> AsyncIterator[Search]:
    """The configured search; where none is and other sites were crawled, a search over what was crawled."""
    tools = config.tools
    if tools.search.backend == "retrieve" and not tools.search.url:
        if has_seeds(config):
            raise ConfigError(
                "tools.search.url: must be the origin of a search server, or tools.search.backend a provider, for seeds, got ''"
            )
        index = SearchIndex.build(Document(url=page.url, title=page.title, text=page.text) for page in pages)

        async def search(query: str) -> list[Hit]:
            found = (match.document for match in index.search(query, tools.search.top_k))
            return [Hit(title=document.title, url=document.url, snippet=document.text) for document in found]

        yield search
        return
    provider = providers(tools)[0]
    backend = open_backend(
        tools.search, lambda policy: PoliteFetcher(policy, tools.polite, provider=provider, quota=ledger, patience_s=_PATIENCE_S)
    )
    # What was found must be found again when the job goes on, as questions build on it, and is not paid for twice.
    kept = KeptSearch(backend.search, Path(config.run_dir) / "searches.jsonl")
    try:
        yield kept
    finally:
        kept.close()
        await backend.aclose()


@asynccontextmanager
async def _model(config: Config, run_dir: Path) -> AsyncIterator[ChatModel]:
    model = ChatModel(config.synthesis.llm, log=AnswerLog(run_dir / "answers.jsonl"))
    try:
        yield model
    finally:
        await model.aclose()
