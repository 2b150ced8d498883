"""Read and write nvfp4: e2m1 with an e4m3 scale for each 16 columns and one float32 global scale.

compressed-tensors divides by the global scale, modelopt multiplies by it.
"""

from __future__ import annotations

from .codec import Fault, Parts, StoredWeight, Unclaimed
from .mxfp4 import Fp4, kept
from .quantized import listed_layers
from .scaled import Scales

GROUP = 16  # columns that have one scale

ROTATED = (".pre_quant_scale", ".input_quantizer._pre_quant_scale")  # the codes are of W times it


class PackedNvfp4(Fp4):
    """`(code * scale) / global scale`: compressed-tensors' nvfp4-pack-quantized (compressors/nvfp4)."""

    key = "nvfp4-pack-quantized"
    ends = (".weight_packed",)
    code_dtypes = frozenset(("U8",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, global_scale = f"{path}.weight_scale", f"{path}.weight_global_scale"
        if len(unclaimed.specs[name].shape) < 2:
            return None
        if global_scale not in unclaimed.specs and unclaimed.need(scale).dtype != "F8_E4M3":
            return None
        unclaimed.need(scale, "F8_E4M3")
        unclaimed.shaped(global_scale, (1,), "F32")
        return self.coded(
            name, {"scales": scale, "scale_of_scales": global_scale, **kept(path, unclaimed)}, unclaimed, GROUP
        )

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        divisor = float(parts["scale_of_scales"].floats()[0])
        return Scales(self.grid(parts, "scales", (1, GROUP), start, stop), GROUP, divisor=divisor)

    def check(self, parts: Parts) -> None:
        super().check(parts)
        if not parts["scale_of_scales"].floats().all():
            raise parts.damaged("scale_of_scales", "is 0, but the weight is divided by it")


class ModeloptNvfp4(Fp4):
    """`code * scale * second scale`: modelopt's."""

    key = "nvfp4"
    ends = (".weight",)
    code_dtypes = frozenset(("U8",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, second = f"{path}.weight_scale", f"{path}.weight_scale_2"
        if second not in unclaimed.specs or len(unclaimed.specs[name].shape) < 2:
            return None
        if f"{path}.comfy_quant" in unclaimed.specs:
            return None  # ComfyUI's order of nibbles and scales differs
        if path.removeprefix(unclaimed.prefix) in listed_layers(unclaimed.metadata):
            return None  # ComfyUI's too
        rotated = unclaimed.one_of(*(path + end for end in ROTATED))
        if rotated:
            raise Fault(f"{rotated} is beside it, which loratool does not apply")
        unclaimed.need(scale, "F8_E4M3")
        unclaimed.shaped(second, (1,), "F32")
        return self.coded(name, {"scales": scale, "scale_of_scales": second, **kept(path, unclaimed)}, unclaimed, GROUP)

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        global_scale = parts["scale_of_scales"].floats()[0]
        return Scales(self.grid(parts, "scales", (1, GROUP), start, stop) * global_scale, GROUP)
