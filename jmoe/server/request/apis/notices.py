"""Lines of the log about clients, each written once: clients repeat in every request what they send."""

import logging
import threading

log = logging.getLogger(__name__)
MAX_NOTICES = 1000  # clients choose the names of fields


class Notices:
    """Remembers what has been logged. Any thread may use it."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.lock = threading.Lock()

    def tell_once(self, text: str) -> None:
        """Logs ``text``, unless it has been logged or very many others have."""
        with self.lock:
            if text in self.known or len(self.known) >= MAX_NOTICES:
                return
            self.known.add(text)
        log.info("%s", text)
