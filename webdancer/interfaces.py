"""The seams: Protocols of one or two methods. Programs and algorithms depend on these, never on Ray, vLLM or a socket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from webdancer.types import (
    Completion,
    EpisodeLost,
    Sampling,
    ScoredTrajectory,
    StepResult,
    Task,
    ToolCall,
    ToolResult,
    TrainBatch,
    TrainingPhase,
    Turn,
    TurnFinished,
    TurnText,
    Verdict,
)


class Tokenizer(Protocol):
    """Text to ids and back. `encode` recognises special tokens in the text and adds none; `decode` keeps them."""

    eos_id: int
    """Id of the end-of-turn token (<|im_end|>), on which generation stops."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Policy(Protocol):
    """Raises `errors.EngineFault` when the engine aborted or failed: never a Completion, so never data."""

    async def complete(self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str) -> Completion: ...


OnTokens = Callable[[Sequence[int]], None]
"""Hears of new token ids of a generation, all of them in their order, before the Completion that holds them."""


@runtime_checkable
class StreamingPolicy(Policy, Protocol):
    """A Policy that can be listened to: `stream` is `complete`, and tells of the ids as they are sampled."""

    async def stream(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str, on_tokens: OnTokens
    ) -> Completion: ...


class Toolbox(Protocol):
    """Never raises for a bad call, page or provider: what went wrong is in the result's error code and text."""

    async def call(self, call: ToolCall) -> ToolResult: ...


class Judge(Protocol):
    """Retries by itself; what stays undecided is `unknown`, never wrong."""

    async def grade(self, task: Task, answer: str) -> Verdict: ...


OnTurn = Callable[[TurnFinished], None]
OnText = Callable[[TurnText], None]


class EpisodeRunner(Protocol):
    """The seam between driver and workers: in-process in tests, a pool of rollout worker actors in a cluster.

    `on_text` hears of each turn while it is written, for a person who waits; training and evaluation do not listen.
    """

    async def run(
        self,
        task: Task,
        *,
        member: int,
        attempt: int,
        sampling: Sampling,
        resume_from: tuple[Turn, ...] = (),
        on_turn: OnTurn | None = None,
        on_text: OnText | None = None,
    ) -> ScoredTrajectory | EpisodeLost: ...


@runtime_checkable
class Staged(Protocol):
    """An EpisodeRunner that can also say what its episodes wait for; asked when nothing moves."""

    def stages(self) -> str: ...


class Learner(Protocol):
    async def begin(self, phase: TrainingPhase) -> None:
        """Start SFT or RL on the live model: fresh optimizer and schedule; weights and version stay."""
        ...

    async def step(self, batch: TrainBatch) -> StepResult:
        """Run the batch's optimizer steps on every rank; the version grows by one. A non-finite loss or gradient skips the update."""
        ...

    async def evaluate(self, batch: TrainBatch) -> Mapping[str, float]:
        """Loss and metrics of the batch without an update."""
        ...

    async def save(self, directory: Path, cursor: Mapping[str, Any], *, best: bool = False) -> None:
        """Begin to write model, optimizer, scheduler, random state, version and the run's cursor, as they are now, as one checkpoint.

        Returns once they are copied; `saved` says when they are committed. Waits for the checkpoint before, and raises what kept that
        from being written. Older checkpoints are pruned, the newest of the `best` ones never.
        """
        ...

    async def saved(self) -> None:
        """Wait until the last checkpoint is committed; raises what kept it from being."""
        ...

    async def load(self, directory: Path) -> Mapping[str, Any]:
        """Restore the newest intact checkpoint below the directory and return its cursor; raises errors.CheckpointError if none is."""
        ...

    async def load_best(self, directory: Path) -> None:
        """Restore only the weights of the newest checkpoint saved as the best: they are this version's from now on."""
        ...

    async def export(self, directory: Path) -> None:
        """Write the weights as a plain Hugging Face directory."""
        ...

    @property
    def version(self) -> int: ...


class WeightSync(Protocol):
    async def publish(self, version: int) -> Mapping[str, float]:
        """Load the learner's weights of this version into every engine and compare both on the canary.

        Returns the canary's figures and the time taken.

        Raises errors.CanaryError when no engine agrees with the learner.
        """
        ...


class NotStarted:
    """Stands where a program did not ask for a part of the services; using it is a fault of the program."""

    def __init__(self, part: str) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: the {self._part} was not started for this program")


def _not_started(part: str) -> Any:
    return NotStarted(part)


Spent = Callable[[], Awaitable[Mapping[str, Mapping[str, float]]]]
"""`requests` and `usd` by provider, of those with a quota or a price, over all starts in the run directory."""


async def nothing_spent() -> Mapping[str, Mapping[str, float]]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a program in `runs/` works with: built by `cluster.launch.services`, or in-process by a test."""

    tokenizer: Tokenizer
    toolbox: Toolbox = field(default_factory=partial(_not_started, "toolbox"))
    judge: Judge = field(default_factory=partial(_not_started, "judge"))
    runner: EpisodeRunner = field(default_factory=partial(_not_started, "rollout"))
    learner: Learner = field(default_factory=partial(_not_started, "learner"))
    weights: WeightSync = field(default_factory=partial(_not_started, "weight sync"))
    spent: Spent = nothing_spent
