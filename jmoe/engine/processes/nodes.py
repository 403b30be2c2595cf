"""Several processes whose devices are one mesh: who they are (``Nodes``), how they ``join`` and ``leave``.

The command line's ``--nnodes``, ``--node-rank`` and ``--dist-init-addr`` set them. Once joined, every process
sees the devices of all, and all must launch the same programs in the same order; ``lockstep`` ensures that.
"""

import logging
import os
import socket
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import jax
from msgspec import Meta

from jmoe.config.reading import check_fields

Whole = Annotated[int, Meta(description="a whole number")]
log = logging.getLogger(__name__)
HEARTBEAT = 30  # seconds without a sign of life after which jax ends the processes that are left
LEAVING = 10  # seconds that an ending process waits for the others to end too


@dataclass(frozen=True)
class Nodes:
    """``nnodes`` processes, of which this is number ``node_rank``.

    dist_init_addr: address HOST:PORT of number 0.
    """

    nnodes: Whole = 1
    node_rank: Whole | None = None
    dist_init_addr: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        last = self.nnodes - 1
        if last < 0:
            raise ValueError(f"nnodes must be at least 1, got {self.nnodes}")
        for name in ("node_rank", "dist_init_addr"):
            if last == 0 and getattr(self, name) is not None:
                raise ValueError(f"{name} is for several processes: it needs nnodes of at least 2")
        if last and self.node_rank is None:
            raise ValueError(f"nnodes {self.nnodes} needs node_rank, this process's number from 0 to {last}")
        if not 0 <= self.rank <= last:
            raise ValueError(f"node_rank must be from 0 to nnodes - 1 = {last}, got {self.node_rank}")
        if last and self.dist_init_addr is None:
            raise ValueError(f"nnodes {self.nnodes} needs dist_init_addr, HOST:PORT of process 0")
        if last and not (self.host and 0 < self.port < 2**16):
            raise ValueError(f"dist_init_addr must be HOST:PORT, got {self.dist_init_addr!r}")

    @property
    def rank(self) -> int:
        return self.node_rank or 0

    @property
    def host(self) -> str:
        return str(self.dist_init_addr).rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port of process 0; 0 if the address has none."""
        port = str(self.dist_init_addr).rpartition(":")[2]
        return int(port) if port.isdecimal() else 0


def join(nodes: Nodes, coordinator: int) -> None:
    """Makes jax's devices those of all processes. Raises ValueError if the processes cannot be one mesh. It
    must be called before anything touches a device.

    coordinator: port on the loopback address, where process 0 starts jax's coordination service and where the
        others reach it (see ``rendezvous``).
    """
    log.info("process %d of %d: joining at %s", nodes.rank, nodes.nnodes, nodes.dist_init_addr)
    # The service would take SIGTERM for a notice that the machine goes away, and the process would live on.
    jax.config.update("jax_enable_preemption_service", False)
    address = f"127.0.0.1:{coordinator}"
    jax.distributed.initialize(
        address,
        nodes.nnodes,
        nodes.rank,
        cluster_detection_method="deactivate",  # the flags say all there is to know
        coordinator_bind_address=address,  # jax's own choice is every address of the machine
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=2 * LEAVING,  # jax would abort after this time; see leave
    )
    counts = [n for _, n in sorted(Counter(d.process_index for d in jax.devices()).items())]
    if len(counts) != nodes.nnodes or len(set(counts)) != 1:
        raise ValueError(f"every process must have as many devices as the others; they have {counts}")


def leave(code: int) -> int:
    """Returns ``code`` once all processes have left together. After a failure, or if another process does not
    leave, it ends this process with ``code``: a step that waits for a lost process never ends, and jax would
    wait for it too, and then abort."""
    if code == 0:
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(LEAVING)
        if not leaving.is_alive():
            return code
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket of process 0. Port 0 takes any free port. A ValueError says why it cannot
    listen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"process 0 cannot listen on {host} port {port} (dist_init_addr): {why}") from None


def free_port() -> int:
    """Returns a port that is free on the loopback address at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
