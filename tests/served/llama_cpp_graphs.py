"""List the weights that llama.cpp's graphs compute with directly: it loads the factors of these and never applies them.

    python tests/served/llama_cpp_graphs.py LLAMA.CPP/src

A graph applies factors where it gives the weight to `build_lora_mm`, `build_lora_mm_id` or `build_inp_embd`, itself
or by a function of `llm_graph_context` that ends in these. Each file of `src/models` makes its tensors (a field is set
to `create_tensor(tn(LLM_TENSOR_X, ...))`) and uses them (`layer.field`, `model.field`, or a local name for one). It
reads by patterns, so what it finds is to be looked at.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

APPLY = {
    "build_lora_mm", "build_lora_mm_id", "build_inp_embd", "build_ffn", "build_moe_ffn", "build_attn", "build_qkv",
}  # fmt: skip
MADE = re.compile(r"([\w.]+)\s*=\s*create_tensor\(tn\(LLM_TENSOR_(\w+),\s*\"weight\"[^)]*\),\s*\{([^}]*)\}")
TENSOR = re.compile(r"\{\s*LLM_TENSOR_(\w+),\s*\"([^\"]+)\"")
ARCHITECTURE = re.compile(r"\{\s*LLM_ARCH_(\w+),\s*\"([^\"]+)\"")
CLASS = re.compile(r"case LLM_ARCH_(\w+):(?:\s*case LLM_ARCH_\w+:)*\s*return new (llama_model_\w+)\(")
GRAPH = re.compile(r"struct (llama_model_\w+)[^;{]*\{(?:(?!\nstruct )[\s\S])*?using graph = (llama_model_\w+)::graph")
BASE = re.compile(r"struct (llama_model_\w+)\s*:\s*public (llama_model_\w+)")


def caller(text: str, at: int) -> str:
    """Return the name of the innermost call around a place, with the number of the argument: `ggml_mul_mat/1`."""
    depth, commas = 0, 0
    while at > 0:
        at -= 1
        if text[at] == ")":
            depth += 1
        elif text[at] == "(":
            if not depth:
                found = re.search(r"(\w+)(?:<\w+>)?\s*$", text[:at])
                return f"{found[1]}/{commas}" if found else ""
            depth -= 1
        elif text[at] == "," and not depth:
            commas += 1
        elif text[at] in ";{}" and not depth:
            return ""
    return ""


def uses(graph: str, field: str) -> set[str]:
    """Return the calls that a field is given to, by itself or by a local name."""
    owners = r"(?:\w*layers?(?:\[[^\]]*\])?|s?model|model_other|model\.layers\[[^\]]*\])"
    places = rf"(?<![\w.]){owners}\.{re.escape(field)}(?![\w.])"
    found = {call for place in re.finditer(places, graph) if (call := caller(graph, place.start()))}
    for alias in set(re.findall(rf"(\w+)\s*=\s*(?:[^;=()]*\?[^;()]*)?{places}\s*(?:[;:])", graph)):
        found |= {
            call for place in re.finditer(rf"(?<![\w.]){alias}(?!\w)", graph) if (call := caller(graph, place.start()))
        }
    return found


# Fields that `build_qkv` takes of the layer it is given
QKV = {"wq", "wk", "wv", "wqkv"}

# The calls that compute with a weight, and which argument it is
DIRECT = {
    "ggml_mul_mat/1",
    "ggml_mul_mat_id/1",
    "ggml_get_rows/1",
    "ggml_ssm_conv/2",
    "ggml_conv_1d_ph/1",
    "ggml_conv_1d_dw_ph/1",
}


def main(source: Path) -> None:
    names = dict(TENSOR.findall((source / "llama-arch.cpp").read_text()))
    architectures = dict(ARCHITECTURE.findall((source / "llama-arch.cpp").read_text()))
    of_class = defaultdict(list)
    for arch, kind in CLASS.findall((source / "llama-model.cpp").read_text()):
        of_class[kind].append(architectures.get(arch, arch))
    headers = (source / "models/models.h").read_text()
    borrowed = dict(GRAPH.findall(headers)) | {
        kind: base for kind, base in BASE.findall(headers) if base != "llama_model_base"
    }
    files = {}
    for file in sorted((source / "models").glob("*.cpp")):
        text = re.sub(r"//[^\n]*|/\*[\s\S]*?\*/", "", file.read_text())
        for kind in set(re.findall(r"void (llama_model_\w+)::load_arch_tensors", text)):
            files[kind] = text
    files |= {kind: files[base] for kind, base in borrowed.items() if kind not in files and base in files}
    for kind, text in sorted(files.items()):
        graph = text + files.get(borrowed.get(kind, ""), "")
        dead, partly, unseen = [], [], []
        for field, tensor, shape in sorted(set(MADE.findall(text + files.get(borrowed.get(kind, ""), "")))):
            if shape.count(",") < 1:
                continue
            calls = uses(graph, field.removeprefix("layer."))
            applied = {each for each in calls if each.partition("/")[0] in APPLY}
            if calls & DIRECT and tensor != "TOKEN_EMBD_PER_LAYER" and not field.startswith("layer.nextn"):
                (partly if applied else dead).append((names.get(tensor, tensor), calls & DIRECT))
            elif not applied and field.removeprefix("layer.") not in QKV and not field.startswith("layer.nextn"):
                unseen.append((names.get(tensor, tensor), calls))
        if dead or partly or unseen:
            print(f"{of_class.get(kind, [kind])}  # graph of {borrowed.get(kind, kind)}")
            for label, found in (("never", dead), ("partly", partly), ("unseen", unseen)):
                for name in sorted({name for name, _ in found}):
                    calls = sorted({call for each, calls in found if each == name for call in calls})
                    print(f"    {label} {name}: {calls}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
