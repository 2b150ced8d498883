"""The calls of `diff`, of adapters and models, with --spectra and with --headers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..arguments import Opt, StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.diff_adapters import AdapterDiff  # noqa: F401
    from ...views.diff_headers import HeadersDiff  # noqa: F401
    from ...views.diff_models import CheckpointDiff  # noqa: F401
    from ...views.diff_several import AdaptersDiff  # noqa: F401
    from ...views.diff_spectra import SpectraDiff  # noqa: F401


class Diff(Call["AdapterDiff | AdaptersDiff | CheckpointDiff"]):
    """Compare two or more adapters, or two models.

    Adapters may be of any readable formats, ranks and targets.

    Args:
        a: An adapter or a model.
        b: Another of the same kind.
        others: More adapters. For three or more, the report shows what each two of them share.
        base: The model under two adapters. With it, you see how large their deltas are relative to the weights.

    Raises:
        UsageError: three or more with a base, or with models among them.
        InputError: only one is an adapter, or their shapes belong to different models.
    """

    work: ClassVar[str] = "diff.command.run_diff"

    def __init__(  # no dataclass, as no field is like *others
        self,
        a: StrPath,
        b: StrPath,
        *others: Annotated[StrPath, Opt(metavar="[C]...")],
        base: Annotated[StrPath | None, Opt("Checks", "BASE")] = None,
        drop: calls.Drop = (),
        alpha: calls.Alpha = None,
        target: calls.Target = (),
        exclude: calls.Exclude = (),
        layers: calls.OfLayers = None,
        digest: calls.Digest = False,
        device: calls.Device = "auto",
        progress: calls.Progress = None,
    ) -> None:
        self.a, self.b, self.others = a, b, others
        self.base, self.drop, self.alpha = base, drop, alpha
        self.target, self.exclude, self.layers = target, exclude, layers
        self.digest, self.device, self.progress = digest, device, progress


@dataclass(frozen=True)
class DiffSpectra(Call["SpectraDiff"]):
    """Count the intruder dimensions of a fine-tune, in all linear layers unless you name targets.

    Args:
        a: The model before fine-tuning.
        b: The fine-tune.

    Raises:
        InputError: one is an adapter, nothing is selected, or a weight has unreadable codes, nan or inf.
        UsageError: the threshold is not a cosine above 0.
    """

    work: ClassVar[str] = "diff.spectra.run_diff_spectra"

    a: StrPath
    b: StrPath
    _: KW_ONLY
    top: calls.Top = None
    threshold: calls.Threshold = None
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None
    digest: calls.Digest = False
    device: calls.Device = "auto"
    progress: calls.Progress = None


@dataclass(frozen=True)
class DiffHeaders(Call["HeadersDiff"]):
    """Compare names, shapes and types of the tensors of two models or adapters, and read no weights.

    Args:
        a: A model or an adapter.
        b: Another of the same kind.

    Raises:
        InputError: only one is an adapter, or a header cannot be read.
    """

    work: ClassVar[str] = "diff.headers.run_diff_headers"

    a: StrPath
    b: StrPath


diff = function_of(Diff)

diff_spectra = function_of(DiffSpectra)

diff_headers = function_of(DiffHeaders)
