"""The settings of the server: its address, its limits, its key and its origins."""

import re
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from jmoe.config.reading import Secret, check_fields

Seconds = Annotated[float, Meta(gt=0, le=1e9, description="above 0 seconds and at most 1e9")]
Wait = Annotated[float, Meta(ge=0, le=1e9, description="at least 0 seconds and at most 1e9")]
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,*]+")
MAX_KEEP_ALIVE = 24 * 60 * 60


@dataclass(frozen=True)
class ServerSettings:
    """The server's settings. The constructor raises ValueError naming the setting and its limit.

    served_model_name: model name that requests may have, or several, of which answers to requests without a
        name carry the first; None = the name that ``serve`` got.
    api_key: key that requests must have; None = no key is needed.
    shutdown_timeout: seconds that running answers get to finish after SIGTERM.
    request_timeout: seconds from a request's arrival to the end of its answer; None = no limit.
    header_timeout, body_timeout: seconds to wait for a request's head and for more of its body.
    write_timeout: seconds in which a client must take some of what is sent to it.
    keep_alive: seconds for which a connection without a request stays open.
    chat_template: file of the chat template; None = the model's own.
    tool_format: form in which the model writes calls of functions: "auto" finds it, "none" has none; else the
        name of a format or the path of its TOML file.
    allowed_origins: origins of web pages whose scripts may use the server, "*" for all.
    response_store: whether answers of /v1/responses are kept in memory for later requests.
    """

    served_model_name: str | tuple[str, ...] | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    api_key: Secret | None = None
    shutdown_timeout: Wait = 30.0
    request_timeout: Seconds | None = None
    max_body_bytes: int = 8 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    header_timeout: Seconds = 20.0
    body_timeout: Seconds = 30.0
    write_timeout: Seconds = 60.0
    keep_alive: Annotated[int, Meta(ge=0, le=MAX_KEEP_ALIVE)] = 75
    chat_template: str | None = None
    tool_format: str = "auto"
    allowed_origins: tuple[str, ...] = ()
    response_store: bool = True

    @property
    def served_names(self) -> tuple[str, ...]:
        """The model names that requests may have; empty if none is set."""
        name = self.served_model_name
        return (name,) if isinstance(name, str) else name or ()

    def __post_init__(self) -> None:
        check_fields(self)
        if "" in self.served_names or self.served_model_name == ():
            raise ValueError("served_model_name must not be empty")
        if len(set(self.served_names)) < len(self.served_names):
            raise ValueError(f"served_model_name has a name twice: {', '.join(self.served_names)}")
        if self.host == "":
            raise ValueError("host must not be empty")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ValueError("api_key must be printable ASCII and not empty")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                form = "'*' or like https://example.org:8443, in lower case and without a path"
                raise ValueError(f"allowed_origins must be {form}, got {origin!r}")
