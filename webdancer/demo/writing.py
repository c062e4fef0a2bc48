"""A turn that is still being written, as a person reads it: its thought, the call that takes shape, its answer.

Only for looking at: what a finished turn is, `agent.actions` says. Text grows at its end and nowhere else: what may turn out to be a part
of a tag, of an escape in JSON or of a character is held back until it is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from webdancer.agent.actions import CALL_CLOSE, END_OF_TURN
from webdancer.types import ToolCall, TurnText

MAX_CALL_CHARS = 20_000
"""A longer call is shown when it is whole."""

_OPEN = re.compile(r"<(think|tool_call|answer|tool_response)>")
_STRING_OR_CLOSE = re.compile(rf'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|{CALL_CLOSE}', re.DOTALL)
_TAGS = (*(f"<{close}{kind}>" for kind in ("think", "tool_call", "answer", "tool_response") for close in ("", "/")), END_OF_TURN)
# C0 and C1 but newline and tab, the marks that turn text around, and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What a turn has more of: `thought` and `answer` go on where they were, `call` is the whole line as far as it is written.

    `anew`: a turn begins, and what was shown of one that did not end is void.
    """

    thought: str = ""
    call: str = ""
    answer: str = ""
    anew: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a text says so far; `call` is what stands between the tags."""

    thought: str
    call: str | None
    answer: str


class LiveTurn:
    """The turns of an episode one after another, as their text comes."""

    def __init__(self) -> None:
        self._index = -1
        self._text = ""
        self._shown = Parts(thought="", call=None, answer="")
        self._line = ""

    def add(self, told: TurnText) -> Writing | None:
        """None where nothing new can be shown. Text that begins at 0 is a turn that begins, again where an engine was lost under it."""
        anew = told.start == 0 or told.index != self._index
        if anew:
            self._index, self._text, self._line = told.index, "", ""
            self._shown = Parts(thought="", call=None, answer="")
        self._text = self._text[: told.start] + told.text
        now, before = parts(self._text), self._shown
        self._shown = now
        line = call_so_far(now.call) if now.call is not None else None
        changed, self._line = line is not None and line != self._line, line or self._line
        thought, answer = now.thought[len(before.thought) :], now.answer[len(before.answer) :]
        if not (thought or answer or changed or anew):
            return None
        return Writing(thought=thought, call=self._line if changed else "", answer=answer, anew=anew)


def parts(text: str) -> Parts:
    """Of a turn's text, finished or not. Text before the first tag counts as thought; what follows a self-written response is not read."""
    text = _settled(text)
    thoughts, call, answer = [], None, ""
    match = _OPEN.search(text)
    thoughts.append(text[: match.start()] if match else text)
    while match is not None and match[1] != "tool_response":
        close = _call_end(text, match.end()) if match[1] == "tool_call" else text.find(f"</{match[1]}>", match.end())
        body = text[match.end() :] if close < 0 else text[match.end() : close]
        if match[1] == "think":
            thoughts.append(body)
        elif match[1] == "tool_call" and call is None:
            call = body
        elif match[1] == "answer" and not answer:
            answer = body
        match = _OPEN.search(text, close) if close >= 0 else None
    return Parts(thought=plain("\n".join(filter(None, map(str.strip, thoughts)))), call=call, answer=plain(answer.strip()))


def call_so_far(body: str) -> str | None:
    """The line of a call whose JSON is not whole yet; None while it says nothing."""
    if len(body) > MAX_CALL_CHARS:
        return None
    closed, is_whole = _closed(body.strip())
    try:
        value: Any = json.loads(closed)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        return None
    name = value.get("name")
    if not isinstance(name, str) or not (is_whole or list(value)[-1] != "name"):
        return None
    return call_line(ToolCall(name=name, arguments=value["arguments"]), is_whole=is_whole)


def call_line(call: ToolCall, *, is_whole: bool = True) -> str:
    """`search: a | b`, `visit: url (goal)`, any other tool with its arguments as JSON."""
    arguments: Mapping[str, Any] = call.arguments
    if call.name == "search":
        return plain(f"search: {' | '.join(strings(arguments.get('query')))}")
    if call.name == "visit":
        goal = arguments.get("goal")
        return plain(f"visit: {' | '.join(strings(arguments.get('url')))}" + (f" ({goal}{')' * is_whole}" if goal else ""))
    return plain(f"{call.name}: {json.dumps(dict(arguments), ensure_ascii=False)}")


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []


def plain(text: str) -> str:
    """Text that writes nothing but itself: control characters and marks that reorder text are replaced."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def _call_end(text: str, start: int) -> int:
    """Where the call is closed, -1 where it is not yet: a tag inside of a JSON string is data."""
    return next((found.start() for found in _STRING_OR_CLOSE.finditer(text, start) if found[0] == CALL_CLOSE), -1)


def _settled(text: str) -> str:
    """Up to the end of the turn, without a tail that may be the beginning of a tag."""
    text = text.partition(END_OF_TURN)[0]
    tail = text.rfind("<")
    return text[:tail] if tail >= 0 and any(tag.startswith(text[tail:]) for tag in _TAGS) else text


def _closed(text: str) -> tuple[str, bool]:
    """The beginning of a JSON text with its open strings and brackets closed, and whether it had none. A half escape is left out."""
    stack: list[str] = []
    in_string, index = False, 0
    while index < len(text):
        character = text[index]
        if in_string and character == "\\":
            width = _escape_width(text, index)
            if index + width > len(text):
                text = text[:index]
            index += width
            continue
        if character == '"':
            in_string = not in_string
        elif not in_string and character in "[{":
            stack.append("]" if character == "[" else "}")
        elif not in_string and character in "]}" and stack:
            stack.pop()
        index += 1
    return text + '"' * in_string + "".join(reversed(stack)), not (in_string or stack)


def _escape_width(text: str, index: int) -> int:
    """Characters of the escape at `index`; a pair of surrogates is one."""
    if text[index + 1 : index + 2] != "u":
        return 2
    return 12 if re.fullmatch("[dD][89abAB].{0,2}", text[index + 2 : index + 6]) else 6
