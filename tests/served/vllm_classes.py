"""Print what vLLM's class of each type of model is to LoRA, as rows of a literal table.

    LORATOOL_SERVED=FOLDER python tests/served/vllm_classes.py [TABLE:TYPE ...]

Every parameter of a small model of transformers' is filled with a number of its own, so that it is seen where vLLM's
loader puts it; and vLLM's manager is asked for every path that PEFT could write. A row says: the class; `renames`, the
path that must be written for PEFT's; `never`, paths of linear layers and embeddings that no key reaches; `experts`, the
module, whether it takes PEFT's stacks, and the last names of one expert; `towers`, whether these take LoRA.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lib.models import tiny
from pairs import save
from servers import Server, running


def numbered(folder: Path, table: str, model_type: str) -> None:
    """Write a small model whose parameters are filled with their numbers, and the names that these stand for."""
    _, model = tiny.build(table, model_type)
    names = dict(enumerate((name for name, _ in model.named_parameters()), 1))
    with torch.no_grad():
        for number, weight in enumerate(model.parameters(), 1):
            weight.fill_(number)
    matrices = [name for name, each in model.named_modules() if getattr(getattr(each, "weight", None), "ndim", 0) == 2]
    save(model, folder)
    known = {"ids": names, "linear": matrices, "stacks": tiny.stacks(model)}
    (folder / "ids.json").write_text(json.dumps(known))


def any_layer(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", path)


def row(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a class from what vLLM said of it."""
    out: dict[str, Any] = {"class": facts["class"]}
    if not facts["lora"]:
        return out | {"lora": False}
    renames, never = {}, set()
    for path, served in facts["hits"].items():
        _, key = (None, None) if "unread" in facts else facts["keys"].get(path) or (None, None)
        if not served and key and key != path:
            renames[any_layer(path)] = any_layer(key)
        elif not served:
            never.add(any_layer(path))
    out |= {"renames": renames, "never": sorted(never - renames.keys())}
    stacks = [name for name, kind in facts["modules"].items() if "FusedMoE" in kind]
    if stacks:
        parts = [name.rsplit(".", 1)[1] for name in facts["packing"].get("experts", ()) if ".0." in name]
        out["experts"] = (any_layer(stacks[0]), "3-D" if facts["3d"] else "2-D", parts)
    if facts["parts"]:
        out["towers"] = facts["towers"]
    return out


def print_rows(vllm: Server, types: list[str]) -> None:
    for each in types:
        table, model_type = each.split(":")
        with tempfile.TemporaryDirectory() as folder:
            try:
                numbered(Path(folder), table, model_type)
                found = row(vllm.ask("facts", Path(folder)))
            except (Exception, AssertionError) as fault:
                lines = [line.strip() for line in str(fault).splitlines() if "rror" in line and "http" not in line]
                found = {"not built": lines[-1][:120] if lines else str(fault)[-120:]}
        print(f"    {each!r}: {found!r},", flush=True)


if __name__ == "__main__":
    every = [f"{table}:{each}" for table, each in tiny.tables() if table in ("causal", "image")]
    with running("vllm") as server:
        print_rows(server, sys.argv[1:] or every)
