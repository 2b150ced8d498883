"""The table of codecs: how files store weights, as tensors of floats or as codes with companions.

A new codec is one file here and one row of the table.
"""

from __future__ import annotations

from ..dtypes import TensorSpec
from .awq import Awq
from .bitnet import BitNet
from .bitsandbytes import Bitsandbytes4, BitsandbytesInt8
from .codec import Codec, CodeFormat, Fault, StoredWeight, Unclaimed
from .comfy import ComfyAwq, ComfyInt8, ComfyMxfp8, ComfyNvfp4
from .comfy_rotated import ComfyRotatedInt4, ComfyRotatedInt8
from .compressed_ints import PackedInts, PlainInts
from .float8 import Float8
from .fp8 import Fp8
from .gguf import GgmlBlocks
from .gptq import Gptq
from .hqq import Hqq
from .mlx import MlxAffine, MlxFp4, MlxFp8
from .mxfp4 import DeepSeekFp4, Mxfp4, PackedMxfp4, QuarkMxfp4
from .nvfp4 import ModeloptNvfp4, PackedNvfp4
from .quanto import QuantoBits, QuantoFloat8, QuantoInt8
from .raw import Raw
from .torchao import TorchaoFloat8, TorchaoInt8

RAW = Raw()

# The first codec that claims a tensor gets it; `Raw` gets the rest.
CODECS: dict[str, Codec] = {
    codec.key: codec
    for codec in (
        Mxfp4(),
        PackedMxfp4(),
        DeepSeekFp4(),
        QuarkMxfp4(),
        PackedNvfp4(),
        ModeloptNvfp4(),
        Bitsandbytes4(),
        BitsandbytesInt8(),
        MlxAffine(),
        MlxFp4(),
        MlxFp8(),
        ComfyInt8(),
        ComfyMxfp8(),
        ComfyNvfp4(),
        ComfyAwq(),
        ComfyRotatedInt8(),
        ComfyRotatedInt4(),
        TorchaoInt8(),
        TorchaoFloat8(),
        BitNet(),
        Hqq(),
        QuantoInt8(),
        QuantoFloat8(),
        QuantoBits(),
        Awq(),
        Gptq(),
        PackedInts(),
        GgmlBlocks(),
        Fp8(),
        PlainInts(),
        Float8(),
        RAW,
    )
}


# Keys of a quantization config that say that its codes are of rotated weights (auto-round's)
ROTATIONS = ("rotation_config", "spinquant_config")


def find_stored(unclaimed: Unclaimed) -> tuple[dict[str, StoredWeight], dict[str, str]]:
    """Return the weights of several tensors by logical name, and the faults of others by the name of their codes.

    Weights of one tensor are not included: the type determines their codec.
    """
    formats = [codec for codec in CODECS.values() if isinstance(codec, CodeFormat)]
    of_dtype = {dtype: [f for f in formats if dtype in f.code_dtypes] for f in formats for dtype in f.code_dtypes}
    rotation = next((key for key in ROTATIONS if unclaimed.declared.get(key)), None)
    weights: dict[str, StoredWeight] = {}
    faults: dict[str, str] = {}
    for name, spec in unclaimed.specs.items():
        for codec in of_dtype.get(spec.dtype, ()) if spec.size else ():
            for end in codec.ends:  # no generator: there is one weight for each expert's matrix
                if name.endswith(end):
                    break
            else:
                continue
            try:
                weight = codec.claim(name.removesuffix(end), name, unclaimed)
                if weight and rotation:
                    raise Fault(f"the config's {rotation} says that it is rotated, which is not supported")
            except Fault as fault:
                faults[name] = str(fault)
                break
            if weight:
                weights[codec.weight_name(name.removesuffix(end), end)] = weight
                break
    return weights, faults


def codec_of(spec: TensorSpec) -> Codec:
    """Return the codec of a weight that is one tensor."""
    return next((codec for codec in CODECS.values() if spec.dtype in codec.dtypes), RAW)
