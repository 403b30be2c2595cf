"""Documents of evaluation files, and their windows of token ids."""

import gzip
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

SEPARATOR = "<|endoftext|>"  # line between the documents of a text file
_OPENERS: dict[str, Callable] = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a ``.txt``, ``.txt.xz``, ``.txt.gz`` or of a ``.jsonl(.gz)`` with ``prompt`` or
    ``text``. It raises ValueError that names the file (and line) that cannot be read."""
    name = path.name.removesuffix(path.suffix) if path.suffix in _OPENERS else path.name
    kind = Path(name).suffix
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: data files are .txt, .txt.xz, .txt.gz, .jsonl or .jsonl.gz")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    yield from _json_documents(path, text) if kind == ".jsonl" else _text_documents(text)


def _text_documents(text: str) -> Iterator[str]:
    """Yields the texts between separator lines, without the line end before a separator or the file's end."""
    for part in f"\n{text}".split(f"\n{SEPARATOR}\n"):
        document = part.removeprefix("\n").removesuffix(f"\n{SEPARATOR}").removesuffix("\n")
        if document:
            yield document


def _json_documents(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            document = item["prompt"] if "prompt" in item else item["text"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f"{path} line {number} is not a JSON object with 'prompt' or 'text'") from None
        if not isinstance(document, str):
            raise ValueError(f"{path} line {number}: 'prompt' or 'text' must be a string")
        if document:
            yield document


def round_robin(sources: Sequence[Iterable[str]]) -> Iterator[str]:
    """Yields one document of each source in turn, until all sources are used up."""
    for row in itertools.zip_longest(*sources):
        yield from (document for document in row if document is not None)


def windows(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Yields non-overlapping windows of at most ``length`` tokens, except windows of one token, in which
    nothing can be scored."""
    for ids in documents:
        for start in range(0, len(ids), length):
            if len(ids) - start > 1:
                yield ids[start : start + length]


def bounded(source: Iterable[list[int]], max_tokens: int | None, *, free: int = 1) -> Iterator[list[int]]:
    """Yields windows until ``max_tokens`` tokens are counted; the last window is cut.

    free: number of tokens at the start of each window that do not count: scoring makes no prediction of the
        first.
    """
    left = max_tokens
    for window in source:
        if left is None:
            yield window
            continue
        if left <= 0:
            return
        yield window[: left + free]
        left -= len(window[: left + free]) - free
