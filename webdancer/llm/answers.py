"""Every answer that a model was paid for, on disk before it is used: a job that is killed and started again asks nothing twice.

One JSON line an answer, by the hash of its whole request. The same request may be asked several times on purpose (several samples, or
again because a reply did not parse); `sample` numbers those, and each has a line of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from webdancer.errors import DataError
from webdancer.telemetry.jsonl import KeyedRows, read_jsonl
from webdancer.tools.completion import ChatAnswer

_FIELDS = tuple(field.name for field in dataclasses.fields(ChatAnswer))


class AnswerLog:
    """Answers by request. They stay in the file; in memory is where each stands there."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for a file that is not such a log; a torn last line is cut off."""
        self._path = path
        self._rows = KeyedRows(path, "request")

    def get(self, request: str) -> ChatAnswer | None:
        row = self._rows.get(request)
        return None if row is None else self._answer(row)

    def add(self, request: str, answer: ChatAnswer) -> None:
        """Raises ServiceError where the disk takes no more."""
        self._rows.add(request, dataclasses.asdict(answer))

    def answers(self) -> Iterator[ChatAnswer]:
        """Of this start and of all before it, in the order in which they came."""
        return (self._answer(row) for row in read_jsonl(self._path))

    def close(self) -> None:
        self._rows.close()

    def _answer(self, row: Mapping[str, Any]) -> ChatAnswer:
        try:
            return ChatAnswer(**{name: row[name] for name in _FIELDS})
        except KeyError as error:
            raise DataError(f"{self._path}: must hold answers of a chat model, got a row without {error}") from error


def request_key(payload: Mapping[str, Any], sample: int) -> str:
    """The identity of a request: 32 hex digits. Where it is sent does not count, only what is asked of which model."""
    canonical = json.dumps([payload, sample], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
