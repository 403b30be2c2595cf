"""Runs llama.cpp as a process that answers calls of ``bench_vs_llama_cpp.py``: JSON lines in and out.

It runs under the interpreter that has llama_cpp and gguf, without jmoe. A call is ``{"call": NAME, ...}``,
and its answer is ``{"result": ...}`` or ``{"error": LINE}``. The process ends when its input ends.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from vs_llama_cpp.olmoe_gguf import write_olmoe_gguf

CELLS = 256  # llama.cpp rounds a sequence's share of the cache up to a multiple of this
LOG_ERROR = 4  # ggml's number of this level
Entry = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are requested
Answer = tuple[float, list[list[int]]]  # tokens/s, and the tokens that llama.cpp would have chosen


class ContextPlace(NamedTuple):
    """A place for one shape of batch.

    context: context of llama.cpp.
    batch: batch to which the inputs are written.
    """

    context: Any
    batch: Any


class Peer:
    """One model in memory, and a place for every requested shape of batch, as small as possible."""

    def __init__(self) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        self.gguf: Any = importlib.import_module("gguf")  # now, and not only after the model was made
        self.log = self.lib.llama_log_callback(print_errors)  # llama.cpp calls it as long as it runs
        self.lib.llama_log_set(self.log, ctypes.c_void_p(0))
        self.lib.llama_backend_init()
        self.places: dict[tuple[int, int], ContextPlace] = {}

    # ---- calls

    def versions(self) -> dict[str, str]:
        return {
            "llama_cpp_python": self.lib.__version__,
            "system_info": self.lib.llama_print_system_info().decode().strip(" |\n"),
        }

    def write(self, directory: str, file: str, sizes: dict[str, Any]) -> None:
        """Writes the bfloat16 checkpoint of ``directory`` to ``file`` for llama.cpp."""
        write_olmoe_gguf(Path(directory), Path(file), sizes)

    def quantize(self, source: str, file: str, number: int, threads: int) -> None:
        """Writes ``source`` to ``file`` in llama.cpp's type of that number."""
        params = self.lib.llama_model_quantize_default_params()
        params.ftype, params.nthread = number, threads
        if status := self.lib.llama_model_quantize(source.encode(), file.encode(), params):
            raise RuntimeError(f"llama_model_quantize returned {status} for type {number}")

    def load(self, file: str, threads: int) -> None:
        """Loads a file."""
        self.threads = threads
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(file.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self.vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def logits(self, prompt: list[int]) -> list[float]:
        """Returns the logits of the token after the prompt."""
        place = self._empty_place(1, len(prompt))
        self._feed(place, whole(prompt, 0))
        return self._logits(place, -1).tolist()

    def prefill(self, prompts: list[list[int]], tokens: list[list[int]]) -> Answer:
        """Returns the prompt tokens/s of one prompt. The next tokens, ``tokens``, are not used."""
        place = self._empty_place(1, len(prompts[0]))
        seconds = self._feed(place, whole(prompts[0], 0))
        return len(prompts[0]) / seconds, [[self._likeliest(place, -1)]]

    def decode(self, prompts: list[list[int]], tokens: list[list[int]]) -> Answer:
        """Returns the tokens/s after the first token.

        tokens: tokens that continue each sequence, even if others are likelier.
        """
        count, position, new = len(prompts), len(prompts[0]), len(tokens[0])
        place = self._empty_place(count, position + new)
        chosen, seconds = [[] for _ in prompts], 0.0
        for sequence, prompt in enumerate(prompts):
            self._feed(place, whole(prompt, sequence))
            chosen[sequence].append(self._likeliest(place, -1))
        for i in range(new - 1):
            step = [(tokens[sequence][i], position + i, sequence, True) for sequence in range(count)]
            seconds += self._feed(place, step)
            for sequence in range(count):
                chosen[sequence].append(self._likeliest(place, sequence))
        return count * (new - 1) / seconds, chosen

    # ---- llama.cpp

    def _empty_place(self, sequences: int, length: int) -> ContextPlace:
        cells = -(-length // CELLS) * CELLS
        if (sequences, cells) not in self.places:
            params = self.lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * cells, sequences
            params.n_batch = max(sequences, cells)
            params.n_threads = params.n_threads_batch = self.threads
            context = self.lib.llama_init_from_model(self.model, params)
            if not context:
                raise RuntimeError(f"llama.cpp has no context for {sequences} sequences of {cells} tokens")
            batch = self.lib.llama_batch_init(params.n_batch, 0, 1)
            self.places[sequences, cells] = ContextPlace(context, batch)
        place = self.places[sequences, cells]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(place.context), False)
        return place

    def _feed(self, place: ContextPlace, entries: list[Entry]) -> float:
        """Returns the seconds of one ``llama_decode`` until its logits are ready."""
        batch = place.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        start = time.perf_counter()
        status = self.lib.llama_decode(place.context, batch)
        self.lib.llama_get_logits(place.context)  # waits for them
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds

    def _logits(self, place: ContextPlace, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(place.context, i), (self.vocab,))

    def _likeliest(self, place: ContextPlace, i: int) -> int:
        return int(self._logits(place, i).argmax())


def whole(prompt: list[int], sequence: int) -> list[Entry]:
    """Returns the entries of a prompt. Only the logits of the last entry are requested."""
    return [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]


def print_errors(level: int, text: bytes, data: Any) -> None:
    if level == LOG_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an answer
    peer = None
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            peer = peer or Peer()
            answer = {"result": getattr(peer, arguments.pop("call"))(**arguments)}
        except Exception as error:  # the caller reports it and ends
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
