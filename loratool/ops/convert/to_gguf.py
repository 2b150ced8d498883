"""Plan a language model's adapter under the names and rows of its GGUF file, with one alpha for all modules.

The file says one alpha, and the scale is alpha / r with each module's own rank. Where a module's scale is another, the
quotient goes into B, which is exact for a power of two.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS
from ...adapters.formats.content import AdapterContent
from ...adapters.formats.gguf import ALPHA
from ...adapters.formats.peft import Peft, virtual_adapter
from ...adapters.gguf_names import to_gguf_names, unfit_modules
from ...adapters.gguf_parts import ARCHITECTURE, GgufModel
from ...adapters.stacked import round_factors, stack_factors
from ...adapters.updates.update import UpdateSpec
from ...architectures.runtimes.llama_cpp import never_applied
from ...errors import NeedsFlag
from ...files.checkpoint import is_config_alone
from ...files.dtypes import TORCH_FLOATS, TensorSpec, safetensors_name
from ..inputs import open_model
from .base_copies import is_of_base
from .factors import EPSILON, NO_LOSS, Loss, is_exact_product, relative_error
from .language import refuse_unsaid_init
from .plain import plan_plain
from .request import AdapterOutput, ConvertRequest, ModuleConvert, cannot_convert


def plan_gguf(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    dropped: tuple[str, ...],
    lost: Mapping[str, Loss],
    opened: ExitStack,
) -> AdapterOutput:
    """Plan the output, of plain LoRA if that is asked for.

    Raises:
        NeedsFlag: only the base tells the names, modules have to be left out, or the init altered the base.
        InputError: the base's names are in no table, or it is of another model.
    """
    _require_copies(source, request, kept, opened)
    if not request.plain:
        return _plan(source, request, kept, dropped, lost)
    plain = plan_plain(source, replace(request, to=Peft.key), kept, dropped, lost, opened)
    made = virtual_adapter(source.name, source.file, plain.content)
    if source.format == request.to:  # without a base the names are the file's own, and the fields in any case
        made = replace(made, format=source.format, config=replace(made.config, peft={}, own=source.config.own))
    return _keep_errors(_plan(made, request, made.updates, dropped, {}), plain.modules)


def _require_copies(
    source: Adapter, request: ConvertRequest, kept: Mapping[str, UpdateSpec], opened: ExitStack
) -> None:
    """Raise an error for a weight under a module's factors that is not the base's, which GGUF has no place for.

    Raises:
        NeedsFlag: modules have to be left out, or the base's weights are not at hand.
        InputError: nothing else is there to convert.
    """
    under = [module for module, update in kept.items() if update.base]
    if not under or request.base is None:
        return
    if is_config_alone(request.base):
        message = "has a weight under its factors, which is to be compared with the base's"
        raise NeedsFlag(message, culprit=under[0], remedy="add --base BASE with the model and its weights")
    base = open_model(request.base, "--base is the adapter's model", opened)
    if trained := [module for module in under if not is_of_base(source, kept[module], base)]:
        what = "have a weight under their factors that is not the base's, and GGUF has no place for it"
        raise cannot_convert(source.name, what, trained, among=kept)


def _plan(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    dropped: tuple[str, ...],
    lost: Mapping[str, Loss],
) -> AdapterOutput:
    refuse_unsaid_init(source, FORMATS[request.to])
    own = replace(source, updates=dict(kept))
    if request.base is not None:
        model = GgufModel.of_config(request.model, str(request.base))
        for reason, modules in unfit_modules(own, model).items():
            raise cannot_convert(source.name, f"have no place in GGUF ({reason})", modules, among=kept)
        named, origins = to_gguf_names(own, model)
        key = model.architecture.key
        said = source.config.own if source.format == request.to else {}
        fields: Mapping[str, object] = {**said, ARCHITECTURE: key, **model.facts.metadata(key)}
    elif source.format == request.to:
        named, origins, fields = own, {module: (module,) for module in kept}, source.config.own
    else:
        raise NeedsFlag(
            f"has transformers' names, and in {request.to}'s files are those of the base's own file there",
            culprit=source.name,
            remedy="add --base BASE with the model, of which the config.json will do",
        )
    alpha = common_alpha(named.updates)
    written = {m: _Written(named, m, u, alpha, request.dtype) for m, u in named.updates.items()}
    to, specs, made = FORMATS[request.to], dict[str, TensorSpec](), dict[str, tuple[str, int]]()
    for module, each in written.items():
        for side, role in enumerate("AB"):
            specs[name := to.tensor_name(module, role)] = TensorSpec(each.dtype, each.update.specs[role].shape)
            made[name] = module, side
    last: dict[str, tuple[Tensor, Tensor]] = {}

    def load(name: str) -> Tensor:
        module, side = made[name]
        if module not in last:
            last.clear()
            last[module] = written[module].factors()
        return last[module][side]

    rows = tuple(each.row(origins[module], lost) for module, each in written.items())
    content = AdapterContent(specs, load, {**fields, ALPHA: alpha})
    return AdapterOutput(content, rows, dropped, tuple(_notes(kept, written, str(fields[ARCHITECTURE]))))


def _notes(kept: Mapping[str, UpdateSpec], written: Collection[str], architecture: str) -> Iterator[str]:
    """Yield what the user has to know of what llama.cpp makes of the file."""
    if under := [module for module, update in kept.items() if update.base]:
        yield f"{', '.join(under)}: the weight that is stored under the factors is left out: it is the base's"
    if dead := never_applied(architecture, written):
        listed = ", ".join(dead[:4]) + (", ..." if dead[4:] else "")
        yield (
            f"llama.cpp loads {listed} of {architecture} and never applies them (as of llama-cpp-python 0.3.36): "
            "merge the adapter to have their change"
        )


def _keep_errors(made: AdapterOutput, former: Sequence[ModuleConvert]) -> AdapterOutput:
    """Return a plan made of another plan's output, with what that one lost."""
    of = {row.name: row for row in former}
    rows = []
    for row in made.modules:
        errors = [of[source].error for source in row.sources]
        error = math.hypot(row.error, max(errors))
        how = of[row.sources[0]].how if row.how == "exact" else row.how
        rows.append(replace(row, how="rounded" if error and how in ("exact", "folded") else how, error=error))
    return replace(made, modules=tuple(rows))


def common_alpha(updates: Mapping[str, UpdateSpec]) -> float:
    """Return the alpha, a float32 number, that most modules have; or 0, by which files say that all scales are 1."""
    alphas = Counter(single(update.scale * update.rank) for update in updates.values())
    if len(alphas) > 1 and all(update.scale == 1 for update in updates.values()):
        return 0.0
    alphas.pop(0.0, None)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def single(number: float) -> float:
    """Return the nearest float32 number."""
    found: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return found


class _Written:
    """A module's factors as they are written."""

    def __init__(
        self, adapter: Adapter, module: str, update: UpdateSpec, alpha: float, dtype: torch.dtype | None
    ) -> None:
        self.module, self.update = module, update
        self._adapter, self._alpha = adapter, alpha
        is_said = alpha in (0.0, single(update.scale * update.rank))
        self._fold = 1.0 if is_said else update.scale * update.rank / alpha
        is_exact = self._fold == 0.0 or abs(math.frexp(self._fold)[0]) == 0.5
        stored = update.specs["B"].dtype
        self.dtype = safetensors_name(dtype) if dtype else stored if is_exact else "F32"

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B in the layout of the update's tensors.

        Raises:
            NeedsFlag, InputError: a number overflows.
        """
        file, tensors = self._adapter.file, self.update.tensors
        A, B = (file.tensor(tensors[role]) for role in "AB")
        wanted: torch.dtype = getattr(torch, TORCH_FLOATS[self.dtype])
        B, A = round_factors(self.module, (B.double() * self._fold if self._fold != 1.0 else B, A), wanted)
        return A, B

    def row(self, sources: tuple[str, ...], lost: Mapping[str, Loss]) -> ModuleConvert:
        """Report the module, with what the file's alpha, folding and a narrower type round."""
        file, update, rank = self._adapter.file, self.update, self.update.rank
        stored = {role: file.tensor(update.tensors[role]) for role in "AB"}
        A, B = self.factors()
        folded = {"A": stored["A"], "B": stored["B"].double() * self._fold}
        said = self._alpha / rank if self._alpha else 1.0
        error = abs(said * self._fold / update.scale - 1.0) if update.scale else 0.0
        same = torch.equal(A.double(), folded["A"].double()) and torch.equal(B.double(), folded["B"])
        if not (same and is_exact_product(stored["B"].dtype, self._fold)):
            true, made = (stack_factors(update.cls.make(update, each)) for each in (folded, {"A": A, "B": B}))
            error = math.hypot(error, max(EPSILON, relative_error(true, made)))
        former = sum((lost.get(source, NO_LOSS) for source in sources), NO_LOSS)
        error = math.hypot(error, former.relative)
        less = former.how == "truncated"
        how = "truncated" if error and less else "rounded" if error else "exact" if self._fold == 1.0 else "folded"
        return ModuleConvert(self.module, sources, how, rank, said * rank, error)
