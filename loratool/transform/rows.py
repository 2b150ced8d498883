"""Define the row of a module in `convert`'s report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleConvert:
    """One module of the output.

    Attributes:
        sources: the modules of the adapter that it is made of.
        how: the same change, to the bit, if it is `exact` (the very factors), `split`, `fused` or `swapped` (other
            rows: `module_map.TargetModule`), `folded` (the scale in the factors) or `expanded` (factors of another kind
            multiplied out to LoRA's); not so if it is `rounded` (a scale or type that it could not have) or
            `truncated` to a rank.
        error: ||D' - D|| / ||D||, of D' as written; 0 of the same change.
    """

    name: str
    sources: tuple[str, ...]
    how: str
    rank: int
    alpha: float
    error: float = 0.0
