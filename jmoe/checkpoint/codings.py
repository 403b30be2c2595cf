"""The codings in which parameters are kept: those of the checkpoint, or those requested while it loads."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from jmoe_kernels.quantised import Coding

from jmoe.blueprint import UNQUANTISED, Codings
from jmoe.checkpoint.facts import has_weights, stored_tensors
from jmoe.checkpoint.formats import StoredParam
from jmoe.checkpoint.hf_reader import HFCheckpoint
from jmoe.checkpoint.manifest import is_converted, read_manifest
from jmoe.checkpoint.params import ParamSpec, abstract_decoder, tensors_by_path
from jmoe.checkpoint.quantisation import read_quantisation
from jmoe.config.choices import QuantizationName, QuantizedProducts
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.units import brief
from jmoe.mesh import make_mesh
from jmoe.models.decoder import make_blueprint

log = logging.getLogger(__name__)

CODINGS: dict[QuantizationName, Coding] = {
    "int8": Coding("int8", None),
    "int4": Coding("int4", 32, "float16", has_lows=True),
    "fp8": Coding("e4m3", None),
    "mxfp4": Coding("e2m1", 32, "uint8"),
}


@dataclass(frozen=True)
class Quantize:
    """A request to quantise plain weights while they load.

    method: how they are kept.
    what: which weights, those of routed experts or of all products.
    """

    method: QuantizationName
    what: QuantizedProducts = "all"


def read_codings(directory: Path, cfg: ModelConfig, request: Quantize | None = None) -> Codings:
    """Returns how the quantised parameters are kept, by path.

    It raises ValueError if the checkpoint contradicts itself, or if it is quantised and more is requested.
    """
    if is_converted(directory):
        found = Codings(read_manifest(directory).codings)
    elif has_weights(directory) and read_quantisation(directory).rules:
        with HFCheckpoint(directory) as checkpoint:
            tensors = list(stored_tensors(checkpoint, cfg))
        found = codings_of(tensors)
        _report_dequantised(directory, tensors, found)
        found = _of_products(found, cfg)
    else:
        found = UNQUANTISED
    if request is None:
        return found
    if found or is_converted(directory):
        what = "is quantised already" if found else "is converted: convert it again, with --quantization"
        raise ValueError(f"{directory}: {what}; quantization {request.method!r} is for plain checkpoints")
    return requested_codings(cfg, request)


def codings_of(tensors: Iterable[StoredParam]) -> Codings:
    """Returns the codings of parameters whose tensors all have the same one; others are dequantised."""
    found = Codings()
    for path, parts in tensors_by_path(tensors).items():
        codings = {None if part.format is None else part.format.coding for part in parts}
        if len(codings) == 1 and (coding := codings.pop()) is not None:
            found[path] = coding
    return found


def _report_dequantised(directory: Path, tensors: Iterable[StoredParam], kept: Codings) -> None:
    """Logs which parameters are quantised in the checkpoint, but not in memory, and why."""
    reasons: dict[str, list[str]] = {}
    for path, parts in tensors_by_path(tensors).items():
        formats = [part.format for part in parts if part.format is not None]
        if formats and path not in kept:
            known = (each.why_dequantised for each in formats if each.coding is None)
            reasons.setdefault(next(known, "its tensors are stored in several ways"), []).append(path)
    for reason, paths in reasons.items():
        log.warning(
            "%s: %d quantised parameters become plain numbers in memory, such as %s (%s)",
            directory, len(paths), brief(paths[0]), reason,
        )  # fmt: skip


def requested_codings(cfg: ModelConfig, request: Quantize) -> Codings:
    """Returns the codings that a request gives to the parameters of products."""
    coding = CODINGS[request.method]
    kinds = ("experts",) if request.what == "experts" else ("experts", "dense")
    specs = _specs(cfg)
    chosen = {path: spec.shape[-1] for path, spec in specs.items() if spec.products in kinds}
    return Codings({path: _for_rows(coding, inner) for path, inner in chosen.items()})


def _of_products(codings: Codings, cfg: ModelConfig) -> Codings:
    """Returns the codings of parameters that stay quantised. The others are dequantised, because they are
    used in more than products."""
    specs = _specs(cfg) if codings else {}
    return Codings({path: each for path, each in codings.items() if specs[path].products is not None})


def _specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    return abstract_decoder(make_blueprint(cfg, MoEConfig(), make_mesh()))[1]


def _for_rows(coding: Coding, inner: int) -> Coding:
    """Returns the coding with groups that are no longer than a row."""
    return replace(coding, group=None) if coding.group and coding.group > inner else coding
