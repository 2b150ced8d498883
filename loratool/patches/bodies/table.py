"""List the bodies, and choose the one that is for a kind of change."""

from __future__ import annotations

from ...numerics.forms import FORMS
from ...numerics.steps import Patterns
from .body import Body
from .classed import Classed
from .codes import Codes
from .fields import Fields
from .plain import OwnBytes, Same
from .planes import Planes

BODIES: dict[str, Body] = {body.key: body for body in (Same(), Classed(), Planes(), Fields(), Codes(), OwnBytes())}


def choose(base_sample: Patterns, target_sample: Patterns, dtype: str, fast: bool = False) -> str:
    """Return the key of the body that takes the least for a sample, the first of `BODIES` that does.

    Tables and states do not count, as those of a span are hardly more than those of a sample. `same` is never chosen:
    it is for spans of which all numbers are known.

    Args:
        fast: without tables by class.
    """
    keys = [key for key, body in BODIES.items() if key != "same" and body.takes(dtype)]
    if fast and dtype in FORMS:
        keys = ["fields", "bytes"]
    sizes = {key: BODIES[key].measure(base_sample, target_sample, dtype) for key in keys}
    return min(keys, key=sizes.__getitem__)
