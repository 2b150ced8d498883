"""Hold every command against hostile names: of tensors, shards, modules and metadata in files, and of arguments."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fuzzing import Case, Fuzzer
from safetensors.torch import save
from valid_files import COMMANDS, LLAMA, PEFT, as_json, everything, factors, tensors, torch_bytes

pytestmark = pytest.mark.fuzz

NAMES = (
    *"/ . .. /etc/passwd ../x ../../x a/../../x ~ $HOME `touch${IFS}canary` $(touch${IFS}canary) CON nul".split(),
    *"aux.json COM1.safetensors x. x:stream C:x C:\\x \\ ..\\x a\\b \\\\host\\share __metadata__ %s%n {0} {x}".split(),
    *"* ? [a-z] ( re:( -o --force --json [red] [/] [bold]x 0 None true weight .weight weight. ..weight a..b".split(),
    *"é e\u0301 \u212b \xc5 ı İ ß ẞ ﬁ \u202e a\u202eb \u200b \ufeff \U0001f600 \uffff \U0010ffff \udc80 \ud800".split(),
    *("", "x ", " x", "\0", "a\0b", "\n", "a\nb", "\r", "\t", "\x07", "\x7f", "\x9b31m", "\u2028", "\u0085", "\xa0"),
    *("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "x" * 4096, "é" * 2000, "a/" * 2000, "error: x", "hint: x"),
)
# Ways to change a name that is right
TURNS: tuple[Callable[[str], str], ...] = (
    *(str.upper, str.title, str.swapcase),
    *(partial(str.format, form) for form in ("{}.", "{} ", " {}", "./{}", "x/{}", "/{}", "../{}", "{}\0", "\ufeff{}")),
    *(lambda name, old=old, new=new: name.replace(old, new)
      for old, new in ((".", "/"), (".", ".."), ("e", "e\u0301"), ("e", "é"), ("k", "\u212a"), ("o", "\x1b[2J"),
                       ("0", "٠"), ("0", "00"), ("0", "-1"), ("0", "99999999999"), (".0.", ".0x0."), ("A", "B"),
                       ("B", "A"))),
)  # fmt: skip


def name_like(rng: random.Random, name: str) -> str:
    """Return a hostile name, a turn of this one, or one within it."""
    match rng.randrange(4):
        case 0:
            return rng.choice(NAMES)
        case 1:
            parts = name.split(".")
            parts[rng.randrange(len(parts))] = rng.choice(NAMES)
            return ".".join(parts)
        case _:
            return rng.choice(TURNS)(name)


def safetensors_bytes(named: list[tuple[str, Any]]) -> bytes:
    """Return a file of tensors under any names, also one twice, which the official writer does not write."""
    header, data = [], b""
    for name, tensor in named:
        raw = bytes(tensor.numpy())
        entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        header.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        data += raw
    text = ("{" + ",".join(header) + "}").encode()
    return struct.pack("<Q", len(text)) + text + data


def with_names(rng: random.Random, found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return tensors of which some have other names, or are there under another name as well."""
    named = list(found.items())
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(named))
        name, tensor = named[at]
        named[at : at + rng.randrange(2)] = [(name_like(rng, name), tensor)]
    return named


def in_weights(rng: random.Random, files: dict[str, bytes]) -> str:
    """Change names of tensors."""
    file, found = rng.choice((("base/model", tensors()), ("adapter/adapter_model", factors())))
    named = with_names(rng, found)
    if rng.random() < 0.2:
        del files[f"{file}.safetensors"]
        path = "base/pytorch_model.bin" if file == "base/model" else f"{file}.bin"
        files[path] = torch_bytes({name: tensor for name, tensor in named if is_text(name)})
    else:
        files[f"{file}.safetensors"] = safetensors_bytes(named)
    return file.partition("/")[0]


def in_index(rng: random.Random, files: dict[str, bytes]) -> str:
    """Change names of tensors, or of shards with their files or without, in an index."""
    del files["base/model.safetensors"]
    files.update((name, data) for name, data in everything(shards=True).items() if name.startswith("base/"))
    path = "base/model.safetensors.index.json"
    index = json.loads(files[path])
    weight_map = index["weight_map"]
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(weight_map))
        if rng.random() < 0.3:
            weight_map[name_like(rng, name)] = weight_map[name]
        else:
            weight_map[name] = name_like(rng, weight_map[name])
    if rng.random() < 0.3:  # all of a shard
        shard = rng.choice(list(weight_map.values()))
        other = name_like(rng, shard)
        weight_map.update({name: other for name, file in weight_map.items() if file == shard})
    files[path] = as_json(index)
    return "base"


def in_adapter_config(rng: random.Random, files: dict[str, bytes]) -> str:
    """Change names that an adapter's config has."""
    name = name_like(rng, "q_proj")
    field, value = rng.choice(
        (
            ("target_modules", [name, "v_proj"]), ("modules_to_save", [name]), ("rank_pattern", {name: 2}),
            ("alpha_pattern", {name: 8}), ("base_model_name_or_path", name), ("target_parameters", [name]),
            ("exclude_modules", [name]), ("target_modules", name), ("peft_type", name), ("revision", name), (name, 1),
            ("trainable_token_indices", {name: [1]}), ("layers_pattern", name), ("task_type", name), ("bias", name),
        )
    )  # fmt: skip
    files["adapter/adapter_config.json"] = as_json({**PEFT, field: value})
    return "adapter"


def in_config(rng: random.Random, files: dict[str, bytes]) -> str:
    """Change names that a model's config has."""
    name = name_like(rng, "llama")
    field = rng.choice(("model_type", "architectures", "torch_dtype", "_name_or_path", "transformers_version", name))
    files["base/config.json"] = as_json({**LLAMA, field: [name] if field == "architectures" else name})
    return "base"


def in_metadata(rng: random.Random, files: dict[str, bytes]) -> str:
    """Put names into a file's metadata."""
    name = name_like(rng, "loratool")
    key = rng.choice("format loratool lora_adapter_metadata ss_network_module modelspec.title ss_base_model".split())
    value = rng.choice((name, json.dumps({name: name}), json.dumps({"adapter_config": {"r": name}})))
    if is_text(value):
        files["adapter/adapter_model.safetensors"] = save(factors(), {key: value})
    return "adapter"


def is_text(name: str) -> bool:
    """Return whether a name has no half of a surrogate pair, with which the official writers fail."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


PLACES = (in_weights, in_weights, in_weights, in_index, in_index, in_adapter_config, in_config, in_metadata)


def make_case(rng: random.Random) -> Case:
    files = everything()
    folder = rng.choice(PLACES)(rng, files)
    argv, outputs = rng.choice([(argv, out) for argv, out in COMMANDS.items() if folder in argv])
    return Case(files, argv, outputs)


def make_argument(rng: random.Random) -> Case:
    """Return a case with a hostile name in the place of an argument; a process has none with these characters."""
    name = rng.choice([each for each in NAMES if "\0" not in each and each != "\ud800"])
    argv, outputs = rng.choice(list(COMMANDS.items()))
    at = rng.randrange(1, len(argv))
    if argv[at - 1] == "-o":
        outputs = (name, f"{name}.undo")
    return Case(everything(), (*argv[:at], name, *argv[at + 1 :]), outputs)


def test_names_in_files(fuzz: Fuzzer) -> None:
    fuzz(make_case, 6)


def test_names_of_arguments(fuzz: Fuzzer) -> None:
    fuzz(make_argument, 6)
