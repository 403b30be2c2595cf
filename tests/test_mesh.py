"""Emulated CPU devices have the threads that their collectives need."""

import os

from jmoe.mesh import THREADS, give_threads


def test_emulated_devices_get_threads_each(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    give_threads()
    assert os.environ["NPROC"] == str(8 * THREADS), "the tests emulate eight devices"


def test_a_number_that_is_set_stays(monkeypatch):
    monkeypatch.setenv("NPROC", "5")
    give_threads()
    assert os.environ["NPROC"] == "5"
