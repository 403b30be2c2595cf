"""The folders that keep compiled things from one process to the next."""

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def user_cache() -> Path:
    """Returns the user's folder for what jmoe compiles.

    It lies in JMOE_CACHE_DIR or else in XDG_CACHE_HOME if that is set, and otherwise in ~/.cache. A user
    without a home gets the temporary folder.
    """
    base = os.environ.get("JMOE_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "jmoe"
    except RuntimeError as error:
        return temporary_cache(str(error).rstrip("."))


def usable(folder: Path) -> Path:
    """Returns ``folder``, or a folder of its name in the temporary folder if ``folder`` cannot be written to.

    A folder that holds something is returned in any case: a read-only image may have brought it along. If the
    temporary folder fails too, a warning is logged and ``folder`` is returned.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        cause = f"{folder}: {error.strerror}"
    try:
        return temporary_cache(cause) / folder.name
    except OSError as error:
        log.warning("%s, and %s: what is compiled is not kept", cause, error)
        return folder


def temporary_cache(cause: str) -> Path:
    """Returns a folder that only this user may write to: a library that somebody else put there would run.

    cause: why the folder is needed, for the log.
    Raises OSError if there is no temporary folder.
    """
    folder = Path(tempfile.gettempdir()) / f"jmoe-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="jmoe-"))
    log.warning("%s: what is compiled is kept in %s", cause, folder)
    return folder
