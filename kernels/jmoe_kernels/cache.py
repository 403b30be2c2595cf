"""Folders in which compiled things are kept between processes."""

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def user_cache() -> Path:
    """The user's folder for what jmoe compiles: in JMOE_CACHE_DIR, XDG_CACHE_HOME or ~/.cache, the first that
    there is; the temporary folder for a user without a home."""
    base = os.environ.get("JMOE_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "jmoe"
    except RuntimeError as error:
        return temporary_cache(str(error).rstrip("."))


def usable(folder: Path) -> Path:
    """``folder``, or one of its name in the temporary folder where it cannot be written to.

    One that holds something is taken in any case: a read-only image may have brought it along.
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
    """A folder that this user alone may write to: a library that another one put there would be run.

    OSError where there is no temporary folder. cause: why it is wanted, for the log.
    """
    folder = Path(tempfile.gettempdir()) / f"jmoe-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="jmoe-"))
    log.warning("%s: what is compiled is kept in %s", cause, folder)
    return folder
