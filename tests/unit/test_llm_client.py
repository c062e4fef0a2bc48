"""The chat client: what is tried again, what is not, what is remembered, what it cost."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import httpx
import pytest

from webdancer.config import LlmConfig
from webdancer.errors import DataError, ServiceError
from webdancer.llm.answers import AnswerLog
from webdancer.llm.client import ChatModel, ChatRefused, NoUsableReply, json_object
from webdancer.tools.completion import ChatAnswer
from webdancer.tools.fetch import Fetcher

ASK = [{"role": "user", "content": "2 + 2?"}]
SETTINGS = {"temperature": 0.0, "max_tokens": 10}


def completion(text, **message):
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return httpx.Response(200, json={"choices": [{"message": {"content": text, **message}, "finish_reason": "stop"}], "usage": usage})


class Endpoint:
    """Answers by script: a response, an exception class, or a function of the request's JSON; the last one for good."""

    def __init__(self, *script):
        self.script = list(script)
        self.seen = []

    def __call__(self, request):
        self.seen.append(json.loads(request.content))
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, type):
            raise step("scripted", request=request)
        return step(self.seen[-1]) if callable(step) else step

    def model(self, log=None, **config):
        config = LlmConfig(base_url="http://127.0.0.1:9/v1", model="m", **config)
        return ChatModel(config, log=log, open_fetcher=lambda policy: Fetcher(policy, transport=httpx.MockTransport(self)))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("webdancer.llm.client._BACKOFF_S", 0.0)
    monkeypatch.delenv("WEBDANCER_LLM_API_KEY", raising=False)


def test_what_may_pass_is_asked_again_and_counted():
    broken = httpx.Response(200, text="<html>a proxy's page</html>", headers={"content-type": "text/html"})
    half = httpx.Response(200, json={"choices": []})
    endpoint = Endpoint(httpx.Response(429), httpx.Response(503), httpx.ConnectError, httpx.ReadTimeout, broken, half, completion("4"))
    model = endpoint.model()
    answer = asyncio.run(model.chat(ASK, **SETTINGS))
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("4", 7, 3)
    assert (model.usage.requests, model.usage.repeated, model.usage.answers) == (7, 6, 1)


def test_an_endpoint_that_stays_down_ends_the_job_with_one_line():
    with pytest.raises(
        ServiceError, match=r"base_url: must be an endpoint that answers, got status 503 from http://127.0.0.1:9/v1 \(m\), 3 "
    ):
        asyncio.run(Endpoint(httpx.Response(503)).model(max_attempts=3).chat(ASK, **SETTINGS))


@pytest.mark.parametrize(("status", "error"), [(400, ChatRefused), (413, ChatRefused), (401, ServiceError), (404, ServiceError)])
def test_what_will_not_pass_is_asked_once(status, error):
    endpoint = Endpoint(httpx.Response(status, text="no"))
    with pytest.raises(error):
        asyncio.run(endpoint.model().chat(ASK, **SETTINGS))
    assert len(endpoint.seen) == 1


def test_a_retry_after_holds_everybody_back():
    times = []

    def note(_):
        times.append(asyncio.get_running_loop().time())
        return httpx.Response(429, headers={"retry-after": "1"}) if len(times) == 1 else completion("ok")

    async def two():
        model = Endpoint(note).model(max_concurrent=1)
        await asyncio.gather(*(model.chat(ASK, **SETTINGS, sample=sample) for sample in range(2)))

    asyncio.run(two())
    assert len(times) == 3
    assert times[1] - times[0] >= 0.95


def test_an_answer_is_asked_for_once_and_paid_once_over_all_starts(tmp_path):
    price = {"usd_per_million_prompt": 1e6, "usd_per_million_completion": 2e6}
    endpoint = Endpoint(completion("one"), completion("two"), completion("three"))

    async def ask_all(model, samples):
        answers = await asyncio.gather(*(model.chat(ASK, **SETTINGS, sample=sample) for sample in samples))
        await model.aclose()
        return [answer.text for answer in answers]

    path = tmp_path / "answers.jsonl"
    first = asyncio.run(ask_all(endpoint.model(AnswerLog(path), **price), [0, 0, 1]))
    assert sorted(first) == ["one", "one", "two"]
    path.write_bytes(path.read_bytes() + b'{"request": "torn')
    model = endpoint.model(AnswerLog(path), **price)
    assert asyncio.run(ask_all(model, [0, 0, 1, 2])) == [*first, "three"]
    assert (model.usage.requests, model.usage.answers, model.usage.usd) == (1, 3, 3 * (7 + 6))


def test_of_many_answers_the_log_holds_in_memory_where_they_are(tmp_path):
    path, count = tmp_path / "answers.jsonl", 1_000
    tracemalloc.start()
    log = AnswerLog(path)
    for number in range(count):
        log.add(f"{number:032x}", ChatAnswer(text=f"{number} " * 5_000))
    log.close()
    again = AnswerLog(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 10_000 * count
    assert held < 1_000 * count
    assert again.get(f"{count - 1:032x}").text == f"{count - 1} " * 5_000
    assert sum(1 for _ in again.answers()) == count


def test_a_file_that_is_no_log_of_answers_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"request": "r", "text": "4"}\n')
    with pytest.raises(DataError, match="must hold answers of a chat model, got a row without 'reasoning'"):
        Endpoint(completion("4")).model(AnswerLog(path))


def test_the_budget_ends_the_job_before_the_next_request():
    endpoint = Endpoint(completion("4"))
    model = endpoint.model(usd_per_million_prompt=1e6, budget_usd=7.0)

    async def twice():
        await model.chat(ASK, **SETTINGS)
        await model.chat(ASK, **SETTINGS, sample=1)

    with pytest.raises(ServiceError, match="budget_usd: must pay for the whole job, got 7"):
        asyncio.run(twice())
    assert len(endpoint.seen) == 1


def test_a_reply_of_another_form_is_counted_and_asked_for_again(tmp_path):
    endpoint = Endpoint(completion("no json"), completion('["a list"]'), completion('Here: {"n": 4}'))
    model = endpoint.model(AnswerLog(tmp_path / "a.jsonl"))
    found = asyncio.run(model.chat_json(ASK, lambda fields: int(fields["n"]), **SETTINGS))
    assert (found, model.usage.malformed, model.usage.answers) == (4, 2, 3)
    assert [request["temperature"] for request in endpoint.seen] == [0.0, 0.7, 0.7]
    with pytest.raises(NoUsableReply, match="no reply of 2"):
        asyncio.run(Endpoint(completion('{"m": 4}')).model().chat_json(ASK, lambda fields: fields["n"], attempts=2, **SETTINGS))


def test_an_object_in_a_reply_that_was_cut_may_be_a_draft():
    cut = httpx.Response(200, json={"choices": [{"message": {"content": 'First {"n": 3}, no'}, "finish_reason": "length"}]})
    endpoint = Endpoint(cut, completion('{"n": 4}'))
    assert asyncio.run(endpoint.model().chat_json(ASK, lambda fields: int(fields["n"]), **SETTINGS)) == 4


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"text": "4", "reasoning_content": " sums "}, ("sums", "4")),
        ({"text": "4", "reasoning": "sums"}, ("sums", "4")),
        ({"text": "<think>\nsums\n</think>\n\n4"}, ("sums", "4")),
        ({"text": "sums</think>4"}, ("sums", "4")),
        ({"text": None}, ("", "")),
    ],
)
def test_reasoning_is_told_from_the_answer(message, expected):
    answer = asyncio.run(Endpoint(completion(**message)).model().chat(ASK, **SETTINGS))
    assert (answer.reasoning, answer.text) == expected


def test_the_key_goes_into_the_header_and_into_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setenv("WEBDANCER_LLM_API_KEY", "sk-very-secret")
    headers = []

    def echo(request):
        headers.append(request.headers["authorization"])
        return completion(f"you said {request.headers['authorization']}")

    config = LlmConfig(base_url="http://127.0.0.1:9/v1", model="m")
    path = tmp_path / "a.jsonl"
    model = ChatModel(config, log=AnswerLog(path), open_fetcher=lambda policy: Fetcher(policy, transport=httpx.MockTransport(echo)))
    answer = asyncio.run(model.chat(ASK, **SETTINGS))
    assert headers == ["Bearer sk-very-secret"]
    assert "secret" not in answer.text + path.read_text()


def test_json_objects_are_found_in_a_reply():
    assert json_object('```json\n{"a": {"b": 1}}\n```') == {"a": {"b": 1}}
    for reply in ("", "}{", "[1]", "{'a': 1}"):
        with pytest.raises(ValueError, match="no JSON object"):
            json_object(reply)
