"""Merge adapters into tensors in memory, in place, and take them out again: the bits of the base return.

    import loratool

    with loratool.live.merged(model, {"adapter": 0.7}) as live:
        print(live.report.kept, live.nbytes)

The guide `live` shows how, and when not to. This is the only room that needs torch on the CPU.
"""

from .handle import LiveMerge, merge, merged
from .iterate import iter_merged

__all__ = ["LiveMerge", "iter_merged", "merge", "merged"]
