"""Demonstrations: JSONL in the layout of the released WebDancer trajectories, read, written, and turned into training samples.

{"type": "chatml", "task": "agent/multiturn_search", "messages": [{"role", "content"}, ...], "functions": [...], "tool_calls": [],
 "answer": [["..."]], "tag": "e2hqa"}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from webdancer.agent.actions import END_OF_TURN, RESPONSE_CLOSE, RESPONSE_OPEN, conforms, outline, parse_action, strip_end_of_turn
from webdancer.agent.episode import FORCED_STOPS
from webdancer.agent.prompt import Message, neutral_specials, prompt_messages, question_of, response_message
from webdancer.agent.transcript import encode_demonstration
from webdancer.config import PromptConfig
from webdancer.data.jsonl import aliases_field, read_rows, write_rows
from webdancer.data.tasks import content_id
from webdancer.errors import DataError
from webdancer.interfaces import Tokenizer
from webdancer.types import FinalAnswer, MalformedAction, ToolCall, TrainSample, Trajectory, Turn

FUNCTIONS: tuple[Mapping[str, Any], ...] = (
    {
        "name_for_human": "search",
        "name_for_model": "search",
        "description_for_model": "Performs batched web searches: supply an array 'query'; the tool retrieves the top 10 results for each "
        "query in one call.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "Array of query strings. Include multiple complementary search queries in a single call.",
                }
            },
            "required": ["query"],
        },
    },
    {
        "name_for_human": "visit",
        "name_for_model": "visit",
        "description_for_model": "Visit webpage(s) and return the summary of the content.",
        "parameters": {
            "type": "object",
            "properties": {
                "url": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "The URL(s) of the webpage(s) to visit. Can be a single URL or an array of URLs.",
                },
                "goal": {"type": "string", "description": "The specific information goal for visiting webpage(s)."},
            },
            "required": ["url", "goal"],
        },
    },
)
"""As released, but for one thing: there the first function calls `queries` what it requires, and the prompt names, as `query`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One conversation, checked: system, user, then assistant and user in turn; calls, and one answer at the end."""

    id: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    source: str

    @property
    def question(self) -> str:
        return question_of(next(message["content"] for message in self.messages if message["role"] == "user"))


def read_demonstrations(path: str | Path, *, strict: bool = True) -> tuple[Demonstration, ...]:
    """All demonstrations of a file, in its order. Raises DataError with file and line for the first thing wrong.

    strict: every turn must be in the protocol, and the last an answer; else roles and texts are enough.
    """
    return _numbered([demonstration_from_row(row, place, strict=strict) for place, row in read_rows(Path(path))])


def write_demonstrations(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows (see `demonstration_row`, `trajectory_to_row`) all at once or not at all; returns their number."""
    return write_rows(Path(path), rows)


def demonstration_from_row(row: Mapping[str, Any], place: str, *, strict: bool = True) -> Demonstration:
    """Raises DataError, beginning with `place`."""
    messages = _messages(row.get("messages"), place, strict=strict)
    answers = aliases_field(row, place)
    source = row.get("tag", "")
    if not isinstance(source, str):
        raise DataError(f"{place}: tag: must be a string, got {type(source).__name__}")
    id = row.get("id", content_id(messages[-1]["content"], [message["content"] for message in messages[:-1]]))
    if not isinstance(id, str):
        raise DataError(f"{place}: id: must be a string, got {type(id).__name__}")
    return Demonstration(id=id, messages=messages, answers=answers, source=source)


def demonstration_row(demonstration: Demonstration) -> dict[str, Any]:
    """The released keys in their order, then our id."""
    return {
        "type": "chatml",
        "task": "agent/multiturn_search",
        "messages": [dict(message) for message in demonstration.messages],
        "functions": [dict(function) for function in FUNCTIONS],
        "tool_calls": [],
        "answer": [list(demonstration.answers)],
        "tag": demonstration.source,
        "id": demonstration.id,
    }


def trajectory_to_row(trajectory: Trajectory, *, prompt: PromptConfig) -> dict[str, Any]:
    """A trajectory as a demonstration; `prompt` is what its episode ran with. Its encoding is the trajectory's own ids again."""
    last = trajectory.turns[-1] if trajectory.turns else None
    # A call that was run is no turn that was asked to answer: there was no room for one.
    forced = trajectory.stop in FORCED_STOPS and not (last and isinstance(last.action, ToolCall) and last.result is not None)
    messages = list(prompt_messages(trajectory.task, prompt))
    for index, turn in enumerate(trajectory.turns):
        messages.append(Message(role="assistant", content=_written(turn)))
        if turn.result is not None and index + 1 < len(trajectory.turns):
            is_forced = forced and index + 2 == len(trajectory.turns)
            messages.append(response_message(turn.result.text, forced=is_forced, prompt=prompt))
    return demonstration_row(
        Demonstration(id=trajectory.id, messages=tuple(messages), answers=trajectory.task.answers, source=trajectory.task.source)
    )


def demonstration_sample(demonstration: Demonstration, tokenizer: Tokenizer) -> TrainSample:
    """For the SFT loss (paper Eq. 2): thoughts, actions and their <|im_end|> are targets, prompt and observations never."""
    token_ids, loss_mask = encode_demonstration(demonstration.messages, tokenizer)
    zeros = np.zeros(len(token_ids), dtype=np.float32)
    return TrainSample(id=demonstration.id, token_ids=token_ids, loss_mask=loss_mask, logprobs=zeros, advantages=zeros)


def _written(turn: Turn) -> str:
    """What stayed of a turn in the ledger, without its end token."""
    text = turn.completion.text
    cut = outline(text).response_at
    return strip_end_of_turn(text) if cut is None else text[:cut]


def _messages(value: Any, place: str, *, strict: bool) -> tuple[Message, ...]:
    if not isinstance(value, list) or len(value) < 3:
        raise DataError(f"{place}: messages: must be a list of at least three (system, user, assistant), got {_kind(value)}")
    messages = tuple(_message(item, f"{place}: messages[{index}]") for index, item in enumerate(value))
    roles = [message["role"] for message in messages]
    expected = ["system"] + ["user" if index % 2 == 0 else "assistant" for index in range(len(roles) - 1)]
    if roles != expected or roles[-1] != "assistant":
        raise DataError(f"{place}: messages: roles must be system, then user and assistant in turn, assistant last; got {' '.join(roles)}")
    for index, message in enumerate(messages):
        if index >= 2 and strict:
            _check_turn(message, f"{place}: messages[{index}]", is_last=index == len(messages) - 1)
    return messages


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str) or not isinstance(value.get("content"), str):
        raise DataError(f"{place}: must be an object with the strings role and content, got {_kind(value)}")
    return Message(role=value["role"], content=value["content"])


def _check_turn(message: Message, place: str, *, is_last: bool) -> None:
    content = message["content"]
    if message["role"] == "user":
        if not content.startswith(RESPONSE_OPEN) or RESPONSE_CLOSE not in content:
            raise DataError(f"{place}: must be in {RESPONSE_OPEN} tags, got {content[:40]!r}")
        return
    action = parse_action(content)
    if isinstance(action, MalformedAction):
        raise DataError(f"{place}: must be one action, got: {action.reason}")
    if not conforms(content):
        raise DataError(f"{place}: must be one <think> and one action and nothing else, got {content[:40]!r}")
    if not isinstance(action, FinalAnswer if is_last else ToolCall):
        raise DataError(f"{place}: must be {'an answer, as the last turn' if is_last else 'a tool call, as it is not the last turn'}")
    if neutral_specials(content) != content:
        raise DataError(f"{place}: must not hold special tokens such as {END_OF_TURN}, which end every message by themselves")


def _numbered(demonstrations: list[Demonstration]) -> tuple[Demonstration, ...]:
    """Several trajectories of one question are kept, and may even be the same: their ids get a number."""
    seen: dict[str, int] = {}
    result = []
    for item in demonstrations:
        seen[item.id] = seen.get(item.id, 0) + 1
        id = item.id if seen[item.id] == 1 else f"{item.id}-{seen[item.id]}"
        result.append(Demonstration(id=id, messages=item.messages, answers=item.answers, source=item.source))
    return tuple(result)


def _kind(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
