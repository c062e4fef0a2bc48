"""Rows of a benchmark's file as its authors publish it: .jsonl, .json, .csv, .parquet or .xlsx, here or on the Hugging Face hub.

Nothing is converted on disk: what the hub gives stays in its cache as it is published.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from webdancer.data.jsonl import read_rows
from webdancer.errors import DataError

HUB = "hf://datasets/"
Place = str
Rows = Iterator[tuple[Place, dict[str, Any]]]


def located(source: str, *, default_file: str, field: str = "evaluation.data") -> Path:
    """The file itself: a path, `owner/name` of a data set on the hub (its `default_file`), or hf://datasets/owner/name/file.

    Raises DataError where there is none, or it is not given to this user (a gated data set wants a token: HF_TOKEN).
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    name = source.removeprefix(HUB)
    parts = name.split("/")
    is_hub = source.startswith(HUB) or (len(parts) == 2 and not path.exists() and not source.startswith((".", "/", "~")))
    if not is_hub or len(parts) < 2 or (len(parts) == 2 and not default_file):
        raise DataError(f"{field}: must be a file, owner/name of a Hugging Face data set or {HUB}owner/name/file, got {source!r}")
    return _from_hub("/".join(parts[:2]), "/".join(parts[2:]) or default_file, field)


def rows(path: Path) -> Rows:
    """(place, row) in order; the place, file and row, begins every error about it. Raises DataError for what cannot be read."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: must be one of {', '.join(_READERS)}, got {path.suffix or 'no ending'!r}")
    yield from reader(path)


def _from_hub(repository: str, file: str, field: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # no such data set, no right to it, no network: for the user all are "not there"
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{field}: must be what the hub gives, got {HUB}{repository}/{file} ({reason})") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: must be a readable file, got: {error.strerror or error}") from error


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8, got: {error}") from error


def _json_rows(path: Path) -> Rows:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: must be JSON, got: {error}") from error
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: must be a list of rows, got {type(content).__name__ if content else 'an empty one'}")
    yield from _numbered(path, content)


def _csv_rows(path: Path) -> Rows:
    try:
        table = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    except csv.Error as error:  # a quotation that nothing ends swallows the rest of the file
        raise DataError(f"{path}: must be CSV, got: {error}") from error
    if not table:
        raise DataError(f"{path}: must have at least one row below its header, got none")
    for place, row in _numbered(path, table):
        if None in row or None in row.values():
            raise DataError(f"{place}: must have as many fields as the header, got {'more' if None in row else 'fewer'}")
        yield place, row


def _parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DataError(f"{path}: needs pyarrow, which is not installed; pip install 'webdancer[benchmarks]'") from error
    try:
        table = read_table(io.BytesIO(_bytes(path))).to_pylist()
    except Exception as error:  # pyarrow raises its own errors and OSError for a broken file
        raise DataError(f"{path}: must be a parquet file, got: {' '.join(str(error).split())[:200]}") from error
    yield from _numbered(path, table)


def _xlsx_rows(path: Path) -> Rows:
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(f"{path}: needs openpyxl, which is not installed; pip install 'webdancer[benchmarks]'") from error
    try:
        sheet = openpyxl.load_workbook(io.BytesIO(_bytes(path)), read_only=True, data_only=True).worksheets[0]
        header, *lines = list(sheet.iter_rows(values_only=True))
    except Exception as error:  # a broken archive, or a sheet without a row
        raise DataError(f"{path}: must be a workbook with a header and rows, got: {' '.join(str(error).split())[:200]}") from error
    names = [str(name).strip() for name in header]
    yield from _numbered(path, [dict(zip(names, line, strict=False)) for line in lines if any(value is not None for value in line)])


def _numbered(path: Path, table: list[Any]) -> Rows:
    for number, row in enumerate(table, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, row {number}: must be an object, got {type(row).__name__}")
        yield f"{path}, row {number}", dict(row)


_READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": read_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".xlsx": _xlsx_rows,
}
