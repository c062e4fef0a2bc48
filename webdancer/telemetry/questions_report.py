"""One page about the questions that `webdancer synthesize` made: types, hops, lengths, what was left out and why, ten of them.

Made from the files of the `questions` folder alone (synthesis/pools.py); like the run's report it loads nothing and runs nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from webdancer.errors import DataError
from webdancer.telemetry.data_report import Thinned, bars, bins, cost_tiles, figures, funnel, headline, kind_of, kind_table, section
from webdancer.telemetry.funnel_chart import Level
from webdancer.telemetry.jsonl import read_jsonl
from webdancer.telemetry.report import page
from webdancer.whole_file import write_whole

FILE_NAME = "report.html"
NUM_SHOWN, MAX_LEFT_OUT = 10, 3
"""Questions shown: from all over the file, and the first that hygiene left out for each of some reasons."""

_POOLS = {"sft": "for the teacher", "rl": "for RL", "dev": "to choose settings", "heldout": "held out"}
_LEFT_OUT, _CLOSED_BOOK = "left_out", "closed_book"
_STAGES = {"written": "Tried", "fit": "Borne out", "unknown": "Passed hygiene", "": "Not known by heart"}
"""A stage of checks, and what comes to it; the last line is what is left after all of them."""


@dataclass(slots=True)
class _Seen:
    """What one pass over the candidates keeps: figures of all, texts of ten."""

    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    question_words: Counter[int] = field(default_factory=Counter)
    answer_words: Counter[int] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {stage: Counter() for stage in _STAGES})
    kept: Thinned[Mapping[str, Any]] = field(default_factory=lambda: Thinned(NUM_SHOWN))
    left_out: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def write_questions_report(folder: Path) -> Path:
    """Write report.html into the folder, whole or not at all. Raises DataError where the folder holds no finished synthesis."""
    path = folder / FILE_NAME
    write_whole(path, render_questions_report(folder).encode("utf-8", "replace"))
    return path.resolve()


def render_questions_report(folder: Path) -> str:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: must hold the manifest of finished questions, got: {error}") from error
    seen = _look(read_jsonl(folder / "candidates.jsonl"))
    sections = (_headline(manifest, seen), _hygiene(seen), _questions(seen), _missing(manifest), _crawl(manifest), _samples(seen))
    return page("WebDancer: questions", "".join(sections), "the files of the questions folder: candidates.jsonl, manifest.json")


def _look(rows: Iterable[Mapping[str, Any]]) -> _Seen:
    seen = _Seen()
    for row in rows:
        if row["state"] == _LEFT_OUT:
            seen.reasons[_stage(row)][row["reason"]] += 1
            if "question" in row:
                seen.left_out.setdefault(row["reason"], row)
            continue
        metadata = row["metadata"]
        seen.kinds[kind_of({**metadata, "tag": row["tag"]}), row["state"]] += 1
        seen.languages[str(metadata["language"])] += 1
        seen.question_words[len(row["question"].split())] += 1
        seen.answer_words[len(_answers(row)[0].split())] += 1
        seen.kept.add(row)
    return seen


def _stage(row: Mapping[str, Any]) -> str:
    """Which checks a candidate failed on: those of who wrote it, hygiene, or a model that knew the answer."""
    if row["reason"] == _CLOSED_BOOK:
        return "unknown"
    return "fit" if "id" in row else "written"


def _headline(manifest: Mapping[str, Any], seen: _Seen) -> str:
    settings, pages = manifest["settings"], manifest["crawl"]["pages"]
    num_left_out = sum(counts.total() for counts in seen.reasons.values())
    tiles = [
        (f"{seen.kinds.total():,}", "questions"),
        *((f"{sum(n for (_, state), n in seen.kinds.items() if state == pool):,}", told) for pool, told in _POOLS.items()),
        (f"{num_left_out:,}", "left out"),
    ]
    source = f"{pages:,} crawled pages" if pages else "simple questions"
    writer = escape(settings["llm"]["model"]) if "writer" in manifest["cost"]["models"] else "rules, without a model"
    lead = f"<strong>{escape(settings['method'].upper())}</strong> out of {source}, written by {writer}."
    return headline("Questions", lead, [*tiles, *cost_tiles(manifest["cost"])])


def _hygiene(seen: _Seen) -> str:
    count = seen.kinds.total() + sum(counts.total() for counts in seen.reasons.values())
    levels = []
    for stage, label in _STAGES.items():
        lost = [(_plain(reason), number) for reason, number in seen.reasons[stage].most_common()]
        levels.append(Level(label=label, count=count, lost=lost, tone="tone-1" if stage else "tone-3"))
        count -= seen.reasons[stage].total()
    if not seen.reasons["unknown"]:
        levels = [*levels[:2], Level(label="Let through", count=levels[-1].count, tone="tone-3")]
    reasons = sum(seen.reasons.values(), Counter[str]())
    charts = [("Reasons", "candidates that no pool has", bars([(_plain(name), n) for name, n in reasons.most_common()], "tone-2"))]
    return section("What was let through", funnel(levels, "Green: in one of the four pools.") + figures(charts))


def _questions(seen: _Seen) -> str:
    by_hops: Counter[str] = Counter()
    for (kind, _), number in seen.kinds.items():
        by_hops[kind] += number
    charts = [
        ("Types and hops", "questions", bars(sorted(by_hops.items(), key=lambda item: (not item[0][:1].isdigit(), item)))),
        ("Length of the question", "words", bars(bins(seen.question_words), "tone-3")),
        ("Length of the answer", "words", bars(bins(seen.answer_words), "tone-3")),
        ("Language", "by script, then by a classifier; und: not sure", bars(seen.languages.most_common(12), "tone-2")),
    ]
    return section("Questions", kind_table(seen.kinds, _POOLS) + figures(charts))


def _missing(manifest: Mapping[str, Any]) -> str:
    """What was asked for and could not be had."""
    missing = manifest["missing"]
    note = "questions that were asked for and that the pages do not hold"
    return section("Missing", figures([("By split and type", note, bars(list(missing.items()), "tone-4"))])) if missing else ""


def _crawl(manifest: Mapping[str, Any]) -> str:
    crawl = manifest["crawl"]
    if not crawl["pages"]:
        return ""
    addresses = [("pages", crawl["pages"]), *crawl["left_out"].items()]
    charts = [("Addresses", "pages, and why others are none", bars([(_plain(name), n) for name, n in addresses]))]
    more = f"<p>{crawl['not_visited']:,} more addresses were found and not visited.</p>" if crawl["not_visited"] else ""
    return section("The crawl", figures(charts) + more)


def _samples(seen: _Seen) -> str:
    left_out = list(seen.left_out.values())[:MAX_LEFT_OUT]
    parts = [_article(row, _POOLS.get(row["state"], row["state"])) for row in seen.kept.pick(NUM_SHOWN - len(left_out))]
    parts += [_article(row, f"left out: {_plain(row['reason'])}") for row in left_out]
    legend = (
        '<p class="legend"><span class="answer">answer</span><span class="observation">what it needs, and where it stands</span>'
        '<span class="think">how it was made harder</span></p>'
    )
    return section(f"{len(parts)} questions", legend + "".join(parts)) if parts else ""


def _article(row: Mapping[str, Any], fate: str) -> str:
    metadata = row.get("metadata", {})
    facts = [fate, kind_of({**metadata, "tag": row["tag"]}), metadata.get("language", ""), row["id"]]
    steps = [f"{step['entity']} → {step['description']}" for step in metadata.get("steps", ())]
    blocks = [_block("answer", " / ".join(_answers(row))), _block("observation", "\n".join(_needed(metadata)))]
    if steps:
        blocks.append(_block("think", "\n".join([f"{metadata.get('seed_question', '')}", *steps])))
    kept = "failed" if row["state"] == _LEFT_OUT else "solved"
    told = escape(" · ".join(str(fact) for fact in facts if fact))
    return f'<article class="{kept}"><h3>{escape(row["question"])}</h3><p class="facts">{told}</p>{"".join(blocks)}</article>'


def _needed(metadata: Mapping[str, Any]) -> list[str]:
    """The facts that the answer needs: quotations where a model wrote the question, else the keys that were read, of the last pages."""
    if quoted := metadata.get("facts"):
        return [f"{fact['url']}: {fact['quote']}" for fact in quoted]
    pages, keys = metadata.get("provenance", ()), metadata.get("keys", ())
    first = len(pages) - len(keys)
    return [f"{url}: {keys[index - first]}" if index >= first else str(url) for index, url in enumerate(pages)]


def _answers(row: Mapping[str, Any]) -> list[str]:
    return [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])


def _plain(reason: str) -> str:
    return reason.replace("_", " ")


def _block(kind: str, text: str) -> str:
    return f'<pre class="{kind}">{escape(text)}</pre>' if text else ""
