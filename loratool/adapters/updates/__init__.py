"""The kinds of updates that an adapter can apply to one tensor; each is a class in a module and a row of `UPDATES`."""

from __future__ import annotations

from .adalora import AdaLoRA
from .add import AddDelta
from .beft import BEFT
from .boft import BOFT
from .c3a import C3A
from .deft import DEFT
from .delora import DeLoRA
from .diff import Diff
from .dora import DoRA
from .experts import Experts
from .fourierft import FourierFT
from .glora import GLoRA
from .gralora import GraLoRA
from .hira import HiRA
from .hra import HRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .low_rank import LowRank
from .lycoris_glora import LycorisGLoRA
from .miss import Bat, Bone, MiSS
from .oft import OFT
from .oft_blocks import OFTBlocks
from .peanut import PEANuT
from .pvera import PVeRA
from .randlora import RandLoRA
from .replace import ReplaceTensor
from .road import RoAd
from .rows import ReplaceRows
from .shira import SHiRA
from .supertuning import SuperTuning
from .tinylora import TinyLoRA
from .tucker import Tucker
from .unilora import UniLoRA
from .update import PeftMethod, Update
from .vblora import VBLoRA
from .vera import VeRA
from .waveft import WaveFT

# kind in reports -> class
UPDATES: dict[str, type[Update]] = {
    each.kind: each
    for each in (
        LowRank,
        Tucker,
        LoHa,
        LoKr,
        AdaLoRA,
        VeRA,
        PVeRA,
        RandLoRA,
        SHiRA,
        SuperTuning,
        FourierFT,
        WaveFT,
        MiSS,
        Bone,
        GraLoRA,
        C3A,
        UniLoRA,
        TinyLoRA,
        VBLoRA,
        DeLoRA,
        Experts,
        OFT,
        OFTBlocks,
        BOFT,
        Bat,
        RoAd,
        HRA,
        LycorisGLoRA,
        HiRA,
        GLoRA,
        DEFT,
        PEANuT,
        DoRA,
        IA3,
        Diff,
        AddDelta,
        BEFT,
        ReplaceTensor,
        ReplaceRows,
    )
}


def peft_methods() -> dict[str, PeftMethod]:
    """Return `peft_type` -> PEFT's way to save adapters of that kind."""
    return {cls.peft.type: cls.peft for cls in UPDATES.values() if cls.peft}
