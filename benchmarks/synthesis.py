"""Questions without a model, end to end, each answer worked out again; and the crawler over a real documentation site.

    OMP_NUM_THREADS=1 python -m benchmarks.synthesis --docs /usr/share/doc/python3/html --out benchmarks/baselines/synthesis.json
    OMP_NUM_THREADS=1 python -m benchmarks.synthesis --only crawl --docs /usr/share/doc/python3/html

Debian's python3-doc has its pages in /usr/share/doc/python3.N/html: `apt install python3-doc`, or without installing it `apt-get download
python3.11-doc && dpkg -x python3.11-doc_*.deb x` and --docs x/usr/share/doc/python3.11/html.

`questions`: `webdancer synthesize crawlqa` and `e2hqa` as commands on the offline encyclopedia: crawl, questions, hygiene, manifest; then
benchmarks.check_questions over the pages as they are served. `crawl`: a folder of HTML pages served on this machine, crawled from `/` with
everything on (gate, robots.txt, budgets, scores, extraction in processes, near-duplicates, the crawl on disk), against httpx and
trafilatura over the same addresses, as many at once, in turn. `--sample`: the released questions through hygiene, with the reasons.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.check_questions import World, check, read_world, report
from webdancer.config import Config, PoliteConfig
from webdancer.data.tasks import read_tasks
from webdancer.offline_web.server import running_server
from webdancer.synthesis.crawl import NEAR_DUPLICATE, Crawl, crawl
from webdancer.synthesis.frontier import CrawlBudget
from webdancer.synthesis.hygiene import Hygiene, language
from webdancer.tools.extraction import Extraction
from webdancer.tools.fetch import FetchPolicy
from webdancer.tools.polite import PoliteFetcher

CONCURRENCY = 8
COMMANDS = {
    "crawlqa": ["crawlqa", "synthesis.hop_shares=[0.25,0.25,0.25,0.25]"],
    "e2hqa": ["e2hqa", "synthesis.num_sft=900", "synthesis.num_rl=900", "synthesis.num_dev=100", "synthesis.num_heldout=200"],
}


def measure_questions(folder: Path) -> dict:
    found = {}
    for name, words in COMMANDS.items():
        run_dir = folder / name
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "webdancer.cli", "synthesize", *words, f"run_dir={run_dir}", "telemetry.wandb_mode=disabled"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()})
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        table, faults = check_served(run_dir / "questions")
        cores = len(os.sched_getaffinity(0))
        print(f"{name}: {seconds:.0f} s, of them {cpu_s:.0f} s on a CPU, with {cores} cores\n{report(table, faults)}", flush=True)
        found[name] = {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "cores": cores, "pools": table, "faults": faults}
    return found


def check_served(questions: Path) -> tuple[list[dict], list[str]]:
    import httpx

    with running_server() as origin, httpx.Client(base_url=origin, trust_env=False) as client:
        world = World(read_world(lambda path: client.get(path).raise_for_status().content))
    return check(questions, world)


async def crawl_whole(origin: str, folder: Path, *, max_pages: int) -> Crawl:
    extraction, config = Extraction(2), Config()

    async def read_text(page) -> str:  # as runs/questions.py has it
        return await extraction.lines(
            page.text.encode(), content_type="text/html", charset="utf-8", max_chars=config.tools.visit.max_page_chars
        )

    async with PoliteFetcher(FetchPolicy(allowed_origins=(origin,)), PoliteConfig()) as fetcher:
        try:
            budget = CrawlBudget(concurrency=CONCURRENCY, by_score=True, max_pages=max_pages)
            options = {"site": origin, "budget": budget, "near_duplicate": 0.8, "read_text": read_text, "folder": folder}
            return await crawl(["/"], fetch=fetcher.fetch, **options)
        finally:
            await extraction.aclose()


async def visit_bare(origin: str, paths: list[str]) -> int:
    import httpx
    import trafilatura

    places = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=origin, trust_env=False, timeout=120) as client:

        async def visit(path: str) -> int:
            async with places:
                response = await client.get(path)
                # In a thread: a page takes seconds here and there, in which the server would hang up on everybody else.
                text = await asyncio.to_thread(trafilatura.extract, response.text, output_format="markdown", include_tables=True)
                return len(text or "")

        return sum(await asyncio.gather(*map(visit, paths)))


def measure_crawl(docs: Path, folder: Path, *, rounds: int, max_pages: int) -> dict:
    ours, bare = [], []
    with running_server(directory=docs) as origin:
        for number in range(rounds):
            started = time.perf_counter()
            crawled = asyncio.run(crawl_whole(origin, folder / f"crawl{number}", max_pages=max_pages))
            visited = [*(page.url for page in crawled.pages), *(url.removeprefix(origin) for url in crawled.failed)]
            ours.append(len(visited) / (time.perf_counter() - started))
            started = time.perf_counter()
            asyncio.run(visit_bare(origin, visited))
            bare.append(len(visited) / (time.perf_counter() - started))
    reasons = Counter(" ".join(reason.split()[:2]).rstrip(":,") for reason in crawled.failed.values())
    near = sum(reason.startswith(NEAR_DUPLICATE) for reason in crawled.failed.values())
    found = {
        "addresses": len(visited),
        "pages": len(crawled.pages),
        "links": sum(len(page.links) for page in crawled.pages),
        "near_duplicates": near,
        "near_duplicate_rate": round(near / len(visited), 4),
        "left_out": dict(reasons),
        "pages_per_s": round(statistics.median(ours), 1),
        "bare_pages_per_s": round(statistics.median(bare), 1),
        "ratio": round(statistics.median(one / other for one, other in zip(ours, bare, strict=True)), 3),
    }
    print("\n".join(f"{name:22}{value}" for name, value in found.items()), flush=True)
    return found


def measure_sample(path: Path) -> dict:
    hygiene, reasons, languages = Hygiene(near_duplicate=0.8), Counter(), Counter()
    for task in read_tasks(path):
        reason = hygiene.check(task)
        reasons[reason or "kept"] += 1
        languages[language(task.question)] += 1
        if reason:
            print(f"{reason}: {task.question[:100]} -> {task.answers[0]}")
        else:
            hygiene.add(task)
    print(dict(reasons), dict(languages), flush=True)
    return {"reasons": dict(reasons), "languages": dict(languages)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("questions", "crawl", "sample"))
    parser.add_argument("--docs", type=Path, help="a folder of HTML pages")
    parser.add_argument("--rounds", type=int, default=3, help="of the crawl and of its bare counterpart")
    parser.add_argument("--pages", type=int, default=1000, help="the crawl's budget")
    parser.add_argument("--sample", type=Path, help="the authors' sample_qa.jsonl")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if options.only in (None, "questions"):
            found["questions"] = measure_questions(Path(folder))
        if options.only in (None, "sample") and options.sample:
            found["sample"] = measure_sample(options.sample)
        if options.only in (None, "crawl") and options.docs:
            found["crawl"] = measure_crawl(options.docs, Path(folder), rounds=options.rounds, max_pages=options.pages)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
