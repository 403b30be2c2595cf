"""A client of any OpenAI-compatible server: its models, and a chat answer piece by piece."""

import http.client
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class ServedModel:
    """A model of a server.

    context: limit on the tokens of prompt and answer; None = not reported.
    """

    name: str
    context: int | None
    owner: str


class ChatClient:
    """A client of the server at a URL, with or without ``/v1`` at its end.

    Its methods raise ValueError with one line if the server is not there or refuses.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600):
        """Raises ValueError if ``url`` is not an address with http or https."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self._place = parts.hostname, port
        self._root = f"{path}/v1"
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self._connect = kinds[parts.scheme]
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[ServedModel]:
        """Returns the models that the server lists."""
        connection = self._connection()
        try:
            answer = json.loads(self._send(connection, "GET", "/models").read())
            rows = answer["data"]
            return [ServedModel(r["id"], r.get("max_model_len"), r.get("owned_by", "")) for r in rows]
        except Refused:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OSError, http.client.HTTPException):
            raise ValueError(f"{self.url} lists no models: it is not OpenAI-compatible") from None
        finally:
            connection.close()

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yields the deltas of a chat answer as they come. Closing the iterator closes the connection, by
        which the server knows that nobody waits for the rest."""
        connection = self._connection()
        try:
            answer = self._send(connection, "POST", "/chat/completions", json.dumps(body | {"stream": True}))
            for event in events(iter(answer.readline, b"")):
                if isinstance(error := event.get("error"), dict):
                    raise Refused(_brief(error.get("message")))
                for choice in event.get("choices") or ():
                    yield choice.get("delta") or {}
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"{self.url} broke off: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        return self._connect(*self._place, timeout=self._timeout)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, self._root + path, body and body.encode(), self._headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"{self.url} does not answer: {error or type(error).__name__}") from None
        if answer.status != 200:
            raise Refused(f"{self.url} answered {answer.status}: {_message(answer.read())}")
        return answer


class Refused(ValueError):
    """A server that refuses, breaks off or is not there, in one line."""


def events(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a stream of server-sent events, up to ``[DONE]`` or its end."""
    data: list[str] = []
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        if line or not data:
            continue
        text, data = "\n".join(data), []
        if text == "[DONE]":
            return
        try:
            event = json.loads(text)
        except ValueError:
            raise Refused(f"an event of the answer is not JSON: {_brief(text)}") from None
        if isinstance(event, dict):
            yield event


def _message(body: bytes) -> str:
    """Returns the message of an error in OpenAI's form, else the beginning of the text."""
    try:
        return _brief(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _brief(body.decode("utf-8", "replace")) or "no text"


def _brief(text: object) -> str:
    return " ".join(str(text).split())[:300]
