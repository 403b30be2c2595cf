"""How the server listens and what it admits."""

from dataclasses import dataclass

from jmoe.server.bounds import MAX_BODY_BYTES


@dataclass(frozen=True)
class ServerSettings:
    """served_model_name: the only model name requests may give; None = as it was named to ``serve``.

    api_key: None = no key is asked for. shutdown_timeout: seconds that running answers get to finish after
    SIGTERM. request_timeout: seconds from a request's arrival to the end of its answer, None = no limit.
    header_timeout, body_timeout: seconds to wait for a request's head and for more of its body.
    write_timeout: seconds in which a client must take some of what is sent to it.
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
