"""Open an adapter or a model as a lazy mapping, for programs and notebooks that look into one.

Opening reads headers only, and torch is loaded with the first tensor. In every format, modules and weights have the
names and numbers that the commands work with.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from ..adapters.adapter import Adapter
from ..adapters.formats import open_adapter as read_adapter
from ..adapters.updates.dora import DoRA
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..binding.modules.placement import Placement
from ..errors import InputError, UsageError
from ..files.checkpoint import Checkpoint, read_config
from ..files.codecs import RAW
from ..files.dtypes import DTYPE_NAMES, TORCH_FLOATS, TensorSpec
from ..views.parts.numbers import all_digits, dimensions, nbytes, plural, quantity, spread
from .arguments import StrPath, checked
from .inputs import open_base, without_base_option
from .machine import require_ieee

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.updates.update import Update
    from ..numerics.arrays import Numbers

V = TypeVar("V")

Self = TypeVar("Self", bound="_Opened[Any]")


class _Opened(Mapping[str, V]):
    """A mapping whose values are in files. A `with` or `close` closes them."""

    def __init__(self, path: str, files: ExitStack) -> None:
        self.path = path
        self._files = files
        self._closed = False

    def close(self) -> None:
        """Close the files. Values that were read stay valid."""
        self._closed = True
        self._files.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("is closed", culprit=self.path, remedy="read it inside its with block")


class AdapterModule:
    """The update of one module in an open adapter.

    Attributes:
        name: the module's path.
        kind: `lora`, `dora`, `loha`, ...: what makes the update.
        rank: of its factors; 0 without any.
        scale: alpha / rank, or by what else the file multiplies.
        shape: of the weight that it changes, (out, in, *kernel); of a stack (experts, out, in).
    """

    def __init__(self, opened: OpenAdapter, adapter: Adapter, spec: UpdateSpec, name: str) -> None:
        self.name = name
        self.kind, self.rank, self.scale, self.shape = spec.kind, spec.rank, spec.scale, spec.shape
        self._opened, self._adapter, self._spec = opened, adapter, spec

    def __repr__(self) -> str:
        shown = f", rank {self.rank}, scale {self.scale:g}" if self.rank else ""
        return f"<{self.kind} of {self.name}: {dimensions(self.shape)}{shown}>"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that make the update, as they are stored, by their roles (`A`, `B`, `magnitude`, ...)."""
        self._opened._require_open()
        return {role: self._adapter.file.tensor(name) for role, name in self._spec.tensors.items()}

    @property
    def A(self) -> Tensor:
        """The factor on the side of the inputs, (rank, in, *kernel)."""
        return _tensor(self._factors.A)

    @property
    def B(self) -> Tensor:
        """The factor on the side of the outputs, (out, rank)."""
        return _tensor(self._factors.B)

    @require_ieee
    def delta(self) -> Tensor:
        """Return what the update adds to the weight, in float64: of LoRA scale * B @ A.

        Raises:
            InputError: the change depends on the weight, as DoRA's does, or its size, as VeRA's; or a tensor holds nan
                or inf.
        """
        if not self._spec.additive or None in self._spec.cls.flat(self._spec):
            of = "the weight's size" if self._spec.additive else "the weight"
            what = f"is {self.kind}: its delta depends on {of}"
            raise InputError(what, culprit=self.name, remedy="merge it, then compare the weights")
        import numpy as np

        from ..numerics.arrays import Numbers
        from ..streaming.segment import RowSegment, UpdateLoader

        self._opened._require_open()
        out = np.zeros(self.shape)
        experts = range(self.shape[0]) if self._spec.cls.stack else (None,)
        for expert, matrix in zip(experts, out if self._spec.cls.stack else (out,), strict=True):
            rows = matrix.reshape(len(matrix), -1)
            placement = Placement(
                self._adapter,
                self._spec,
                weight=1.0,
                transposed=False,
                rows=len(rows),
                start=0,
                stop=len(rows),
                expert=expert,
            )
            segment = RowSegment(None, rows.shape[1], 0, len(rows), [placement], UpdateLoader())
            rows += segment.reals(Numbers.of(rows), 0)[0]
        return _tensor(Numbers.of(out))

    @property
    def _factors(self) -> LowRank:
        self._opened._require_open()
        update: Update = self._adapter.load(self._spec)
        inner = update.inner if isinstance(update, DoRA) else update
        if not isinstance(inner, LowRank):
            theirs = f"its tensors are {', '.join(self._spec.tensors)}"
            raise InputError(f"is {self.kind} and has no factors A and B", culprit=self.name, remedy=theirs)
        return inner


class OpenAdapter(_Opened[AdapterModule]):
    """An adapter of any format as a mapping from module path to its update.

    Attributes:
        path: as it was named.
        format: a key of FORMATS, like `peft` or `kohya`.
        config: all that its config says, whoever wrote it; empty where there is none.
        base_model: the base that it names, or None.
    """

    def __init__(self, adapter: Adapter, files: ExitStack) -> None:
        super().__init__(adapter.name, files)
        self.format, self.config = adapter.format, adapter.config.extra
        self.base_model = adapter.config.base_model
        self._adapter = adapter

    def __getitem__(self, module: str) -> AdapterModule:
        return AdapterModule(self, self._adapter, self._adapter.updates[module], module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.updates)

    def __len__(self) -> int:
        return len(self._adapter.updates)

    def __repr__(self) -> str:
        updates = self._adapter.updates.values()
        kinds = " and ".join(
            f"{all_digits(count)} {kind}" for kind, count in Counter(each.kind for each in updates).items()
        )
        ranks = [each.rank for each in updates if each.rank]
        rank = [f"rank {spread(ranks, all_digits)}"] if ranks else []
        specs = [spec for each in updates for spec in each.specs.values()]
        base = [f"for {self.base_model}"] if self.base_model else []
        return f"<{self.format} adapter {self.path}: {', '.join([f'{kinds} modules', *rank, *_sizes(specs), *base])}>"


class OpenCheckpoint(_Opened["Tensor"]):
    """A model as a mapping from its weights' names to tensors; of codes the numbers that they mean, in float64.

    Attributes:
        path: as it was named.
        config: its config.json; empty without one.
        specs: name -> type and shape, from headers.
        quantized: the method of its quantized weights, or None.
    """

    def __init__(self, path: str, model: Checkpoint, files: ExitStack) -> None:
        super().__init__(path, files)
        self.config, self.specs, self.quantized = model.config, model.specs, model.quantized
        self._model = model

    @require_ieee
    def __getitem__(self, name: str) -> Tensor:
        self._require_open()
        if name not in self.specs:  # nor is a part of a weight one
            raise KeyError(name)
        ref = self._model.ref(name)
        if ref.codec is not RAW or ref.spec.dtype in TORCH_FLOATS:
            return _tensor(ref.read_matrix(1, 0, 1)).view(ref.spec.shape)
        if ref.spec.dtype not in DTYPE_NAMES:
            raise InputError(f"is {ref.spec.dtype}, which torch does not have", culprit=name)
        import torch

        dtype = getattr(torch, DTYPE_NAMES[ref.spec.dtype])
        if not ref.spec.size:
            return torch.empty(ref.spec.shape, dtype=dtype)
        return torch.frombuffer(ref.file.read(name), dtype=dtype).view(ref.spec.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        specs = self.specs.values()
        facts = [plural(len(specs), "tensor"), f"{quantity(sum(spec.size for spec in specs))} parameters"]
        facts += [*([self.quantized] if self.quantized else []), *_sizes(self._model.stored.values())]
        return f"<{self._model.model_type or 'checkpoint'} {self.path}: {', '.join(facts)}>"


def _tensor(numbers: Numbers) -> Tensor:
    from ..numerics.tensors import tensor_of

    return tensor_of(numbers)


def _sizes(specs: Iterable[TensorSpec]) -> list[str]:
    """Return the types and bytes of tensors, in words."""
    listed = [*specs]
    return ["/".join(sorted({spec.dtype for spec in listed})), nbytes(sum(spec.nbytes for spec in listed))]


@checked
@require_ieee
def open_adapter(path: StrPath, *, alpha: float | None = None, base: StrPath | None = None) -> OpenAdapter:
    """Open an adapter of any format as a lazy mapping; close it, or use it in a `with`.

    >>> with loratool.open_adapter("demo/adapter") as adapter:
    ...     adapter["model.layers.0.self_attn.q_proj"]
    <lora of model.layers.0.self_attn.q_proj: 64x64, rank 8, scale 2>

    Args:
        path: a folder, a file, or `org/adapter` on the hub.
        alpha: for a file without an alpha.
        base: the model, for formats whose rows only its config tells.

    Raises:
        InputError: it is no adapter, or one that cannot be read.
        NeedsFlag: the file does not say its alpha.
    """
    with ExitStack() as files:
        with without_base_option() if base is None else nullcontext():
            adapter = read_adapter(path, alpha, model=None if base is None else read_config(base))
        files.callback(adapter.file.close)
        return OpenAdapter(adapter, files.pop_all())


@checked
@require_ieee
def open_checkpoint(path: StrPath) -> OpenCheckpoint:
    """Open a model as a lazy mapping; close it, or use it in a `with`.

    >>> with loratool.open_checkpoint("demo/base") as model:
    ...     model["model.layers.0.self_attn.q_proj.weight"].dtype
    torch.bfloat16

    Args:
        path: a file, a folder, an index JSON, or `org/model` on the hub.

    Raises:
        InputError: it is no model, or one that cannot be read.
    """
    with ExitStack() as files:
        model = open_base(path, "open_checkpoint opens models; use open_adapter", files)
        return OpenCheckpoint(os.fspath(path), model, files.pop_all())
