"""A chat model as the teacher: an interfaces.Policy, so that its episodes run through the same code, tools, limits and recorder as RL's.

It sees token ids, reads the conversation back from them, tells it to the model in ReAct form, and gives the model's reply back as a turn of
the protocol (paper App. E.4, Fig. 6 and 7):

    instruct    the model writes Thought, Action and Action Input, or Thought and Final Answer: short chains of thought
    reasoning   the model sees earlier actions and observations and none of its earlier thoughts; what it reasons now is stored as the
                thought: long chains of thought
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from webdancer.agent.actions import RESPONSE_CLOSE, RESPONSE_OPEN, THINK_CLOSE, outline, parse_action, render_action
from webdancer.agent.prompt import Message, neutral_specials, question_of
from webdancer.agent.transcript import read_messages, written_completion
from webdancer.data.demonstrations import FUNCTIONS
from webdancer.errors import EngineFault
from webdancer.interfaces import Tokenizer
from webdancer.llm.client import ChatModel, ChatRefused
from webdancer.tools.completion import ChatAnswer
from webdancer.types import Completion, FinalAnswer, MalformedAction, Sampling, ToolCall

ASKINGS = 3
"""Times that a turn is asked for until a reply can be read; after that the last one is the turn, as it is."""

_OBSERVATION = "Observation:"
_FIELD = re.compile(r"^[*#\s]*(Thought|Action Input|Action|Observation|Final Answer)\**\s*:\**[ \t]*", re.MULTILINE)
_TAG = re.compile(r"<(?=/?(?:think|tool_call|answer|tool_response)>)")

_SYSTEM = """\
You answer a question by searching the web with tools. These are the tools, as JSON schemas:

{tools}

You work in steps, and each of your replies is one step in one of two forms. To use a tool:

{action_form}
Action: the name of one tool
Action Input: its arguments as one JSON object

Or, once the evidence is complete:

{answer_form}
Final Answer: the answer alone, as short as it can be

What a tool says is given to you as an Observation after your step; you never write one yourself. Rest every claim on what was observed, \
not on memory. Search again with other words where the results do not help, and do not ask for what you have already seen. \
Stop as soon as the evidence is complete.{date}"""
_FORMS = {
    "instruct": (
        "Thought: what the observations establish, what the chain of evidence still lacks, and why this tool with these arguments is next",
        "Thought: how the observations, link by link, lead to the answer, and that nothing is missing",
    ),
    "reasoning": ("", ""),
}
_FORCE = "No more tools can be used. Reply with your Final Answer now, the one that the observations make most likely."


class ChatTeacher:
    """A Policy. `style` is instruct or reasoning; `more_tools` are schemas besides search and visit (prompt.more_tools)."""

    def __init__(self, model: ChatModel, tokenizer: Tokenizer, *, style: str, more_tools: str = "") -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._style = style
        self._tools = _schemas(more_tools)

    async def complete(self, prompt_ids: Sequence[int], *, sampling: Sampling, max_tokens: int, session: str) -> Completion:
        """The next turn. Raises EngineFault where the endpoint refuses this conversation, ServiceError where it is down.

        The attempt's number, the last part of `session`, makes its answers others than those of the attempts before.
        """
        messages = self._conversation(read_messages(self._tokenizer.decode(prompt_ids)))
        first = int(session.rpartition("/")[2]) * ASKINGS
        text = ""
        for asking in range(ASKINGS):
            try:
                answer = await self._model.chat(
                    messages,
                    temperature=sampling.temperature,
                    max_tokens=max_tokens,
                    stop=(f"\n{_OBSERVATION}",) if self._style == "instruct" else (),
                    sample=first + asking,
                )
            except ChatRefused as error:
                raise EngineFault(f"teacher: {error}") from error
            try:
                text = read_step(answer, self._style)
                break
            except Unreadable:
                self._model.usage.malformed += 1
                text = answer.text
        text = neutral_specials(text).encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair, a tokenizer cannot
        return written_completion(text, self._tokenizer, max_tokens=max_tokens)

    def _conversation(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The episode so far, as the model is told it."""
        system, first, *later = messages
        _, found, date = system["content"].rpartition("Current date: ")
        action_form, answer_form = _FORMS[self._style]
        told = _SYSTEM.format(
            tools=self._tools, action_form=action_form, answer_form=answer_form, date=f"\n\nCurrent date: {date}" if found else ""
        )
        said = [{"role": "system", "content": told}, {"role": "user", "content": f"Question: {question_of(first['content'])}"}]
        for message in later:
            content = message["content"]
            if message["role"] == "assistant":
                said.append({"role": "assistant", "content": _as_step(content, with_thought=self._style == "instruct")})
            else:
                said.append({"role": "user", "content": _as_observation(content)})
        return said


class Unreadable(Exception):
    """The reply is no step; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """A reply by its fields, each up to the next one; of a field that comes twice, the first."""

    before: str
    fields: dict[str, str]
    order: tuple[str, ...]


def read_step(answer: ChatAnswer, style: str) -> str:
    """The turn in the protocol. An observation of the model's own making is kept as one, so that the funnel sees it. Raises Unreadable."""
    if answer.finish == "length":
        raise Unreadable("the reply was cut")
    reply = _fields(answer.text)
    thought = answer.reasoning if style == "reasoning" else ""
    thought = (thought or reply.fields.get("Thought", "") or reply.before).strip()
    if not thought:
        raise Unreadable("there is no thought")
    thought = thought.replace(THINK_CLOSE, "< /think>")
    actions = [name for name in reply.order if name in ("Action", "Final Answer")]
    is_simulated = _OBSERVATION[:-1] in reply.order
    if not actions or (len(actions) > 1 and not is_simulated):
        raise Unreadable("there must be one action, or one final answer")
    if actions[0] == "Final Answer":
        text = _TAG.sub("< ", reply.fields["Final Answer"].strip())
        if not text:
            raise Unreadable("the final answer is empty")
        return render_action(FinalAnswer(text=text), thought=thought)
    call = ToolCall(name=reply.fields["Action"].strip().strip("`\"'*"), arguments=_arguments(reply.fields.get("Action Input", "")))
    turn = render_action(call, thought=thought)
    if isinstance(parse_action(turn), MalformedAction):
        raise Unreadable("the action cannot be a call")
    return f"{turn}\n{RESPONSE_OPEN}\n{reply.fields['Observation']}\n{RESPONSE_CLOSE}" if is_simulated else turn


def _fields(text: str) -> _Reply:
    found = list(_FIELD.finditer(text))
    ends = [match.start() for match in found] + [len(text)]
    fields: dict[str, str] = {}
    for match, end in zip(found, ends[1:], strict=True):
        fields.setdefault(match[1], text[match.end() : end].strip())
    before = text[: ends[0]] if found else ""
    return _Reply(before=before, fields=fields, order=tuple(match[1] for match in found))


def _arguments(text: str) -> dict[str, Any]:
    start = text.find("{")
    try:
        value, end = json.JSONDecoder().raw_decode(text, start) if start >= 0 else (None, 0)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the Action Input is not JSON: {error}") from error
    if not isinstance(value, dict) or text[end:].strip().strip("`"):
        raise Unreadable("the Action Input is not one JSON object")
    return value


def _as_step(turn: str, *, with_thought: bool) -> str:
    """An earlier turn as the model would have written it; one that could not be read stands as it was."""
    action = parse_action(turn)
    if isinstance(action, MalformedAction):
        return turn
    thoughts = [block.body.strip() for block in outline(turn).blocks if block.kind == "think"]
    head = f"Thought: {thoughts[0]}\n" if with_thought and thoughts else ""
    if isinstance(action, FinalAnswer):
        return f"{head}Final Answer: {action.text}"
    return f"{head}Action: {action.name}\nAction Input: {json.dumps(dict(action.arguments), ensure_ascii=False)}"


def _as_observation(content: str) -> str:
    body, _, after = content.partition(RESPONSE_OPEN)[2].rpartition(RESPONSE_CLOSE)
    return f"{_OBSERVATION} {body.strip()}" + (f"\n\n{_FORCE}" if after.strip() else "")


def _schemas(more_tools: str) -> str:
    tools: list[Any] = [
        {"name": one["name_for_model"], "description": one["description_for_model"], "parameters": one["parameters"]} for one in FUNCTIONS
    ]
    return "\n".join(json.dumps(tool, ensure_ascii=False) for tool in [*tools, *json.loads(f"[{more_tools}]")])
