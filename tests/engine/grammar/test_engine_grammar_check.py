"""The processes that try grammars: killed, stopped, starved, and a panic in Rust."""

import os
import signal
import subprocess
import threading

import pytest
from support.server.fake_engine import EOS, VOCAB, ByteCodec

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
    monkeypatch.setattr(grammar_check, "STALL_SECONDS", 1.0)
    checker = GrammarChecker(spec)
    checker.check(GOOD)
    yield checker
    checker.close()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_child_that_ended_or_was_stopped_is_replaced(checker, sent):
    first = checker.child
    first.send_signal(sent)
    if sent != signal.SIGSTOP:
        first.wait()
    checker.check(GOOD)
    with pytest.raises(ValueError, match="unclosed group"):
        checker.check(BAD)
    assert checker.child is not first and first.poll() is not None


def test_a_stopped_try_is_ended_and_made_again(checker, monkeypatch):
    """Its child goes on, because only the fork was stopped."""
    stopped, talk = [], grammar_check._talk

    def stop_the_first(fork, message, pid):
        if not stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        return talk(fork, message, pid)

    child = checker.child
    monkeypatch.setattr(grammar_check, "_talk", stop_the_first)
    checker.check(GOOD)
    assert checker.child is child
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


def test_a_child_that_never_answers_is_given_up(checker, monkeypatch):
    monkeypatch.setattr(grammar_check, "MAIN", "import time; time.sleep(1000)")
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


def test_tries_run_side_by_side_and_end_alone(checker):
    child, costs = checker.child, []

    def cost():
        with pytest.raises(TooCostly):
            checker.check(ENDLESS)
        costs.append(1)

    threads = [threading.Thread(target=cost) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        checker.check(GOOD)
    assert not costs, "the cheap ones waited for the costly ones"
    for thread in threads:
        thread.join()
    assert len(costs) == 2 and checker.child is child
    forks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True)
    assert not forks.stdout.split()


PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


def test_a_panic_fails_one_answer_and_nothing_else():
    class Panics:
        def compute_bitmask(self, *_):
            raise PanicException("index out of bounds")

        consume_token = deep_copy = compute_bitmask

    constraint = GrammarConstraint(Panics(), 1)
    for call in (constraint.allowed, lambda: constraint.accept(0)):
        with pytest.raises(ValueError, match="llguidance failed: index out of bounds"):
            call()
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
