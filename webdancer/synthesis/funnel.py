"""The funnel between a teacher's attempts and the demonstrations (paper section 3 and App. D): validity, correctness, quality.

Each stage is a pure function of an attempt and says keep or not, with a reason that is counted. The rules need no model; the last part of
the quality stage, `quality_check.py`, asks one where there is one.

    validity      format, known tools, no simulated observation
    correctness   the judge's verdict
    quality       repetition, number of actions, redundant calls, calls after the answer was seen
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from webdancer.agent.actions import RESPONSE_CLOSE, RESPONSE_OPEN, conforms, outline, parse_action, strip_end_of_turn
from webdancer.agent.prompt import TRUNCATED, neutral_specials, observation_of
from webdancer.config import QualityConfig
from webdancer.data.demonstrations import Demonstration
from webdancer.rewards.judge import normalise
from webdancer.synthesis.similar import words
from webdancer.types import Action, FinalAnswer, MalformedAction, ScoredTrajectory, ToolCall, Verdict

Stage = Literal["outage", "validity", "correctness", "quality", "passed"]
STAGES: tuple[Stage, ...] = ("outage", "validity", "correctness", "quality", "passed")
"""Where an attempt ends, in order. `outage`: tools or engine broke under it, which says nothing about the teacher."""

NEEDED: dict[str, Stage] = {"all": "validity", "valid": "correctness", "correct": "quality", "quality": "passed"}
"""sample.keep -> the first stage at which an attempt may end and still be a demonstration."""

KNOWN_TOOLS = frozenset({"search", "visit"})
NGRAM = 10
"""Words in a row that may not come back too often (paper App. D)."""
_UNDECIDED = frozenset({"no_verdict", "unchecked"})
_MIN_ANSWER_CHARS = 4

_SCRIPTS_WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_SCRIPTS_WITHOUT_SPACES}]|[^\\s{_SCRIPTS_WITHOUT_SPACES}]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`reason` is a stable code of what was wrong, empty where the attempt is kept; `detail` is for people."""

    keep: bool
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The first stage that did not let the attempt through, and why; `passed` where all did."""

    stage: Stage
    reason: str = ""
    detail: str = ""

    def is_kept(self, keep: str) -> bool:
        """Whether it came as far as `sample.keep` asks."""
        return STAGES.index(self.stage) >= STAGES.index(NEEDED[keep])

    @property
    def is_undecided(self) -> bool:
        """Nobody's fault but that of a tool, an engine, a judge or a checker that was away."""
        return self.stage == "outage" or self.reason in _UNDECIDED


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn as it was written; `observation` is None where no tool was called.

    `cut`: the turn did not end by itself. `failed`: what is observed is an error.
    """

    text: str
    action: Action
    observation: str | None = None
    cut: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What the stages look at, of an episode that was just run or of a conversation in a file."""

    question: str
    answers: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def calls(self) -> list[tuple[ToolCall, Step]]:
        return [(step.action, step) for step in self.steps if isinstance(step.action, ToolCall)]

    @property
    def num_actions(self) -> int:
        """Tool calls, and the answer."""
        return sum(not isinstance(step.action, MalformedAction) for step in self.steps)


def attempt_of(scored: ScoredTrajectory) -> Attempt:
    trajectory = scored.trajectory
    steps = tuple(
        Step(
            text=turn.completion.text,
            action=turn.action,
            observation=None if turn.result is None else turn.result.text,
            cut=turn.completion.finish != "stop",
            failed=turn.result is not None and turn.result.error is not None,
        )
        for turn in trajectory.turns
    )
    return Attempt(question=trajectory.task.question, answers=trajectory.task.answers, steps=steps)


def attempt_of_demonstration(shown: Demonstration) -> Attempt:
    steps: list[Step] = []
    messages = shown.messages[2:]
    for index in range(0, len(messages), 2):
        text = messages[index]["content"]
        observation = observation_of(messages[index + 1]["content"]) if index + 1 < len(messages) else None
        steps.append(Step(text=text, action=parse_action(text), observation=observation))
    return Attempt(question=shown.question, answers=shown.answers, steps=tuple(steps))


def sift(attempt: Attempt, verdict: Verdict, config: QualityConfig, *, outage: str | None = None, tools: Set[str] = KNOWN_TOOLS) -> Outcome:
    """All stages in order, the rules of the last one; the first that says no is where the attempt ends."""
    if outage is not None:
        return Outcome(stage="outage", reason="outage", detail=outage)
    stages: tuple[tuple[Stage, Decision], ...] = (
        ("validity", valid := validity(attempt, tools=tools)),
        ("correctness", right := correctness(verdict) if valid.keep else valid),
        ("quality", quality(attempt, config) if right.keep else right),
    )
    for stage, decision in stages:
        if not decision.keep:
            return Outcome(stage=stage, reason=decision.reason, detail=decision.detail)
    return Outcome(stage="passed")


def validity(attempt: Attempt, *, tools: Set[str] = KNOWN_TOOLS) -> Decision:
    """Every turn one thought and one action, ended by the teacher itself; known tools; no observation of its own making; an answer last.

    Keeps exactly what `rewards.reward.format_score` calls well-formed, less the calls of unknown tools, and special tokens of a chat
    format, which SFT would read as such.
    """
    for number, step in enumerate(attempt.steps, start=1):
        if (reason := _invalid(step, tools)) is not None:
            return Decision(keep=False, reason=reason, detail=f"turn {number}")
        if isinstance(step.action, FinalAnswer) != (number == len(attempt.steps)):
            return Decision(keep=False, reason="no_answer", detail=f"turn {number}")
    return Decision(keep=True) if attempt.steps else Decision(keep=False, reason="no_answer", detail="no turn")


def correctness(verdict: Verdict) -> Decision:
    """The judge's verdict; where it has none the attempt is not wrong, and not a demonstration either."""
    if verdict.status == "correct":
        return Decision(keep=True)
    return Decision(keep=False, reason="wrong" if verdict.status == "wrong" else "no_verdict", detail=verdict.reason[:200])


def quality(attempt: Attempt, config: QualityConfig) -> Decision:
    """The rules, in order: repetition, number of actions, redundant calls, calls after the answer was seen."""
    repeated, ngram = most_repeated(step.text for step in attempt.steps)
    if repeated > config.max_repetition:
        return Decision(keep=False, reason="repetition", detail=f"{repeated} times: {ngram}")
    if attempt.num_actions < config.min_actions:
        return Decision(keep=False, reason="too_few_actions", detail=str(attempt.num_actions))
    if config.max_actions and attempt.num_actions > config.max_actions:
        return Decision(keep=False, reason="too_many_actions", detail=str(attempt.num_actions))
    redundant = redundant_calls(attempt)
    if redundant > config.max_redundant_calls:
        return Decision(keep=False, reason="redundant_call", detail=str(redundant))
    late = calls_after_answer(attempt)
    if late > config.max_calls_after_answer:
        return Decision(keep=False, reason="over_action", detail=f"{late} calls after the answer was seen")
    return Decision(keep=True)


def most_repeated(texts: Iterable[str], *, n: int = NGRAM) -> tuple[int, str]:
    """(times, words) of the n words in a row that stand most often in the texts; (0, "") where all are shorter.

    Words are what white space parts, in Chinese, Japanese and Korean each character. No run of words crosses from one text to the next.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = _WORD.findall(text)
        counts.update(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    if not counts:
        return 0, ""
    words_in_row, times = counts.most_common(1)[0]
    return times, " ".join(words_in_row)


def redundant_calls(attempt: Attempt) -> int:
    """Calls of which every query, or every page for the same goal, had been asked for before, and had been answered."""
    asked: set[str] = set()
    redundant = 0
    for call, step in attempt.calls:
        pieces = _pieces(call)
        redundant += pieces <= asked
        if not step.failed:
            asked |= pieces
    return redundant


def calls_after_answer(attempt: Attempt) -> int:
    """Calls made once an observation had shown the right answer: some verify it, many are over-action (paper App. A).

    Numbers and very short answers do not count as seen: they stand everywhere by chance.
    """
    wanted = [told for alias in attempt.answers if len(told := _told(alias)) >= _MIN_ANSWER_CHARS and not told.isdigit()]
    calls = attempt.calls
    for index, (_, step) in enumerate(calls):
        text = f" {_told((step.observation or '').removesuffix(TRUNCATED))} "
        if any(f" {told} " in text for told in wanted):
            return len(calls) - index - 1
    return 0


def _told(text: str) -> str:
    return " ".join(words(normalise(text)))


def _invalid(step: Step, tools: Set[str]) -> str | None:
    if is_simulated(step.text):
        return "simulated_observation"
    if step.cut:
        return "cut_off"
    written = strip_end_of_turn(step.text)
    if isinstance(step.action, MalformedAction) or not conforms(step.text) or neutral_specials(written) != written:
        return "malformed"
    return "unknown_tool" if isinstance(step.action, ToolCall) and step.action.name not in tools else None


def is_simulated(text: str) -> bool:
    """Whether the turn holds an observation of the writer's own making: outside the thought, or whole inside it."""
    found = outline(text)
    if found.response_at is not None:
        return True
    thoughts: Sequence[str] = [block.body for block in found.blocks if block.kind == "think"]
    return any(opened and RESPONSE_CLOSE in rest for _, opened, rest in (thought.partition(RESPONSE_OPEN) for thought in thoughts))


def _pieces(call: ToolCall) -> set[str]:
    """What a call asks for, each piece by itself."""
    arguments = dict(call.arguments)
    name = {"search": "query", "visit": "url"}.get(call.name, "")
    values = arguments.pop(name, "")
    rest = json.dumps(arguments, sort_keys=True, ensure_ascii=False).casefold()
    pieces = values if isinstance(values, list) else [values]
    return {f"{call.name} {' '.join(str(piece).casefold().split())} {rest}" for piece in pieces} or {f"{call.name} {rest}"}
