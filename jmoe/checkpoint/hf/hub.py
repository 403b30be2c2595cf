"""Models of the Hugging Face Hub: their ids, and their files in huggingface_hub's cache.

Token, cache, endpoint and offline mode are those of huggingface_hub: HF_TOKEN or its login file, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE. It resumes a download that was cut. A repository's
code is never fetched, nor are pickled weights.
"""

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jmoe.checkpoint.source import CONFIG, GGUF, Directory, is_first_part

log = logging.getLogger(__name__)

TEXTS = ("*.json", "*.jinja", "tokenizer.model")  # the configuration, the tokenizer, the chat template
WEIGHTS = "*.safetensors"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # read next to a GGUF file
COMMIT = re.compile(r"[0-9a-f]{40}")
PART = re.compile(r"-\d{5}-of-(\d{5}\.gguf)$", re.IGNORECASE)
NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
ID = re.compile(rf"(?P<repository>{NAME}/{NAME})(?::(?P<kind>[\w.-]+)|/(?P<file>[^:]+\.gguf))?", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A model of the Hub: ``ORG/NAME``, or a GGUF file of it as ``ORG/NAME:QUANT`` or ``ORG/NAME/FILE.gguf``.

    kind: QUANT, the end of the file's name; "" without one.
    file: path of the GGUF file in the repository; "" without one.
    """

    repository: str
    kind: str = ""
    file: str = ""

    @property
    def is_gguf(self) -> bool:
        return bool(self.kind or self.file)

    @property
    def patterns(self) -> list[str]:
        """Patterns of the GGUF files, all parts of a split one."""
        if self.file:
            return [PART.sub(r"-?????-of-\1", self.file)]
        kinds = {self.kind, self.kind.upper(), self.kind.lower()}
        ends = (GGUF, f"-?????-of-?????{GGUF}")
        return [f"*[-._]{kind}{end}" for kind in sorted(kinds) for end in ends]


@dataclass(frozen=True)
class Fetched:
    """A model of the Hub in the cache.

    path: its folder, or its GGUF file, the first one of a split model.
    commit: the commit hash of its files.
    """

    path: Path
    commit: str


def hub_id(text: str) -> HubId | None:
    """Returns the model of the Hub that a text names; None if it has the shape of a path."""
    found = ID.fullmatch(text)
    if found is None or any(pair in found["repository"] for pair in ("--", "..")):
        return None
    if found["repository"].endswith(GGUF):
        return None  # a file that is not here
    return HubId(found["repository"], found["kind"] or "", found["file"] or "")


def fetch(
    hub: HubId, revision: str | None = None, download_dir: str | None = None, *, weights: bool = True
) -> Fetched:
    """Returns the files of a model, from the cache or the Hub. A ValueError says in one line why there are
    none.

    revision: branch, tag or commit hash; None = the main branch.
    download_dir: folder of the cache; None = huggingface_hub's own.
    weights: whether the weights are fetched too, or only the configuration and the tokenizer.
    """
    from huggingface_hub import snapshot_download

    if hub.is_gguf:
        allowed, ignored = [*hub.patterns, *BESIDE], ["*mmproj*"]
    else:
        allowed, ignored = [*TEXTS, *([WEIGHTS] if weights else [])], ["*/*"]  # subfolders: other forms of it
    _check_name(hub.repository, revision)
    log.info("%s: fetching %s", hub.repository, revision or "the main branch")
    with _one_line(hub.repository, revision, download_dir):
        folder = Path(
            snapshot_download(
                hub.repository,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=allowed,
                ignore_patterns=ignored,
                tqdm_class=None if sys.stderr.isatty() else _no_bars(),
            )
        )
    fetched = Fetched(folder, folder.name)
    if hub.is_gguf:
        fetched = replace(fetched, path=_gguf_file(hub, fetched))
    else:
        _check_folder(hub.repository, fetched, weights=weights)
    log.info("%s: commit %s, in %s", hub.repository, fetched.commit, fetched.path)
    return fetched


def _no_bars() -> type:
    """Returns a class of bars that show nothing, for logs."""
    from huggingface_hub.utils.tqdm import tqdm

    class NoBars(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    return NoBars


def _check_name(repository: str, revision: str | None) -> None:
    """Raises ValueError if the repository has another name now. If the Hub does not answer, or refuses, the
    download says so, or the cache has the files."""
    from huggingface_hub import HfApi

    if revision is not None and COMMIT.fullmatch(revision):
        return  # these files are what they were, whatever the name
    found = repository
    with contextlib.suppress(Exception):
        found = HfApi().model_info(repository, revision=revision).id
    if found.lower() != repository.lower():
        raise ValueError(f"{repository} was renamed: give its new name, {found}")


@contextlib.contextmanager
def _one_line(repository: str, revision: str | None, download_dir: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into ValueErrors of one line, and holds back its own warnings."""
    from huggingface_hub import constants, errors

    own = logging.getLogger("huggingface_hub")
    level, wanted = own.level, f"revision {revision!r}" if revision else "the main branch"
    own.setLevel(logging.ERROR)
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{repository}: {' '.join(str(error).split())}") from None
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository}"
        login = "log in with HF_TOKEN or `hf auth login`"
        raise ValueError(f"{repository} is gated: accept its terms on {page}, and {login}") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repository} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        where = f"a repository of {constants.ENDPOINT} that your token may read"
        raise ValueError(f"{repository!r} is neither a folder here nor {where}") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        cache = download_dir or constants.HF_HUB_CACHE
        where = f"{wanted} of it is not whole in the cache {cache}, and {why}"
        raise ValueError(f"{repository!r} is no folder here; {where}") from None
    except Exception as error:  # the transport's errors are another package's in each version
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            full = f"no space left in {download_dir or constants.HF_HUB_CACHE}"
            raise ValueError(f"{repository}: {full}; the next start goes on where this one ended") from None
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{repository} cannot be fetched: {text[:300]}") from None
    finally:
        own.setLevel(level)


def _check_folder(repository: str, fetched: Fetched, *, weights: bool) -> None:
    """Raises ValueError if the repository has no model that jmoe reads."""
    where = f"{repository} at commit {fetched.commit}"
    if not (fetched.path / CONFIG).is_file():
        raise ValueError(f"{where} has no {CONFIG}; a GGUF file of it is given as {repository}:QUANT")
    if weights and not Directory(fetched.path).has_weights():
        raise ValueError(f"{where} has no {WEIGHTS}; other weights (*.bin) are not read")


def _gguf_file(hub: HubId, fetched: Fetched) -> Path:
    """Returns the GGUF file that ``hub`` names, the first part of a split one; raises ValueError unless there
    is exactly one."""
    files = [path.relative_to(fetched.path) for path in sorted(fetched.path.rglob("*"))]
    found = [
        str(file)
        for file in files
        if is_first_part(file.name) and any(fnmatchcase(file.as_posix(), each) for each in hub.patterns)
    ]
    if len(found) == 1:
        return fetched.path / found[0]
    where = f"{hub.repository} at commit {fetched.commit}"
    if not found:
        raise ValueError(f"{where} has no GGUF file {hub.file or f'of {hub.kind}'}")
    raise ValueError(
        f"{where} has {len(found)} GGUF files of {hub.kind}, such as {found[0]}; give one of them"
    )
