"""jax's cache of compiled programs on disk, and the removal of damaged entries, which jax does not do.

jax writes an entry in place and trusts any file that has the entry's name. If the file cannot be read, the
program is compiled again at every start, because an entry that exists is never written again. So damaged
entries are removed before jax looks.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jmoe.placement.npz import replacing

log = logging.getLogger(__name__)

ENTRIES = "*-cache"  # as jax names them
INDEX = "entries.json"
ZSTD = b"\x28\xb5\x2f\xfd"
CHUNK = 1 << 20  # bytes

# size, time of the last change in ns, sha256
Known = tuple[int, int, str]


def use_compilation_cache(directory: Path) -> None:
    """Keeps compiled programs in ``directory`` across processes. It also keeps small ones that compile
    quickly."""
    drop_damaged(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def drop_damaged(directory: Path) -> list[str]:
    """Removes the damaged entries; returns their names.

    An entry is read whole once, and again only if the size or time of its file has changed: its bytes must
    then be the same as before. Files that cannot be read or removed are left to jax.
    """
    known, found, dropped = _read_index(directory / INDEX), {}, []
    try:
        paths = sorted(directory.glob(ENTRIES))
    except OSError:
        return []
    for path in paths:
        try:
            stat, before = path.stat(), known.get(path.name)
            if before is not None and before[:2] == (stat.st_size, stat.st_mtime_ns):
                found[path.name] = before
                continue
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            if is_whole(raw) and (before is None or before[2] == digest):
                found[path.name] = (stat.st_size, stat.st_mtime_ns, digest)
            else:
                path.unlink()
                dropped.append(path.name)
        except OSError:
            continue
    if dropped:
        log.info(
            "%s: %d damaged compiled programs were removed; they are compiled again", directory, len(dropped)
        )
    if found != known:
        _write_index(directory / INDEX, found)
    return dropped


def is_whole(raw: bytes) -> bool:
    """Returns whether an entry can be decompressed to its end."""
    try:
        if raw.startswith(ZSTD):
            decompress = _zstd()
            return decompress is None or bool(decompress(raw))
        stream, at = zlib.decompressobj(), 0
        while at < len(raw):
            rest = raw[at : at + CHUNK]
            while rest:
                stream.decompress(rest, CHUNK)
                rest = stream.unconsumed_tail
            at += CHUNK
        return stream.eof and not stream.unused_data
    except Exception:  # each library has its own exception for damaged data
        return False


def _zstd() -> Callable[[bytes], bytes] | None:
    """Returns the zstd decompressor that jax would choose, or None if jax could not read such an entry
    either."""
    try:
        from compression import zstd  # pyright: ignore[reportMissingImports]

        return zstd.decompress
    except ImportError:
        pass
    try:
        import zstandard  # pyright: ignore[reportMissingImports]

        return zstandard.ZstdDecompressor().decompress
    except ImportError:
        return None


def _read_index(path: Path) -> dict[str, Known]:
    """Returns the index, which is empty if the file is absent or damaged, so that all entries are read
    again."""
    try:
        entries: dict[str, Any] = json.loads(path.read_bytes())
        return {name: (int(size), int(time), str(digest)) for name, (size, time, digest) in entries.items()}
    except Exception:
        return {}


def _write_index(path: Path, entries: dict[str, Known]) -> None:
    try:
        with replacing(path) as file:
            file.write(json.dumps(entries).encode())
    except OSError:
        return  # the folder cannot be written to: jax says so
