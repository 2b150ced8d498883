"""Run llama.cpp's own converters: a model's folder, or a PEFT adapter's, to GGUF.

They are not in the package `gguf`, but in the tree that llama-cpp-python's sdist has inside, and nothing of that is
compiled. LLAMA_CPP names the tree; without it, it is looked for where the next lines unpack it, beside this checkout:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    mkdir -p oracles && tar xzf llama_cpp_python-0.3.36.tar.gz -C oracles

A small model has no tokenizer, so that the converters' step that writes the vocabulary is replaced: tokens are named by
their numbers. All jobs of one call run in one process, whose start takes most of the time.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

# transformers 5's names of Granite's kinds of layers -> those of the files on the Hub, the only ones the converter has
HYBRID_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}

# Model type -> (config of transformers 5) -> fields that a converter reads, as the files on the Hub have them
OLD_FIELDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "granite_swa": lambda config: {"no_rope_layers": [int(theta > 0) for theta in config["layer_rope_theta"]]},
    "hunyuan_v1_moe": lambda config: {
        "moe_intermediate_size": [config["intermediate_size"]] * 2, "moe_topk": [config["moe_topk"]] * 2,
        "num_shared_expert": [1] * 2,
    },
    "minimax_m2": lambda config: {
        "rotary_dim": int(config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 1)),
    },
    "mistral4": lambda config: {"architectures": ["Mistral3ForConditionalGeneration"]},
    "mpt": lambda config: {"architectures": ["MPTForCausalLM"]},
    "phimoe": lambda config: {
        "architectures": ["PhiMoEForCausalLM"],
        "rope_parameters": config["rope_parameters"] | {"original_max_position_embeddings": 128},
    },
    "mimo_v2_flash": lambda config: {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in config["layer_types"]],
        "swa_num_key_value_heads": 4, "topk_method": "noaux_tc", "sliding_window": config["sliding_window"] - 1,
        **{f"swa_{name}": config[name] for name in ("head_dim", "v_head_dim", "num_attention_heads")},
        "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": 0.5, "rope_theta": 1e4},
    },
    "umt5": lambda config: {
        "architectures": [config["architectures"][0].replace("UMT5Enc", "T5Enc")],  # the converter has no name for it
    },
    "kimi_linear": lambda config: {
        "linear_attn_config": {"full_attn_layers": [2], "short_conv_kernel_size": 4, "head_dim": 16},
        "first_k_dense_replace": 1,
    },
    "step3p7": lambda config: {"text_config": config["text_config"] | {
        "num_attention_groups": 2, "moe_num_experts": 4, "moe_top_k": 2, "moe_layers_enum": "1",
        "partial_rotary_factors": [0.5, 1.0],
    }},
}  # fmt: skip

SDIST = "llama_cpp_python-0.3.36/vendor/llama.cpp"


def tree() -> Path:
    """Return llama.cpp's folder; the test skips where it is not."""
    beside = Path(__file__).parents[4] / "oracles" / SDIST
    found = Path(os.environ.get("LLAMA_CPP", beside))
    if not (found / "convert_hf_to_gguf.py").is_file():
        pytest.skip("needs llama.cpp's tree, named by LLAMA_CPP: tests/lib/oracles/llama_cpp.py says how to get it")
    return found


def model_to_gguf(folder: Path, out: Path, outtype: str = "f32", *options: str) -> list[str]:
    """Return the job that converts a model's folder. outtype: f32, f16, bf16 or q8_0."""
    return ["convert_hf_to_gguf.py", str(folder), "--outfile", str(out), "--outtype", outtype, *options]


def adapter_to_gguf(adapter: Path, base: Path, out: Path, outtype: str = "f32") -> list[str]:
    """Return the job that converts a PEFT adapter's folder. base: the model's, of which the config is read."""
    return [
        "convert_lora_to_gguf.py", str(adapter), "--base", str(base), "--outfile", str(out), "--outtype", outtype,
    ]  # fmt: skip


def run_converters(jobs: Iterable[list[str]]) -> dict[str, str]:
    """Run the jobs one after the other; return what went wrong with each that failed, by its output file."""
    listed = list(jobs)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, __file__, str(tree())],
        input=json.dumps(listed),
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def save_model(model: Any, folder: Path) -> Path:
    """Save a model, with a tokenizer.json of as many words as it has, which Gemma 3's converter counts."""
    model.save_pretrained(folder)
    vocab = {f"t{i}": i for i in range(model.config.get_text_config().vocab_size)}
    words = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    return folder


def _with_old_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the fields that some converters read and that transformers 5 drops from it."""
    if config.get("model_type") == "gpt2":
        return {"n_ctx": config["n_positions"], **config}
    if config.get("model_type") == "gpt_neox":
        return {"rotary_pct": config["rope_parameters"]["partial_rotary_factor"], **config}
    if config.get("model_type") == "cohere2":
        return {"rotary_pct": 1.0, **config}
    config = {**config, **OLD_FIELDS.get(str(config.get("model_type")), lambda config: {})(config)}
    if config.get("model_type") == "granitemoehybrid":
        return {**config, "layer_types": [HYBRID_KINDS.get(each, each) for each in config["layer_types"]]}
    if config.get("model_type") == "nemotron_h" and "moe" not in config["layers_block_type"]:
        return {key: value for key, value in config.items() if key != "num_experts_per_tok"}
    if str(config.get("model_type")).startswith("qwen3_"):  # Qwen 3.5's has a layer that predicts another token
        nested = config.get("text_config", {})
        return {**config, "mtp_num_hidden_layers": 1, "text_config": {**nested, "mtp_num_hidden_layers": 1}}
    return config


def _write_vocabulary(model: Any) -> None:
    """Stand in for a model class's `set_vocab`."""
    import gguf

    size = model.hparams["vocab_size"]
    if "type_vocab_size" in model.hparams:
        model.gguf_writer.add_token_type_count(model.hparams["type_vocab_size"])
    model.gguf_writer.add_tokenizer_model("gpt2")
    model.gguf_writer.add_token_list([f"t{i}" for i in range(size)])
    gguf.SpecialVocab(model.dir_model, load_merges=False, n_vocab=size).add_to_gguf(model.gguf_writer)


def _main(folder: Path) -> None:
    sys.path[:1] = [str(folder), str(folder / "gguf-py")]
    import conversion

    classes = conversion.get_model_class

    def get_model_class(*args: Any, **kwargs: Any) -> Any:
        found = classes(*args, **kwargs)
        for each in (found, *vars(found).values()):  # a class of Mistral 3 has the true ones inside
            if isinstance(each, type) and issubclass(each, conversion.TextModel):
                each.set_vocab = _write_vocabulary
        return found

    conversion.base.TextModel.get_vocab_base_pre = lambda *_: "default"  # by which Mistral 3's tells its tokenizer
    load = conversion.ModelBase.load_hparams
    conversion.get_model_class = get_model_class
    conversion.ModelBase.load_hparams = staticmethod(lambda *args, **kwargs: _with_old_fields(load(*args, **kwargs)))
    failed = {}
    for script, *argv in json.load(sys.stdin):
        sys.argv = [script, *argv]
        try:
            runpy.run_path(str(folder / script), run_name="__main__")
        except (Exception, SystemExit) as error:
            failed[argv[argv.index("--outfile") + 1]] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
