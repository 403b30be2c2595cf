"""Prints the sizes of the shapes in ``configs/model`` as a table.

The parameters are those of the whole model, and those that one token uses:

    python scripts/make/model_sizes.py
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def main() -> None:
    """Prints the table. It allocates nothing."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    print("| shape | family | layers with experts | experts | parameters | active | KV cache a token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(CONFIGS.glob("*.toml")):
        print(row(path))


def row(path: Path) -> str:
    """Returns the row of one model.

    active: active parameters, with the shared experts but without the embedding, of which a token uses
        one row.
    KV cache: the bytes in bfloat16, over all layers.
    """
    from jmoe.checkpoint.params import abstract_decoder
    from jmoe.config.model import ModelConfig
    from jmoe.config.moe import MoEConfig
    from jmoe.config.reading import read_toml
    from jmoe.mesh import make_mesh, split_attention
    from jmoe.models.decoder import make_blueprint
    from jmoe.nn.kinds import page_bytes

    cfg = ModelConfig.from_dict(read_toml(path))
    specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), make_mesh()))[1]
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    routed = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    unused = routed * (1 - cfg.num_experts_per_tok / cfg.num_experts)
    embedding = 0 if cfg.tie_word_embeddings else sizes["embed"]
    total, active = sum(sizes.values()), sum(sizes.values()) - unused - embedding
    cached = page_bytes(replace(cfg, dtype="bfloat16"), split_attention(make_mesh(), "dp"), 1)
    experts = f"{cfg.num_experts_per_tok} of {cfg.num_experts}"
    layers = f"{len(cfg.moe_layers)} of {cfg.num_hidden_layers}"
    family = cfg.architecture.removesuffix("ForCausalLM")
    numbers = f"{total / 1e9:.1f} B | {active / 1e9:.1f} B | {cached / 1024:.1f} KiB"
    return f"| `{path.stem}` | {family} | {layers} | {experts} | {numbers} |"


if __name__ == "__main__":
    main()
