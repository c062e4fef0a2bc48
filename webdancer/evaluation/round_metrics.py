"""What rounds of a benchmark say: accuracy in every sense that papers use, with intervals, by kind of question, and what it took.

For k rounds and c_q right of the n_q <= k attempts at question q that have a verdict:

    Pass@1 of round r   share of right attempts in that round
    Avg                 mean over rounds of Pass@1 ("Avg. Pass@3" of the released evaluation)
    Best                the largest Pass@1 of a round
    Pass@k              mean over q of 1 - C(n_q - c_q, k) / C(n_q, k): some of k attempts is right; questions with n_q < k are left out
    Cons@k              mean over q of c_q / n_q, the paper's consistency (its Cons@3)
    Majority@k          mean over q of the verdict on the answer that most attempts at q gave; ties count in parts. Elsewhere also
                        called cons@k, which the paper's is not. Which answers are the same: `same_answers`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from webdancer.evaluation.attempts import LABELS, Attempt
from webdancer.evaluation.metrics import Estimate, pass_at_k, share
from webdancer.rewards.judge_prompts import NOT_ATTEMPTED
from webdancer.rewards.matching import normalise, same_answer

Gold = Mapping[str, Sequence[str]]
NO_GOLD: Gold = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Of the questions of one kind. `pass_at_1` is one number a round; NaN where a round has no verdict."""

    num_questions: int
    pass_at_1: tuple[float, ...]
    avg: float
    best: float
    pass_at_k: Estimate
    cons_at_k: Estimate
    majority_at_k: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFigures:
    """`by`: label (level, type, ...) -> value -> accuracy. Means are over attempts; `usd` is the sum of what tools cost, and the judge's
    figures are sums as well."""

    k: int
    accuracy: Accuracy
    by: Mapping[str, Mapping[str, Accuracy]]
    unknown: float
    """Share of attempts without a verdict, which count in no accuracy."""
    no_answer: float
    """Share that ended without an answer: the papers' invalid share. They are wrong."""
    malformed: float
    not_attempted: float
    """SimpleQA's third grade; wrong as well."""
    actions: float
    calls: float
    calls_by_tool: Mapping[str, float]
    tokens: float
    policy_tokens: float
    usd: float
    judge_requests: int
    judge_tokens: int
    judge_usd: float
    stops: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not defined is null."""
        plain = _finite(asdict(self))
        assert isinstance(plain, dict)
        return plain


def round_figures(attempts: Sequence[Attempt], *, rounds: int, gold: Gold = NO_GOLD) -> RoundFigures:
    """attempts: one an episode. gold: question id -> its right answers, for the majority. Raises ValueError without any attempt."""
    if not attempts:
        raise ValueError("attempts: must have at least one, got none")
    kinds = {name: sorted({one.labels[name] for one in attempts if name in one.labels}) for name in LABELS}
    tools = sorted({tool for one in attempts for tool in one.calls})
    ran = [one for one in attempts if one.stop != "failed"]
    return RoundFigures(
        k=rounds,
        accuracy=accuracy(attempts, rounds=rounds, gold=gold),
        by={
            name: {
                value: accuracy([one for one in attempts if one.labels.get(name) == value], rounds=rounds, gold=gold) for value in values
            }
            for name, values in kinds.items()
            if len(values) > 1
        },
        unknown=_mean([one.status == "unknown" for one in attempts]),
        no_answer=_mean([one.answer is None for one in ran]),
        malformed=_mean([not one.well_formed for one in ran]),
        not_attempted=_mean([one.reason == NOT_ATTEMPTED for one in ran]),
        actions=_mean([one.num_actions for one in ran]),
        calls=_mean([sum(one.calls.values()) for one in ran]),
        calls_by_tool={tool: _mean([one.calls.get(tool, 0) for one in ran]) for tool in tools},
        tokens=_mean([one.num_tokens for one in ran]),
        policy_tokens=_mean([one.num_policy_tokens for one in ran]),
        usd=sum(one.usd for one in attempts),
        judge_requests=sum(one.judge_requests for one in attempts),
        judge_tokens=sum(one.judge_tokens for one in attempts),
        judge_usd=sum(one.judge_usd for one in attempts),
        stops=dict(Counter(one.stop for one in attempts).most_common()),
    )


def accuracy(attempts: Sequence[Attempt], *, rounds: int, gold: Gold = NO_GOLD) -> Accuracy:
    decided = [one for one in attempts if one.status != "unknown"]
    questions: defaultdict[str, list[Attempt]] = defaultdict(list)
    for one in decided:
        questions[one.task_id].append(one)
    by_round = tuple(_mean([one.status == "correct" for one in decided if one.round == round]) for round in range(1, rounds + 1))
    known = [value for value in by_round if not math.isnan(value)]
    enough = [tried for tried in questions.values() if len(tried) >= rounds]
    return Accuracy(
        num_questions=len({one.task_id for one in attempts}),
        pass_at_1=by_round,
        avg=_mean(known),
        best=max(known, default=math.nan),
        pass_at_k=share([pass_at_k(len(tried), num_right(tried), rounds) for tried in enough]),
        cons_at_k=share(list(scores(decided).values())),
        majority_at_k=share([majority(tried, gold=gold.get(id, ())) for id, tried in questions.items()]),
    )


def scores(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Question id -> share of right attempts among those with a verdict."""
    questions: defaultdict[str, list[bool]] = defaultdict(list)
    for one in attempts:
        if one.status != "unknown":
            questions[one.task_id].append(one.status == "correct")
    return {id: sum(right) / len(right) for id, right in questions.items()}


def majority(tried: Sequence[Attempt], *, gold: Sequence[str] = ()) -> float:
    """Whether the most common answer to a question is right; of several as common ones, the share. No answer has no vote."""
    voters = [one for one in tried if one.answer is not None]
    groups = same_answers([one.answer or "" for one in voters], gold=gold)
    if not groups:
        return 0.0
    most = max(map(len, groups))
    shares = [sum(voters[index].status == "correct" for index in group) / most for group in groups if len(group) == most]
    return _mean(shares)


def same_answers(answers: Sequence[str], *, gold: Sequence[str] = ()) -> list[list[int]]:
    """The answers (their indices) in groups of the same one: by the offline matcher (text, number, date, list; matching.same_answer), and
    where two match right answers of one question, which are aliases of each other. Nothing depends on their order."""
    texts = list(dict.fromkeys(answers))
    is_right = {text: any(same_answer(text, alias) for alias in gold) for text in texts}
    group_of = dict(zip(texts, texts, strict=True))
    for one, other in combinations(texts, 2):
        if (is_right[one] and is_right[other]) or normalise(one) == normalise(other) or same_answer(one, other):
            old, new = group_of[one], group_of[other]
            group_of = {text: new if group == old else group for text, group in group_of.items()}
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        groups[group_of[answer]].append(index)
    return list(groups.values())


def num_right(tried: Sequence[Attempt]) -> int:
    return sum(one.status == "correct" for one in tried)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
