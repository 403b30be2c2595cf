"""``compressed-tensors``: groups of modules, each with its own numbers of bits, strategy and format."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from jmoe.checkpoint.quantised.formats import Format
from jmoe.checkpoint.quantised.formats.fp8 import Fp8
from jmoe.checkpoint.quantised.formats.grids import LARGEST, Block
from jmoe.checkpoint.quantised.formats.int8 import Int8
from jmoe.checkpoint.quantised.formats.mxfp4 import IN_ROWS
from jmoe.checkpoint.quantised.formats.nvfp4 import Nvfp4
from jmoe.checkpoint.quantised.formats.packed_ints import PackedInts
from jmoe.checkpoint.quantised.methods.method import Method, Rule
from jmoe.checkpoint.quantised.methods.patterns import REGEX, matcher, patterns
from jmoe.config.reading import check_fields, check_keys, from_table, named, shown

MIXED, DENSE = "mixed-precision", "dense"
STATUSES = ("compressed", "frozen", "calibration", "initialized")  # of the writer; its tensors are the same
READ = ("config_groups", "format", "ignore", "quant_method", "quantization_status", "sparsity_config")
# they change nothing about the weights
NOT_READ = ("kv_cache_scheme", "global_compression_ratio", "version", "run_compressed")
# products run in the model's dtype, whatever their activations were quantised to
ACTIVATIONS = ("input_activations", "output_activations")

Size = Annotated[int, Meta(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class Weights:
    """The table ``weights`` of a group, with the keys and defaults of compressed-tensors."""

    num_bits: Literal[4, 8] = 8
    type: Literal["int", "float"] = "int"
    strategy: Literal["tensor", "channel", "group", "block", "tensor_group"] = "tensor"
    group_size: Size | None = None
    block_structure: tuple[Size, ...] | None = None
    symmetric: bool = True
    actorder: Literal["static", "weight"] | None = None  # the order of rounding; numbers are stored in order
    dynamic: Literal[False] = False
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: Any = None
    observer_kwargs: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.strategy in ("group", "tensor_group")) != (self.group_size is not None):
            raise ValueError(f"group_size {self.group_size} does not fit strategy {self.strategy!r}")
        if (self.strategy == "block") != (self.block_structure is not None):
            raise ValueError(
                f"block_structure {self.block_structure} does not fit strategy {self.strategy!r}"
            )
        if self.block_structure is not None and len(self.block_structure) != 2:
            raise ValueError(f"block_structure must be two numbers, got {list(self.block_structure)}")

    @property
    def block(self) -> Block:
        """Rows and columns that share a scale."""
        if self.block_structure is not None:
            return self.block_structure[0], self.block_structure[1]
        return (None if self.strategy == "tensor" else 1), self.group_size


def rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    _check_top(config)
    for entry in patterns(config, "ignore"):
        yield Rule(matcher(entry), None, f"ignore: {entry!r}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"config_groups must be an object of groups, got {shown(groups)}")
    found = []
    for name, group in groups.items():
        with named(f"config_groups.{name}"):
            found += _targets(name, group, config.get("format"))
    # names decide before patterns, and patterns before classes, whatever their group
    yield from (rule for _, rule in sorted(found, key=lambda each: each[0]))


def _check_top(config: Mapping[str, Any]) -> None:
    """Raises ValueError for keys that change what the tensors mean."""
    check_keys("it", (key for key, value in config.items() if value), (*READ, *NOT_READ, "transform_config"))
    transform = config.get("transform_config")
    if transform and not (isinstance(transform, Mapping) and not transform.get("config_groups")):
        raise ValueError("transform_config: rotated weights are not read; checkpoints without it are")
    sparsity = config.get("sparsity_config") or {"format": DENSE}
    kind = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if kind != DENSE:
        raise ValueError(f"sparsity_config.format {shown(kind)} is not read, {DENSE!r} is")
    if (status := config.get("quantization_status")) not in (None, *STATUSES):
        raise ValueError(
            f"quantization_status {shown(status)} is not read; {', '.join(map(repr, STATUSES))} are"
        )


def _targets(name: str, group: Any, default: Any) -> Iterator[tuple[int, Rule]]:
    """Yields the rules of a group, each with its rank among all rules.

    default: format of groups that do not say theirs.
    """
    if not isinstance(group, Mapping):
        raise ValueError(f"it must be an object, got {shown(group)}")
    check_keys("it", group, ("targets", "weights", "format", *ACTIVATIONS))
    if group.get("weights") is None:
        return
    stored = _format(group["weights"], group.get("format") or default)
    for target in patterns(group, "targets"):
        yield _rank(target), Rule(_target(target), stored, f"config_groups.{name} for {target!r}")


def _rank(target: str) -> int:
    return 1 if target.startswith(REGEX) else 2 if _is_class(target) else 0


def _target(target: str) -> Callable[[str], bool]:
    if not _is_class(target):
        return matcher(target)
    if target not in CLASSES:
        raise ValueError(
            f"targets: class {shown(target)} is not read; {', '.join(CLASSES)}, names of modules and "
            f"{REGEX!r} patterns are"
        )
    return CLASSES[target]


def _is_class(target: str) -> bool:
    return target.isidentifier() and target[0].isupper()


def _is_embedding(module: str) -> bool:
    return module.endswith("embed_tokens")


# every module of a decoder with a matrix is one of these
CLASSES: dict[str, Callable[[str], bool]] = {
    "Linear": lambda module: not _is_embedding(module),
    "Embedding": _is_embedding,
}


def _format(values: Any, kind: Any) -> Format | None:
    """Returns the format of a group's weights.

    values: its table ``weights``.
    kind: its ``format``.
    """
    if kind == DENSE:
        return None
    if not isinstance(kind, str) or kind not in FORMATS:
        known = ", ".join(map(repr, (*FORMATS, DENSE)))
        where = " (each group must say its own)" if kind == MIXED else ""
        raise ValueError(f"format {shown(kind)} is not read; {known} are{where}")
    with named("weights"):
        if not isinstance(values, Mapping):
            raise ValueError(f"it must be an object, got {shown(values)}")
        weights = from_table(Weights, _plain(values), "it", "")
        needed, make = FORMATS[kind]
        for key, known in needed.items():
            if (value := getattr(weights, key)) not in known:
                read = " or ".join(map(repr, known))
                raise ValueError(f"{key} {value!r} is not read with format {kind!r}; {read} is")
        if not weights.symmetric and (weights.type == "float" or weights.strategy == "tensor"):
            kinds = f"type {weights.type!r} and strategy {weights.strategy!r}"
            raise ValueError(f"symmetric False is not read with {kinds}; True is")
        return make(weights)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table without the values that mean that a key is absent, and with its strategy."""
    plain = {key: value for key, value in values.items() if value is not None}
    if plain.get("actorder") is False:
        del plain["actorder"]
    size = plain.get("group_size")
    plain.setdefault("strategy", "tensor" if size is None else "channel" if size == -1 else "group")
    if size == -1 and plain["strategy"] == "channel":
        del plain["group_size"]
    return plain


def _scaled(weights: Weights) -> Format:
    """Returns the format of numbers that are not packed."""
    if weights.type == "float":
        return Fp8(weights.block, "_scale")
    return Int8(weights.block, not weights.symmetric)


NO_TENSOR_GROUP = ("tensor", "channel", "group", "block")
FLOAT_SCALE = (None, "torch.bfloat16", "torch.float16", "torch.float32", "bfloat16", "float16", "float32")
BYTE_SCALE = (None, "torch.uint8", "uint8", "torch.float8_e8m0fnu")
MX: dict[str, tuple[Any, ...]] = {
    "type": ("float",),
    "strategy": ("group",),
    "group_size": (32,),
    "scale_dtype": BYTE_SCALE,
}
# the values of ``weights`` that are read with each format, and what makes it
FORMATS: dict[str, tuple[dict[str, tuple[Any, ...]], Callable[[Weights], Format]]] = {
    "pack-quantized": (
        {"type": ("int",), "strategy": ("tensor", "channel", "group"), "scale_dtype": FLOAT_SCALE},
        lambda weights: PackedInts(weights.block, not weights.symmetric, bits=weights.num_bits),
    ),
    "int-quantized": (
        {"type": ("int",), "strategy": NO_TENSOR_GROUP, "scale_dtype": FLOAT_SCALE},
        _scaled,
    ),
    "float-quantized": (
        {"type": ("float",), "num_bits": (8,), "strategy": NO_TENSOR_GROUP, "scale_dtype": FLOAT_SCALE},
        _scaled,
    ),
    "naive-quantized": (
        {"num_bits": (8,), "strategy": NO_TENSOR_GROUP, "scale_dtype": FLOAT_SCALE},
        _scaled,
    ),
    "nvfp4-pack-quantized": (
        {
            "type": ("float",), "num_bits": (4,), "strategy": ("tensor_group",), "group_size": (16,),
            "scale_dtype": (None, "torch.float8_e4m3fn", "float8_e4m3fn"),
        },
        lambda weights: Nvfp4("_scale", "_global_scale", multiplies=False, codes="_packed"),
    ),
    "mxfp4-pack-quantized": (MX | {"num_bits": (4,)}, lambda weights: IN_ROWS),
    "mxfp8-quantized": (
        MX | {"num_bits": (8,)},
        lambda weights: Fp8(weights.block, "_scale", keeps_bytes=True),
    ),
}  # fmt: skip


METHOD = Method("compressed-tensors", rules)
