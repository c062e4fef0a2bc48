"""What an OpenAI-compatible /chat/completions answers. Whose fault a failure is, and what follows from it, is each client's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """What a chat model said. `reasoning` is what it thought before, empty where it shows none."""

    text: str
    reasoning: str = ""
    finish: str = "stop"
    """As the endpoint names it; `length` is an answer that was cut."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def read_completion(reply: Any) -> ChatAnswer:
    """Of the reply's JSON. Reasoning is a field of its own (vLLM, DeepSeek), or stands before `</think>` in the text.

    Raises ValueError for what is no chat completion.
    """
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice["message"]
        text = str(message.get("content") or "")
        reasoning = str(message.get("reasoning_content") or message.get("reasoning") or "")
        tokens = [max(0, int(usage.get(name) or 0)) for name in ("prompt_tokens", "completion_tokens")]
        finish = str(choice.get("finish_reason") or "stop")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a reply that is no chat completion ({type(error).__name__})") from error
    if not reasoning and "</think>" in text:
        reasoning, _, text = text.rpartition("</think>")
        reasoning = reasoning.strip().removeprefix("<think>")
    return ChatAnswer(text=text.strip(), reasoning=reasoning.strip(), finish=finish, prompt_tokens=tokens[0], completion_tokens=tokens[1])
