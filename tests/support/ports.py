"""Ports that a test must know before the process that listens there has started."""

import socket

_KEPT: list[socket.socket] = []  # one for each port that was given, until this process ends


def own_port() -> int:
    """Returns a port that no other test gets. The system's own ports begin higher. In all processes, this
    function returns a port once, because it binds the name of a Unix socket for each."""
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
