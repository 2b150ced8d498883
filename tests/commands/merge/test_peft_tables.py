"""Hold every row of the table of PEFT's kinds: merged as PEFT merges it, proven, undone, and converted to LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import few
from lib.models.peft_tables import ROWS, loaded, peft, write
from safetensors.torch import load_file

import loratool
from loratool.adapters.updates import peft_methods
from loratool.errors import InputError, NeedsFlag

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("variant", few(ROWS, *(each for each in ROWS if "," not in each)))
def test_merged_and_converted_as_peft_has_it(tmp_path: Path, variant: str) -> None:
    wanted, close = write(tmp_path, variant), ROWS[variant].close
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors"
    before = load_file(base)
    loratool.merge(base, adapter, out)
    found, changed = load_file(out), {name for name, x in wanted.items() if not torch.equal(x, before[name])}
    assert {name.rpartition(".")[0] for name in changed} >= {*ROWS[variant].layers}
    for name, x in wanted.items():
        assert (found[name] - x).abs().max() <= close * (x - before[name]).abs().max(), name
    assert loratool.verify(base, adapter, out).status == "proven"
    loratool.unmerge(out, adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    if any(layer.startswith(("conv", "point")) for layer in ROWS[variant].layers):
        return  # their kernels are not in every file
    try:  # which kinds are converted is a table of the guide
        report = loratool.convert(adapter, tmp_path / "lora", to="peft")
    except (InputError, NeedsFlag):
        return
    if ranks := ranks_of(adapter):
        assert {row.rank for row in report.modules if row.rank} == ranks
    again = loaded(base, tmp_path / "lora").merge_and_unload().state_dict()
    for name, x in wanted.items():
        assert (again[name] - x).abs().max() <= 1e-6 * (x - before[name]).abs().max(), name


def ranks_of(adapter: Path) -> set[int]:
    """Return the ranks of the kinds that have the same as LoRA."""
    ends = ("unilora_indices_A", "tinylora_A", "vblora_logits_A_topk_indices", "vblora_logits_A", "delora_A")
    return {len(x) for name, x in load_file(adapter / "adapter_model.safetensors").items() if name.endswith(ends)}


def test_the_table_has_every_kind() -> None:
    """All that peft still makes: Bone is MiSS today."""
    types = {getattr(peft, row.config)(**row.fields).peft_type.value for row in ROWS.values()}
    assert types >= peft_methods().keys() - {"BONE"}
