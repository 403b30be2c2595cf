"""Tries grammars of strangers in a process of its own, which a hostile one may end.

A JSON schema of 60 kB can exhaust llguidance's stack, a short grammar its time. Both would take the server
with them, so the child gets a quarter of a thread's usual stack, processor time and memory: what it compiles,
the server can.
"""

import json
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from jmoe.engine.grammar import make_tokenizer, try_grammar

MAX_SECONDS = 2.0  # of processor time
MAX_BYTES = 256 * 1024 * 1024  # of address space, beyond what the child takes with its tokenizer
STACK_BYTES = 2 * 1024 * 1024
ROOT = Path(__file__).parent.parent.parent
MAIN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from jmoe.engine.grammar_check import serve; serve()"


class GrammarChecker:
    """The parent's end, for one thread at a time. A child that ended is replaced at the next call.

    spec: ``engine.grammar.tokenizer_spec``.
    """

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.child: subprocess.Popen[str] | None = None

    def check(self, source: str) -> None:
        """Raises ValueError with one line where ``source`` cannot be compiled within the limits."""
        child = self.child
        if child is None or child.poll() is not None:
            self.close()
            child = self._start()
        answer = _ask(child, source)
        if answer is None:
            self.close()
            limits = f"{MAX_SECONDS:g} s or {MAX_BYTES >> 20} MiB"
            raise ValueError(f"it is too complex: compiling it takes more than {limits}")
        if answer["error"]:
            raise ValueError(answer["error"])

    def close(self) -> None:
        """Ends the child; it also ends by itself once this process has."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None

    def _start(self) -> "subprocess.Popen[str]":
        command, pipe, quiet = [sys.executable, "-P", "-c", MAIN], subprocess.PIPE, subprocess.DEVNULL
        self.child = child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True)
        _send(child, self.spec)
        return child


def _send(child: "subprocess.Popen[str]", message: dict[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(message) + "\n")
    child.stdin.flush()


def _ask(child: "subprocess.Popen[str]", source: str) -> dict[str, Any] | None:
    """The child's answer, None where it ended instead."""
    assert child.stdout is not None
    try:
        _send(child, {"source": source})
    except BrokenPipeError:
        return None
    line = child.stdout.readline()
    return json.loads(line) if line else None


def serve() -> None:
    """The child: a tokenizer on the first line of stdin, a grammar on each other one, an answer to each."""
    tokenizer = make_tokenizer(json.loads(sys.stdin.readline()))
    threading.stack_size(STACK_BYTES)
    _limit_memory()
    for line in sys.stdin:
        answer: dict[str, Any] = {}

        def run(source: str, answer: dict[str, Any] = answer) -> None:
            answer["error"] = try_grammar(tokenizer, source)[1]

        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # nobody handles its signal: the process ends
        thread = threading.Thread(target=run, args=[json.loads(line)["source"]])
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _limit_memory() -> None:
    sizes = Path("/proc/self/statm")
    if sizes.exists():  # Linux
        limit = int(sizes.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
