"""One episode: the policy speaks, the tools answer, until an answer or a limit. Pure asyncio; no retries, no routing.

    limit reached? -> one forced answer turn -> end
    complete -> parse -> answer: end | call: run the tool, observe | malformed: observe the correction

Resuming runs the same loop over turns that are already known: the completions and tool results come from them instead of from the
policy and the toolbox, so the ledger of a resumed episode is, id for id, that of one that was never interrupted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from webdancer.agent.actions import parse_action
from webdancer.agent.prompt import TRUNCATED, correction_text, prompt_messages, response_message
from webdancer.agent.spoken import turn_speaker
from webdancer.agent.transcript import Transcript
from webdancer.config import EpisodeConfig, PromptConfig
from webdancer.interfaces import OnText, OnTurn, Policy, StreamingPolicy, Tokenizer, Toolbox
from webdancer.types import (
    Completion,
    FinalAnswer,
    MalformedAction,
    Sampling,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
    TurnFinished,
)

log = logging.getLogger(__name__)

MALFORMED_ACTION = "malformed_action"
TOOL_TIMEOUT = "tool_timeout"
TOOL_CRASHED = "tool_crashed"
EPISODE_ERRORS = frozenset({TOOL_TIMEOUT, TOOL_CRASHED})
"""Error codes given here, not by a tool, when the tool server hung or died: never the policy's doing."""

FORCED_STOPS = frozenset({StopReason.MAX_TURNS, StopReason.TOOL_BUDGET, StopReason.MAX_TOKENS})
"""Limits at which the last turn is a forced answer (unless not even that found room)."""


async def run_episode(
    task: Task,
    *,
    policy: Policy,
    toolbox: Toolbox,
    tokenizer: Tokenizer,
    limits: EpisodeConfig,
    prompt: PromptConfig,
    sampling: Sampling,
    member: int,
    attempt: int = 0,
    resume_from: Sequence[Turn] = (),
    on_turn: OnTurn | None = None,
    on_text: OnText | None = None,
) -> Trajectory:
    """Run to the end, whatever end. `on_turn` hears of each new turn, not of the resumed ones, and `on_text` of their text as it is
    written, where the policy is a StreamingPolicy.

    The deadline forbids another turn or call and cuts nothing off: what hangs has a deadline of its own, and is not the policy's doing.
    Raises errors.EngineFault from the policy: its worker hands the episode on, with the turns that `on_turn` reported.
    """
    episode = _Episode(
        task=task,
        policy=policy,
        toolbox=toolbox,
        tokenizer=tokenizer,
        limits=limits,
        prompt=prompt,
        sampling=sampling,
        member=member,
        attempt=attempt,
        on_turn=on_turn,
        on_text=on_text,
        transcript=Transcript(tokenizer, prompt_messages(task, prompt)),
        known=deque(resume_from),
        ends_s=asyncio.get_running_loop().time() + limits.timeout_s,
    )
    stop = await episode.run()
    return episode.transcript.trajectory(id=episode.id, task=task, member=member, turns=episode.turns, stop=stop, answer=episode.answer)


@dataclass(slots=True, kw_only=True)
class _Episode:
    """The state of one episode.

    `known`: turns of an earlier run, still to be replayed. `ends_s`: the deadline, on the loop's clock. `pending`: what the environment
    has said since the policy's last turn, not yet in the ledger.
    """

    task: Task
    policy: Policy
    toolbox: Toolbox
    tokenizer: Tokenizer
    limits: EpisodeConfig
    prompt: PromptConfig
    sampling: Sampling
    member: int
    attempt: int
    on_turn: OnTurn | None
    on_text: OnText | None
    transcript: Transcript
    known: deque[Turn]
    ends_s: float
    turns: list[Turn] = field(default_factory=list)
    pending: str | None = None
    answer: str | None = None
    num_calls: int = 0
    num_malformed: int = 0

    @property
    def id(self) -> str:
        return f"{self.task.id}/{self.attempt}/{self.member}"

    @property
    def turn_room(self) -> int:
        """The least room a turn is given; one token of it is for an <|im_end|> that is not sampled."""
        return min(self.limits.max_turn_tokens, max(32, self.limits.max_tokens // 16)) + 1

    @property
    def reserve(self) -> int:
        """What stays free for a forced answer and the message that asks for it."""
        return self.turn_room + self._cost("", forced=True)

    async def run(self) -> StopReason:
        while True:
            if self._is_late():
                return StopReason.TIMEOUT
            if (limit := self._limit()) is not None:
                await self._force_answer()
                return limit
            self._observe(forced=False)
            turn = await self._turn(self._room() - self.reserve, run_tool=True)
            if isinstance(turn.action, FinalAnswer):
                self.answer = turn.action.text
                return StopReason.ANSWERED
            if turn.result is not None and turn.result.error == TOOL_CRASHED:
                return StopReason.FAILED
            if self.num_malformed >= self.limits.max_malformed:
                return StopReason.MALFORMED

    def _limit(self) -> StopReason | None:
        """The limit that forbids another ordinary turn."""
        if len(self.turns) >= self.limits.max_turns:
            return StopReason.MAX_TURNS
        if self.num_calls >= self.limits.max_tool_calls:
            return StopReason.TOOL_BUDGET
        pending = 0 if self.pending is None else self._cost(self.pending, forced=False)
        if self._room() - pending < self.turn_room + self.reserve:
            return StopReason.MAX_TOKENS
        return None

    async def _force_answer(self) -> None:
        """One turn more, asked to answer; a call in it is not run. Without room for it the episode just ends."""
        self._observe(forced=True)
        if self._room() < 2:
            return
        turn = await self._turn(self._room(), run_tool=False)
        if isinstance(turn.action, FinalAnswer):
            self.answer = turn.action.text

    async def _turn(self, room: int, *, run_tool: bool) -> Turn:
        known = self.known.popleft() if self.known else None
        completion = known.completion if known is not None else await self._complete(room)
        self.transcript.append_completion(completion)
        action = parse_action(completion.text)
        result: ToolResult | None = None
        if isinstance(action, MalformedAction):
            result = self._fitted(ToolResult(text=correction_text(action, self.prompt), error=MALFORMED_ACTION))
            self.num_malformed += 1
        elif isinstance(action, ToolCall) and run_tool and not self._is_late():
            result = known.result if known is not None and known.result is not None else self._fitted(await self._call(action))
            self.num_calls += 1
            self.num_malformed = 0
        turn = Turn(completion=completion, action=action, result=result)
        self.pending = None if result is None else result.text
        self._finish(turn, is_new=known is None)
        return turn

    def _is_late(self) -> bool:
        return asyncio.get_running_loop().time() >= self.ends_s

    async def _complete(self, room: int) -> Completion:
        prompt_ids, max_tokens = self.transcript.token_ids, min(self.limits.max_turn_tokens, room - 1)  # one for an unsampled <|im_end|>
        if self.on_text is not None and isinstance(self.policy, StreamingPolicy):
            on_tokens = turn_speaker(self.tokenizer, self.on_text, index=len(self.turns))
            return await self.policy.stream(prompt_ids, sampling=self.sampling, max_tokens=max_tokens, session=self.id, on_tokens=on_tokens)
        return await self.policy.complete(prompt_ids, sampling=self.sampling, max_tokens=max_tokens, session=self.id)

    async def _call(self, call: ToolCall) -> ToolResult:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.limits.tool_timeout_s):
                return await self.toolbox.call(call)
        except TimeoutError:
            text, error = "The tool did not answer in time. Try again later.", TOOL_TIMEOUT
        except Exception:
            # A Toolbox never raises for what a call or a page does, so its server is gone: this episode is lost, the program is not.
            log.exception("episode %s: the toolbox failed on %s", self.id, call.name)
            text, error = "The tool is not available.", TOOL_CRASHED
        return ToolResult(text=text, error=error, latency_s=time.perf_counter() - started)

    def _fitted(self, result: ToolResult) -> ToolResult:
        """The result with its text cut to what the context can hold beside a forced answer."""
        room = self._room() - self.turn_room
        text = truncate(result.text, room, self.tokenizer, cost=lambda text: self._cost(text, forced=True))
        return result if text == result.text else replace(result, text=text)

    def _finish(self, turn: Turn, *, is_new: bool) -> None:
        self.turns.append(turn)
        if is_new and self.on_turn is not None:
            index = len(self.turns) - 1
            self.on_turn(TurnFinished(task_id=self.task.id, member=self.member, attempt=self.attempt, index=index, turn=turn))

    def _observe(self, *, forced: bool) -> None:
        """Before the first turn there is nothing to observe; a prompt that leaves no room for turns is not asked again."""
        if self.pending is not None:
            self.transcript.append_user(self._content(self.pending, forced=forced))
            self.pending = None

    def _room(self) -> int:
        return self.limits.max_tokens - len(self.transcript)

    def _content(self, text: str, *, forced: bool) -> str:
        return response_message(text, forced=forced, prompt=self.prompt)["content"]

    def _cost(self, text: str, *, forced: bool) -> int:
        return self.transcript.cost_of_user(self._content(text, forced=forced))


def truncate(text: str, max_tokens: int, tokenizer: Tokenizer, *, cost: Callable[[str], int] | None = None) -> str:
    """The text, or as much of its beginning (whole tokens) as costs at most `max_tokens` together with a note that it was cut.

    cost: what a text takes, its own tokens by default. Empty where not even the note fits.
    """
    cost = cost or (lambda text: len(tokenizer.encode(text)))
    excess = cost(text) - max_tokens
    if excess <= 0:
        return text
    token_ids = tokenizer.encode(text)
    keep = len(token_ids)
    while (keep := keep - max(excess, 1)) > 0:
        shortened = tokenizer.decode(token_ids[:keep]).rstrip("\ufffd") + TRUNCATED  # a character may have been cut in two
        if (excess := cost(shortened) - max_tokens) <= 0:
            return shortened
    return ""
