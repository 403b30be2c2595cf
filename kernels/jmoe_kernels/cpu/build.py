"""The C++ kernels as a shared library: compiled on first use, kept in a cache, registered with XLA.

They are not compiled at installation: a wheel would have to carry one binary per processor family and jaxlib
version, and an installation from source builds in isolation, with another jaxlib than the one that will run.
The cache is keyed by source, flags, compiler, processor and jaxlib, so that a changed machine compiles again
(about 15 s on two cores). A cached library whose bytes are not those that were written compiles again too.
Without a compiler, or if the build or the load fails, the portable kernels run and the reason is kept for
``jmoe doctor``.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax

from jmoe_kernels.cache import temporary_cache, user_cache

SOURCE = Path(__file__).parent / "src"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-w")
X86_FLAGS = {
    "isa_avx2.cc": ("-mavx2", "-mfma"),
    "isa_avx512.cc": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
}
X86_FLAGS["isa_avx512_vnni.cc"] = (*X86_FLAGS["isa_avx512.cc"], "-mavx512vnni")
X86_FLAGS["isa_avx512_bf16.cc"] = (*X86_FLAGS["isa_avx512.cc"], "-mavx512bf16")
X86_FLAGS["e4m3.cc"] = (*X86_FLAGS["isa_avx512_bf16.cc"], "-mavx512vbmi")
X86_FLAGS["isa_amx.cc"] = (*X86_FLAGS["isa_avx512_bf16.cc"], "-mamx-tile", "-mamx-bf16", "-mamx-int8")
TARGETS = {
    "jmoe_grouped_mlp": "JmoeGroupedMlp",
    "jmoe_combined_mlp": "JmoeCombinedMlp",
    "jmoe_linear": "JmoeLinear",
    "jmoe_attend": "JmoeAttend",
    "jmoe_write_pages": "JmoeWritePages",
    "jmoe_rotate": "JmoeRotate",
}


@dataclass(frozen=True)
class Library:
    """The loaded kernels.

    path: file of the library.
    dll: handle of the loaded file.
    """

    path: Path
    dll: ctypes.CDLL

    @property
    def isa(self) -> str:
        """Returns the name of the instruction set in use."""
        return self.dll.jmoe_isa().decode()

    @property
    def isas(self) -> tuple[str, ...]:
        """Returns the names of all instruction sets that this processor could use."""
        return tuple(self.dll.jmoe_isas().decode().splitlines())

    def use(self, isa: str) -> None:
        """Uses that instruction set from now on, in the whole process; raises ValueError if it cannot run."""
        if not self.dll.jmoe_use_isa(isa.encode()):
            raise ValueError(
                f"instruction set {isa!r} cannot run here; those that can: {', '.join(self.isas)}"
            )


def cache_directory() -> Path:
    """Returns the folder of compiled kernels: next to jax's compilation cache, or in the user's cache."""
    programs = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return (Path(programs).parent if programs else user_cache()) / "kernels"


@functools.cache
def get_library() -> Library | str:
    """Returns the loaded library, which is built if it is not in the cache, or the reason why there is none.

    A cache that cannot be written to, or that libraries cannot be loaded from, is no reason for slow kernels:
    the temporary folder takes its place.
    """
    try:
        try:
            return load(build(cache_directory()))
        except OSError as error:
            return load(build(temporary_cache(str(error)) / "kernels"))
    except (OSError, RuntimeError) as error:
        return str(error)


def why_missing() -> str | None:
    """Returns why the kernels cannot run here, or None if they can."""
    library = get_library()
    return library if isinstance(library, str) else None


def load(path: Path) -> Library:
    """Loads a built library and registers its kernels with XLA; raises OSError if it cannot be loaded."""
    dll = ctypes.CDLL(str(path))
    dll.jmoe_isa.restype = dll.jmoe_isas.restype = ctypes.c_char_p
    dll.jmoe_use_isa.argtypes, dll.jmoe_use_isa.restype = [ctypes.c_char_p], ctypes.c_bool
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(dll, symbol)), platform="cpu")
    return Library(path, dll)


def build(directory: Path, extra: tuple[str, ...] = ()) -> Path:
    """Compiles the library into ``directory`` unless it is there, and returns its path.

    extra: compiler flags in addition to ours; they are part of the key.
    Raises RuntimeError with the reason if there is no compiler or if it fails.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler found (c++, g++ or clang++)")
    name = f"jmoe-{_key(compiler, extra)}"
    for path in directory.glob(f"{name}-*.so"):
        if path == _library_path(path, name):
            return path
        path.unlink(missing_ok=True)  # a processor that runs half a library ends the process
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: _compile(compiler, s, Path(scratch), extra), _sources()))
        library = Path(scratch) / f"{name}.so"
        _run([compiler, "-shared", "-o", str(library), *map(str, objects), *extra, "-lpthread"])
        with open(library, "rb") as file:
            os.fsync(file.fileno())
        # another process may have been quicker; both files are whole
        return library.replace(_library_path(library, name, directory))


def _library_path(library: Path, name: str, directory: Path | None = None) -> Path:
    """Returns the path of a library with these bytes: its name ends in their digest, which reveals damage."""
    with open(library, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return (directory or library.parent) / f"{name}-{digest}.so"


def _sources() -> list[Path]:
    """Returns the files to compile, the longest first."""
    return sorted(SOURCE.rglob("*.cc"), key=lambda p: -p.stat().st_size)


def _flags(source: Path) -> tuple[str, ...]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (*FLAGS, *(X86_FLAGS.get(source.name, ()) if x86 else ()))


def _compile(compiler: str, source: Path, directory: Path, extra: tuple[str, ...]) -> Path:
    object_file = directory / f"{source.stem}.o"
    include = ["-isystem", jax.ffi.include_dir()]
    _run([compiler, *_flags(source), *extra, *include, "-c", str(source), "-o", str(object_file)])
    return object_file


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
        raise RuntimeError(f"{command[0]} failed: {first.strip()}")


def _key(compiler: str, extra: tuple[str, ...]) -> str:
    compiler_version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [compiler_version, platform.machine(), version("jaxlib"), *extra]
    for source in sorted(path for path in SOURCE.rglob("*") if path.is_file()):
        parts += [source.name, source.read_text(), *_flags(source)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
