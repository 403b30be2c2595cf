"""The choices of settings that the command line shows too. This module imports nothing heavy."""

from typing import Literal

DTypeChoice = Literal["auto", "float32", "bfloat16"]
AttentionSplit = Literal["dp", "tp"]
QuantizationName = Literal["int8", "int4", "fp8", "mxfp4"]
QuantizedProducts = Literal["experts", "all"]  # the weights that are quantised while they load
KVCacheName = Literal["auto", "int8", "fp8"]
