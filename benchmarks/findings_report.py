"""docs/findings.md and its plots, out of the results of `benchmarks.findings`.

A difference is first minus second, paired by question: the mean over the seeds that have both, question by question, with a 95 % bootstrap
interval over questions. It says how sure we are for these trained models; how far another training run would differ is in the column of the
seeds. The minimum detectable effect is 2.8 standard errors: a true difference of that size is found in 80 % of all draws of questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.findings_cells import BY_NAME, CELLS, NUM_QUESTIONS, NUM_SAMPLES, RL_STEPS
from benchmarks.findings_claims import CLAIMS, Arm, Claim, Comparison, Result, cells_of
from webdancer.evaluation.metrics import Estimate, estimate
from webdancer.whole_file import write_whole

SEEDS = range(100)
NUM_SEEDS = 3
POWER = 1.96 + 0.84
"""Standard errors that are found with 80 % power at 5 %, two-sided."""
IMAGES = "images/findings"
AS_IN_THE_PAPER = ("as in the paper", "no resolved difference, as in the paper")
"""The verdicts on a difference that the paper has, and on one that it has not."""
Results = Mapping[str, Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`by_seed`: of each seed that has both arms."""

    first: Estimate
    second: Estimate
    difference: Estimate
    detectable: float
    by_seed: tuple[float, ...]


def values(results: Results, arm: Arm, seed: int) -> NDArray[np.float64] | None:
    """[Q]; None where a cell of this seed was not measured."""
    cells = [results.get(f"{name}-{seed}") for name in arm.cells]
    found = [cell for cell in cells if cell is not None]
    return arm.measure(found) if len(found) == len(cells) else None


def difference(results: Results, comparison: Comparison) -> Difference | None:
    """None where no seed has both arms."""
    pairs = []
    for seed in SEEDS:
        first, second = values(results, comparison.first, seed), values(results, comparison.second, seed)
        if first is not None and second is not None:
            pairs.append((first, second))
    if not pairs:
        return None
    firsts, seconds = np.array([one for one, _ in pairs]), np.array([two for _, two in pairs])
    known = ~np.isnan(firsts - seconds).any(axis=0)
    firsts, seconds = firsts[:, known], seconds[:, known]
    paired = (firsts - seconds).mean(axis=0)
    error = float(paired.std(ddof=1) / np.sqrt(len(paired)))
    return Difference(
        first=estimate(firsts.mean(axis=0).tolist()),
        second=estimate(seconds.mean(axis=0).tolist()),
        difference=estimate(paired.tolist()),
        detectable=POWER * error,
        by_seed=tuple(float(one) for one in (firsts - seconds).mean(axis=1)),
    )


def verdict(comparison: Comparison, found: Difference | None) -> str:
    """What the interval and the seeds say; with fewer than three seeds, how many there are, as training noise is not in the interval."""
    if found is None:
        return "not measured yet"
    low, high = found.difference.low, found.difference.high
    agree = all(one > 0 for one in found.by_seed) or all(one < 0 for one in found.by_seed)
    resolved = agree and (low > 0 or high < 0)
    if comparison.expected == "same":
        said = "differs, not as in the paper" if resolved else AS_IN_THE_PAPER[1]
    elif not resolved:
        said = "no resolved difference"
    else:
        said = AS_IN_THE_PAPER[0] if low > 0 else "the opposite of the paper"
    num_seeds = len(found.by_seed)
    return said if num_seeds >= NUM_SEEDS else f"{said} (on {_seeds(num_seeds)})"


def _seeds(number: int) -> str:
    return f"{number} seed{'s' if number > 1 else ''}"


def write_report(results: Results, docs: Path) -> Path:
    """findings.md, and a plot for every claim that has a measured comparison."""
    images = docs / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    parts = [_head(results)]
    for number, claim in enumerate(CLAIMS, start=1):
        measured = [(one, difference(results, one)) for one in claim.comparisons]
        path = images / f"{claim.key}.svg"
        plot = _plot([(one, found) for one, found in measured if found is not None])
        if plot:
            write_whole(path, plot.encode())
        else:
            path.unlink(missing_ok=True)
        parts.append(_section(number, claim, measured, results, has_plot=bool(plot)))
    parts.append(_cells_table(results))
    page = docs / "findings.md"
    write_whole(page, "\n\n".join(parts).encode() + b"\n")
    return page


def _head(results: Results) -> str:
    done = sum(f"{cell.name}-{seed}" in results for cell in CELLS for seed in range(NUM_SEEDS))
    return f"""# The paper's findings in miniature

Made by `python -m benchmarks.findings` ([how](../benchmarks/README.md#findingspy-the-papers-findings-in-miniature)): real runs of the real
commands on the offline encyclopedia with the tiny model, {RL_STEPS} RL steps from one warm start a seed, {NUM_QUESTIONS} held-out questions
of 1 to 3 hops, the same ones in every cell, {NUM_SAMPLES} samples each at temperature 1. {done} of {NUM_SEEDS * len(CELLS)} cells (three
seeds) are measured; what is not says so.

A model of 2M parameters on generated pages can show that a mechanism works as the paper says, or that it does not matter here. It cannot
show what a 32B model does on the web.

A difference is first minus second, paired by question, the mean over the seeds that have both, with a 95 % bootstrap interval over
questions: it holds for the models that were trained, and how far another training run would differ is what the seeds say. MDE, the minimum
detectable effect, is 2.8 standard errors: a true difference of that size is found four times out of five. `No resolved difference` means
that there may be one smaller than that. A difference counts as resolved where its interval is on one side of 0 and all seeds are on the
same; on one seed, a small one may still be the luck of a training run.

{_summary(results)}"""


def _summary(results: Results) -> str:
    """A claim's first row, and how many of all its measured rows are as in the paper."""
    lines = ["| | claim of the paper | difference | here | all rows |", "|---|---|---|---|---|"]
    for number, claim in enumerate(CLAIMS, start=1):
        first = claim.comparisons[0]
        found = difference(results, first)
        shown = "" if found is None else f"{_signed(found.difference, first.first.unit)} {first.first.unit}"
        said = [verdict(one, there) for one in claim.comparisons if (there := difference(results, one)) is not None]
        alike = sum(one.startswith(AS_IN_THE_PAPER) for one in said)
        lines.append(f"| {number} | {claim.text} | {shown} | {verdict(first, found)} | {alike} of {len(said)} as in the paper |")
    return "\n".join(lines)


def _section(
    number: int, claim: Claim, measured: Sequence[tuple[Comparison, Difference | None]], results: Results, *, has_plot: bool
) -> str:
    lines = [f"## {number}. {claim.text}"]
    table = ["| first | second | figure | first | second | difference | MDE | by seed | here |", "|---|---|---|---|---|---|---|---|---|"]
    for one, found in measured:
        names = f"| {one.first.label} | {one.second.label} | {one.first.unit}"
        if found is None:
            table.append(f"{names} | | | | | | not measured yet |")
            continue
        unit = one.first.unit
        seeds = ", ".join(_number(value, unit, sign="+") for value in found.by_seed)
        table.append(
            f"{names} | {_number(found.first.mean, unit)} | {_number(found.second.mean, unit)} | {_signed(found.difference, unit)} "
            f"| {_number(found.detectable, unit)} | {seeds} | {verdict(one, found)} |"
        )
    lines.append("\n".join(table))
    lines += [text for text in (claim.note, claim.seen) if text]
    if has_plot:
        lines.append(f"![{claim.text}]({IMAGES}/{claim.key}.svg)")
    missing = [f"{name}-{seed}" for name in cells_of(claim) for seed in range(NUM_SEEDS) if f"{name}-{seed}" not in results]
    if missing:
        lines.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(lines)


def _cells_table(results: Results) -> str:
    lines = [
        "## Cells",
        "",
        "| cell | seed | pass@1 | greedy | tool calls | RL steps | minutes | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = list(BY_NAME)
    for key, row in sorted(results.items(), key=lambda item: (order.index(item[0].rpartition("-")[0]), item[0])):
        name, _, seed = key.rpartition("-")
        about = row["about"]
        figures = f"{row['pass_at_1']:.3f} | {_mean(row['greedy']):.3f} | {_mean(row['calls']):.2f}"
        lines.append(f"| {name} | {seed} | {figures} | {about['steps']} | {about['minutes']:g} | {about['commit']} |")
    return "\n".join(lines)


def _mean(column: Sequence[Any]) -> float:
    known = [value for value in column if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _number(value: float, unit: str, sign: str = "") -> str:
    digits = 0 if "tokens" in unit else 2 if "calls" in unit else 3
    return format(value, f"{sign}.{digits}f")


def _signed(value: Estimate, unit: str) -> str:
    return f"{_number(value.mean, unit, '+')} [{_number(value.low, unit, '+')}, {_number(value.high, unit, '+')}]"


def _plot(measured: Sequence[tuple[Comparison, Difference]]) -> str:
    """Each arm as a dot with its 95 % interval; arms of one figure share a scale, and an arm stands once, as in the comparison with
    most seeds of it. SVG without script or font."""
    if not measured:
        return ""
    scales: dict[str, dict[str, tuple[Estimate, int]]] = {}
    for one, found in measured:
        arms, num_seeds = scales.setdefault(one.first.unit, {}), len(found.by_seed)
        for label, value in ((one.first.label, found.first), (one.second.label, found.second)):
            if label not in arms or arms[label][1] < num_seeds:
                arms[label] = (value, num_seeds)
    rows, y = [], 8
    for unit, arms in scales.items():
        highest = max(value.high for value, _ in arms.values())
        limit = 1.0 if highest <= 1 else 1.1 * highest
        rows.append(f'<text x="4" y="{y + 12}" class="unit">{escape(unit)}, 0 to {limit:.3g}</text>')
        y += 20
        for label, (value, num_seeds) in arms.items():
            few = "" if num_seeds >= NUM_SEEDS else f" ({_seeds(num_seeds)})"
            rows.append(_plot_row(label, value, f"{_number(value.mean, unit)}{few}", y=y, limit=limit))
            y += 24
        y += 8
    style = "text{font:12px system-ui,sans-serif;fill:#667085}.unit{font-weight:600}.track{stroke:#98a2b3;stroke-opacity:.35}"
    style += ".interval{stroke:#2f6fed;stroke-width:2}circle{fill:#2f6fed}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {y}" width="640" height="{y}"><style>{style}</style>'
    return f"{head}{''.join(rows)}</svg>\n"


def _plot_row(label: str, value: Estimate, shown: str, *, y: int, limit: float) -> str:
    left, room = 190, 340
    x, low, high = (left + room * max(0.0, number) / limit for number in (value.mean, value.low, value.high))
    return (
        f'<text x="{left - 10}" y="{y + 12}" text-anchor="end">{escape(label)}</text>'
        f'<path class="track" d="M{left} {y + 8}H{left + room}"/><path class="interval" d="M{low:.1f} {y + 8}H{high:.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y + 8}" r="4"/><text x="{left + room + 12}" y="{y + 12}">{shown}</text>'
    )
