"""Starts llama.cpp's process (``vs_llama_cpp.peer``) and calls it; it runs under another interpreter."""

import json
import subprocess
from pathlib import Path
from typing import Any

from shared.protocol import Contender, Row, Run

SCRIPTS, PEER = Path(__file__).parents[1], "vs_llama_cpp.peer"


class LlamaCpp:
    """A process of ``vs_llama_cpp.peer`` under ``python``, which answers one call at a time."""

    def __init__(self, python: str):
        try:
            self.process = subprocess.Popen(
                [python, "-m", PEER], cwd=SCRIPTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise SystemExit(f"--llama-python {python}: {error.strerror}") from None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.communicate()  # closes its input, which ends it

    def call(self, name: str, **values: Any) -> Any:
        """Returns the answer to a call. An error of the peer ends this program with the error's line."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps({"call": name, **values}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise SystemExit("llama.cpp's process has ended") from None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process has ended"}
        if "error" in answer:
            hint = " (how to install it: --help)" if "ModuleNotFound" in answer["error"] else ""
            raise SystemExit(f"llama.cpp: {answer['error']}{hint}")
        return answer["result"]

    def contender(self, row: Row, tokens: list[list[int]]) -> Contender:
        """Returns a contender that runs ``row`` and continues its prompts with ``tokens``."""

        def run(prompts: list[list[int]], new: int) -> Run:
            return self.call(row.phase, prompts=prompts, tokens=[t[:new] for t in tokens])

        return run
