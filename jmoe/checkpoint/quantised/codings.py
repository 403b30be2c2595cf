"""The codings in which parameters are kept: those of the checkpoint, or those requested while it loads."""

import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from jmoe_kernels.quantised import Coding

from jmoe.blueprint import UNQUANTISED, Codings
from jmoe.checkpoint.converted.manifest import is_converted, read_manifest
from jmoe.checkpoint.facts import stored_tensors
from jmoe.checkpoint.params import abstract_decoder, in_layer, tensors_by_path
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.source import ModelFiles, source_of
from jmoe.config.choices import QuantizationName, QuantizedProducts
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.units import brief
from jmoe.mesh import make_mesh
from jmoe.models.decoder import make_blueprint
from jmoe.param import Products

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


def read_codings(model: ModelFiles, cfg: ModelConfig, request: Quantize | None = None) -> Codings:
    """Returns how the quantised parameters are kept, by path.

    It raises ValueError if the checkpoint contradicts itself, or if it is quantised and more is requested.
    """
    source = source_of(model)
    directory = source.path
    if is_converted(directory):
        found = Codings(read_manifest(directory).codings)
    elif source.has_weights() and not source.quantisation().is_plain:
        with source.open() as checkpoint:
            tensors = list(stored_tensors(checkpoint, cfg))
        products = _products(cfg, ("experts", "dense"))
        found = codings_of(tensors, products)
        _report_dequantised(directory, [each for each in tensors if each.path in products], found)
    else:
        found = UNQUANTISED
    if request is None:
        return found
    if found or is_converted(directory):
        what = "is quantised already" if found else "is converted: convert it again, with --quantization"
        raise ValueError(f"{directory}: {what}; quantization {request.method!r} is for plain checkpoints")
    return requested_codings(cfg, request)


def codings_of(tensors: Iterable[StoredParam], products: Container[str]) -> Codings:
    """Returns the codings of the parameters of products whose tensors all have the same one, along the same
    axis as the parameter; all others are dequantised.

    products: paths of the parameters that are factors of products.
    """
    found = Codings()
    for path, parts in tensors_by_path(tensors).items():
        codings = {
            None if part.format is None or part.form.is_transposed else part.format.coding for part in parts
        }
        if len(codings) == 1 and path in products and (coding := codings.pop()) is not None:
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
    """Returns the codings that a request gives to the parameters of products.

    The head, and the embedding if it is one with it, have at least eight bits: four bits there cost about as
    much perplexity as in all layers (docs/results/quantised.md).
    """
    kinds = ("experts",) if request.what == "experts" else ("experts", "dense")
    found = Codings()
    for path, inner in _products(cfg, kinds).items():
        coding = CODINGS[request.method]
        is_head = in_layer(path)[0] < 0
        found[path] = CODINGS["int8"] if is_head and coding.num_packed > 1 else _for_rows(coding, inner)
    return found


def _products(cfg: ModelConfig, kinds: tuple[Products, ...]) -> dict[str, int]:
    """Returns the length of a row of each parameter that is a factor of such products, by its path."""
    specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), make_mesh()))[1]
    return {path: spec.shape[-1] for path, spec in specs.items() if spec.products in kinds}


def _for_rows(coding: Coding, inner: int) -> Coding:
    """Returns the coding with groups that are no longer than a row."""
    return replace(coding, group=None) if coding.group and coding.group > inner else coding
