"""What one tool actor remembers beyond its own life: a SQLite file on a local disk (WAL does not work over network file systems).

One file an actor, several may also share one. Losing it, or finding it broken or full, costs misses and never a wrong answer: a value
carries its whole key, and one that cannot be read is none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import zstandard

from webdancer.config import ToolsConfig
from webdancer.errors import ConfigError
from webdancer.tools.address import is_private_name, is_public
from webdancer.tools.cache import Kept, SingleFlightCache

V = TypeVar("V")
_LOG = logging.getLogger(__name__)
_TABLE = (
    "CREATE TABLE IF NOT EXISTS kept (space TEXT, key TEXT, expires REAL, body BLOB, PRIMARY KEY (space, key)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS by_expiry ON kept (expires)",
)
_CLEAN = "DELETE FROM kept WHERE expires < ?"
_PUTS_BETWEEN_CLEANINGS = 2_000
_BROKEN = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_PATIENCE_S = 10.0  # with others who write to the file


class ShelfFile:
    """The file and its one thread. Raises ConfigError where the directory cannot hold it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shelf")
        self._num_puts = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db: sqlite3.Connection | None = _open_or_begin_anew(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"tools.cache_dir: must be a directory for databases, got {str(path.parent)!r}: {error}") from error

    async def run(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """What the work gives, None where the file fails; after that it is left alone."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    async def aclose(self) -> None:
        await self.run(lambda db: None)
        db, self._db = self._db, None
        self._thread.shutdown(wait=True)
        if db is not None:
            db.close()

    def put(self, db: sqlite3.Connection, row: tuple[str, str, float, bytes]) -> None:
        db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?)", row)
        self._num_puts += 1
        if self._num_puts % _PUTS_BETWEEN_CLEANINGS == 0:
            db.execute(_CLEAN, (time.time(),))

    def _run(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        if self._db is None:
            return None
        try:
            return work(self._db)
        except sqlite3.Error as error:  # a full or broken disk: everything that would be remembered there is asked again
            _LOG.warning("cache %s: not used any more: %s", self._path, error)
            self._db = None
            return None


class Space(Generic[V]):
    """A cache.Shelf for one kind of value; `encode` gives what JSON can hold, `keeps` says which keys belong here."""

    def __init__(
        self, file: ShelfFile, name: str, encode: Callable[[V], Any], decode: Callable[[Any], V], keeps: Callable[[str], bool]
    ) -> None:
        self._keeps = keeps
        self._file = file
        self._name = name
        self._encode = encode
        self._decode = decode

    async def get(self, key: str) -> Kept[V] | None:
        if not self._keeps(key):
            return None
        row = await self._file.run(lambda db: self._get(db, key))
        if row is None:
            return None
        try:
            return Kept(self._decode(json.loads(zstandard.decompress(row[1]))), row[0])
        except (ValueError, TypeError, KeyError, zstandard.ZstdError):
            return None

    async def put(self, key: str, kept: Kept[V]) -> None:
        if not self._keeps(key):
            return
        body = zstandard.compress(json.dumps(self._encode(kept.value), ensure_ascii=False).encode("utf-8", "surrogatepass"), 3)
        await self._file.run(lambda db: self._file.put(db, (self._name, key, kept.expires, body)))

    def _get(self, db: sqlite3.Connection, key: str) -> Any:
        return db.execute("SELECT expires, body FROM kept WHERE space = ? AND key = ?", (self._name, key)).fetchone()


def _open_or_begin_anew(path: Path) -> sqlite3.Connection:
    """Only what can never be read again is cleared away. All else (locked, full, no descriptors left) may pass, and days of paid results
    may be in the file."""
    try:
        return _open(path)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _BROKEN:
            raise
    _LOG.warning("cache %s: not a readable database, begun anew", path)
    for broken in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        broken.unlink(missing_ok=True)
    return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=_PATIENCE_S)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last values, never break the file
        for statement in _TABLE:
            db.execute(statement)
        db.execute(_CLEAN, (time.time(),))
    except BaseException:
        db.close()
        raise
    return db


class Memory:
    """What the tools of one actor remember, by config: in memory, and on the shelf where there is one."""

    def __init__(self, config: ToolsConfig, file: ShelfFile | None = None) -> None:
        self._entries = config.cache_entries
        self._found_s = config.cache_days * 86_400
        self._negative_s = config.cache_negative_hours * 3_600
        self._file = file

    def of(
        self,
        name: str,
        *,
        provider: str,
        max_size: int,
        size_of: Callable[[V], int],
        encode: Callable[[V], Any],
        decode: Callable[[Any], V],
        is_negative: Callable[[V], bool] = lambda value: False,
        on_shelf: Callable[[str], bool] = lambda key: True,
    ) -> SingleFlightCache[str, V]:
        """A cache of its own. `name` says all that a value depends on besides its key; `on_shelf`, which keys may outlive the run."""
        return SingleFlightCache(
            max_entries=self._entries,
            max_size=max_size,
            size_of=size_of,
            lifetime_s=lambda value: self._negative_s if is_negative(value) else self._found_s,
            shelf=None if self._file is None else Space(self._file, name, encode, decode, on_shelf),
            name=provider,
        )


def is_local(url: str) -> bool:
    """On this machine or inside the network, where another server or another web may be at the same address tomorrow."""
    host = ""
    try:
        host = urlsplit(url).hostname or ""
        return not is_public(ip_address(host))
    except ValueError:
        return bool(host) and is_private_name(host.removesuffix("."))
