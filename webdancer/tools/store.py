"""What the tools said, kept by what they were asked: a recording that gives the same policy tokens the same bytes again.

One SQLite file without anything of the machine in it. A question (tool, one query or page, and the settings that shape its text) leads
to the digest of an answer, and the digest to the answer; an answer that does not match its digest is an error, never an observation.
The first answer to a question stays: it was acted upon. Outages are not recorded.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import zstandard

from webdancer.config import ToolsConfig
from webdancer.errors import DataError
from webdancer.types import ToolCall, ToolResult

FORMAT = 1
SHAPING = {
    "search": ("backend", "top_k", "snippets", "snippet_chars", "snippet_sentences"),
    "visit": (
        "backend", "max_page_chars", "max_evidence_chars", "max_evidence_sentences",
        "summarizer.backend", "summarizer.model", "summarizer.max_tokens",
    ),
}  # fmt: skip
"""Settings of a tool that shape its text. Addresses, keys, limits and times do not, so a recording plays anywhere."""


@dataclass(frozen=True, slots=True)
class Said:
    """An observation without what only describes how it came about."""

    text: str
    error: str | None = None

    @classmethod
    def of(cls, result: ToolResult) -> Said:
        return cls(result.text, result.error)

    @property
    def content(self) -> bytes:
        return json.dumps([self.text, self.error], ensure_ascii=True).encode()

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.content).digest()

    def result(self) -> ToolResult:
        return ToolResult(text=self.text, error=self.error, cached=True)


class Recording(Protocol):
    """Keeps the first answer to a question and gives it back, here or in another process."""

    async def record(self, question: str, said: Said) -> Said: ...

    async def recorded(self, question: str) -> Said | None: ...


def question_of(call: ToolCall, config: ToolsConfig) -> str:
    """The address of a call of one query or page. Spaces around its texts and the order of its arguments make no difference."""
    arguments = {name: value.strip() if isinstance(value, str) else value for name, value in call.arguments.items()}
    shaping = {name: attrgetter(f"{call.name}.{name}")(config) for name in SHAPING.get(call.name, ())}
    asked = json.dumps([FORMAT, call.name, arguments, shaping], sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()


class RecordingFile:
    """The file, for one process that writes or for any number that read. Raises DataError for a file that is no recording."""

    def __init__(self, path: Path | str, *, writable: bool) -> None:
        self._path = Path(path)
        if writable:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        elif not self._path.is_file():
            raise DataError(f"tools.replay.path: must be a recording that the tool actors can read, got {str(path)!r}")
        try:
            self._db = self._open(writable)
        except sqlite3.DatabaseError as error:
            raise DataError(f"tools.replay.path: must be a recording of format {FORMAT}, got {str(path)!r}: {error}") from error

    def __len__(self) -> int:
        (count,) = self._db.execute("SELECT count(*) FROM questions").fetchone()
        return int(count)

    def get(self, question: str) -> Said | None:
        row = self._db.execute(
            "SELECT answers.digest, answers.body FROM questions JOIN answers USING (digest) WHERE question = ?", (bytes.fromhex(question),)
        ).fetchone()
        return None if row is None else self._checked(question, *row)

    async def record(self, question: str, said: Said) -> Said:
        """Keep the first answer to this question, and give it."""
        content, digest = said.content, said.digest
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (digest, zstandard.compress(content, 3)))
            self._db.execute("INSERT OR IGNORE INTO questions VALUES (?, ?)", (bytes.fromhex(question), digest))
        first = self.get(question)
        assert first is not None
        return first

    async def recorded(self, question: str) -> Said | None:
        return self.get(question)

    def close(self) -> None:
        self._db.close()

    def _checked(self, question: str, digest: bytes, body: bytes) -> Said:
        try:
            content = zstandard.decompress(body)
        except zstandard.ZstdError as error:
            raise DataError(f"tools.replay.path: the answer to {question[:12]} in {str(self._path)!r} is damaged") from error
        if hashlib.sha256(content).digest() != digest:
            raise DataError(f"tools.replay.path: the answer to {question[:12]} in {str(self._path)!r} is not the one that was recorded")
        text, error_code = json.loads(content)
        return Said(text, error_code)

    def _open(self, writable: bool) -> sqlite3.Connection:
        mode = "rwc" if writable else "ro"
        db = sqlite3.connect(f"{self._path.resolve().as_uri()}?mode={mode}", uri=True, check_same_thread=False)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (num_tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version != FORMAT and not (writable and version == 0 and num_tables == 0):
            raise sqlite3.DatabaseError(f"format {version}")
        if writable:
            # One file at all times, whole after a crash of the process; flushing every answer to the disk would hold the tools up.
            db.execute("PRAGMA synchronous = OFF")
            db.execute(f"PRAGMA user_version = {FORMAT}")
            db.execute("CREATE TABLE IF NOT EXISTS questions (question BLOB PRIMARY KEY, digest BLOB) WITHOUT ROWID")
            db.execute("CREATE TABLE IF NOT EXISTS answers (digest BLOB PRIMARY KEY, body BLOB)")
        db.execute("SELECT count(*) FROM questions")
        return db
