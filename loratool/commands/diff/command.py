"""The command `diff`: compare adapters in factor space, or two checkpoints tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS
from ...binding.modules.selection import Selection
from ...errors import InputError, UsageError
from ...files.checkpoint import open_checkpoint, read_config
from ...files.gguf_model import with_names_of_one
from ...streaming.parallel import choose_device
from ...streaming.threads import one_thread
from ...transform.in_memory import by_meaning
from ...views.diff_adapters import AdapterDiff
from ...views.diff_models import CheckpointDiff
from ...views.diff_several import AdaptersDiff
from ..adapter_requests import parse_adapters
from ..arguments import parse_words
from ..inputs import open_adapters, open_model, without_base_option
from .adapters import diff_adapters
from .aligned import align_modules
from .call import Diff
from .headers import are_adapters
from .models import diff_models
from .related import require_known_names, require_of_one_model
from .several import diff_several

if TYPE_CHECKING:
    from ...transform.lazy import Transformed


def run_diff(call: Diff) -> AdapterDiff | AdaptersDiff | CheckpointDiff:
    """Compare adapters of any readable formats, ranks and targets, or two checkpoints."""
    selection = Selection.parse(call.target, call.exclude, call.layers)
    paths = [os.fspath(path) for path in (call.a, call.b, *call.others)]
    with ExitStack() as opened:
        opened.enter_context(one_thread())
        if not are_adapters(paths):
            if call.base is not None or call.alpha is not None or call.drop:
                raise UsageError("--base, --drop and --alpha are for adapters, but these are two models")
            sides = [open_checkpoint(path) for path in paths]
            for side in sides:
                opened.callback(side.close)
            model_a, model_b = with_names_of_one(sides)
            return diff_models((paths[0], paths[1]), model_a, model_b, selection, call.progress)
        if call.others and call.base is not None:
            raise UsageError("--base is for two adapters: run diff for each pair")
        config = None if call.base is None else read_config(call.base)
        adapters = open_adapters(
            parse_adapters(paths, parse_words(call.drop)),
            call.alpha,
            opened,
            config,
            has_base_option=call.base is None and not call.others,
        )
        sha256 = {each.name: each.sha256 for each in adapters}
        if len({each.format for each in adapters}) > 1:
            with without_base_option() if call.others else nullcontext():
                adapters = [FORMATS[each.format].with_standard_names(each) for each in adapters]
        modules = [module for adapter in adapters for module in adapter.updates]
        states = by_meaning(adapters, selection)
        comparable, aliases = [state.adapter for state in states], _file_names(states)
        require_of_one_model(comparable)
        selection.require_used([*modules, *aliases], " or ".join(adapter.name for adapter in adapters))
        selected = [_selected(adapter, selection, aliases) for adapter in comparable]
        if not any(each.updates for each in selected):
            raise InputError(f"{'no' if call.others else 'neither'} adapter has a selected module")
        aligned = align_modules(selected)
        require_known_names(selected, aligned)
        if call.others:
            return replace(diff_several(selected, aligned, choose_device(call.device), call.progress), sha256=sha256)
        model = None if call.base is None else open_model(call.base, "--base must be the model under both", opened)
        first, second = selected
        report = diff_adapters(
            first,
            second,
            aligned,
            model,
            os.fspath(call.base) if call.base else None,
            choose_device(call.device),
            call.progress,
        )
        return replace(report, sha256=sha256)


def _file_names(states: Sequence[Transformed]) -> dict[str, tuple[str, ...]]:
    """Return module -> its names in the files, for modules with other names or rows there."""
    names: dict[str, tuple[str, ...]] = {}
    for state in states:
        for module, change in state.log.items():
            if change.sources != (module,):
                names[module] = (*names.get(module, ()), *change.sources)
    return names


def _selected(adapter: Adapter, selection: Selection, aliases: Mapping[str, tuple[str, ...]]) -> Adapter:
    return adapter.only([module for module in adapter.updates if selection.selects(module, *aliases.get(module, ()))])
