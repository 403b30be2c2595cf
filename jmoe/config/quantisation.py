"""The values of the settings that quantise weights."""

from typing import Literal

QuantizationName = Literal["int8", "int4", "fp8", "mxfp4"]
QuantizedProducts = Literal["experts", "all"]
