"""The forms of weights that ``bench_vs_llama_cpp.py`` compares: jmoe's own, and llama.cpp's types of files.

A form has the least median correlation of its logits with those of jmoe in bfloat16. On random weights, which
amplify rounding, the measured ones are 0.99999 (bf16), 0.9998 (q8_0), 0.966 (q4_0) and 0.981 (q4_K_M).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shared.protocol import JMOE

LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class FileType:
    """A type of llama.cpp's files.

    number: llama.cpp's number of the type to which it quantises the bfloat16 file; None is that file itself.
    correlation: least correlation of the logits.
    """

    number: int | None
    correlation: float


@dataclass(frozen=True)
class Form:
    """A form in which jmoe keeps weights.

    name: name of the contender.
    correlation: least correlation of the logits.
    options: options of ``LLM``.
    """

    name: str
    correlation: float
    options: dict[str, Any] = field(default_factory=dict)


FILE_TYPES = {
    "bf16": FileType(None, 0.99998),
    "q8_0": FileType(7, 0.999),
    "q4_0": FileType(2, 0.9),
    "q4_K_M": FileType(15, 0.9),
}
CORRELATIONS = {"int8": 0.999, "fp8": 0.98, "int4": 0.9, "mxfp4": 0.8}
ACTIVATIONS = {"auto": "", "int8": " A8"}


def forms(quantizations: Iterable[str], activations: Iterable[str]) -> list[Form]:
    """Returns bfloat16, which is compared with all others, and every quantisation with every activation."""
    quantised = [
        Form(
            f"{JMOE} {name}{ACTIVATIONS[rounded]}",
            CORRELATIONS[name],
            {"quantization": name, "activation_dtype": rounded},
        )
        for name in quantizations
        for rounded in activations
    ]
    return [Form(JMOE, 1.0), *quantised]
