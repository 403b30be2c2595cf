"""Changes of a file's bytes that hypothesis draws, and what its reader must give: the same, or one line."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from hypothesis import strategies as st

from jmoe.checkpoint import load_model
from jmoe.mesh import make_mesh

PLACE = st.floats(0, 1, exclude_max=True)
CHANGES = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(1, 255)),
    st.tuples(st.just("cut out"), PLACE, st.integers(1, 40)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("digit"), PLACE, st.sampled_from(b'0123456789-.eE[]{}",:')),
    st.tuples(st.just("copy"), PLACE, PLACE, st.integers(1, 60)),
    st.tuples(st.just("end"), PLACE),
    st.tuples(st.just("append"), st.binary(min_size=1, max_size=9)),
)


def damaged(data: bytes, changes: list[tuple]) -> bytes:
    out = bytearray(data)
    for what, *how in changes:
        at = int(how[0] * len(out)) if isinstance(how[0], float) else 0
        match what:
            case "flip" if out:
                out[at] ^= how[1]
            case "cut out":
                del out[at : at + how[1]]
            case "insert":
                out[at:at] = how[1]
            case "digit" if out:
                out[at] = how[1]
            case "copy":
                start = int(how[1] * len(out))
                out[at:at] = out[start : start + how[2]]
            case "end":
                del out[at:]
            case "append":
                out += how[0]
    return bytes(out)


def loaded(directory: Path) -> dict[str, bytes]:
    """Returns the parameters of a model by path, as bytes."""
    model = load_model(directory, make_mesh(devices=jax.devices()[:1]))
    state = nnx.to_flat_state(nnx.state(model))
    return {str(path): np.asarray(value.get_value()).tobytes() for path, value in state}


def refused(error: ValueError, where: Path) -> bool:
    """Returns whether the message is one line that names the place."""
    return str(where) in str(error) and "\n" not in str(error)
