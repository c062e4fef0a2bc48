"""Every text that the environment says to the policy: prompts, tool responses, corrections, the call for a final answer.

`released` is the prompt of the released WebDancer samples (MIT); `brief` is one line, for models too small to read schemas. Both go
through the same code.
"""

from __future__ import annotations

import datetime
import re
from typing import TypedDict

from webdancer.agent.actions import RESPONSE_CLOSE, RESPONSE_OPEN
from webdancer.config import PromptConfig
from webdancer.errors import ConfigError
from webdancer.types import MalformedAction, Task


class Message(TypedDict):
    role: str
    content: str


RELEASED_SYSTEM = """\
You are a Web Information Seeking Master. Your task is to thoroughly seek the internet for information and provide accurate answers to \
questions. No matter how complex the query, you will not give up until you find the corresponding information.

As you proceed, adhere to the following principles:

1. **Persistent Actions for Answers**: You will engage in many interactions, delving deeply into the topic to explore all possible aspects \
until a satisfactory answer is found.

2. **Repeated Verification**: Before presenting a Final Answer, you will **cross-check** and **validate the information** you've gathered \
to confirm its accuracy and reliability.

3. **Attention to Detail**: You will carefully analyze each information source to ensure that all data is current, relevant, and from \
credible origins.
Current date: """

RELEASED_USER = """\
A conversation between User and Assistant. The user asks a question, and the assistant solves it by calling one or more of the following \
tools.
<tools>
{
  "name": "search",
  "description": "Performs batched web searches: supply an array 'query'; the tool retrieves the top 10 results for each \
query in one call.",
  "parameters": {
    "type": "object",
    "properties": {
      "query": {
        "type": "array",
        "items": {
          "type": "string"
        },
        "description": "Array of query strings. Include multiple complementary search queries in a single call."
      }
    },
    "required": [
      "query"
    ]
    }
},
{
  "name": "visit",
    "description": "Visit webpage(s) and return the summary of the content.",
    "parameters": {
        "type": "object",
        "properties": {
            "url": {
                "type": "array",
                "items": {"type": "string"},
                "description": "The URL(s) of the webpage(s) to visit. Can be a single URL or an array of URLs."
            },
            "goal": {
                "type": "string",
                "description": "The specific information goal for visiting webpage(s)."
            }
        },
        "required": [
            "url",
            "goal"
        ]
    }
}
</tools>

The assistant starts with one or more cycles of (thinking about which tool to use -> performing tool call -> waiting for tool response), \
and ends with (thinking about the answer -> answer of the question). The thinking processes, tool calls, tool responses, and answer are \
enclosed within their tags. There could be multiple thinking processes, tool calls, tool call parameters and tool response parameters.

Example response:
<think> thinking process here </think>
<tool_call>
{"name": "tool name here", "arguments": {"parameter name here": parameter value here, "another parameter name here": another parameter \
value here, ...}}
</tool_call>
<tool_response>
tool_response here
</tool_response>
<think> thinking process here </think>
<tool_call>
{"name": "another tool name here", "arguments": {...}}
</tool_call>
<tool_response>
tool_response here
</tool_response>
(more thinking processes, tool calls and tool responses here)
<think> thinking process here </think>
<answer> answer here </answer>

User: """

RELEASED_USER_WITHOUT_TOOLS = """\
Answer the question. Think first, then give the answer alone, in this format:
<think> thinking process here </think>
<answer> answer here </answer>"""

BRIEF_SYSTEM = "You are a web agent."

RETRIEVED = "retrieved"
"""In a task's metadata: what a search found for its question, for a prompt without tools."""

TRUNCATED = "\n[truncated]"

_USER = "\n\nUser: "
_TOLD_APART_BY = 60
"""Characters at which the released message begins, in whatever version of it."""

_FORCE = {
    "released": (
        "No more tool calls are possible. Think once more about all the information above and give the answer that you consider most "
        "likely, in this format:\n<think> thinking process here </think>\n<answer> answer here </answer>"
    ),
    "brief": "No more calls. Answer now.",
}
_CORRECTION = {
    "released": (
        "[invalid action] {reason}. Each turn is one <think> block and then either one <tool_call> block, whose body is a JSON object "
        "with name and arguments, or one <answer> block."
    ),
    "brief": "[invalid action] {reason}.",
}

# Tokens of chat formats look like <|name|>; a space after the bracket makes them plain text, which reads the same.
_SPECIAL = re.compile(r"<(?=[|｜][^<>|｜\s]{1,64}[|｜]>)")
_RESPONSE_TAG = re.compile(r"<(?=(?:/\s*)?tool_response\s*>)", re.IGNORECASE)


def prompt_messages(task: Task, prompt: PromptConfig, *, today: datetime.date | None = None) -> tuple[Message, Message]:
    """The system and user message of an episode. Raises ConfigError for an unknown style."""
    if not prompt.tools:
        return _prompt_without_tools(task, prompt)
    if prompt.style == "brief":
        return Message(role="system", content=BRIEF_SYSTEM), Message(role="user", content=task.question)
    if prompt.style != "released":
        raise ConfigError(f"prompt.style: must be one of {', '.join(_FORCE)}, got {prompt.style!r}")
    date = prompt.current_date or (today or datetime.date.today()).isoformat()
    more = prompt.more_tools.strip()
    user = RELEASED_USER.replace("\n</tools>", f",\n{more}\n</tools>", 1) if more else RELEASED_USER
    return Message(role="system", content=RELEASED_SYSTEM + date), Message(role="user", content=user + task.question)


def _prompt_without_tools(task: Task, prompt: PromptConfig) -> tuple[Message, Message]:
    """Instead of tools, what was retrieved, if anything was."""
    found = str(task.metadata.get(RETRIEVED, ""))
    if prompt.style == "brief":
        system, parts = BRIEF_SYSTEM, [found, task.question]
    else:
        system, parts = "You are a helpful assistant.", [RELEASED_USER_WITHOUT_TOOLS, found, f"User: {task.question}"]
    return Message(role="system", content=system), Message(role="user", content="\n\n".join(filter(None, parts)))


def question_of(user_content: str) -> str:
    """The question in a first user message, of either style; a question may hold `User:` itself."""
    if not user_content.startswith((RELEASED_USER[:_TOLD_APART_BY], RELEASED_USER_WITHOUT_TOOLS)):
        return user_content
    at = user_content.rfind if user_content.startswith(RELEASED_USER_WITHOUT_TOOLS) else user_content.find
    found = at(_USER)
    return user_content[found + len(_USER) :] if found >= 0 else user_content


def response_message(text: str, *, forced: bool, prompt: PromptConfig) -> Message:
    """An observation as the user's message; `forced` adds the call for a final answer."""
    content = f"{RESPONSE_OPEN}\n{neutral_response(text)}\n{RESPONSE_CLOSE}"
    return Message(role="user", content=f"{content}\n{force_text(prompt)}" if forced else content)


def observation_of(user_content: str) -> str:
    """The tool's text in a response message."""
    return user_content.partition(RESPONSE_OPEN)[2].rpartition(RESPONSE_CLOSE)[0].strip()


def force_text(prompt: PromptConfig) -> str:
    """The call for a final answer at the call or token limit."""
    return _FORCE[prompt.style]


def correction_text(action: MalformedAction, prompt: PromptConfig) -> str:
    """What the agent reads after a malformed action."""
    return _CORRECTION[prompt.style].format(reason=action.reason)


def neutral_response(text: str) -> str:
    """A tool's text that can neither end its own response nor open a new turn; idempotent, all other text unchanged."""
    return neutral_specials(_RESPONSE_TAG.sub("< ", text))


def neutral_specials(text: str) -> str:
    """Text in which no special token of a chat format is left; idempotent."""
    return _SPECIAL.sub("< ", text)
