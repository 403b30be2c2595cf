"""How the server listens and what it admits."""

import re
from dataclasses import dataclass

from jmoe.server.bounds import MAX_BODY_BYTES

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,*]+")
MAX_KEEP_ALIVE = 24 * 60 * 60


@dataclass(frozen=True)
class ServerSettings:
    """served_model_name: the only model name requests may give; None = as it was named to ``serve``.

    api_key: None = no key is asked for. shutdown_timeout: seconds that running answers get to finish after
    SIGTERM. request_timeout: seconds from a request's arrival to the end of its answer, None = no limit.
    header_timeout, body_timeout: seconds to wait for a request's head and for more of its body.
    write_timeout: seconds in which a client must take some of what is sent to it.
    keep_alive: seconds for which a connection without a request stays open.
    allowed_origins: the origins of web pages whose scripts may use the server, "*" for all.
    Raises ValueError naming the setting and its limit.
    """

    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    shutdown_timeout: float = 30.0
    request_timeout: float | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    max_header_bytes: int = 64 * 1024
    header_timeout: float = 20.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    keep_alive: int = 75
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.served_model_name == "":
            raise ValueError("served_model_name must not be empty")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ValueError("api_key must be printable ASCII and not empty")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise ValueError(f"shutdown_timeout must be at least 0 seconds, got {self.shutdown_timeout}")
        limit = self.request_timeout
        if limit is not None and not 0 < limit < float("inf"):
            raise ValueError(f"request_timeout must be above 0 seconds, got {limit}")
        if not 0 <= self.keep_alive <= MAX_KEEP_ALIVE:
            raise ValueError(f"keep_alive must be 0 to {MAX_KEEP_ALIVE} seconds, got {self.keep_alive}")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                form = "'*' or like https://example.org:8443, in lower case and without a path"
                raise ValueError(f"allowed_origins must be {form}, got {origin!r}")
