"""The sections of the report, each a function from the run's data to HTML; a section without data is empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape

from webdancer.evaluation.metrics import Estimate, mean_of, sampled_pass_at_k
from webdancer.evaluation.results import Evaluation
from webdancer.telemetry.charts import Bar, Series, bar_chart, line_chart, stacked_chart
from webdancer.telemetry.console import duration, number
from webdancer.telemetry.report_data import (
    Points,
    RunData,
    accuracy,
    greedy_accuracy,
    has_samples,
    kinds,
    stage_order,
    stage_title,
)
from webdancer.telemetry.report_trajectory import trajectory_article

DROPS = (
    ("kept", "rollout/groups_kept", "tone-1"),
    ("all wrong", "rollout/dropped_all_wrong", "tone-2"),
    ("all correct", "rollout/dropped_all_correct", "tone-3"),
    ("too few valid", "rollout/dropped_too_few_valid", "tone-4"),
)
BEFORE_RL = "rl-0"
"""The stage that `webdancer rl` begins with."""
CLIPS = (
    ("below", "train/clip_fraction_low", "tone-1"),
    ("above", "train/clip_fraction_high", "tone-2"),
    ("dual", "train/clip_fraction_dual", "tone-3"),
)


def headline(data: RunData) -> str:
    """What happened, in numbers."""
    tiles = [_tile(_percent(accuracy(one.rows)), stage_title(one.stage)) for one in _main_stages(data.evaluations)]
    if data.num_trajectories:
        tiles.append(_tile(f"{data.num_trajectories:,}", "trajectories scored"))
    if data.usd:
        tiles.append(_tile(f"${data.usd:,.2f}", "for tools and judge"))
    if data.phases:
        tiles.append(_tile(duration(sum(phase.seconds for phase in data.phases)), "in all phases"))
    model = f'<p class="model">{escape(data.model)}</p>' if data.model else ""
    return (
        f'<header><p class="brand">WebDancer</p><h1>{escape(data.name)}</h1>{model}'
        f'<p class="lead">{_story(data)}</p><div class="tiles">{"".join(tiles)}</div></header>'
    )


def held_out(data: RunData) -> str:
    """All stages on the questions that no training saw."""
    if not data.evaluations:
        return ""
    bars = []
    for one in data.evaluations:
        estimate = accuracy(one.rows)
        tone = f"tone-{min(3, stage_order(one.stage)[0] + 1)}"
        text = f"{_percent(estimate)} ({_range(estimate)})"
        bars.append(Bar(label=stage_title(one.stage), value=estimate.mean, text=text, tone=tone, interval=(estimate.low, estimate.high)))
    chart = bar_chart(bars, limit=1.0)
    measure = "sampled pass@1" if has_samples(data.evaluations) else "greedy accuracy"
    note = f"{measure} on {len(data.evaluations[0].rows)} held-out questions; whiskers are 95 % intervals"
    if data.undecided:
        note += f"; without a single verdict, and left out: {escape(', '.join(map(stage_title, data.undecided)))}"
    return _section("Held-out questions", f"<figure>{chart}<figcaption>{note}</figcaption></figure>{_stage_table(data.evaluations)}")


def by_kind(data: RunData) -> str:
    """Accuracy by type and hops, a column a stage."""
    stages = _main_stages(data.evaluations)
    if not stages:
        return ""
    head = "".join(f"<th>{escape(stage_title(one.stage))}</th>" for one in stages)
    rows = []
    for label, split in kinds(stages):
        cells = "".join(f"<td>{_estimate(accuracy(rows_))}</td>" for rows_ in split)
        rows.append(f"<tr><th>{escape(label)}</th><td>{max(map(len, split))}</td>{cells}</tr>")
    total = "".join(f"<td>{_estimate(accuracy(one.rows))}</td>" for one in stages)
    rows.append(f'<tr class="total"><th>all</th><td>{len(stages[0].rows)}</td>{total}</tr>')
    return _section("By type and hops", _table(f"<th>question</th><th>n</th>{head}", rows))


def curves(data: RunData) -> str:
    """What the steps of RL did."""
    entropy = data.curve("train/entropy", "learner/entropy", "entropy")
    charts = [
        _curve("Accuracy of rollouts", "share that is right, dropped groups included", data.curve("rollout/accuracy"), share=True),
        _curve("Reward", "0.1 format + 0.9 answer, mean of all rollouts", data.curve("rollout/reward"), share=True),
        _held_out_curve(data.evaluations),
        _groups_chart(data),
        _curve("Tool calls", "mean of a rollout", data.curve("rollout/tool_calls"), floor=0.0),
        _curve("Entropy", "of the policy over the trained tokens, in nats", entropy, floor=0.0),
        _curve("Policy tokens", "mean of a rollout", data.curve("rollout/policy_tokens"), floor=0.0),
        _clip_chart(data),
        _weights_chart(data),
        _step_time_chart(data),
        _curve("SFT loss", "nats a token", data.curve("sft/loss", phase="sft"), floor=0.0),
        _curve("SFT validation loss", "nats a token, held back", data.curve("sft/validation_loss", phase="sft"), floor=0.0),
    ]
    shown = "".join(chart for chart in charts if chart)
    return _section("Training", f'<div class="charts">{shown}</div>') if shown else ""


def canary(data: RunData) -> str:
    """Engines against the learner on a fixed probe, after every weight update."""
    mean, largest = data.curve("canary/mean", "canary_mean"), data.curve("canary/max", "canary_max")
    if not mean:
        return ""
    body = _curve("Canary, mean", "|log p engine - log p learner| on the probe, after each update", mean, floor=0.0)
    body += _curve("Canary, max", "the worst token of the probe", largest, floor=0.0) if largest else ""
    drift = data.curve("train/mismatch_abs", "learner/mismatch_abs", "mismatch_abs")
    body += _curve("Drift", "|log p rollout - log p learner| over trained tokens", drift, floor=0.0) if drift else ""
    worst = f"In {len(mean)} updates the mean was at most {_small(max(y for _, y in mean))}"
    worst += f" and the largest difference {_small(max(y for _, y in largest))}." if largest else "."
    return _section("Do engines and learner hold the same weights?", f'<p>{worst}</p><div class="charts">{body}</div>')


def times(data: RunData) -> str:
    if not data.phases:
        return ""
    bars = [
        Bar(label=phase.name, value=phase.seconds, text=duration(phase.seconds) + ("" if phase.finished else ", not finished"))
        for phase in data.phases
    ]
    return _section("Time per phase", f"<figure>{bar_chart(bars, label_width=150)}</figure>")


def trajectories(data: RunData) -> str:
    parts = [trajectory_article(row, title) for row, title in ((data.solved, "Solved"), (data.failed, "Failed")) if row]
    legend = (
        '<p class="legend"><span class="think">thought</span><span class="call">tool call</span>'
        '<span class="observation">observation (never trained on)</span><span class="answer">answer</span></p>'
    )
    return _section("Two trajectories", legend + "".join(parts)) if parts else ""


SECTIONS: tuple[Callable[[RunData], str], ...] = (headline, held_out, by_kind, curves, canary, times, trajectories)


def _story(data: RunData) -> str:
    stages = {one.stage: accuracy(one.rows) for one in data.evaluations}
    first = "sft" if "sft" in stages else BEFORE_RL
    last = _last_rl(data.evaluations)
    if first not in stages or last in ("", first):
        return f"{len(data.rl_steps)} steps of RL so far; it takes held-out questions asked before and after to say what they were worth."
    before, after = stages[first], stages[last]
    base = f" The base model, which has never seen a tool, solves {_percent(stages['base'])}." if "base" in stages else ""
    began = "its warm start" if first == "sft" else "where it began"
    return (
        f"In {last.partition('-')[2]} steps of DAPO the agent went from {_percent(before)} to <strong>{_percent(after)}</strong> on "
        f"{after.num_tasks} held-out questions ({100 * (after.mean - before.mean):+.0f} points over {began}).{base}"
    )


def _last_rl(evaluations: Sequence[Evaluation]) -> str:
    """The stage of the last evaluation in RL; empty without one."""
    return max((one.stage for one in evaluations if one.stage.startswith("rl-")), key=stage_order, default="")


def _main_stages(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Base, SFT or what RL began with, and the last RL evaluation; what is not one of these is shown too."""
    shown = (BEFORE_RL, _last_rl(evaluations))
    return [one for one in evaluations if not one.stage.startswith("rl-") or one.stage in shown]


def _stage_table(evaluations: Sequence[Evaluation]) -> str:
    sampled = has_samples(evaluations)
    k = max((len(row.samples_correct) for one in evaluations for row in one.rows), default=0)
    head = "<th>greedy</th>" + ("<th>pass@1</th>" if sampled else "") + (f"<th>pass@{k}</th>" if k > 1 else "")
    rows = []
    for one in evaluations:
        cells = f"<td>{_estimate(greedy_accuracy(one.rows))}</td>"
        cells += f"<td>{_estimate(accuracy(one.rows))}</td>" if sampled else ""
        cells += f"<td>{_estimate(sampled_pass_at_k(one.rows, k))}</td>" if k > 1 else ""
        calls, well = mean_of(row.num_tool_calls for row in one.rows), mean_of(row.format_ok for row in one.rows)
        rows.append(f"<tr><th>{escape(stage_title(one.stage))}</th>{cells}<td>{calls:.1f}</td><td>{100 * well:.0f} %</td></tr>")
    return _table(f"<th>stage</th>{head}<th>tool calls</th><th>well-formed</th>", rows)


def _table(head: str, rows: Sequence[str]) -> str:
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _held_out_curve(evaluations: Sequence[Evaluation]) -> str:
    found: list[tuple[float, Estimate]] = []
    for one in evaluations:
        kind, _, step = one.stage.partition("-")
        if one.stage == "sft" or (kind == "rl" and step.isdigit()):
            found.append((float(step or 0), accuracy(one.rows)))
    if len(found) < 2:
        return ""
    series = Series(
        name="held-out",
        points=[(step, estimate.mean) for step, estimate in found],
        intervals=[(estimate.low, estimate.high) for _, estimate in found],
        tone="tone-3",
    )
    chart = line_chart([series], floor=0.0, ceiling=1.0)
    return _chart("Held-out accuracy", "step 0 is before RL; the band is the 95 % interval", chart)


def _groups_chart(data: RunData) -> str:
    steps = [step for step, _ in data.curve("rollout/groups_kept")]
    layers = _layers(data, DROPS)
    if not steps or not layers:
        return ""
    filled = [replace(layer, points=[(step, dict(layer.points).get(step, 0.0)) for step in steps]) for layer in layers]
    return _chart("Groups", f"dynamic sampling trains on mixed groups only: {_legend(layers)}", stacked_chart(steps, filled))


def _clip_chart(data: RunData) -> str:
    layers = _layers(data, CLIPS)
    if not layers:
        return ""
    return _chart("Clipped tokens", f"share of trained tokens whose ratio was cut off: {_legend(layers)}", line_chart(layers, floor=0.0))


def _weights_chart(data: RunData) -> str:
    """Only where rollouts and learner are not one policy: else it is 1."""
    points = data.curve("train/effective_sample_size")
    if all(size > 0.999 for _, size in points):
        return ""
    return _curve("Effective sample size", "of the importance weights, as a share of the trained tokens", points)


def _layers(data: RunData, parts: Sequence[tuple[str, str, str]]) -> list[Series]:
    """(name, metric, tone) as series, without those that are 0 throughout."""
    curves = [(name, data.curve(metric), tone) for name, metric, tone in parts]
    return [Series(name=name, points=points, tone=tone) for name, points, tone in curves if any(value for _, value in points)]


def _legend(layers: Sequence[Series]) -> str:
    return " · ".join(f'<span class="key {layer.tone}">{escape(layer.name)}</span>' for layer in layers)


def _step_time_chart(data: RunData) -> str:
    layers = []
    for index, name in enumerate(("rollout", "train", "sync"), start=1):
        points = data.curve(f"time/{name}_s")
        if points:
            layers.append(Series(name=f"s {name}", points=points, tone=f"tone-{index}"))
    if not layers or len({len(layer.points) for layer in layers}) > 1:
        return ""
    legend = " · ".join(f'<span class="key {layer.tone}">{escape(layer.name[2:])}</span>' for layer in layers)
    return _chart("Step time", f"seconds: {legend}", stacked_chart([step for step, _ in layers[0].points], layers))


def _curve(title: str, note: str, points: Points, *, share: bool = False, floor: float | None = None) -> str:
    if not points:
        return ""
    floor, ceiling = (0.0, 1.0) if share else (floor, None)
    last = f' <span class="last">{number(points[0][1])} → {number(points[-1][1])}</span>' if len(points) > 1 else ""
    chart = line_chart([Series(name=title.lower(), points=points)], floor=floor, ceiling=ceiling)
    return _chart(escape(title) + last, escape(note), chart)


def _chart(title_html: str, note_html: str, svg: str) -> str:
    return f'<figure class="chart"><h3>{title_html}</h3>{svg}<figcaption>{note_html}</figcaption></figure>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _percent(estimate: Estimate) -> str:
    return "-" if estimate.num_tasks == 0 else f"{100 * estimate.mean:.0f} %"


def _range(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.0f} to {100 * estimate.high:.0f}"


def _estimate(estimate: Estimate) -> str:
    if estimate.num_tasks == 0:
        return "-"
    return f"{_percent(estimate)} <small>{_range(estimate)}</small>"


def _small(value: float) -> str:
    return f"{value:.1e}"
