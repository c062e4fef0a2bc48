"""Evaluations as text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from webdancer.evaluation.comparison import Agreement, Comparison
from webdancer.evaluation.metrics import Estimate
from webdancer.evaluation.round_metrics import Accuracy, RoundFigures


def table(figures: RoundFigures) -> str:
    """Accuracy of all questions and by kind, then what it took."""
    k = figures.k
    rounds = [f"round {number}" for number in range(1, k + 1)]
    lines = [["", "questions", *rounds, "Avg", "Best", f"Pass@{k}", f"Cons@{k}", f"Majority@{k}"], _line("all", figures.accuracy)]
    for name, values in figures.by.items():
        lines += [_line(f"{name} {value}", accuracy) for value, accuracy in values.items()]
    low, high = figures.accuracy.cons_at_k.low, figures.accuracy.cons_at_k.high
    calls = ", ".join(f"{_number(number)} {tool}" for tool, number in figures.calls_by_tool.items()) or "none"
    took = [
        f"95 % interval of Cons@{k}: {_percent(low)} to {_percent(high)} (bootstrap over questions)",
        f"no verdict {_percent(figures.unknown)}, no answer {_percent(figures.no_answer)}, malformed {_percent(figures.malformed)}, "
        f"not attempted {_percent(figures.not_attempted)}",
        f"an episode: {_number(figures.actions)} actions, {_number(figures.calls)} tool calls ({calls}), {_number(figures.tokens)} tokens, "
        f"{_number(figures.policy_tokens)} of them the policy's; tools cost ${figures.usd:.2f} in all",
        *_judge_lines(figures.judge_requests, figures.judge_tokens, figures.judge_usd),
        f"ended: {', '.join(f'{stop} {count}' for stop, count in figures.stops.items())}",
    ]
    return "\n".join([*_aligned(lines), *took])


def _judge_lines(requests: int, tokens: int, usd: float) -> list[str]:
    """None where no model judged."""
    return [f"judge: {requests:,} requests, {tokens:,} tokens, ${usd:.2f} in all"] if requests else []


def comparison_text(comparison: Comparison) -> str:
    difference = comparison.difference
    return "\n".join(
        [
            f"{comparison.num_questions} questions: first {_percent(comparison.first)}, second {_percent(comparison.second)}",
            f"second minus first: {100 * difference.mean:+.1f} points, 95 % interval {100 * difference.low:+.1f} to "
            f"{100 * difference.high:+.1f}",
            f"p {_p(comparison.p_value)} (permutation test over questions, mean over rounds)",
            f"round 1: {comparison.only_first} right only in the first, {comparison.only_second} only in the second, "
            f"p {_p(comparison.mcnemar_p)} (exact McNemar test)",
        ]
    )


def agreement_text(agreement: Agreement) -> str:
    same = agreement.agreement
    pairs = [f"{count} {first}/{second}" for (first, second), count in sorted(agreement.counts.items())]
    return "\n".join(
        [
            f"{agreement.num_decided} answers that both judges decide: {_percent(same.mean)} alike "
            f"(95 % interval {_percent(same.low)} to {_percent(same.high)}), Cohen's kappa {_number(agreement.kappa, digits=2)}",
            f"recorded/this judge: {', '.join(pairs)}",
            *_judge_lines(agreement.use.requests, agreement.use.prompt_tokens + agreement.use.completion_tokens, agreement.use.usd),
        ]
    )


def _line(name: str, accuracy: Accuracy) -> list[str]:
    estimates: list[float | Estimate] = [*accuracy.pass_at_1, accuracy.avg, accuracy.best, accuracy.pass_at_k, accuracy.cons_at_k]
    values = [*estimates, accuracy.majority_at_k]
    return [name, str(accuracy.num_questions), *(_percent(one.mean if isinstance(one, Estimate) else one) for one in values)]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.4f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _number(value: float, *, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
