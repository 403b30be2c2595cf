"""A headless Chromium, driven over a pipe in its devtools protocol."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
         "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage")  # fmt: skip


class Page:
    """One tab.

    requests: URLs that it requested.
    errors: what its scripts or its policy complained of.
    """

    def __init__(self, reading: int, writing: int):
        self.reading, self.writing = reading, writing
        self.numbers, self.buffer = itertools.count(1), b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message(30)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self, seconds: float) -> dict[str, Any]:
        """Returns the next message; the requests and errors that it reports are kept."""
        while b"\0" not in self.buffer:
            assert select.select([self.reading], [], [], seconds)[0], "the browser is silent"
            read = os.read(self.reading, 1 << 16)
            assert read, "the browser has ended"
            self.buffer += read
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"]["exception"]["description"])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
        return message

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 120.0) -> Any:
        """Returns the value of ``expression`` once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            time.sleep(0.05)
        return value

    def size(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Starts a browser.

    profile: empty directory for the browser's files.
    """
    assert CHROMIUM is not None
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    # bash: other shells know no descriptors above 9
    command = f'exec "$@" 3<&{their_in} 4>&{their_out}'
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_in, their_out),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(our_in, our_out)
    finally:
        os.close(our_out)  # the browser ends when the pipe does
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(our_in)
