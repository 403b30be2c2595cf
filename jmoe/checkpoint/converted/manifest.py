"""The manifest of a converted checkpoint: its format, parameters, and the size and sha256 of every file."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from jmoe_kernels.quantised import Coding

from jmoe.blueprint import Codings
from jmoe.checkpoint.safetensors_file import HEADER_LIMIT, open_regular, read_json

MANIFEST = "jmoe_checkpoint.json"
FORMAT, VERSION = "jmoe", 3
READ = (2, VERSION)  # version 2 has no quantised parameters
PARAMS = "params"  # folder of the Orbax checkpoints: one for each layer and one for all other parameters
HASHING_THREADS = 4
LONGEST = 1000  # characters of a file's relative path


@dataclass(frozen=True)
class Manifest:
    """The manifest of a converted checkpoint.

    architecture: name of the model's architecture.
    dtype: dtype of the model.
    parameters: shape of each array by dotted path.
    files: (bytes, sha256) of each file by relative path.
    kept: parameters that are float32 because the source checkpoint stores them so.
    codings: how the quantised parameters are stored, by dotted path.
    """

    architecture: str
    dtype: str
    parameters: dict[str, tuple[int, ...]]
    files: dict[str, tuple[int, str]]
    kept: tuple[str, ...] = ()
    codings: dict[str, Coding] = field(default_factory=dict)


def is_converted(directory: Path | str) -> bool:
    return (Path(directory) / MANIFEST).is_file()


def write_manifest(
    directory: Path,
    architecture: str,
    dtype: str,
    parameters: dict[str, tuple[int, ...]],
    kept: tuple[str, ...],
    codings: Codings,
) -> None:
    """Flushes every file of ``directory`` to disk, then lists it. It is called last, before the rename."""
    files = _digests(directory, _listed(directory), flush=True)
    manifest = Manifest(architecture, dtype, parameters, files, kept, dict(codings))
    text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}, indent=1)
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest; raises ValueError if it is malformed or of another version."""
    path = directory / MANIFEST
    raw = read_json(path, HEADER_LIMIT)
    if raw.pop("format", None) != FORMAT or type(raw.get("version")) is not int:
        raise ValueError(f"{path}: is not the manifest of a converted checkpoint")
    version = raw.pop("version")
    if version not in READ:
        raise ValueError(f"{path}: has version {version}; this release reads {VERSION}: convert again")
    try:
        return Manifest(
            str(raw.pop("architecture")),
            str(raw.pop("dtype")),
            {name: tuple(map(int, shape)) for name, shape in raw.pop("parameters").items()},
            {_inside(name): (int(size), str(digest)) for name, (size, digest) in raw.pop("files").items()},
            tuple(map(str, raw.pop("kept", ()))),  # absent if an earlier release wrote it, as codings may be
            {path: msgspec.convert(coding, Coding) for path, coding in raw.pop("codings", {}).items()},
        )
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: is damaged: {type(error).__name__}: {error}") from None


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Raises ValueError naming the first file that is missing, added or not as it was written."""
    for name, (size, _) in manifest.files.items():
        path = directory / name
        if not os.path.isfile(path):  # for a name too long this is False, while Path.is_file raises
            raise ValueError(f"{path}: is missing; {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, {MANIFEST} says {size}")
    for name in _listed(directory):
        if name.startswith(PARAMS + "/") and name not in manifest.files:
            raise ValueError(f"{directory / name}: is not listed in {MANIFEST}")
    for name, (_, digest) in _digests(directory, list(manifest.files), flush=False).items():
        if digest != manifest.files[name][1]:
            raise ValueError(f"{directory / name}: was changed since it was written (sha256 differs)")


def _listed(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _digests(directory: Path, names: list[str], *, flush: bool) -> dict[str, tuple[int, str]]:
    def one(name: str) -> tuple[int, str]:
        with open_regular(directory / name) as file:
            if flush:
                os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _inside(name: Any) -> str:
    path = PurePosixPath(name)
    if len(name) > LONGEST:
        raise ValueError(f"file {name[:40]!r}... has a name of {len(name)} characters")
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"file {name!r} lies outside the checkpoint")
    return name
