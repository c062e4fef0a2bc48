"""What the paper claims, as comparisons of cells; and what is kept of an evaluated cell, question by question."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Result = dict[str, Any]
Measure = Callable[[Sequence[Result]], NDArray[np.float64]]
"""One value per question [Q] of the cells of an arm; NaN where an episode is missing."""


def result_row(trajectories: Iterable[Mapping[str, Any]], questions: Sequence[str], *, about: Mapping[str, Any]) -> Result:
    """Member 0 is the greedy episode, the others are sampled; of an episode that was recorded twice, the last. All lists are [Q]."""
    episodes = {(row["task"]["id"], row["member"]): row for row in trajectories if row["decision"] == "evaluated"}
    by_question: defaultdict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for (question, member), row in episodes.items():
        if row["reward"]["valid"]:
            by_question[question][member] = row
    greedy = [by_question[name].get(0) for name in questions]
    sampled = [[row for member, row in sorted(by_question[name].items()) if member > 0] for name in questions]
    right = [[int(row["reward"]["answer"] > 0) for row in rows] for rows in sampled]
    return {
        "about": dict(about),
        "pass_at_1": float(np.mean([np.mean(one) for one in right if one])) if any(right) else float("nan"),
        "hops": [next((row["task"].get("hops", 0) for row in by_question[name].values()), 0) for name in questions],
        "greedy": [None if row is None else int(row["reward"]["answer"] > 0) for row in greedy],
        "samples": right,
        "majority": [_majority(rows) for rows in sampled],
        "calls": [_mean([row["num_tool_calls"] for row in rows]) for rows in sampled],
        "tokens": [_mean([row["num_policy_tokens"] for row in rows]) for rows in sampled],
        "invalid": [_mean([row["answer"] is None for row in rows]) for rows in sampled],
    }


def _majority(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Whether the most frequent answer is right; among equals the one that came first."""
    if not rows:
        return None
    answers = Counter(str(row["answer"]).strip().casefold() for row in rows)
    chosen = answers.most_common(1)[0][0]
    return int(any(row["reward"]["answer"] > 0 for row in rows if str(row["answer"]).strip().casefold() == chosen))


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 3) if values else None


def pass_at_1(cells: Sequence[Result]) -> NDArray[np.float64]:
    return np.array([np.mean(one) if one else np.nan for one in cells[0]["samples"]])


def pass_at_3(cells: Sequence[Result]) -> NDArray[np.float64]:
    return np.array([float(any(one)) if one else np.nan for one in cells[0]["samples"]])


def all_right(cells: Sequence[Result]) -> NDArray[np.float64]:
    return np.array([float(all(one)) if one else np.nan for one in cells[0]["samples"]])


def column(name: str) -> Measure:
    return lambda cells: np.array([np.nan if value is None else float(value) for value in cells[0][name]])


def of_hops(measure: Measure, *hops: int) -> Measure:
    """The measure over questions of so many hops, NaN elsewhere."""
    return lambda cells: np.where(np.isin(cells[0]["hops"], hops), measure(cells), np.nan)


def disagreement(pick: Callable[[Result], Sequence[float | None]]) -> Measure:
    """1 where the cells do not all come to the same verdict on a question."""

    def measure(cells: Sequence[Result]) -> NDArray[np.float64]:
        verdicts = np.array([[np.nan if value is None else value for value in pick(cell)] for cell in cells], np.float64)
        return np.where(np.isnan(verdicts).any(axis=0), np.nan, (verdicts != verdicts[0]).any(axis=0).astype(np.float64))

    return measure


def greedy_verdicts(cell: Result) -> Sequence[float | None]:
    return list(cell["greedy"])


def first_sample(cell: Result) -> Sequence[float | None]:
    return [one[0] if one else None for one in cell["samples"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    label: str
    cells: tuple[str, ...]
    measure: Measure = pass_at_1
    unit: str = "pass@1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`expected` of first minus second, by the paper."""

    first: Arm
    second: Arm
    expected: Literal["higher", "same"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    key: str
    text: str
    comparisons: tuple[Comparison, ...]
    note: str = ""
    seen: str = ""
    """What the trajectories of the measured cells say besides; written by hand."""


def arm(label: str, cell: str, measure: Measure = pass_at_1, unit: str = "pass@1") -> Arm:
    return Arm(label=label, cells=(cell,), measure=measure, unit=unit)


def versus(first: Arm, second: Arm, expected: Literal["higher", "same"] = "higher") -> Comparison:
    return Comparison(first=first, second=second, expected=expected)


RL, SFT = "SFT + RL", "SFT"
SYNC = arm("staleness 0", "sft_rl")
CALLS, TOKENS, INVALID = column("calls"), column("tokens"), column("invalid")
MAJORITY = column("majority")

CLAIMS = (
    Claim(
        key="sft",
        text="SFT is essential: RL alone stays near zero",
        comparisons=(versus(arm(RL, "sft_rl"), arm("RL only", "rl_only")),),
        note="RL only is asked for more rollouts than SFT + RL has; without a mixed group it makes no update.",
        seen="Seed 0: of 320 groups (2,560 rollouts) of the base model not one was mixed, all were wrong, and RL ended without an update.",
    ),
    Claim(
        key="rl",
        text="RL lifts Pass@1 towards SFT's Pass@3, and raises consistency",
        comparisons=(
            versus(arm(RL, "sft_rl"), arm(SFT, "sft")),
            versus(arm(RL, "sft_rl", MAJORITY, "majority of 3"), arm(SFT, "sft", MAJORITY, "majority of 3")),
            versus(arm(RL, "sft_rl", all_right, "3 of 3 right"), arm(SFT, "sft", all_right, "3 of 3 right")),
            versus(arm("SFT's pass@3", "sft", pass_at_3, "pass@3 or 1"), arm("pass@1 after RL", "sft_rl", unit="pass@3 or 1"), "same"),
        ),
        note="The paper's Cons@3 is the mean of three Pass@1, which is pass@1 here; majority and 3 of 3 say how consistent a policy is.",
        seen="Seed 0: 13 steps go 57 % of the way from SFT's pass@1 to its pass@3.",
    ),
    Claim(
        key="dynamic_sampling",
        text="Dynamic sampling helps",
        comparisons=(
            versus(arm("on", "sft_rl"), arm("off, same steps", "no_dynamic")),
            versus(arm("on", "sft_rl"), arm("off, same rollouts", "no_dynamic_rollouts")),
            versus(arm("on, curriculum and staged groups", "curriculum"), arm("on", "sft_rl"), "same"),
        ),
        note="The second row is accuracy for the same number of rollouts, dropped groups included. The third is not the paper's: as many "
        "steps of as many useful groups, for which questions are chosen and groups grown so that fewer rollouts are thrown away.",
    ),
    Claim(
        key="masking",
        text="Masking observations helps",
        comparisons=(
            versus(arm("masked (RL)", "sft_rl"), arm("all tokens (RL)", "rl_all_tokens")),
            versus(arm("masked (SFT)", "sft"), arm("all tokens (SFT)", "sft_all_tokens")),
        ),
        seen="With a loss on all tokens, 44 to 48 % of the samples after SFT end without an answer (masked: 13 to 17 %).",
    ),
    Claim(
        key="filtered",
        text="Filtered data wins when data is short",
        comparisons=(
            versus(arm("filtered, 200", "filtered_short"), arm("unfiltered, 200", "unfiltered_short")),
            versus(arm("filtered, 900", "sft"), arm("unfiltered, 900", "unfiltered")),
        ),
    ),
    Claim(
        key="temperature",
        text="The temperature of inference hardly matters",
        comparisons=(
            versus(arm("0.3", "temperature_0.3"), arm("1.0", "sft_rl"), "same"),
            versus(arm("0.6", "temperature_0.6"), arm("1.0", "sft_rl"), "same"),
        ),
        seen="Seed 0: a policy of 2M parameters is not sharp. At temperature 1, 8 % of its samples end without an answer, at 0.3 it is "
        "0.2 %, and every misread name is a wrong answer; a large model has probability to spare. So the other rows, at temperature 1, see "
        "differences that greedy decoding would hide.",
    ),
    Claim(
        key="asynchronous",
        text="Asynchronous is as good as synchronous",
        comparisons=(
            versus(arm("staleness 1", "stale_1"), SYNC, "same"),
            versus(arm("staleness 4", "stale_4"), SYNC, "same"),
            versus(arm("staleness 1", "stale_1"), arm("1, uncorrected", "stale_1_uncorrected"), "same"),
            versus(arm("staleness 4", "stale_4"), arm("4, uncorrected", "stale_4_uncorrected")),
            versus(arm("staleness 4, clipped", "stale_4_clipped"), SYNC, "same"),
        ),
        note="Uncorrected: the truncated importance weight is 1 everywhere. Clipped: pi_old is the rollouts' policy "
        "(rl.proximal=rollout), so that DAPO's clipping bounds how far a token goes from the policy that wrote it; "
        "in all others it is the learner's own.",
        seen="A staleness of 4 is a third of a run of 13 steps, each of which moves this policy far. All three hold for some steps and "
        "then fall: the mean distance |log p rollout - log p learner| of a batch grows from .01 to .1, 1.1 and 1.6 although tokens "
        "are weighted, and at the end 75 to 96 % of the samples have no answer. Without the weights, staleness 1 goes the same way. "
        "DAPO's clip around the rollouts' policy keeps staleness 4 from falling, and 15, 60 and 43 % of what RL gains. "
        "The first batch of an asynchronous run holds what finishes first, which is short: 2.4 to 3.0 calls an episode at staleness "
        "1 against 3.3 to 4.0 in a synchronous run, and the second has what is left, 4.7 to 4.9.",
    ),
    Claim(
        key="longer",
        text="RL makes episodes longer and use more tools",
        comparisons=(
            versus(arm(RL, "sft_rl", CALLS, "tool calls"), arm(SFT, "sft", CALLS, "tool calls")),
            versus(arm(RL, "sft_rl", TOKENS, "policy tokens"), arm(SFT, "sft", TOKENS, "policy tokens")),
            versus(
                arm(f"{RL}, 2 and 3 hops", "sft_rl", of_hops(CALLS, 2, 3), "calls, 2-3 hops"),
                arm(f"{SFT}, 2 and 3 hops", "sft", of_hops(CALLS, 2, 3), "calls, 2-3 hops"),
            ),
            versus(
                arm(f"{RL}, 2 and 3 hops", "sft_rl", of_hops(pass_at_1, 2, 3), "pass@1, 2-3 hops"),
                arm(f"{SFT}, 2 and 3 hops", "sft", of_hops(pass_at_1, 2, 3), "pass@1, 2-3 hops"),
            ),
        ),
        seen="Seed 0: right episodes are as long before as after (1.7, 3.3 and 4.9 calls for 1, 2 and 3 hops): a hop takes its calls and "
        "no more. What RL takes away are the wandering ones: wrong samples fall from 4.2 to 3.5 calls, repeated calls from 0.25 to 0.06 an "
        "episode, episodes that use up their turns from 3.6 % to 0.2 %. Where more calls do not help, RL has nothing to lengthen.",
    ),
    Claim(
        key="instability",
        text="Instability comes from the web, not from decoding",
        comparisons=(
            versus(
                Arm(
                    label="3 draws of the web",
                    cells=("web_1", "web_2", "web_3"),
                    measure=disagreement(greedy_verdicts),
                    unit="verdict differs",
                ),
                Arm(
                    label="temperatures 0.3, 0.6, 1.0",
                    cells=("temperature_0.3", "temperature_0.6", "sft_rl"),
                    measure=disagreement(first_sample),
                    unit="verdict differs",
                ),
            ),
        ),
        note="A draw re-orders the hits and their facts and loses 10 % of the pages; decoding is greedy there.",
        seen="Seed 0: greedy accuracy is .957 on the web that the policy was trained on and .50, .64 and .59 on the three draws. Facts are "
        "shown for the first hit only, and the policy has learnt to look there: another order is a harder web, not only another one.",
    ),
    Claim(
        key="long_thoughts",
        text="Long thoughts cost small models format",
        comparisons=(
            versus(arm("verbose", "sft_verbose", INVALID, "no answer"), arm("terse", "sft", INVALID, "no answer")),
            versus(arm("terse", "sft"), arm("verbose", "sft_verbose")),
        ),
        note="Verbose thoughts restate the question and all notes before what is new; a turn of theirs may have 256 tokens, not 96.",
        seen="Verbose episodes have twice the tokens (280 to 299 against 136 to 142), and what they cost is not the format: 3 % of the "
        "samples end without an answer where terse ones leave 16 %. They cost the answer: greedy accuracy is .55 to .61 against .87 "
        "to .91.",
    ),
    Claim(
        key="both_sets",
        text="Both data sets help",
        comparisons=(
            versus(arm("both", "rl_both_sets"), arm("CRAWLQA alone", "rl_crawlqa")),
            versus(arm("both", "rl_both_sets"), arm("E2HQA alone", "rl_e2hqa")),
        ),
        note="RL on 2,400 questions each, from the same warm start. Its demonstrations are CRAWLQA, and so are the 300 questions. "
        "E2HQA (webdancer synthesize e2hqa, without a chat model) describes entities that the agent must find by what is said of them.",
        seen="Of E2HQA's questions the warm start solves 2 to 6 % of the first batch, so that 13 steps take 11,912 to 14,136 rollouts "
        "where CRAWLQA's take 2,064 to 2,248. The policy comes to 9 to 15 % of them, and gets no better at CRAWLQA's.",
    ),
)


def cells_of(claim: Claim) -> tuple[str, ...]:
    """Each once, in order."""
    arms = [one for comparison in claim.comparisons for one in (comparison.first, comparison.second)]
    return tuple(dict.fromkeys(cell for one in arms for cell in one.cells))
