"""Damage for files and requests, and what a reader of them must do: return, or say in one line what is wrong.

``Reader`` is an entry of jmoe with good input; ``fuzz`` gives it damaged input, the same in every run.
"""

import copy
import json
import random
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.least_time import within

SECONDS = 1.0  # of the processor, for one input
SPARE = 1 << 30  # bytes of address space beyond four times the input: pools of threads, libraries' arenas

INTEGERS = (
    0, 1, -1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 10**30,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *INTEGERS, None, True, False, 0.5, -0.0, 1e-45, 1e300, float("nan"), float("inf"),
    "", "x", "0", "\x00", "\u00e9" * 40, "\ud800", "../../x", "/dev/zero", "a" * 5000,
    [], {}, [[]], [None], {"": {}}, ["a", 1], [0] * 500, {"a": [1, {"b": None}]},
)  # fmt: skip
TEXTS = (
    b"\x00", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"{{", b"}}", b"{%", b"%}", b"[", b"]", b"{", b"}",
    b'"', b"\\", b"\\ud800", b"null", b"NaN", b"-1", b"1e999", b"9" * 400, b"[" * 2000, b"\n", b"''", b"#",
    b"{%for x in y%}" * 50, b"{{ range(9999999) }}", b"|replace('a','b'*9)", b"__class__", b"= [", b"[[moe]]",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """An entry of jmoe that reads input.

    name: name for messages.
    files: good input, by the name under which ``read`` finds it.
    read: function of the folder that holds the files.
    damaged: names of the files that are damaged; if it is empty, all of them are.
    refusals: exceptions that ``read`` may raise.
    """

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], object]
    damaged: tuple[str, ...] = ()
    refusals: tuple[type[Exception], ...] = (ValueError,)


def fuzz(reader: Reader, folder: Path, *, count: int, seconds: float) -> int:
    """Reads ``count`` damaged inputs, or fewer if ``seconds`` are over, and returns how many were refused.

    Raises AssertionError, naming the damaged input, for an exception that is no refusal, a message of more
    than a line, or too long a time. An input that takes too much memory ends in a MemoryError.
    """
    rng = random.Random(reader.name)
    for name, data in reader.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    reader.read(folder)
    names, refused, end = sorted(reader.damaged or reader.files), 0, time.monotonic() + seconds
    for number in range(count):
        if time.monotonic() > end:
            break
        name = rng.choice(names)
        bad = damaged(reader.files[name], rng)
        (folder / name).write_bytes(bad)
        refused += _is_refused(reader, folder, f"{reader.name} {number}: {name}", bad)
        (folder / name).write_bytes(reader.files[name])
    return refused


def _is_refused(reader: Reader, folder: Path, what: str, bad: bytes) -> bool:
    def refused() -> bool:
        try:
            with bounded_memory(4 * len(bad) + SPARE):
                reader.read(folder)
        except reader.refusals as error:
            message = str(error)
            assert "\n" not in message and 0 < len(message) < 2000, f"{what}: {message[:3000]!r}"
            return True
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}: {bad[:3000]!r}") from error
        return False

    return within(SECONDS, refused, (what, bad[:3000]))


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Limits the process to ``more`` bytes of address space beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Returns ``data`` with one to three changes: mostly of values if it is JSON, else of bytes."""
    if rng.random() < 0.7 and (values := _json(data)):
        return damaged_json(values, rng)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_bytes(out, rng)
    return bytes(out)


def _change_bytes(out: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 40, 400))
    match rng.randrange(9):
        case 0 | 1 if at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        case 2:
            del out[at : at + length]
        case 3:
            del out[at:]
        case 4:
            out[at:at] = rng.randbytes(length)
        case 5:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + length]
        case 6:
            width = rng.choice((1, 2, 4, 8))
            number, order = rng.choice(INTEGERS) % 256**width, rng.choice(("little", "big"))
            out[at : at + width] = number.to_bytes(width, order)
        case 7:
            out[at:at] = rng.choice(TEXTS)
        case _:
            numbers = list(re.finditer(rb"\d+", out[at : at + 4000]))
            if numbers:
                found = rng.choice(numbers)
                out[at + found.start() : at + found.end()] = str(rng.choice(INTEGERS)).encode()


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def damaged_json(values: Any, rng: random.Random) -> bytes:
    root = [values]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                holder[rng.choice(("", "x", "a" * 3000, str(key) + " "))] = holder.pop(key)
            case 1 if holder is not root:
                del holder[key]
            case 2:
                other, place = rng.choice(places)
                holder[key] = json.loads(json.dumps(other[place]))
            case 3:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(root[0])
    if rng.random() < 0.05 and text.startswith('{"'):  # a name twice
        text = text[:-1] + "," + text[1 : text.index(":")] + ":1}"
    return text.encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every value below a node, as (holder, key)."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])
