"""Files that are there whole or not at all: whoever reads sees the old content or the new, also after a crash or on a full disk.

And how to tell that they still are, after a way on which nobody means harm (`fast_hash`).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """On any error what was there stays, and nothing else is left behind."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def fast_hash(path: Path) -> str:
    """XXH3 of 128 bits, at the speed of memory: SHA-256 of weights takes longer than to copy them. Raises OSError, and ValueError for an
    empty file."""
    import xxhash

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)
