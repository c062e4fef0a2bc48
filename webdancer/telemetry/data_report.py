"""What the pages about made data (questions, trajectories) are built of. Every text is escaped here or was before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any, Generic, TypeVar

from webdancer.data.tasks import num_hops
from webdancer.telemetry.charts import Bar, bar_chart
from webdancer.telemetry.funnel_chart import Level, funnel_chart

Item = TypeVar("Item")
Tile = tuple[str, str]
"""(figure, what it counts)"""

_BINS = 12
_MAX_LABEL_CHARS = 28


class Thinned(Generic[Item]):
    """Items from all over a stream: as they come they are thinned out, so that at most 2 x `wanted` are held, evenly spread."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._kept: list[Item] = []
        self._stride, self._count = 1, 0

    def add(self, item: Item) -> None:
        if self._count % self._stride == 0:
            self._kept.append(item)
        self._count += 1
        if len(self._kept) > 2 * self._wanted:
            self._kept, self._stride = self._kept[::2], self._stride * 2

    def pick(self, count: int) -> list[Item]:
        count = min(count, len(self._kept))
        return [self._kept[index * len(self._kept) // count] for index in range(count)]


def headline(title: str, lead: str, tiles: Sequence[Tile]) -> str:
    """`lead` is HTML."""
    shown = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles)
    top = f'<p class="brand">WebDancer</p><h1>{escape(title)}</h1><p class="lead">{lead}</p>'
    return f'<header>{top}<div class="tiles">{shown}</div></header>'


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def cost_tiles(cost: Mapping[str, Any]) -> list[Tile]:
    """Of a manifest's `cost` (synthesis.manifest); nothing where nothing was asked of anybody who counts."""
    tiles: list[Tile] = []
    if usages := cost["models"].values():
        tiles.append((f"{sum(usage['prompt_tokens'] + usage['completion_tokens'] for usage in usages):,}", "tokens of chat models"))
    tiles += [(f"{spent['requests']:,}", f"requests to {name}") for name, spent in cost["providers"].items()]
    return [*tiles, (f"${cost['usd']:,.2f}", "paid for them")] if tiles else []


def funnel(levels: Sequence[Level], note: str) -> str:
    return f"<figure>{funnel_chart(levels)}<figcaption>{escape(note)}</figcaption></figure>"


def figures(charts: Sequence[tuple[str, str, Sequence[Bar]]]) -> str:
    """(title, note, bars) each; those without a bar are left out."""
    return "".join(_figure(*chart) for chart in charts if chart[2])


def bars(counts: Sequence[tuple[str, int]], tone: str = "tone-1") -> list[Bar]:
    return [Bar(label=label, value=count, text=f"{count:,}", tone=tone) for label, count in counts]


def bins(values: Counter[int]) -> list[tuple[str, int]]:
    """value -> how often, as about a dozen equal bins of a round width, the empty ones between others included."""
    if not values:
        return []
    low, high = min(values), max(values)
    sizes = (factor * 10**exponent for exponent in range(12) for factor in (1, 2, 5))
    width = next(size for size in sizes if (high - low) / size < _BINS)
    counts: Counter[int] = Counter()
    for value, count in values.items():
        counts[value // width] += count
    spans = ((index, f"{index * width}-{index * width + width - 1}") for index in range(low // width, high // width + 1))
    return [(span if width > 1 else f"{index}", counts[index]) for index, span in spans]


def kind_table(cells: Counter[tuple[str, str]], columns: Mapping[str, str]) -> str:
    """(kind of question, column) -> number, with sums; `columns`: their names, in order; those without a question are left out."""
    kinds = sorted({kind for kind, _ in cells}, key=lambda kind: (not kind[:1].isdigit(), kind))
    shown = [column for column in columns if any(cells[kind, column] for kind in kinds)]
    head = "<th>question</th><th>n</th>" + "".join(f"<th>{escape(columns[column])}</th>" for column in shown)
    rows = []
    for kind in kinds:
        numbers = [cells[kind, column] for column in shown]
        rows.append(f"<tr><th>{escape(kind)}</th>{_cells([sum(numbers), *numbers])}</tr>")
    sums = [sum(cells[kind, column] for kind in kinds) for column in shown]
    rows.append(f'<tr class="total"><th>all</th>{_cells([sum(sums), *sums])}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def kind_of(row: Mapping[str, Any]) -> str:
    """Of what kind a question is, by the `type`, `hops` and `tag` of its row."""
    kind, hops = str(row.get("type", "")), num_hops(row)
    if kind.lower() in ("count", "intersection") or hops < 1:
        return kind.upper() or str(row.get("tag", "")) or "other"
    return f"{hops} hop{'s' if hops > 1 else ''}"


def _figure(title: str, note: str, bars: Sequence[Bar]) -> str:
    shown = [replace(bar, label=bar.label[:_MAX_LABEL_CHARS]) for bar in bars]
    chart = bar_chart(shown, label_width=max(110, 16 + 7 * max(len(bar.label) for bar in shown)))
    return f"<figure><h3>{escape(title)}</h3>{chart}<figcaption>{escape(note)}</figcaption></figure>"


def _cells(numbers: Sequence[int]) -> str:
    return "".join(f"<td>{number:,}</td>" for number in numbers)
