"""The process that tries grammars of untrusted clients: it makes the tokenizer once and forks per grammar.

A JSON schema of 60 kB can exhaust llguidance's stack, and a short grammar its time. A fork gets a quarter of
a thread's usual stack and limited processor time and memory: a grammar that it compiles, the server can
compile too. Forks run in parallel, so the system shares the processors among costly and cheap grammars.
"""

import json
import os
import resource
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import llguidance

from jmoe.engine.grammar.tokens import follow, make_tokenizer, try_grammar

MAX_BYTES = 256 * 1024 * 1024  # address space beyond that of the process with its tokenizer
STACK_BYTES = 2 * 1024 * 1024


def serve() -> None:
    """Reads the tokenizer (8 bytes of length, then JSON) from the socket on stdin, then one byte and one
    socket for every grammar."""
    control = socket.socket(fileno=0)
    spec = json.loads(_exactly(control, int.from_bytes(_exactly(control, 8), "big")))
    tokenizer = make_tokenizer(spec)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    memory = _memory_limit()
    while True:
        data, handles, *_ = socket.recv_fds(control, 1, 1)
        if not data:  # the server has ended
            return
        for handle in handles:
            if _fork() == 0:
                control.close()
                _answer(socket.socket(fileno=handle), tokenizer, spec["end_ids"], memory)
            os.close(handle)


def _fork() -> int:
    try:
        return os.fork()
    except OSError:  # no processes left: the server sees its socket closed without an answer
        return -1


def _answer(
    server: socket.socket, tokenizer: llguidance.LLTokenizer, ends: list[int], memory: int | None
) -> None:
    """Does the work of a fork: sends its process id, reads a grammar and its time limit in seconds, and sends
    what is wrong with the grammar."""
    try:
        server.sendall(f"{os.getpid()}\n".encode())
        request = json.loads(server.makefile().readline())
        answer: dict[str, Any] = {}

        def run() -> None:
            matcher, error = try_grammar(tokenizer, request["source"])
            answer["error"] = error if matcher is None else follow(matcher, ends)

        threading.stack_size(STACK_BYTES)
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal kills the process
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if answer:
            server.sendall(json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def _exactly(control: socket.socket, size: int) -> bytes:
    read = bytearray()
    while len(read) < size:
        part = control.recv(min(size - len(read), 1 << 20))
        if not part:
            raise EOFError("the server ended")
        read += part
    return bytes(read)


def _memory_limit() -> int | None:
    sizes = Path("/proc/self/statm")
    if not sizes.exists():  # not Linux
        return None
    return int(sizes.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
