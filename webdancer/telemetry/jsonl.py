"""Append-only JSON lines that survive a crash: a line counts once its newline is on disk, and a torn last line is nobody's data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from webdancer.errors import DataError, ServiceError


class JsonlWriter:
    """One writer a file. Each line is one write; opening cuts off what a crash left of an unfinished line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_tail(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size

    def write(self, row: Mapping[str, Any]) -> int:
        """Where the line begins. Raises ServiceError where the disk takes no more; the file then ends with the last whole line."""
        text = json.dumps(_finite(row), ensure_ascii=False, separators=(",", ":")) + "\n"
        line = text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes \udc80, which is JSON's escape for it
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written")
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise ServiceError(f"{self.path}: must be writable, got: {error}") from error
        self._size += len(line)
        return self._size - len(line)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows in order; no file gives none. A torn last line is passed over, any other broken line is a DataError with its number."""
    return (row for _, row in read_placed(path))


def read_placed(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same, each row after the offset at which its line begins."""
    if not path.exists():
        return
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield offset, _row(line, path, number)
            offset += len(line)


class KeyedRows:
    """What was found out, by what was asked, in a file: whoever starts again has it. In memory are keys and offsets, 200 bytes a row.

    Every row has its key in one column. Of several rows of one key the last one counts.
    """

    def __init__(self, path: Path, column: str) -> None:
        """Reads the file; a torn last line is cut off. Raises DataError for one that is of another kind."""
        self._writer = JsonlWriter(path)
        self._column = column
        self._offsets: dict[str, int] = {}
        for offset, row in read_placed(path):
            if not isinstance(row.get(column), str):
                raise DataError(f"{path}: {column}: must be a text in every row, got {type(row.get(column)).__name__}")
            self._offsets[row[column]] = offset
        self._file = path.open("rb")

    def get(self, key: str) -> dict[str, Any] | None:
        if (offset := self._offsets.get(key)) is None:
            return None
        self._file.seek(offset)
        row: dict[str, Any] = json.loads(self._file.readline())
        return row

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Raises ServiceError where the disk takes no more."""
        self._offsets[key] = self._writer.write({self._column: key, **row})

    def close(self) -> None:
        self._writer.close()
        self._file.close()


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: must be JSON, got: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: must be a JSON object, got {type(row).__name__}")
    return row


def _cut_torn_tail(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 65536)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON; they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
