"""The ten commonest mistakes: what a user reads, word for word behind `error:` and `hint:`, and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from lib.harness.stage import set_stage

Run = Callable[..., Any]

# mistake -> calls, the exit code of each, and its message
MISTAKES = {
    "swapped arguments": """
        loratool merge adapter base -> 3
        adapter: is an adapter, but the first argument must be the base model
        swap them: loratool merge base adapter

        loratool unmerge adapter taken -> 3
        adapter: is an adapter, but the first argument must be the merged model
        swap them: loratool unmerge taken adapter

        loratool verify base taken adapter -> 3
        taken: is a model, not an adapter
        to extract an adapter from a full fine-tune: loratool extract base taken

        loratool merge base tuned -> 3
        tuned: is a model, not an adapter
        to extract an adapter from a full fine-tune: loratool extract base tuned

        loratool merge gpt2 gpt2/model.safetensors -> 3
        gpt2/model.safetensors: is a model, not an adapter
        to extract an adapter from a full fine-tune: loratool extract gpt2 gpt2/model.safetensors

        loratool verify base adapter adapter -> 3
        adapter: is an adapter, but the last argument must be the merged model
        to see what it has: loratool inspect adapter

        loratool extract base adapter -o out -> 3
        adapter: is an adapter, but extract compares two models
        to see what it has: loratool inspect adapter

        loratool inspect adapter --base adapter -> 3
        adapter: is an adapter, but --base must be the model under it
        to see what it has: loratool inspect adapter

        loratool diff adapter base -> 3
        base: is a model, but adapter is an adapter; diff compares two of a kind
        to check the adapter against the model: loratool inspect adapter --base base
    """,
    "missing config": """
        loratool merge base lost -o out -> 4
        lost: has no adapter_config.json beside it, so the alpha that it was trained with is unknown
        put the adapter_config.json there, or pass --alpha
    """,
    "wrong base": """
        loratool merge gpt2 adapter -o out -> 3
        adapter: 21 of 21 modules are not in the base:
          mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj and 3 more in model.layers.{0..2}; nearest there: transformer.h.0.mlp.c_proj.weight
        its config names its base: fixtures/llama/base

        loratool merge wide adapter -o out -> 3
        adapter: 21 of 21 modules have other shapes in the base, like model.layers.0.mlp.down_proj.weight: A is (8, 176) and B is (64, 8) in adapter, but the base weight is (64, 352) as (out, in)
        its config names its base: fixtures/llama/base

        loratool extract base gpt2 -o out -> 3
        no tensor of one side has a name of the other
        are these two of one family?
    """,  # noqa: E501
    "wrong alpha": """
        loratool merge base adapter --alpha 8 -o out -> 2
        adapter: --alpha 8 contradicts the config's lora_alpha 16
        leave --alpha out; to change the adapter's strength, give it a weight: adapter:0.5

        loratool merge base adapter:0,5 -o out -> 2
        ADAPTER[:WEIGHT]: '0,5' is not a weight, like 0.7
        loratool merge -h
    """,
    "quantized base": """
        loratool merge four-bit adapter -o out -> 3
        model.layers.0.mlp.down_proj.weight: is quantized (bitsandbytes 4-bit): model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4 is missing beside it; 20 more that the adapter changes are, too
        pass the original model in 16 or 32 bits; adapter says it was trained on fixtures/llama/base

        loratool init four-bit -o out -> 3
        four-bit: is quantized (bitsandbytes 4-bit), and the codes of model.layers.0.mlp.down_proj.weight cannot be read: model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4 is missing beside it
        pass the original model in 16 or 32 bits
    """,  # noqa: E501
    "output exists": """
        loratool merge base adapter -o taken -> 4
        taken: exists already
        add --force to replace it, or name another with -o

        loratool merge base adapter -o notes --force -> 2
        notes: holds todo.txt; --force replaces a model's files and nothing else
        name another output with -o

        loratool merge base adapter -o base --force -> 2
        base: the output would overwrite an input
        name another output with -o

        loratool merge base adapter -o deep/down/out -> 2
        {here}/deep/down: there is no such folder to write into
        make it first, or name another output with -o
    """,
    "no space": """
        loratool merge base adapter -o out -> 5
        {here}: 350 kB are needed and 10 B are free
        free some space, or name another disk with -o

        loratool resize adapter --rank 4 -o out -> 5
        {here}: 61.3 kB are needed and 10 B are free
        free some space, or name another disk with -o
    """,
    "typo in a target": """
        loratool merge base adapter --target q_prj -o out -> 3
        --target q_prj: names no module of adapter or the base
        did you mean q_proj? modules: down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, ..., 12 kinds

        loratool merge base adapter --target q_proj --exclude dwn_proj -o out -> 3
        --exclude dwn_proj: names no module of adapter or the base
        did you mean down_proj? modules: down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, ..., 12 kinds

        loratool merge base adapter --layers 4-7 -o out -> 3
        --layers: names no layer of adapter or the base
        there are 0-2

        loratool init base --target q_prj -o out -> 3
        --target q_prj: names no weight of the base that could have an adapter
        did you mean q_proj? modules: down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, ..., 9 kinds

        loratool extract base tuned --target q_prj -o out -> 3
        --target q_prj: names no module of base
        did you mean q_proj? modules: down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, ..., 12 kinds
    """,  # noqa: E501
    "typo in a name": """
        loratool merge bsae adapter -> 3
        bsae: no such file or folder
        did you mean base?

        loratool merge base adapter/adapter_model.safetensor -> 3
        adapter/adapter_model.safetensor: no such file or folder
        did you mean adapter/adapter_model.safetensors?

        loratool merge meta-llama/Llama-3.1-8B adapter -> 3
        meta-llama/Llama-3.1-8B: no such file or folder, nor in the Hugging Face cache, and HF_HUB_OFFLINE is set
        unset HF_HUB_OFFLINE, or download it first: hf download meta-llama/Llama-3.1-8B

        loratool mrege base adapter -> 2
        no command 'mrege'
        loratool merge -h

        loratool frobnicate -> 2
        no command 'frobnicate'
        loratool -h

        loratool style.safetensors -> 2
        no command 'style.safetensors'
        loratool inspect style.safetensors

        loratool adapter -> 2
        no command 'adapter'
        loratool inspect adapter

        loratool merge base adapter --dtpye fp32 -> 2
        no option '--dtpye'
        --dtype; all options: loratool merge --help

        loratool merge base adapter --zzz -> 2
        no option '--zzz'
        loratool merge --help

        loratool merge base adapter --tied perhaps -> 2
        --tied: 'perhaps' is not one of 'untie', 'share', 'refuse'
        loratool merge -h

        loratool merge base -> 2
        merge: no ADAPTER[:WEIGHT] given
        loratool merge -h

        loratool inspect base more -> 2
        inspect: got unexpected extra argument (more)
        loratool inspect -h

        loratool merge base adapter --rank -> 2
        no option '--rank'
        loratool merge --help

        loratool inspect notes -> 3
        notes: holds no weights: no *.safetensors or *.gguf file and none of torch
    """,
    "an image model's adapter": """
        loratool merge base style.safetensors -o out -> 3
        style.safetensors: is an adapter for SDXL, but the base is not an image model
        pass the image model that it was trained on

        loratool merge sdxl.safetensors adapter -o out -> 3
        adapter: 21 of 21 modules are not in the base, an image model:
          mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj and 3 more in model.layers.{0..2}; nearest there: first_stage_model.decoder.conv_in.weight
        its config names its base: fixtures/llama/base
    """,  # noqa: E501
}
CALLS = [
    (mistake, *call.split("\n", 1)) for mistake, text in MISTAKES.items() for call in dedent(text).strip().split("\n\n")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stage")
    set_stage(made)
    return made


@pytest.mark.parametrize(("mistake", "call", "message"), CALLS, ids=[f"{m}: {call}" for m, call, _ in CALLS])
def test_what_is_said(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, mistake: str, call: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    if mistake == "no space":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
    command, code = call.split(" -> ")
    wanted, before = message.replace("{here}", str(folder)), sorted(folder.rglob("*"))
    result = run(*command.split()[1:])
    what, *remedy = wanted.split("\n")
    said = "".join(
        f"{line}\n"
        for line in (f"error: {what}", *(line if line.startswith("  ") else f"hint: {line}" for line in remedy))
    )
    assert (result.exit_code, result.stdout, result.stderr) == (int(code), "", said)
    value = json.loads(run(*command.split()[1:], "--json").stdout)
    error = value["error"]
    head = f"{error['tensor']}: {error['message']}" if error["tensor"] else error["message"]
    assert value["exit_code"] == int(code) and "\n".join(filter(None, [head, error["remedy"]])) == wanted
    assert sorted(folder.rglob("*")) == before


def test_each_of_the_ten_is_here() -> None:
    assert len(MISTAKES) == 10 and all(len(text.strip()) > 40 for text in MISTAKES.values())
