"""The call of `verify`: its arguments, options and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ...binding.merge.choices import TIED
from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, StrPath, one_of, words_of
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.attestation import AttestationReport  # noqa: F401
    from ...views.verify import VerifyReport  # noqa: F401


@dataclass(frozen=True)
class Verify(Call["VerifyReport"]):
    """Prove that MERGED is BASE with the adapters added, or diagnose what is wrong.

    Modules that `target`, `exclude`, `layers` and `drop` exclude must be equal to the base's.

    Args:
        base: The model that the adapters were added to.
        adapters: The adapters of the merge with their weights, as in `merge`.
        merged: The output of `merge`, or of another program.
        tied: The value that you gave to merge.
        initial: The value that you gave to merge.
        residual_base: Add it if you gave it to merge.
        exhaustive: Examine every tensor that is wrong in full. By default a few are, and the others by a sample of
            their rows.
        allow: inconclusive: accept a merge in which all updates are below half an ulp, so that nothing can be
            checked.
        force: Replace a statement that exists.

    Raises:
        InputError: the files do not belong together.
    """

    work: ClassVar[str] = "verify.command.run_verify"

    base: StrPath
    adapters: Annotated[Adapters, Opt(metavar="ADAPTER[:WEIGHT]...")]
    merged: StrPath
    _: KW_ONLY
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None
    drop: calls.Drop = ()
    alpha: calls.Alpha = None
    tied: Annotated[Literal["untie", "share", "refuse"], one_of(TIED), Opt("About the inputs")] = "untie"
    initial: Annotated[StrPath | None, Opt("About the inputs", "ADAPTER")] = None
    residual_base: Annotated[bool, Opt("About the inputs")] = False
    allow: Annotated[
        Literal["inconclusive"] | Sequence[Literal["inconclusive"]], words_of(["inconclusive"]), Opt("Checks")
    ] = ()
    exhaustive: Annotated[bool, Opt("Checks")] = False
    digest: calls.Digest = False
    attest: calls.Attest = None
    force: Annotated[bool, Opt("Output", letter="-f")] = False
    progress: calls.Progress = None
    workers: calls.Workers = None


@dataclass(frozen=True)
class VerifyAttestation(Call["AttestationReport"]):
    """Hold a statement that --attest wrote against the files, and compute its merge again.

    Give all of `base`, `adapters` and `merged`, or none: then they are where the statement says. No name that only the
    statement has is downloaded.

    Args:
        attestation: Prove what this statement of `merge --attest` or `verify --attest` says: the files that it names
            and the merge, with its options. Then BASE, ADAPTER and MERGED need not be given.
        base: The model that the adapters were added to.
        adapters: The adapters in the order of the statement, without weights.
        merged: The merged model.
        initial: The initial adapter of the statement, if it is elsewhere.
        exhaustive: As in `verify`.
        allow: As in `verify`.

    Raises:
        InputError: the statement is damaged or of another kind, or names files that are not here.
        UsageError: some of the files are given, or weights.
    """

    work: ClassVar[str] = "attest.hold.run_verify_attestation"

    attestation: Annotated[StrPath, Opt("Checks", "FILE")]
    _: KW_ONLY
    base: StrPath | None = None
    adapters: Adapters | None = None
    merged: StrPath | None = None
    initial: StrPath | None = None
    allow: Annotated[
        Literal["inconclusive"] | Sequence[Literal["inconclusive"]], words_of(["inconclusive"]), Opt("Checks")
    ] = ()
    exhaustive: Annotated[bool, Opt("Checks")] = False
    progress: calls.Progress = None
    workers: calls.Workers = None


verify = function_of(Verify)

verify_attestation = function_of(VerifyAttestation)
