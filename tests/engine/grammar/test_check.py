"""Tests the processes that try grammars if they are killed, stopped or starved, or if Rust panics."""

import os
import signal
import subprocess
import threading

import pytest
from support.server.fake_engine import EOS, VOCAB, ByteCodec, eventually

from jmoe.engine.grammar import check as grammar_check
from jmoe.engine.grammar.check import CheckerUnavailable, GrammarChecker, TooCostly
from jmoe.engine.grammar.grammar import Grammar, GrammarCompiler, GrammarConstraint
from jmoe.engine.grammar.tokens import panics_as_errors

GOOD, BAD = Grammar("regex", "a").source(), Grammar("regex", "a(b").source()
ENDLESS = Grammar("json_schema", '{"type": "integer", "multipleOf": 1000003}').source()


@pytest.fixture(scope="module")
def spec():
    return GrammarCompiler(ByteCodec.tokenizer, VOCAB, [EOS]).spec


@pytest.fixture
def checker(spec, monkeypatch):
    """Makes a checker whose child has a minute to get processor time: a busy machine may take it away."""
    monkeypatch.setattr(grammar_check, "STALL_SECONDS", 60.0)
    checker = GrammarChecker(spec)
    checker.check(GOOD)
    yield checker
    checker.close()


@pytest.fixture
def stalls(checker, monkeypatch):
    """Gives the child one second at the first look after it was stopped; the next request has its minute."""
    line = grammar_check._line

    def impatient(end, pid):
        monkeypatch.setattr(grammar_check, "STALL_SECONDS", 1.0)
        monkeypatch.setattr(grammar_check, "_line", line)
        try:
            return line(end, pid)
        finally:
            monkeypatch.setattr(grammar_check, "STALL_SECONDS", 60.0)

    return lambda: monkeypatch.setattr(grammar_check, "_line", impatient)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_child_that_ended_or_was_stopped_is_replaced(checker, stalls, sent):
    first = checker.child
    first.send_signal(sent)
    if sent == signal.SIGSTOP:
        stalls()
    else:
        first.wait()
    checker.check(GOOD)
    with pytest.raises(ValueError, match="unclosed group"):
        checker.check(BAD)
    assert checker.child is not first and first.poll() is not None


def test_a_stopped_try_is_ended_and_made_again(checker, stalls, monkeypatch):
    """Its child goes on, because only the fork was stopped."""
    stopped, talk = [], grammar_check._talk

    def stop_the_first(fork, message, pid):
        if not stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
            stalls()
        return talk(fork, message, pid)

    child = checker.child
    monkeypatch.setattr(grammar_check, "_talk", stop_the_first)
    checker.check(GOOD)
    assert checker.child is child
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


def test_a_child_that_never_answers_is_given_up(checker, monkeypatch):
    monkeypatch.setattr(grammar_check, "MAIN", "import time; time.sleep(1000)")
    monkeypatch.setattr(grammar_check, "STALL_SECONDS", 1.0)
    checker.close()
    with pytest.raises(CheckerUnavailable, match="does not answer"):
        checker.check(GOOD)
    assert checker.child is None


@pytest.mark.parametrize("name", ["socket.socketpair", "subprocess.Popen"])
def test_what_the_system_refuses_is_unavailable(checker, monkeypatch, name):
    def none(*_, **__):
        raise OSError("Too many open files")

    checker.close()
    with monkeypatch.context() as patch:
        patch.setattr(name, none)
        with pytest.raises(CheckerUnavailable, match="Too many open files"):
            checker.check(GOOD)
    checker.check(GOOD)


def test_tries_run_side_by_side_and_end_alone(checker, monkeypatch):
    """The costly ones have begun, and are held until the cheap ones have ended."""
    child, costs, begun, going = checker.child, [], [], threading.Event()
    talk = grammar_check._talk

    def held(fork, message, pid):
        if b"1000003" in message:
            begun.append(pid)
            assert going.wait(120)
        return talk(fork, message, pid)

    monkeypatch.setattr(grammar_check, "_talk", held)

    def cost():
        with pytest.raises(TooCostly):
            checker.check(ENDLESS)
        costs.append(1)

    threads = [threading.Thread(target=cost) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: len(begun) == 2)
    for _ in range(5):
        checker.check(GOOD)
    going.set()
    for thread in threads:
        thread.join()
    assert len(costs) == 2 and checker.child is child

    def forks() -> list[str]:
        return subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()

    assert eventually(lambda: not forks())


PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


def test_a_panic_fails_one_answer_and_nothing_else():
    class Panics:
        def compute_bitmask(self, *_):
            raise PanicException("index out of bounds")

        consume_token = deep_copy = validate_tokens = compute_bitmask
        is_accepting = is_stopped = bool

    constraint = GrammarConstraint(Panics(), 1, [], has_inner_text=False)
    for call in (constraint.allowed, lambda: constraint.is_allowed(0), lambda: constraint.accept(0)):
        with pytest.raises(ValueError, match="llguidance failed: index out of bounds"):
            call()
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
