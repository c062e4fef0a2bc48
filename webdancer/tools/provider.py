"""Asking a provider of JSON. Further attempts are the fetcher's (tools.polite); what is not the provider's format is an outage with a code.

What a provider says in an error is never repeated: it may hold the key that it was asked with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from webdancer.tools.fetch import BlockedUrl, Fetcher, FetchFailed, Page
from webdancer.tools.keys import redacted
from webdancer.tools.limits import NotAsked
from webdancer.tools.polite import PASSING
from webdancer.tools.result import BAD_RESPONSE, BUDGET_SPENT, REFUSED, UNAVAILABLE

_ILL_FORMED = ("content_type", "body_too_large")  # of an answer that did come


class ProviderFailed(Exception):
    """Never the policy's fault. `code` is one of INFRASTRUCTURE_ERRORS, `status` the HTTP status that said so, 0 if none did."""

    def __init__(self, code: str, reason: str, *, status: int = 0) -> None:
        super().__init__(reason)
        self.code = code
        self.status = status


class WrongShape(ProviderFailed):
    """An answer lacks what its format promises."""

    def __init__(self, reason: str) -> None:
        super().__init__(BAD_RESPONSE, f"the answer is not in the provider's format: {reason}")


async def ask(fetcher: Fetcher, url: str, *, payload: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> Any:
    """The JSON object of the answer to a POST of `payload`, or to a GET without one. Raises ProviderFailed."""
    try:
        page = await (fetcher.get_json(url, headers=headers) if payload is None else fetcher.post_json(url, payload, headers=headers))
    except BlockedUrl as error:
        raise ProviderFailed(BAD_RESPONSE if error.code in _ILL_FORMED else UNAVAILABLE, str(error)) from error
    except NotAsked as error:
        raise ProviderFailed(BUDGET_SPENT if error.reason == "budget" else UNAVAILABLE, str(error)) from error
    except FetchFailed as error:
        raise ProviderFailed(UNAVAILABLE, str(error)) from error
    if page.ok:
        return _object(page)
    raise ProviderFailed(UNAVAILABLE if page.status in PASSING else REFUSED, f"status {page.status}", status=page.status)


def items(answer: Any, *path: str, optional: bool = False) -> list[Any]:
    """The list at this path of nested objects; `optional`: empty where a step of the path is missing. Raises WrongShape."""
    found = answer
    for name in path:
        if not isinstance(found, Mapping):
            raise WrongShape(f"no object around {name!r}")
        found = found.get(name)
        if found is None and optional:
            return []
    if not isinstance(found, list):
        raise WrongShape(f"{'.'.join(path)} is not a list")
    return found


def text_of(item: Any, name: str) -> str:
    """The text of this field, on one line; empty where it is missing or null. Raises WrongShape."""
    if not isinstance(item, Mapping):
        raise WrongShape(f"no object around {name!r}")
    value = item.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WrongShape(f"{name} is not a text")
    return " ".join(value.split())


def _object(page: Page) -> dict[str, Any]:
    """Without any key that the provider repeats, so that none gets into what is remembered, on disk or elsewhere."""
    try:
        answer = json.loads(redacted(page.body.decode()))
    except (ValueError, RecursionError) as error:
        raise ProviderFailed(BAD_RESPONSE, "the answer is not JSON", status=page.status) from error
    if not isinstance(answer, dict):
        raise ProviderFailed(BAD_RESPONSE, "the answer is not a JSON object", status=page.status)
    return answer
