"""The parts of which structs of requests are made: strict objects, and the types of their fields.

Fields that clients send and this server cannot honour are declared too (``only``), so that the values that
request nothing pass and any other value is answered with a 400 that names the field.
"""

import functools
from typing import Annotated, Any

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Limit = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
StopText = Annotated[str, Meta(max_length=1024)]
StopTexts = Annotated[list[Annotated[StopText, Meta(min_length=1)]], Meta(max_length=16)]
# In Python ``$`` also matches before a last line end, which JavaScript's, and JSON Schema's, does not.
# OpenAI allows 64 characters, Anthropic 128.
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$(?!\n)")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Factor = Annotated[float, Meta(gt=0, le=2.0**127)]
BadWord = Annotated[str, Meta(min_length=1, max_length=1024)]
GrammarText = Annotated[str, Meta(min_length=1, max_length=64 * 1024)]


def only(*values: Any) -> Meta:
    """Annotates a field of a feature that is not supported: null and ``values`` request nothing, and pass.

    They are kept as JSON: typing takes equal annotations for one, and False equals 0.
    """
    return Meta(extra={"only": msgspec.json.encode(values)}, extra_json_schema={"enum": [None, *values]})


Off = Annotated[Any, only(False)]
On = Annotated[Any, only(True)]
Zero = Annotated[Any, only(0)]
One = Annotated[Any, only(1)]
Unlimited = Annotated[Any, only(-1)]
Absent = Annotated[Any, only()]


@functools.cache
def neutral(kind: type[msgspec.Struct]) -> dict[str, list[Any]]:
    """Returns the values that pass besides null, for each field of ``kind`` declared with ``only``."""
    shape = msgspec.inspect.type_info(kind)
    assert isinstance(shape, msgspec.inspect.StructType)
    extras = {field.name: getattr(field.type, "extra", None) or {} for field in shape.fields}
    return {name: msgspec.json.decode(extra["only"]) for name, extra in extras.items() if "only" in extra}


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object without other fields than its own."""


class WithSource(Strict, kw_only=True, dict=True):
    """A JSON object that the model's template gets as it was sent: with its own keys in their order.

    ``decoding.decode`` sets ``source``.
    """

    @property
    def source(self) -> dict[str, Any]:
        return self.__dict__["source"]
