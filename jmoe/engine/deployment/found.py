"""The files of a model that a user named: a bundled one, a path, or one of the Hub."""

from dataclasses import dataclass
from pathlib import Path

from jmoe.checkpoint.hf.hub import fetch, hub_id
from jmoe.checkpoint.source import WithoutWeights
from jmoe.engine.deployment.settings import BUNDLED, model_directory


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine.

    files: its directory or GGUF file; a ``WithoutWeights`` if only its configuration was asked for.
    repository: the Hub's id as it was given; None for a model that is not from the Hub.
    commit: commit hash of the files; None as above.
    """

    files: Path | WithoutWeights
    repository: str | None = None
    commit: str | None = None

    @property
    def path(self) -> Path:
        """Its directory or GGUF file."""
        return self.files if isinstance(self.files, Path) else self.files.path

    @property
    def report(self) -> dict[str, dict[str, str]]:
        """The fields that a run's report has of it; none for a model that is not from the Hub."""
        if self.repository is None or self.commit is None:
            return {}
        return {"hub": {"model": self.repository, "commit": self.commit}}


def find_model(
    model: str | Path, revision: str | None = None, download_dir: str | None = None, *, weights: bool = True
) -> FoundModel:
    """Returns the files of ``model``: a bundled name or what is at that path, else a model of the Hub, which
    is fetched unless it is in the cache. It raises ValueError if there is none, and for a revision of a model
    that is not from the Hub.

    revision: branch, tag or commit hash; None = the main branch.
    download_dir: folder of the cache; None = huggingface_hub's own.
    weights: whether the weights are needed, or only the configuration and the tokenizer.
    """
    hub = hub_id(model) if isinstance(model, str) and not _is_here(model) else None
    if hub is None:
        given = {"revision": revision, "download_dir": download_dir}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{unused[0]} is for a model of the Hub (ORG/NAME), and {str(model)!r} is not one"
            )
        return FoundModel(model_directory(model))
    fetched = fetch(hub, revision, download_dir, weights=weights)
    is_whole = weights or hub.is_gguf
    return FoundModel(fetched.path if is_whole else WithoutWeights(fetched.path), str(model), fetched.commit)


def _is_here(model: str) -> bool:
    return model in BUNDLED or Path(model).exists()
