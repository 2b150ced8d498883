"""Write an adapter of tensors in memory: the way back from `open_adapter`, through the steps of `convert`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Protocol

import numpy as np

from ..adapters.formats import FORMATS, written_formats
from ..errors import InputError, NeedsFlag, UsageError, brief
from ..files.dtypes import TORCH_DTYPES, TORCH_FLOATS
from ..files.output.output import naming_output
from ..files.output.paths import check_output_path
from ..numerics.arrays import Numbers
from ..numerics.forms import FORMS
from ..streaming.threads import one_thread
from ..transform.from_tensors import adapter_of
from ..transform.lazy import start
from ..transform.output import content
from ..transform.plan import plan_convert
from ..transform.request import ConvertRequest
from .arguments import ArgumentType, StrPath, checked, dtype_word, one_of, parse_number, parse_text
from .calls import output_elsewhere
from .convert.adapter import files_given
from .inputs import given_base
from .machine import require_ieee
from .namings import WrittenFormat


class AnyTensor(Protocol):
    """A tensor of torch or an array of numpy."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def parse_modules(value: object) -> dict[str, tuple[Numbers, Numbers, float]]:
    """Return modules with their factors as numbers.

    Raises:
        UsageError: it is no mapping of (A, B, scale), a factor is no tensor of floats, or two do not fit together.
    """
    if not isinstance(value, Mapping) or not value:
        raise UsageError(f"{brief(value)} is not {MODULES_TAKEN}")
    return {parse_text(module): _parse_module(str(module), parts) for module, parts in value.items()}


def _parse_module(module: str, parts: object) -> tuple[Numbers, Numbers, float]:
    if not isinstance(parts, Sequence) or isinstance(parts, str) or len(parts) != 3:
        raise UsageError(f"{brief(parts)} is not (A, B, scale)", culprit=module)
    A, B = (_parse_factor(module, side, x) for side, x in zip("AB", parts[:2], strict=True))
    if A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise UsageError(f"A is {A.shape} and B is {B.shape}: not (r, in) and (out, r)", culprit=module)
    try:
        return A, B, parse_number(parts[2])
    except UsageError as error:
        raise UsageError(f"its scale {error.message}", culprit=module) from error


def _parse_factor(module: str, side: str, x: Any) -> Numbers:
    if isinstance(x, Numbers):
        return x
    name = TORCH_DTYPES.get(dtype_word(getattr(x, "dtype", None)))
    if name not in TORCH_FLOATS or len(getattr(x, "shape", ())) < 2:
        raise UsageError(f"{side} is not a matrix of floats, torch's or numpy's: {brief(x)}", culprit=module)
    if hasattr(x, "detach"):
        from ..numerics.tensors import numbers_of

        return numbers_of(x.detach().cpu().contiguous())
    return Numbers(np.ascontiguousarray(x).view(FORMS[name].bits_type), FORMS[name])


MODULES_TAKEN = "a mapping of module -> (A, B, scale)"

Modules = Annotated[Mapping[str, tuple[AnyTensor, AnyTensor, float]], ArgumentType(MODULES_TAKEN, parse_modules)]


@checked
@require_ieee
def save_adapter(
    path: StrPath,
    modules: Modules,
    *,
    to: Annotated[WrittenFormat, one_of(written_formats())] = "peft",
    base: StrPath | None = None,
    architecture: str | None = None,
    force: bool = False,
) -> int:
    """Write a LoRA of tensors in memory, completely or not at all; return the bytes of its tensors.

    >>> with loratool.open_adapter("demo/adapter") as adapter:
    ...     factors = {name: (module.A, module.B, module.scale / 2) for name, module in adapter.items()}
    >>> loratool.save_adapter("half", factors)
    112128

    Args:
        path: a folder or a file, as the format has them.
        modules: module -> (A, B, scale): A is (r, in, *kernel), B is (out, r), of torch or numpy, and the change of
            the weight is scale * B @ A. Factors keep their types. Modules are named as `open_adapter` names those of
            the format, for GGUF as transformers does.
        to: the format.
        base: the model, for formats whose names or rows depend on it; PEFT's config names it.
        architecture: the class of a language model, or the family of an image model, as in `convert`.
        force: replace an output that exists.

    Raises:
        UsageError: two factors do not fit together, or the path is that of no output.
        InputError: the format has no place for a module, or a factor holds nan or inf.
        NeedsFlag: the output exists, or the format needs `base`.
    """
    if output_elsewhere(path):
        raise UsageError("is not on this machine", culprit=os.fspath(path), remedy="save it here, and send the files")
    format = FORMATS[to]
    adapter = adapter_of(parse_modules(modules), format, None if base is None else os.fspath(base))
    out, is_file = format.output(path, "adapter")
    check_output_path(out, is_file, [*files_given(base)], force)
    with ExitStack() as opened, one_thread():
        model = None if base is None else given_base(base, opened)
        request = ConvertRequest(to, base=model, architecture=architecture)
        try:
            settled = plan_convert(start(adapter), request, out.absolute().parent, opened)
        except NeedsFlag as error:
            if not error.asks_for("--exclude"):
                raise
            raise InputError(error.message, culprit=error.culprit, remedy="leave these modules out") from error
        written = content(settled, request.model)
        opened.enter_context(naming_output(out))
        format.write(out, is_file, written, [])
    return sum(spec.nbytes for spec in format.as_file(written).specs.values())
