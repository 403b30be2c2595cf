"""Ports that a test must know before the process that listens there has started."""

import socket

_KEPT: list[socket.socket] = []  # one for each port that was given, until this process ends


def own_port() -> int:
    """A port that nobody else is given: not by the system, whose own begin higher, and not by this function
    in any process, since the name of a Unix socket is taken for each."""
    for port in range(15_000, 30_000):
        name, probe = socket.socket(socket.AF_UNIX), socket.socket()
        try:
            name.bind(f"\0jmoe-tests-port-{port}")
            with probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            name.close()
            probe.close()
            continue
        _KEPT.append(name)
        return port
    raise RuntimeError("no port is free")
