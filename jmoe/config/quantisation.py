"""The values of the settings that quantise weights and the KV cache."""

from typing import Literal

QuantizationName = Literal["int8", "int4", "fp8", "mxfp4"]
QuantizedProducts = Literal["experts", "all"]
KVCacheName = Literal["auto", "int8", "fp8"]
