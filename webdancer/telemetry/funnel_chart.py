"""A funnel as inline SVG: how many came to each stage, and what was left behind on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LABELS, MIDDLE, SPAN, WIDTH = 130, 320, 360, 860
BAR, GAP = 28, 44
LINE_CHARS, MAX_LINES = 56, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """`count` came this far; `lost` are (reason, number) of those that go no further."""

    label: str
    count: int
    lost: Sequence[tuple[str, int]] = ()
    tone: str = "tone-1"


def funnel_chart(levels: Sequence[Level]) -> str:
    most = max([level.count for level in levels] + [1])
    parts: list[str] = []
    for index, level in enumerate(levels):
        top = 6 + index * (BAR + GAP)
        half = _half(level.count, most)
        parts.append(f'<text class="label" x="{LABELS - 8}" y="{top + 19}" text-anchor="end">{escape(level.label)}</text>')
        parts.append(f'<rect class="fill {level.tone}" x="{MIDDLE - half:.1f}" y="{top}" width="{2 * half:.1f}" height="{BAR}" rx="3"/>')
        share = f" ({100 * level.count / most:.0f} %)" if index else ""
        parts.append(f'<text class="value" x="{MIDDLE + SPAN / 2 + 16:.0f}" y="{top + 19}">{level.count:,}{share}</text>')
        if index + 1 < len(levels):
            parts.append(_narrowing(half, _half(levels[index + 1].count, most), top + BAR, level.tone))
            told = _told(level.lost)
            first = top + BAR + 33 - 7 * len(told)
            for number, line in enumerate(told):
                parts.append(f'<text class="tick" x="{MIDDLE + SPAN / 2 + 16:.0f}" y="{first + 14 * number}">{escape(line)}</text>')
    height = 12 + len(levels) * (BAR + GAP) - GAP
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _told(lost: Sequence[tuple[str, int]]) -> list[str]:
    """Reasons in as many lines as there is room for; those that do not fit are summed up."""
    if not lost:
        return ["none lost"]
    lines = ["−"]
    for index, (reason, number) in enumerate(lost):
        piece = f"{number:,} {reason}"
        if index and len(lines[-1]) + len(piece) > LINE_CHARS:
            if len(lines) == MAX_LINES:
                return [*lines[:-1], f"{lines[-1]} {sum(left for _, left in lost[index:]):,} others"]
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".strip() + (" ·" if index + 1 < len(lost) else "")
    return lines


def _half(count: int, most: int) -> float:
    return max(SPAN / 2 * count / most, 0.5 if count else 0.0)


def _narrowing(above: float, below: float, top: float, tone: str) -> str:
    corners = [(MIDDLE - above, top), (MIDDLE + above, top), (MIDDLE + below, top + GAP), (MIDDLE - below, top + GAP)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    return f'<path class="band {tone}" d="M{path}Z"/>'
