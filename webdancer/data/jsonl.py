"""JSON lines that people and other programs wrote: whole files, in which anything wrong is a DataError with file and line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from webdancer.errors import DataError


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for every line that is not blank; the place, `file, line n`, begins every error about the row.

    Raises DataError for a file that cannot be read or has no row, and a line that is not a JSON object in UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: must be a readable file, got: {error.strerror or error}") from error
    empty = True
    # Lines end at \n alone: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            empty = False
            place = f"{path}, line {number}"
            yield place, _row(line, place)
    if empty:
        raise DataError(f"{path}: must have at least one row, got an empty file")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write all rows or, on any error, leave what was there; returns their number. Half a surrogate pair, which is no text, becomes `?`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    count = 0
    try:
        with os.fdopen(handle, "wb") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return count


def text_field(row: Mapping[str, Any], name: str, place: str) -> str:
    """A string with something in it. Raises DataError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {name}: must be a non-empty string, got {_shown(value)}")
    return value


def aliases_field(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The row's answer, a string or (nested) list of strings, as one tuple of different aliases. Raises DataError."""
    aliases = tuple(dict.fromkeys(_flat(row.get("answer"), place)))
    if not aliases:
        raise DataError(f"{place}: answer: must have at least one alias, got {_shown(row.get('answer'))}")
    return aliases


def _flat(value: Any, place: str, depth: int = 2) -> Iterator[str]:
    if isinstance(value, list) and depth:
        for item in value:
            yield from _flat(item, place, depth - 1)
    elif isinstance(value, str) and value.strip():
        yield value
    else:
        raise DataError(f"{place}: answer: must be a non-empty string or lists of them, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text: no tokenizer takes it
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{place}: must be JSON in UTF-8, got: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: must be a JSON object, got {type(row).__name__}")
    return row
