"""Every dataclass that crosses a module boundary, one per stage of the data flow, and nothing else.

No type is filled in later: a `Trajectory` has no reward, a `ScoredTrajectory` always has one.
Arrays are numpy; the learner turns them into tensors. Shape suffixes: T tokens, G members of a group.

    Task -> Completion -> Turn -> Trajectory -> ScoredTrajectory -> Group
         -> TrainSample -> Microbatch -> OptimizerStep -> TrainBatch -> StepResult
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from webdancer.config import OptimizerConfig

FinishReason = Literal["stop", "length"]
VerdictStatus = Literal["correct", "wrong", "unknown"]
FilterReason = Literal["kept", "all_correct", "all_wrong", "too_few_valid"]
LossName = Literal["dapo", "cispo", "sft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question. `answers` are aliases: any of them is right."""

    id: str
    question: str
    answers: tuple[str, ...]
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the policy draws tokens. In rollouts top_p is 1 and top_k is off (-1), so that the learner's log-probabilities match."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled by the weights of this version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One generation of the policy: the engine's own ids and processed log-probabilities, of equal length.

    `text` is the ids decoded with special tokens kept. `finish` is `stop` when the end-of-turn token was sampled (it is then
    the last id) and `length` when the budget ran out.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish: FinishReason
    versions: tuple[VersionSpan, ...]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"logprobs: must have one per token id, got {len(self.logprobs)} for {len(self.token_ids)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool, checked for its form only: whether the tool and its arguments exist is the Toolbox's to say."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalAnswer:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedAction:
    """Why a turn was neither one tool call nor one answer."""

    reason: str


Action = ToolCall | FinalAnswer | MalformedAction


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a call caused at one provider: requests on the network (retries included), answers out of memory, and money."""

    provider: str
    requests: int = 0
    hits: int = 0
    usd: float = 0.0

    def __add__(self, other: ToolUse) -> ToolUse:
        """Of one provider."""
        return replace(self, requests=self.requests + other.requests, hits=self.hits + other.hits, usd=self.usd + other.usd)


def by_provider(uses: Iterable[ToolUse]) -> dict[str, ToolUse]:
    """The sum of each provider's uses."""
    sums: dict[str, ToolUse] = {}
    for use in uses:
        sums[use.provider] = sums[use.provider] + use if use.provider in sums else use
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What the agent reads. `error` is a stable code (None when all went well); the text then explains it to the agent.

    throttled: a quota or a provider in trouble held the call up or turned it away, so that fewer calls at once would do better.
    """

    text: str
    error: str | None = None
    latency_s: float = 0.0
    cached: bool = False
    uses: tuple[ToolUse, ...] = ()
    throttled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """`completion` is what the engine gave, before anything was cut. `result` is None for a final answer."""

    completion: Completion
    action: Action
    result: ToolResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFinished:
    """What a rollout worker tells the driver after each turn, so that another worker can go on with the episode."""

    task_id: str
    member: int
    attempt: int
    index: int
    turn: Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnText:
    """What a turn that is not finished has more of: `text` from character `start` on. 0: it begins, perhaps again on another worker."""

    index: int
    start: int
    text: str


TurnNews = TurnFinished | TurnText


class StopReason(StrEnum):
    ANSWERED = "answered"
    MAX_TURNS = "max_turns"  # model calls used up
    TOOL_BUDGET = "tool_budget"  # tool calls used up
    MAX_TOKENS = "max_tokens"  # context used up
    MALFORMED = "malformed"  # too many malformed actions in a row
    TIMEOUT = "timeout"
    FAILED = "failed"  # infrastructure, never the policy's fault


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One whole episode as the ledger of its tokens.

    token_ids, loss_mask, logprobs and versions have one length T. The mask is True exactly on the tokens that the policy
    sampled and that were kept; elsewhere logprobs is 0 and versions is -1.
    """

    id: str
    task: Task
    member: int
    turns: tuple[Turn, ...]
    token_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    stop: StopReason
    answer: str | None
    uses_before: tuple[ToolUse, ...] = ()
    """What its prompt took, where a search was made for it."""

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.logprobs), len(self.versions)}
        if len(lengths) != 1:
            raise ValueError(f"token_ids, loss_mask, logprobs, versions: must have one length, got {sorted(lengths)}")

    @property
    def num_policy_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def num_tool_calls(self) -> int:
        return sum(isinstance(turn.action, ToolCall) for turn in self.turns)

    @property
    def tool_uses(self) -> tuple[ToolUse, ...]:
        return (*self.uses_before, *(use for turn in self.turns if turn.result is not None for use in turn.result.uses))

    @property
    def start_version(self) -> int | None:
        """Version of the oldest token; None if the policy sampled none."""
        versions = self.versions[self.loss_mask]
        return int(versions.min()) if versions.size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeUse:
    """What verdicts took: requests to a model that were answered, verdicts out of the judge's memory, tokens, and money."""

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: JudgeUse) -> JudgeUse:
        return JudgeUse(
            requests=self.requests + other.requests,
            hits=self.hits + other.hits,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            usd=self.usd + other.usd,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`unknown` means that the judge failed, which is not a wrong answer. `use`: what this verdict took, however it came out."""

    status: VerdictStatus
    reason: str = ""
    judge: str = ""
    use: JudgeUse = JudgeUse()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """total = 0.1 format + 0.9 answer (+ overlong, in [-1, 0]); paper Eq. 5. Not valid: outside every mean, advantage 0."""

    total: float
    format: float
    answer: float
    overlong: float = 0.0
    valid: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredTrajectory:
    trajectory: Trajectory
    reward: Reward
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLost:
    """The worker or its engine died under the episode. Its finished turns are with the driver; another worker resumes it."""

    task_id: str
    member: int
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """All members for one task, sampled from the same prompt. `attempt` counts how often this task was admitted."""

    task: Task
    members: tuple[ScoredTrajectory, ...]
    attempt: int
    start_version: int  # the learner version when the group was admitted
    weight: float = 1.0  # of its advantages: 1 / the probability that a group of these outcomes is kept (rollout/stages.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterDecision:
    keep: bool
    reason: FilterReason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainSample:
    """One sequence to train on; all arrays [T] and all aligned to the *target*: entry t belongs to the prediction of token t.

    `logprobs` are the rollout's (zeros for SFT), `advantages` are constant over a trajectory (zeros for SFT), `versions` are the
    weights' that sampled the tokens (None where nothing was sampled).
    """

    id: str
    token_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    versions: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.logprobs), len(self.advantages)}
        if len(lengths) != 1:
            raise ValueError(f"token_ids, loss_mask, logprobs, advantages: must have one length, got {sorted(lengths)}")
        if self.loss_mask.size and self.loss_mask[0]:
            raise ValueError(f"loss_mask: the first token of sample {self.id!r} has no context to be predicted from, got mask 1")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """Several samples packed end to end into one row; all arrays [T].

    positions restart at 0 with every sample, and that alone says where one ends. Aligned to the target, as in TrainSample.
    A microbatch with no loss token is legal: every rank runs the same number of passes.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    rollout_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    versions: NDArray[np.int32] | None = None
    """Of the weights that sampled each token, -1 elsewhere; None where nothing was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptimizerStep:
    """microbatches[rank][i]; every rank has the same number of them. num_loss_tokens is the sum over all of them."""

    microbatches: tuple[tuple[Microbatch, ...], ...]
    num_loss_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """What one `Learner.step` consumes: one optimizer step, or several mini-batches of one rollout batch."""

    loss: LossName
    steps: tuple[OptimizerStep, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """`version` counts the learner's weights: it grows by one with each `Learner.step`, however many optimizer steps that held."""

    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPhase:
    """What the learner needs to know before the first step of SFT or RL."""

    loss: LossName
    optimizer: OptimizerConfig
    total_steps: int
    """Optimizer steps that the schedule is laid out for."""
    temperature: float = 1.0
    """Logits are divided by it, as in the rollouts."""
