"""Change the layout of a language model's adapter, and refuse adapters that files cannot describe."""

from __future__ import annotations

from ..adapters.adapter import Adapter
from ..adapters.formats.format import Format
from ..adapters.formats.peft_config import base_mutating_init
from ..adapters.updates.dora import DoRA
from ..adapters.updates.low_rank import LowRank
from ..architectures.families import LAYOUTS
from ..binding.modules.image_modules import SourceModule
from ..errors import InputError, NeedsFlag, UsageError
from .base import Base
from .fused_qkv import Sizes, locate_fused, plan_qkv, qkv_rows, to_fuse_unlike
from .lazy import Transformed
from .refusals import cannot_convert
from .regroup import regroup
from .request import INITIAL, WHAT_INITIAL, ConvertRequest
from .to_class import with_fields


def refuse_unsaid_init(source: Adapter, to: Format) -> None:
    """Raise NeedsFlag for an initialization that changed the base, if the format's files cannot record it."""
    init = base_mutating_init(source.config)
    if init and not to.can.starts:
        message = (
            f"was initialized with {init}, which changed the base under it, and {to.key}'s files cannot record that"
        )
        raise NeedsFlag(message, culprit=source.name, flags=INITIAL, why=WHAT_INITIAL)


def to_layout(state: Transformed, request: ConvertRequest) -> Transformed:
    """Split or fuse the modules that differ in the other layout."""
    source, updates = state.adapter, state.adapter.updates
    assert request.layout is not None
    pairs = [SourceModule(m, u, "", m) for m, u in updates.items() if u.cls in (LowRank, DoRA) and len(u.shape) == 2]
    parts, unlike = to_fuse_unlike(pairs) if request.layout == "fused" else ({}, [])
    if unlike:
        what = "would be fused although some of their parts are DoRA and others have no magnitude"
        raise cannot_convert(source.name, what, unlike, among=parts)
    targets = plan_qkv(pairs, request.layout, _rows_of(request.base))
    regrouped = {target.path: target for target in targets if target.how != "exact"}
    if not regrouped:
        raise UsageError(
            f"--layout {request.layout} changes nothing: the adapter has no such modules", culprit=source.name
        )
    taken = {part.source.module for target in regrouped.values() for part in target.parts}
    others = [module for module in updates if module not in taken]
    beside = [m for m in others if m.rpartition(".")[0] in taken or m in regrouped]
    beside += [module for module in updates if module in taken and updates[module].base]
    if beside:
        raise InputError("has another change beside its factors, which no other layout has", culprit=beside[0])
    changed = regroup(state, regrouped, others)
    fused = (path for path in (*regrouped, *taken) if (located := locate_fused(path)) and path in located.maker)
    if any(path.endswith(end) for path in fused for family in LAYOUTS.values() for end in family.conv1d):
        return with_fields(changed, fan_in_fan_out=request.layout == "fused")
    return changed


def _rows_of(base: Base | None) -> Sizes:
    """Return the numbers of rows of q_proj, k_proj and v_proj; empty without a base.

    Raises:
        InputError: the config lacks the attention heads or their size.
    """
    rows = qkv_rows(base.config) if base else {}
    if base and not rows:
        raise InputError("its config.json does not say its attention heads and their size", culprit=base.path)
    return rows


def refuse_layout_of_init(source: Adapter) -> None:
    """Raise NeedsFlag for an initialization from matrices that the layout would split or fuse."""
    if init := base_mutating_init(source.config):
        raise NeedsFlag(
            f"was initialized with {init} from whole matrices of its base, not from their parts",
            culprit=source.name,
            remedy="convert it with --plain --initial ADAPTER first, the adapter as it was before training",
        )
