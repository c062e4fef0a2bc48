"""One recorded trajectory as HTML: thought, tool call, observation and answer each in a colour of its own, every text escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any

MAX_OBSERVATION_CHARS = 6_000

_BLOCK = re.compile(r"<(think|tool_call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_CLASSES = {"think": "think", "tool_call": "call", "answer": "answer"}
_END_OF_TURN = "<|im_end|>"


def trajectory_article(row: dict[str, Any], title: str) -> str:
    task, reward = row["task"], row["reward"]
    facts = [
        f"expected: {' / '.join(task['answers'])}",
        f"answered: {row['answer'] if row['answer'] is not None else 'nothing'}",
        f"reward {reward['total']:.2f} (format {reward['format']:.0f}, answer {reward['answer']:.0f})",
        f"{row['num_tool_calls']} tool calls",
        f"stop: {row['stop']}",
    ]
    if row["versions"]:
        facts.append(f"weights: version {_versions(*row['versions'])}")
    turns = "".join(f'<div class="turn">{"".join(_turn(turn))}</div>' for turn in row["turns"])
    return (
        f'<article class="{"solved" if reward["answer"] > 0 else "failed"}"><h3>{escape(title)}: {escape(task["question"])}</h3>'
        f'<p class="facts">{escape(" · ".join(facts))}</p>{turns}</article>'
    )


def _versions(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _turn(turn: dict[str, Any]) -> Iterator[str]:
    yield from _policy_blocks(turn["text"].removesuffix(_END_OF_TURN))
    if turn.get("malformed"):
        yield _block("malformed", f"malformed: {turn['malformed']}")
    if "observation" in turn:
        yield _block("observation", _shortened(turn["observation"]))


def _shortened(text: str) -> str:
    hidden = len(text) - MAX_OBSERVATION_CHARS
    return text if hidden <= 0 else f"{text[:MAX_OBSERVATION_CHARS]}\n... {hidden:,} more characters"


def _policy_blocks(text: str) -> Iterator[str]:
    """The blocks of the protocol, and whatever else the policy wrote between them."""
    end = 0
    for match in _BLOCK.finditer(text):
        if stray := text[end : match.start()].strip():
            yield _block("stray", stray)
        yield _block(_CLASSES[match[1]], match[2].strip())
        end = match.end()
    if stray := text[end:].strip():
        yield _block("stray", stray)


def _block(kind: str, text: str) -> str:
    return f'<pre class="{kind}">{escape(text)}</pre>'
