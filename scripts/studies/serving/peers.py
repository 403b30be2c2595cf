"""Describes a server that jmoe's is compared with: how to install, start and call it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Load:
    """The load for which a server must have room.

    concurrency: number of requests at a time.
    input_len: number of words in a prompt.
    output_len: number of tokens in an answer.
    dtype: type of the weights.
    """

    concurrency: int
    input_len: int
    output_len: int
    dtype: str


@dataclass(frozen=True)
class Peer:
    """A server that jmoe's is compared with.

    command: program of the server.
    install: how to install it.
    words: function (model, port, load) -> the words after the program in the command line.
    prompt_form: form of a prompt that it takes, "text" or "ids".
    packages: packages whose versions are reported.
    extra: fields that are added to the body of a request of ``jmoe bench serve``; a field whose value is None
        is removed from it.
    environment: environment variables with which it is started.
    """

    command: str
    install: str
    words: Callable[[Path, int, Load], list[str]]
    prompt_form: Literal["ids", "text"]
    packages: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def shown(self, words: list[str]) -> list[str]:
        """Returns the words of the command line that have a meaning on another machine."""
        return [w for before, w in zip(["", *words], words, strict=False) if "--port" not in (before, w)][2:]
