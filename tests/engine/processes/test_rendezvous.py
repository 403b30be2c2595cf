"""Tests the gate of a mesh's processes: whom it lets in, and how each notices that another is gone."""

import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from support.server.fake_engine import eventually

from jmoe.engine.processes import channel as channel_module
from jmoe.engine.processes import rendezvous
from jmoe.engine.processes.channel import Channel, Followers
from jmoe.engine.processes.rendezvous import Gate, Tunnel, knock
from jmoe.engine.request import EngineDead


@pytest.fixture
def meet():
    """Returns both ends of one channel, as (followers, channel); a refused end is its exception instead."""
    ends: list[Any] = []

    def meet_with(near: dict, far: dict, strangers: Callable[[int], None] = lambda port: None):
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]

        def lead() -> Followers:
            return Followers(Gate(listening, 2, 1), near, b"S")

        def follow() -> Channel:
            channel = Channel(knock("127.0.0.1", port, 1)[0])
            ends.append(channel)
            channel.agree(far, 0)
            channel.keep_alive(b"s")
            return channel

        with ThreadPoolExecutor(2) as pool:
            leading = pool.submit(lead)
            strangers(port)
            following = pool.submit(follow)
            found = [end.exception(timeout=120) or end.result() for end in (leading, following)]
        ends.extend(end for end in found if isinstance(end, Followers))
        return found

    yield meet_with
    for end in ends:
        end.close()


def say(port: int, *pieces: bytes) -> bytes:
    """Returns what a connection that sends ``pieces`` and then nothing receives until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as stranger:
        for piece in pieces:
            stranger.sendall(piece)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            return stranger.recv(100)
    return b""


def test_strangers_are_refused_and_the_processes_meet_all_the_same(meet, caplog):
    hello = partial(rendezvous.HELLO.pack, rendezvous.MAGIC)

    def strangers(port: int) -> None:
        assert say(port, bytes(rendezvous.HELLO.size)) == b""  # not jmoe's protocol
        assert say(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        assert say(port, b"") == b""
        none = bytes(rendezvous.TOKEN)
        assert say(port, hello(rendezvous.Purpose.TUNNEL, 1, none)) == b""  # before anybody has joined
        refused = rendezvous.ANSWER.unpack(say(port, hello(rendezvous.Purpose.JOIN, 2, none)))
        assert refused == (rendezvous.MAGIC, rendezvous.Verdict.UNKNOWN, none)

    followers, channel = meet({"a": [1, 2]}, {"a": (1, 2)}, strangers)
    followers.send([b"ab", b"c"])
    assert channel.read(3) == b"abc" and followers.loss is None
    assert "it does not speak jmoe's protocol" in caplog.text
    assert "it says it is process 1 and does not know that one's token" in caplog.text


def test_a_number_is_given_once_and_is_free_again_where_its_process_ended_before_all_had_joined():
    listening = socket.create_server(("127.0.0.1", 0))
    port, door = listening.getsockname()[1], Gate(listening, 3, 1)
    first, token = knock("127.0.0.1", port, 1)
    with pytest.raises(ValueError, match="node_rank 1: a process of that number has joined"):
        knock("127.0.0.1", port, 1)
    with pytest.raises(ValueError, match="node_rank 3: process 0 was started with a smaller nnodes"):
        knock("127.0.0.1", port, 3)
    first.close()
    again, other = knock("127.0.0.1", port, 1)
    second, _ = knock("127.0.0.1", port, 2)
    assert token != other and sorted(door.meet(120)) == [1, 2]
    again.close()
    with pytest.raises(ValueError, match="has joined process 0 already"):  # the meeting is over
        knock("127.0.0.1", port, 1)
    second.close()
    door.close()


def test_slow_strangers_hold_nobody(monkeypatch, meet, caplog):
    """They send a byte at a time, and take every place for connections that have said nothing yet."""
    monkeypatch.setattr(rendezvous, "GREETING", 1)
    monkeypatch.setattr(rendezvous, "VISITORS", 4)
    open_ones: list[socket.socket] = []

    def strangers(port: int) -> None:
        open_ones.extend(socket.create_connection(("127.0.0.1", port)) for _ in range(8))

    followers, channel = meet({}, {}, strangers)
    followers.send([b"x"])
    assert channel.read(1) == b"x"
    assert eventually(lambda: caplog.text.count("it sent 0 of") >= 4)
    for stranger in open_ones:
        stranger.close()


def test_a_meeting_that_is_not_complete_says_who_is_missing():
    door = Gate(socket.create_server(("127.0.0.1", 0)), 3, 1)
    with pytest.raises(ValueError, match="process 1 did not join within 0 s"):
        door.meet(0.01)
    door.close()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ValueError, match=r"process 0 did not answer at 127.0.0.1 port \d+ \(dist_init"):
            knock("127.0.0.1", silent.getsockname()[1], 1, limit=0.01)


def test_a_tunnel_leads_to_the_coordinator_and_stays_open_where_it_ends():
    coordinator, listening = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    port = listening.getsockname()[1]
    door = Gate(listening, 2, coordinator.getsockname()[1])
    connection, token = knock("127.0.0.1", port, 1)
    with socket.create_connection(("127.0.0.1", Tunnel("127.0.0.1", port, 1, token).port)) as near:
        near.sendall(b"question")
        far, _ = coordinator.accept()
        assert far.recv(8) == b"question"
        far.sendall(b"answer")
        assert near.recv(6) == b"answer"
        far.close()
        near.settimeout(0.2)
        with pytest.raises(TimeoutError):  # else jax would end the process before its channel can say why
            near.recv(1)
    connection.close()
    door.close()


def test_a_lost_follower_is_noticed(meet, caplog):
    followers, channel = meet({}, {})
    channel.close()
    assert eventually(lambda: followers.loss)
    said = "process 1 is gone (the connection was closed): nothing more can run on this mesh"
    assert eventually(lambda: said in caplog.text)
    with pytest.raises(EngineDead, match="process 1 is gone"):
        followers.send([b"d"])


def test_a_process_that_says_nothing_any_more_is_lost_to_both_ends(monkeypatch, meet):
    monkeypatch.setattr(channel_module, "SILENCE", 0.5)
    monkeypatch.setattr(channel_module, "BEAT", 60)  # as a stopped process
    followers, channel = meet({}, {})
    assert eventually(lambda: followers.loss)
    assert "process 1 is gone (it was silent for" in str(followers.loss)
    with pytest.raises(EngineDead, match="it was silent for"):
        channel.read(1)


def test_signs_of_life_keep_a_line(monkeypatch, meet):
    monkeypatch.setattr(channel_module, "SILENCE", 4)
    monkeypatch.setattr(channel_module, "BEAT", 0.05)
    followers, channel = meet({}, {})
    assert channel.read(90) == b"S" * 90 and followers.loss is None


def test_process_0_may_end_with_a_last_word_or_without(meet):
    followers, channel = meet({}, {})
    followers.close(b"bye")
    assert channel.read(3) == b"bye" and followers.loss is None
    with pytest.raises(EngineDead, match="the connection was closed"):
        channel.read(1)


def test_other_flags_in_another_process_are_refused_by_both(meet):
    near, far = meet({"model": "m", "max_num_seqs": 8}, {"model": "m", "max_num_seqs": 4})
    assert str(near).startswith("max_num_seqs is 8 here and 4 in process 1:")
    assert str(far).startswith("max_num_seqs is 4 here and 8 in process 0:")


def test_another_process_that_sends_no_settings_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far = socket.create_connection(listening.getsockname())
        channel = Channel(listening.accept()[0])
    far.sendall(channel_module.LENGTH.pack(1 << 31))
    with pytest.raises(EngineDead, match="sent 2147483648 bytes of settings; the limit is 1048576"):
        channel.agree({}, 1)
    channel.close()
    far.close()
