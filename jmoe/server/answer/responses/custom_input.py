"""Reads the text of a custom tool's call from the JSON text of its arguments, while it grows."""

import json
import re

from jmoe.server.request.apis.responses.tools import INPUT

_BEGINNING = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
# Characters and whole escapes of a JSON string; half of a surrogate pair waits for what follows it.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[0-9a-fA-F]{4}|(?=[^\\]|\\[^u])))*"
)


class InputReader:
    """Reads one call."""

    def __init__(self) -> None:
        self.unread, self.has_begun, self.is_over = "", False, False

    def feed(self, arguments: str) -> str:
        """Takes more of the arguments and returns more of the text."""
        if self.is_over:
            return ""
        self.unread += arguments
        if not self.has_begun:
            found = _BEGINNING.match(self.unread)
            if found is None:
                return ""
            self.has_begun, self.unread = True, self.unread[found.end() :]
        whole = _WHOLE.match(self.unread)
        assert whole is not None  # it may be empty
        self.unread = self.unread[whole.end() :]
        self.is_over = self.unread.startswith('"')
        text = json.loads(f'"{whole[0]}"', strict=False)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
