"""Directories for weights on their way, mostly in memory: whose process was killed leaves them behind, and they are large.

Their names say whose they are: a process id, and a mark of the machine (since it was started) and of the process namespace in which that id
means something. Only who could see that the owner lives may say that it does not: other machines and containers may share the place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

WEIGHTS, RECEIVED = "webdancer-weights-", "webdancer-received-"
"""Prefixes: what a learner rank writes for the engines, and what a rollout worker on another node has fetched of it."""


def shared_memory() -> str | None:
    """Where files live in memory; None (the default directory for temporary files) where there is no such place."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def make_scratch(prefix: str, base: str | None) -> Path:
    """A new directory below `base`."""
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-{_mark()}-", dir=base))


def remove_orphans(prefix: str, base: str | None) -> None:
    """Those that killed processes of this machine have left."""
    for directory in Path(base or tempfile.gettempdir()).glob(f"{prefix}*"):
        owner, _, rest = directory.name.removeprefix(prefix).partition("-")
        if _mark() and rest.startswith(f"{_mark()}-") and owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            shutil.rmtree(directory, ignore_errors=True)


@cache
def _mark() -> str:
    """Empty where there is no telling."""
    try:
        where = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return hashlib.blake2b(where.encode(), digest_size=4).hexdigest()
