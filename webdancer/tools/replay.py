"""The tools over a recording: what was said once is said again, byte for byte (config.ReplayConfig has the modes)."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Protocol

from webdancer.config import ToolsConfig
from webdancer.tools.hops import Hop, Moved
from webdancer.tools.pieces import join, split
from webdancer.tools.result import INFRASTRUCTURE_ERRORS, REPLAY_MISS
from webdancer.tools.store import Recording, RecordingFile, Said, question_of
from webdancer.types import ToolCall, ToolResult, ToolUse

RECORDING = "recording"
"""As a name beside those of providers."""


class LiveToolbox(Protocol):
    async def call(self, call: ToolCall, hop: Hop | None = None) -> ToolResult: ...

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...


class ReplayToolbox:
    """interfaces.Toolbox. live: asked for what the recording does not have, None in mode `replay`. writer: where mode `record` keeps it.

    Raises DataError where a recording that is to be read is none.
    """

    def __init__(self, config: ToolsConfig, *, live: LiveToolbox | None, writer: Recording | None = None) -> None:
        self._config = config
        self._live = live
        self._writer = writer
        reads = config.replay.mode in ("replay", "replay_or_live")
        self._known: dict[str, bytes] = {}  # question -> digest of what was recorded: the members of a group all ask it
        self._file = RecordingFile(Path(config.replay.path), writable=False) if reads else None

    async def call(self, call: ToolCall, hop: Hop | None = None) -> ToolResult:
        return join(await asyncio.gather(*(self._one(piece, hop) for piece in split(call))))

    async def check(self) -> None:
        if self._live is not None:
            await self._live.check()

    async def aclose(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._live is not None:
            await self._live.aclose()

    async def _one(self, piece: ToolCall, hop: Hop | None) -> ToolResult:
        question = question_of(piece, self._config)
        if self._file is not None and (said := self._file.get(question)) is not None:
            return dataclasses.replace(said.result(), uses=(ToolUse(provider=RECORDING, hits=1),))
        if self._live is None:
            return ToolResult(text="This was never asked when the web was recorded, so there is no answer to it.", error=REPLAY_MISS)
        begins = question not in self._known and (hop is None or hop.redirects == 0)
        if self._writer is not None and begins and (said := await self._writer.recorded(question)) is not None:
            return dataclasses.replace(said.result(), uses=(ToolUse(provider=RECORDING, hits=1),))  # by a start before this one
        result = await self._live.call(piece, hop)
        if self._writer is None or result.error in INFRASTRUCTURE_ERRORS or isinstance(result, Moved):
            return result
        said = Said.of(result)
        if self._known.get(question) == said.digest:
            return result
        said = await self._writer.record(question, said)
        self._known[question] = said.digest
        return dataclasses.replace(result, text=said.text, error=said.error)
