"""Make the tables of formats and runtimes, one by converting a small adapter of each format to each.

`tests/lib/guide_tables.py` writes them into the guides. A cell of the matrix is what `convert` reported, with the flags
that it asked for first, or that it refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import factors, weights, write_peft
from safetensors.torch import save_file
from torch import Tensor

import loratool
from lib import markdown
from lib.files import gguf_bytes
from lib.models.training_runs import write_dcp
from loratool import InputError, NeedsFlag
from loratool.adapters.formats import FORMATS, loaded_by, written_formats
from loratool.adapters.updates import UPDATES
from loratool.architectures.families import FAMILIES
from loratool.architectures.runtimes.image_programs import IMAGE_RUNTIMES
from loratool.architectures.runtimes.runtime import FEATURES
from loratool.architectures.runtimes.table import RUNTIMES
from loratool.files.output.output import CONTAINERS

Q, Q_SHAPE = "model.layers.0.self_attn.q_proj", (6, 8)
DOWN_UP, A_B = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
SDXL = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
SGM = "input_blocks.4.1.transformer_blocks.1.attn1.to_q"
LAYER = "text_model.encoder.layers.0.mlp.fc1"
# Of Flux's widths and last blocks, which tell it from others with modules of these names
SPLIT = {f"transformer_blocks.18.attn.to_{x}": (3072, 3072) for x in "qkv"}
SPLIT |= {"single_transformer_blocks.37.proj_out": (3072, 15360)}
FUSED = {"double_blocks.18.img_attn.qkv": (9216, 3072), "single_blocks.37.linear2": (3072, 15360)}


def _flat(names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.replace(".", "_"): shape for name, shape in names.items()}


def _image(
    path: Path,
    names: Mapping[str, tuple[int, ...]],
    ends: tuple[str, str],
    alpha: float | None = 2.0,
    mark: str = ".",
    **more: Tensor,
) -> Path:
    """Write one file: a pair of rank 4 for each name, an alpha, and what else each has."""
    tensors = {}
    for i, (name, shape) in enumerate(names.items()):
        for end, side in zip(ends, factors(*shape, 4, seed=i), strict=True):
            tensors[f"{name}{mark}{end}"] = side
        tensors |= {f"{name}.{end}": tensor.clone() for end, tensor in more.items()}
        tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def _peft(path: Path, dora: bool = False, **config: Any) -> Path:
    folder = write_peft(path, {Q: factors(*Q_SHAPE, 4)}, **config)
    if dora:
        from safetensors.torch import load_file

        file = folder / "adapter_model.safetensors"
        save_file({**load_file(file), f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(6)}, file)
    return folder


def _mlx(path: Path, dora: bool) -> Path:
    path.mkdir(parents=True)
    A, B = factors(*Q_SHAPE, 4)
    tensors = {f"{Q}.lora_a": A.T.contiguous(), f"{Q}.lora_b": B.T.contiguous()}
    save_file({**tensors, **({f"{Q}.m": torch.ones(6)} if dora else {})}, path / "adapters.safetensors")
    lora = {"rank": 4, "scale": 0.5, "dropout": 0.0}
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "lora_parameters": lora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _gguf(path: Path) -> Path:
    """Write llama.cpp's file of a model with one head, which the file says."""
    A, B = (each.numpy() for each in factors(*Q_SHAPE, 4))
    tensors = {f"blk.0.attn_q.weight.lora_{end}": gguf_bytes.floats(each) for end, each in (("a", A), ("b", B))}
    fields = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    fields |= {"llama.attention.head_count": 1, "adapter.lora.alpha": 2.0}
    return gguf_bytes.write(path.with_suffix(".gguf"), fields, tensors)


def _loralib(path: Path, merged: bool) -> Path:
    A, B = factors(24, 8, 4)
    tensors = (
        {"c_attn.lora_A": A, "c_attn.lora_B": B[:16, :2].contiguous()}
        if merged
        else {f"{Q}.lora_A": A, f"{Q}.lora_B": B}
    )
    torch.save(tensors, path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def _enable_lora(path: Path) -> Path:
    """Write a MergedLinear of q and v as PEFT before 0.3 does."""
    A, _ = factors(24, 8, 4)
    config = {"enable_lora": [True, False, True], "r": 2, "lora_alpha": 2}
    return write_peft(path, {"h.0.attn.c_attn": (A, weights(16, 2, 1))}, **config)


def _trained(path: Path, name: str, tensors: Mapping[str, Tensor], beside: Mapping[str, str]) -> Path:
    """Write a torch file in a folder, and what its trainer leaves beside it."""
    path.mkdir()
    torch.save(dict(tensors), path / name)
    for file, text in beside.items():
        (path / file).write_text(text)
    return path


def _adapterhub(path: Path) -> Path:
    own = {"architecture": "lora", "composition_mode": "add", "r": 4, "alpha": 2, "attn_matrices": ["q", "v"]}
    sides = zip("AB", factors(*Q_SHAPE, 4), strict=True)
    tensors = {f"encoder.layer.0.attention.self.query.loras.mine.lora_{x}": side for x, side in sides}
    return _trained(path, "pytorch_adapter.bin", tensors, {"adapter_config.json": json.dumps({"config": own})})


def _torchtune(path: Path) -> Path:
    A, B = factors(8, 8, 4)
    model = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
    tensors = {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B}
    said = {"adapter_config.json": json.dumps({"r": 4, "lora_alpha": 2}), "config.json": json.dumps(model)}
    return _trained(path, "adapter_model.pt", tensors, said)


def _litgpt(path: Path) -> Path:
    A, B = factors(8, 8, 4)
    lines = "lora_r: 4\nlora_alpha: 2\nlora_query: false\nlora_key: false\nlora_value: false\n"
    model = "mlp_class_name: LLaMAMLP\nhead_size: 4\nn_head: 2\nn_query_groups: 2\n"
    tensors = {"transformer.h.0.attn.proj.lora_A": A, "transformer.h.0.attn.proj.lora_B": B}
    return _trained(path, "lit_model.pth.lora", tensors, {"hyperparameters.yaml": lines, "model_config.yaml": model})


def _sam(path: Path) -> Path:
    tensors = {
        f"w_{end}_00{n}": weights(*shape, seed=n) for n in (0, 1) for end, shape in (("a", (2, 8)), ("b", (8, 2)))
    }
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def _cloneofsimo(path: Path) -> Path:
    """Write the attentions of SD 1, 128 layers, 2 columns wide here."""
    tensors = {f"unet:{i}:{end}": weights(*shape, seed=i) for i in range(128)
               for end, shape in (("up", (2, 1)), ("down", (1, 2)))}  # fmt: skip
    save_file(tensors, path.with_suffix(".safetensors"), {"unet": json.dumps(["CrossAttention"])})
    return path.with_suffix(".safetensors")


def _megatron(path: Path) -> Path:
    A, B = factors(8, 8, 4)
    stem = "decoder.layers.0.self_attention.linear_proj.adapter"
    folder = write_dcp(path, {(f"{stem}.linear_in.weight",): A, (f"{stem}.linear_out.weight",): B})
    (folder / "run_config.yaml").write_text("peft:\n  alpha: 2\nmodel:\n  tensor_model_parallel_size: 1\n")
    return folder


# The readable formats, each with what makes a small adapter of it
READABLE: dict[str, Callable[[Path], Path]] = {
    "PEFT, of a language model": lambda p: _peft(p, lora_alpha=2),
    "PEFT, rsLoRA": lambda p: _peft(p, lora_alpha=3, use_rslora=True),
    "PEFT, DoRA": lambda p: _peft(p, dora=True, use_dora=True),
    "PEFT before 0.3, `enable_lora`": _enable_lora,
    "PEFT, of an image model": lambda p: write_peft(p, {SDXL: factors(8, 8, 4)}, lora_alpha=2),
    "MLX": lambda p: _mlx(p, False),
    "MLX, DoRA": lambda p: _mlx(p, True),
    "llama.cpp": _gguf,
    "loralib": lambda p: _loralib(p, False),
    "loralib, MergedLinear": lambda p: _loralib(p, True),
    "AdapterHub": _adapterhub,
    "torchtune": _torchtune,
    "litgpt": _litgpt,
    "Segment Anything": _sam,
    "Megatron-Core": _megatron,
    "kohya, SD 1, 2, SDXL": lambda p: _image(
        p, {f"lora_unet_{SGM.replace('.', '_')}": (8, 8), f"lora_te1_{LAYER.replace('.', '_')}": (32, 8)}, DOWN_UP
    ),
    "kohya, Flux and SD 3": lambda p: _image(p, {f"lora_unet_{n}": s for n, s in _flat(FUSED).items()}, DOWN_UP),
    "kohya, DoRA": lambda p: _image(
        p, {f"lora_unet_{SGM.replace('.', '_')}": (8, 8)}, DOWN_UP, dora_scale=torch.ones(8, 1)
    ),
    "diffusers, SD 1, 2, SDXL": lambda p: _image(
        p, {f"unet.{SDXL}": (8, 8), f"text_encoder.{LAYER}": (32, 8)}, A_B, None
    ),
    "diffusers, Flux and SD 3": lambda p: _image(p, {f"transformer.{n}": s for n, s in SPLIT.items()}, A_B, None),
    "diffusers, old processors": lambda p: _image(
        p, {f"unet.{SDXL.replace('.to_q', '.processor.to_q')}": (8, 8)}, ("down.weight", "up.weight"), None, "_lora."
    ),
    "ComfyUI": lambda p: _image(
        p, {f"diffusion_model.{SGM}": (8, 8), f"text_encoders.clip_l.transformer.{LAYER}": (32, 8)}, DOWN_UP
    ),
    "ai-toolkit": lambda p: _image(p, {f"transformer.{n}": s for n, s in SPLIT.items()}, A_B, None),
    "XLabs": lambda p: _image(
        p,
        {"double_blocks.18.processor.qkv_lora1": (9216, 3072), "single_blocks.37.processor.proj_lora": (3072, 15360)},
        ("down.weight", "up.weight"),
        None,
    ),
    "OneTrainer": lambda p: _image(p, {f"lora_transformer_{n}": s for n, s in _flat(SPLIT).items()}, DOWN_UP),
    "cloneofsimo": _cloneofsimo,
}


def columns() -> dict[str, dict[str, Any]]:
    """Return the formats that are written, each with the options of its column."""
    return {**{to: {} for to in written_formats()}, "peft --plain": {"plain": True}}


def cell(adapter: Path, column: str, out: Path) -> tuple[str, loratool.ConvertReport | None]:
    """Convert to `out` with each flag that is asked for; return the cell, which names them, and the report."""
    to = column.split()[0]
    out = out.with_suffix(CONTAINERS[FORMATS[to].container][0])
    options: dict[str, Any] = dict(columns()[column])
    asked: list[str] = []
    while True:
        try:
            report = loratool.convert(adapter, out, to=to, force=True, **options)
        except NeedsFlag as error:
            flags = re.findall(r"--[a-z-]+", error.remedy or "")
            values = {"--alpha": ("alpha", 2.0), "--enable-lora": ("enable_lora", (True, False, True))}
            if "--base" in flags:
                return "needs base", None
            if flags[0] == "--exclude":
                options["exclude"] = re.sub(r"'| to exclude.*", "", (error.remedy or "").split("--exclude ")[1]).split(
                    ","
                )
                asked.append("one component")
                continue
            name, value = values[flags[0]]
            options[name] = value
            asked.append(flags[0])
            continue
        except InputError:
            return "impossible", None
        said = [_how(report), *(f"with `{each}`" if each[0] == "-" else each for each in asked)]
        return ", ".join(said), report


def _how(report: loratool.ConvertReport) -> str:
    hows = {module.how for module in report.modules}
    error = max(module.error for module in report.modules)
    if hows & {"rounded", "truncated"}:
        return f"{'truncated' if 'truncated' in hows else 'rounded'}, {error:.0e}"
    assert error == 0.0
    return "folded" if "folded" in hows else ", ".join(["exact", *sorted(hows - {"exact"})])


def matrix(folder: Path) -> str:
    """Return the matrix as Markdown: a table for each set of targets that some adapters convert to."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for i, (name, make) in enumerate(READABLE.items()):
        adapter, out = make(folder / f"{i}"), folder / "out.safetensors"
        cells = {column: cell(adapter, column, out)[0] for column in columns()}
        flags = dict.fromkeys(flag for said in cells.values() for flag in re.findall(r"with (`--[a-z-]+`)", said))
        possible = {column: _shortened(said) for column, said in cells.items() if said != "impossible"}
        if set(cells.values()) == {"needs base"}:  # which a small adapter alone does not have
            continue
        named = f"{name} ({', '.join(flags)})" if flags else name
        groups.setdefault(tuple(possible), []).append((named, *possible.values()))
    tables = []
    for targets, rows in groups.items():
        heads = [target.replace("peft --plain", "plain") for target in targets]
        tables.append(markdown.table(("from", *heads), rows))
    return "\n".join(tables)


def _shortened(said: str) -> str:
    """Return a cell in a word: what the row's name says is left out, and one component is a star."""
    said = re.sub(r", with `--[a-z-]+`", "", said).removeprefix("needs ").replace(", one component", "*")
    return re.sub(r"exact, (split|fused)", r"\1", said)


def held() -> str:
    """Return what files of each format hold as Markdown, from `Capabilities`."""
    rows = []
    for key, each in FORMATS.items():
        can = each.can
        kinds = ", ".join(kind for kind, cls in UPDATES.items() if cls in can.kinds)
        written = ("folder, file" if can.folder else "file") if can.writes else "no"
        components = "all" if can.components == "many" else "one"
        rows.append((f"`{key}`", components, kinds, can.alpha, "yes" if can.starts else "no", written))
    return markdown.table(("format", "models", "updates", "alpha", "init", "written"), rows)


SIDE_BY_SIDE = 5  # runtimes whose columns fit a terminal


def applied() -> str:
    """Return what each runtime does with what an adapter may have as Markdown, from RUNTIMES, some in each table."""
    rows, tables = [*RUNTIMES.values()], []
    for some in (rows[:SIDE_BY_SIDE], rows[SIDE_BY_SIDE:]):
        lines = [(title, *(row.reads[feature] for row in some)) for feature, title in FEATURES.items()]
        lines.append(("a missing module", *(row.miss for row in some)))
        tables.append(markdown.table(("", *(f"`{row.key}`" for row in some)), lines))
    return "\n".join(tables)


def runtimes() -> str:
    """Return which version of each runtime is known and how as Markdown, from RUNTIMES."""
    rows = []
    for row in RUNTIMES.values():
        written = loaded_by(row.key).key + (", Modelfile" if row.modelfile else "")
        rows.append((f"`{row.key}`", row.title, row.version, row.checked, written))
    return markdown.table(("`--for`", "program", "version", "known", "written as"), rows)


NORMS = {"sum": "applied", "base": "applied, by magnitudes for it", "none": "made LoRA"}


def image_programs() -> str:
    """Return the version and what each program for image models does with DoRA as Markdown, from IMAGE_RUNTIMES."""
    rows = []
    for row in IMAGE_RUNTIMES.values():
        inputs = "applied" if row.along_inputs else "made LoRA"
        rows.append((f"`{row.key}`", row.version, row.checked, loaded_by(row.key).key, NORMS[row.dora], inputs))
    columns = ("`--for`", "version", "known", "written as", "DoRA along outputs", "along inputs")
    return markdown.table(columns, rows)


def image_families() -> str:
    """Return the families that each program for image models loads adapters of as Markdown, from IMAGE_RUNTIMES."""
    titles = {
        row.key: ", ".join(family.title for key, family in FAMILIES.items() if key in row.families)
        for row in IMAGE_RUNTIMES.values()
    }
    return "".join(markdown.bullet(f"`{key}`: {families}") for key, families in titles.items())


# Software that we did not write, and the test that holds a format to it. Of adapters by keys of FORMATS
ADAPTERS_CHECKED = {
    "cloneofsimo": ("cloneofsimo's own file", "adapters/test_old_formats.py"),
    "kohya": ("diffusers", "commands/convert/test_convert_image_oracles.py"),
    "comfy": ("ComfyUI", "commands/convert/test_image_programs.py"),
    "diffusers": ("diffusers", "commands/convert/test_convert_image_oracles.py"),
    "adapterhub": ("adapters", "adapters/test_trainers_adapterhub.py"),
    "gguf": ("gguf, llama.cpp's converters", "adapters/test_gguf_names.py"),
    "torchtune": ("torchtune", "adapters/test_trainers_torchtune.py"),
    "litgpt": ("litgpt", "adapters/test_trainers_litgpt.py"),
    "loralib": ("loralib", "commands/convert/test_convert_image_oracles.py"),
    "mlx": ("mlx-lm", "adapters/test_mlx_oracle.py"),
    "megatron": ("Megatron-Bridge, Megatron-Core", "adapters/test_megatron.py"),
    "sam": ("SAMed, LoRA-ViT", "adapters/test_sam.py"),
    "peft": ("peft", "commands/merge/test_merge_peft_layers.py"),
}

# Of models: what they are written as, the software, the test
MODELS_CHECKED = {
    "safetensors": ("a file or a folder", "safetensors", "files/containers/test_safetensors_file.py"),
    "torch": ("a file or a folder, by `convert`", "torch", "files/containers/test_torch_reader.py"),
    "GGUF": ("a file, of a GGUF base", "gguf, llama.cpp's converters", "files/test_gguf_as_transformers.py"),
    "MLX": ("a folder, of an MLX base", "mlx", "files/codecs/test_mlx.py"),
    "DCP, FSDP": ("no", "torch.distributed", "files/states/test_dcp_file.py"),
    "NumPy": ("no", "numpy", "files/containers/test_npz_file.py"),
    "DeepSpeed ZeRO 1 to 3": ("no", "deepspeed", "files/states/test_zero_file.py"),
    "ranks' DTensors (verl)": ("no", "torch's DTensor", "files/states/test_dtensor_file.py"),
}


def checked() -> str:
    """Return the software that holds each format, and the test, as Markdown."""
    adapters = {f"`{key}`": row for key, row in ADAPTERS_CHECKED.items()}
    models = {f"{name} models": row[1:] for name, row in MODELS_CHECKED.items()}
    rows = {**adapters, **models}.items()
    return "".join(markdown.bullet(f"{name}: {against} (`{test}`)") for name, (against, test) in rows)


def models() -> str:
    """Return which models are written as what, as Markdown."""
    return markdown.table(("model", "written"), [(name, row[0]) for name, row in MODELS_CHECKED.items()])
