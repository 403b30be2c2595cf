"""The files of earlier commands that settings name: a placement and a profile."""

from pathlib import Path

from jax.sharding import Mesh

from jmoe.config.model import ModelConfig
from jmoe.config.techniques import OffloadConfig, ShuffleConfig
from jmoe.mesh import EXPERT
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile


def read_placement(shuffle: ShuffleConfig | None, cfg: ModelConfig, mesh: Mesh) -> Placement | None:
    """Returns the configured placement; raises ValueError if it is for another mesh or number of experts.

    ``load_model`` checks that it is for this model.
    """
    if shuffle is None:
        return None
    placement = Placement.load(Path(shuffle.placement))
    placement.check(
        model=placement.model, layers=len(cfg.moe_layers), experts=cfg.num_experts, ranks=mesh.shape[EXPERT]
    )
    if not (shuffle.tokens or shuffle.requests):
        return placement
    if placement.tables is None:
        raise ValueError(f"{shuffle.placement} has no token tables, which moe.shuffle needs: make it anew")
    if (known := placement.tables.ranks_LV.shape[1]) != cfg.vocab_size:
        raise ValueError(
            f"{shuffle.placement} has tables of {known} token ids, the model has {cfg.vocab_size}: "
            "make it anew"
        )
    return placement


def read_profile(offload: OffloadConfig | None) -> Profile | None:
    """Returns the configured profile; raises ValueError if it cannot be read. ``make_cache`` checks its
    model."""
    return None if offload is None or offload.store is None else Profile.load(Path(offload.store))
