"""Write the card of a merged model, whose figures are those of the merge's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...adapters.adapter import Adapter
from ...adapters.formats import usual_format
from ...architectures.mlx_names import FORMAT
from ...binding.modules.module_weights import spell_weight
from ...files.checkpoint import Checkpoint
from ...files.folder.sentence_transformers import MODULES
from ...files.output.model_card import ModelCard, code, name_on_hub, read_licence, shown_name
from ...views.merge import MergeReport
from ..cards import common_licence, few_names, folder_of, kept_or_none, short
from ..inputs import is_of_mlx


def merge_card(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], commands: Sequence[str], report: MergeReport
) -> bytes:
    """Return the card of a merge.

    Args:
        commands: lines of a shell: what made it, and what verifies it.
        report: of the merge; the figures of a dry run are not known.
    """
    folders = [base.root if base.has_side_files else None]
    folders += [folder_of(adapter.name, adapter.file.path) for adapter, _ in adapters]
    licences = [read_licence(folder) for folder in folders]
    names = [adapter.name for adapter, _ in adapters]
    models = dict.fromkeys(filter(None, map(name_on_hub, (report.base, *names))))
    metadata = {
        "base_model": tuple(models),
        "base_model_relation": "merge" if models else "",
        "library_name": _library(base),
        **common_licence(licences),
        "tags": ("lora", "loratool", "merge"),
    }
    facts = [f"base: {code(shown_name(report.base))}{_licence(licences[0])}"]
    facts += [
        f"{code(shown_name(adapter.name))}: {_adapter_facts(adapter, weight)}{_licence(licence)}"
        for (adapter, weight), licence in zip(adapters, licences[1:], strict=True)
    ]
    facts += [
        f"{report.changed} tensors changed, {report.copied} are the base's; "
        f"rounding leaves {kept_or_none(report.kept)} of the delta"
    ]
    facts += [f"left out: {few_names(report.left_out)}"] if report.left_out else []
    title = f"{code(shown_name(report.base))} with {few_names([*map(shown_name, names)])}"
    return ModelCard(title, facts, commands, metadata).encode()


def _library(base: Checkpoint) -> str:
    """Return the hub's name of what loads the model, empty if the files do not tell."""
    if base.parts or "_class_name" in base.config:
        return usual_format("pipeline").key
    if is_of_mlx(base):
        return FORMAT
    if base.has_side_files and (base.root / MODULES).is_file():
        return "sentence-transformers"
    return "transformers" if "model_type" in base.config else ""


def _adapter_facts(adapter: Adapter, weight: float) -> str:
    scales = sorted({update.scale for update in adapter.updates.values() if update.rank and not update.fault})
    scale = f", scale {'..'.join(short(each) for each in dict.fromkeys((scales[0], scales[-1])))}" if scales else ""
    own = f" ({code(spell_weight(weight, adapter.module_weights))})" if adapter.module_weights else ""
    count = len(adapter.updates)
    return f"weight {short(weight)}{own}{scale}, {count} modules of {adapter.format}, sha256 {code(adapter.sha256)}"


def _licence(licence: Mapping[str, str]) -> str:
    return f", licence {code(licence['license'])}" if licence else ""
