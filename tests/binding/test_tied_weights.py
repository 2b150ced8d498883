"""Hold heads tied to embeddings, and vocabularies of another size. The oracle is peft's forward pass, never its merge:
that changes both sides of a tie where base and adapter changed one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, load_model, spread
from lib.models.peft_models import (
    FAMILIES,
    Pair,
    agree,
    answer,
    config_of,
    llava,
    load,
    peft,
    transformers,
    wrap,
    write_base,
    write_pair,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, NeedsFlag

pytestmark = [pytest.mark.filterwarnings("ignore")]

HEAD = "lm_head.weight"
EMBED = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
KINDS = {
    "nothing": lambda linear, embed: {"target_modules": linear},
    "embedding": lambda linear, embed: {"target_modules": [*linear, embed]},
    "embedding, dora": lambda linear, embed: {"target_modules": [*linear, embed], "use_dora": True},
    "head": lambda linear, embed: {"target_modules": [*linear, "lm_head"]},
    "head, dora": lambda linear, embed: {"target_modules": [*linear, "lm_head"], "use_dora": True},
    "both, different": lambda linear, embed: {"target_modules": [*linear, embed, "lm_head"]},
    "both, dora": lambda linear, embed: {"target_modules": [*linear, embed, "lm_head"], "use_dora": True},
    "both, equal": lambda linear, embed: {"target_modules": [*linear, embed, "lm_head"], "ensure_weight_tying": True},
    "saved embedding": lambda linear, embed: {"target_modules": linear, "modules_to_save": [embed]},
    "saved head": lambda linear, embed: {"target_modules": linear, "modules_to_save": ["lm_head"]},
    "saved both": lambda linear, embed: {"target_modules": linear, "modules_to_save": [embed, "lm_head"]},
    "saved both, equal": lambda linear, embed: {
        "target_modules": linear,
        "modules_to_save": [embed],
        "ensure_weight_tying": True,
    },
    "tokens": lambda linear, embed: {"target_modules": linear, "trainable_token_indices": [3, 30, 5]},
    "tokens and embedding": lambda linear, embed: {
        "target_modules": [*linear, "wpe"] if embed == "wte" else linear,
        "trainable_token_indices": [30, 5],
        "modules_to_save": ["norm" if embed == "embed_tokens" else "ln_f"],
    },
}
STAY_TIED = ("nothing", "both, equal", "saved both, equal", "tokens", "tokens and embedding")

PARTED_BY_PEFT = ("gpt2", "saved both, equal")  # its ensure_weight_tying knows an embedding by the name embed_tokens


def edit_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    made: dict[tuple[str, str], Pair] = {}

    def pair(family: str, kind: str) -> Pair:
        if (family, kind) not in made:
            names = FAMILIES[family]
            config = KINDS[kind]([*names.linear], names.embed)
            made[family, kind] = write_pair(
                tmp_path_factory.mktemp("tied"), names.make(tie_word_embeddings=True), **config
            )
            assert HEAD not in load_model(made[family, kind].base)
        return made[family, kind]

    return pair


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", spread(FAMILIES, 1))
def test_untied_where_the_sides_part(pairs: Any, tmp_path: Path, family: str, kind: str) -> None:
    """A tied pair stays one matrix only if both sides get the same values; the answers are those before the merge."""
    pair = pairs(family, kind)
    report = loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    assert pair.holds(tmp_path / "out")
    parted = kind not in STAY_TIED or (family, kind) == PARTED_BY_PEFT
    assert (HEAD in load_model(tmp_path / "out")) is parted
    assert config_of(tmp_path / "out").get("tie_word_embeddings", True) is not parted
    assert any("loaders that tie anyway" in warning for warning in report.warnings) is parted


@pytest.mark.parametrize("kind", ["embedding", "head", "both, different", "both, equal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_one_matrix_with_every_change(pairs: Any, tmp_path: Path, family: str, kind: str) -> None:
    """The changes are those that peft's layers name."""
    pair = pairs(family, kind)
    model = peft.PeftModel.from_pretrained(load(pair.base, pair.cls), pair.adapter)
    sides = [model.get_submodule("base_model.model." + n.removesuffix(".weight")) for n in (EMBED[family], HEAD)]
    deltas = [side.get_delta_weight("default") for side in sides if hasattr(side, "get_delta_weight")]
    wanted = load_model(pair.base)[EMBED[family]] + sum(deltas[:1] if kind == "both, equal" else deltas)
    loratool.merge(pair.base, pair.adapter, tmp_path / "out", tied="share")
    merged = load_model(tmp_path / "out")
    torch.testing.assert_close(merged[EMBED[family]], wanted, rtol=1e-12, atol=1e-12)
    assert HEAD not in merged and config_of(tmp_path / "out").get("tie_word_embeddings", True) is True


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STAY_TIED])
def test_refused_names_the_flags_that_work(pairs: Any, tmp_path: Path, run: Any, kind: str) -> None:
    pair = pairs("llama", kind)
    with pytest.raises(NeedsFlag, match="is tied to the other side and changes alone") as caught:
        loratool.merge(pair.base, pair.adapter, tmp_path / "out", tied="refuse")
    assert not (tmp_path / "out").exists()
    for mode in ("untie", "share"):
        done = run("merge", pair.base, pair.adapter, "-o", tmp_path / mode, "--tied", mode)
        assert (f"--tied {mode}" in str(caught.value.remedy)) is (done.exit_code == 0), done.stderr
        if done.exit_code:
            assert mode == "share" and done.exit_code == 4 and "--tied untie" in done.stderr
    assert pair.holds(tmp_path / "untie")
    assert run("merge", pair.base, pair.adapter, "-o", tmp_path / "x", "--tied", "refuse").exit_code == 4


@pytest.mark.parametrize("kind", STAY_TIED)
def test_refuse_lets_pass_what_stays_tied(pairs: Any, tmp_path: Path, kind: str) -> None:
    pair = pairs("llama", kind)
    loratool.merge(pair.base, pair.adapter, tmp_path / "out", tied="refuse")
    assert pair.holds(tmp_path / "out")


@pytest.mark.parametrize("kind", ["embedding", "head", "both, equal", "tokens", "saved embedding"])
def test_a_tied_head_that_is_stored_all_the_same(pairs: Any, tmp_path: Path, kind: str) -> None:
    """Some files have both names."""
    pair = pairs("llama", kind)
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    tensors = load_model(base)
    save_file({**tensors, HEAD: tensors[EMBED["llama"]].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    loratool.merge(base, pair.adapter, tmp_path / "out")
    merged = load_model(tmp_path / "out")
    assert torch.equal(merged[HEAD], merged[EMBED["llama"]]) is (kind in STAY_TIED)
    assert pair.holds(tmp_path / "out")


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_tied_weights_of_one_storage(tmp_path: Path, kind: str) -> None:
    """Torch files have both names for the one matrix."""
    config = {"target_modules": ["q_proj"] + (["embed_tokens"] if kind == "embedding" else [])}
    pair = write_pair(tmp_path, FAMILIES["llama"].make(tie_word_embeddings=True), **config)
    state = load(pair.base, pair.cls).state_dict()
    assert state[HEAD].data_ptr() == state[EMBED["llama"]].data_ptr()
    (pair.base / "model.safetensors").unlink()
    torch.save(state, pair.base / "pytorch_model.bin")
    loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    assert pair.holds(tmp_path / "out")
    assert config_of(tmp_path / "out").get("tie_word_embeddings", True) is (kind == "linear")


def test_a_flag_that_says_no_is_believed(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama", "embedding")
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    tensors = load_model(base)
    save_file({**tensors, HEAD: tensors[EMBED["llama"]].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    edit_config(base, tie_word_embeddings=False)
    report = loratool.merge(base, pair.adapter, tmp_path / "out", tied="refuse")
    assert pair.holds(tmp_path / "out") and not any("untied" in w for w in report.warnings)


def test_a_backbone_has_no_head_to_part_from(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", FAMILIES["llama"].make("LlamaModel", tie_word_embeddings=True))
    model = wrap(load(base, transformers.LlamaModel), task_type="FEATURE_EXTRACTION", target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path / "a")
    loratool.merge(base, tmp_path / "a", tmp_path / "out", tied="refuse")
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        found = load(tmp_path / "out", transformers.LlamaModel)(tokens).last_hidden_state
        assert agree(found, model(tokens).last_hidden_state)
    assert load_model(tmp_path / "out").keys() == load_model(base).keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight", [0.5, -1.0])
def test_a_weight_on_one_side(pairs: Any, tmp_path: Path, family: str, weight: float) -> None:
    pair = pairs(family, "embedding")
    loratool.merge(pair.base, (pair.adapter, weight), tmp_path / "part")
    loratool.merge(pair.base, pair.adapter, tmp_path / "full")
    W, part, full = load_model(pair.base), load_model(tmp_path / "part"), load_model(tmp_path / "full")
    embed = EMBED[family]
    assert torch.equal(part[HEAD], W[embed]) and torch.equal(full[HEAD], W[embed])
    torch.testing.assert_close(part[embed], W[embed] + weight * (full[embed] - W[embed]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("one", "two"), [("embedding", "head"), ("tokens", "embedding"), ("tokens", "head")])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters(pairs: Any, tmp_path: Path, family: str, one: str, two: str) -> None:
    """Tokens of one are those of both sides; the other's change is of its side alone."""
    a, b = pairs(family, one), pairs(family, two)
    loratool.merge(a.base, [a.adapter, b.adapter], tmp_path / "both")
    W, each = load_model(a.base)[EMBED[family]], {}
    for name, pair in (("a", a), ("b", b)):
        loratool.merge(pair.base, pair.adapter, tmp_path / name)
        merged = load_model(tmp_path / name)
        each[name] = {EMBED[family]: merged[EMBED[family]], HEAD: merged.get(HEAD, merged[EMBED[family]])}
    found = load_model(tmp_path / "both")
    for side in (EMBED[family], HEAD):
        torch.testing.assert_close(found[side], each["a"][side] + each["b"][side] - W, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[HEAD], found[EMBED[family]])


class TestVocabulary:
    """peft saves embeddings with more or fewer rows than the base's config says, and the merge takes them."""

    def resized(self, folder: Path, family: str, tie: bool, size: int, save: Any = "auto", **config: Any) -> Any:
        names = FAMILIES[family]
        model = names.make(tie_word_embeddings=tie)
        cls, base = type(model), write_base(folder / "base", model)
        model = load(base, cls)
        model.resize_token_embeddings(size)
        model.config._name_or_path = str(base)  # where peft looks for the size that it was
        wrapped = wrap(model, **{"target_modules": [*names.linear], **config})
        wrapped.save_pretrained(folder / "a", save_embedding_layers=save)
        tokens = torch.tensor([[0, 1, 2, size // 2, size - 2, size - 1]])
        return cls, base, folder / "a", tokens, answer(wrapped, tokens)

    @pytest.mark.parametrize(
        ("family", "tie", "size"), [("llama", True, 40), ("llama", False, 20), ("gpt2", True, 20), ("gpt2", False, 40)]
    )
    @pytest.mark.parametrize("kind", ["linear", "embedding and head", "tokens", "saved embedding and head"])
    def test_its_size_follows(self, tmp_path: Path, family: str, tie: bool, size: int, kind: str) -> None:
        names = FAMILIES[family]
        config = {
            "linear": {},
            "embedding and head": {"target_modules": [*names.linear, names.embed, "lm_head"]},
            "tokens": {"trainable_token_indices": [size - 1, size - 2]},
            "saved embedding and head": {"modules_to_save": [names.embed, "lm_head"]},
        }[kind]
        cls, base, adapter, tokens, wanted = self.resized(tmp_path, family, tie, size, **config)
        loratool.merge(base, adapter, tmp_path / "out")
        assert config_of(tmp_path / "out")["vocab_size"] == size
        assert agree(answer(load(tmp_path / "out", cls), tokens), wanted)
        assert load_model(tmp_path / "out").keys() - {HEAD} == load_model(base).keys() - {HEAD}

    def test_one_side_alone_resized_is_refused(self, tmp_path: Path) -> None:
        _, base, adapter, _, _ = self.resized(tmp_path, "llama", False, 40)
        file = adapter / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k}, file)
        with pytest.raises(
            InputError, match=r"end with different rows \(model.embed_tokens.weight 40, lm_head.weight 32\)"
        ):
            loratool.merge(base, adapter, tmp_path / "out")

    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize(
        "config", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}, {"tokens": [35]}]
    )
    def test_new_rows_without_a_source_are_refused(self, tmp_path: Path, tie: bool, config: dict[str, Any]) -> None:
        if "tokens" in config:
            config = {"trainable_token_indices": config["tokens"]}
        _, base, adapter, _, _ = self.resized(tmp_path, "llama", tie, 40, save=False, **config)
        file = adapter / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if ".base_layer." not in k}, file)
        with pytest.raises(InputError, match="32"):
            loratool.merge(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_part_of_a_resized_vocabulary_is_refused(self, tmp_path: Path) -> None:
        _, base, adapter, _, _ = self.resized(tmp_path, "llama", True, 40)
        with pytest.raises(InputError, match="vocab|rows|replaces it by"):
            loratool.merge(base, (adapter, 0.5), tmp_path / "out")

    def write_tokenizer(self, folder: Path, text: str) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).write_text(json.dumps({"of": text}))

    @pytest.mark.parametrize("size", [40, 32])
    def test_the_tokenizer_is_the_adapters(self, tmp_path: Path, size: int) -> None:
        _, base, adapter, _, _ = self.resized(tmp_path, "llama", False, size, modules_to_save=["embed_tokens"])
        self.write_tokenizer(base, "base")
        (base / "chat_template.jinja").write_text("base")
        loratool.merge(base, adapter, tmp_path / "none")
        self.write_tokenizer(adapter, "adapter")
        report = loratool.merge(base, adapter, tmp_path / "out")
        found = [json.loads((tmp_path / out / "tokenizer.json").read_text())["of"] for out in ("none", "out")]
        assert found == ["base", "adapter"]
        assert report.notes[0].startswith(f"tokenizer: that of {adapter}")

    def test_the_tokenizer_of_one_that_leaves_the_vocabulary_alone_stays(self, tmp_path: Path) -> None:
        _, base, adapter, _, _ = self.resized(tmp_path, "llama", False, 32)
        self.write_tokenizer(base, "base")
        self.write_tokenizer(adapter, "adapter")
        loratool.merge(base, adapter, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "base"}


def test_a_single_file_has_both_matrices(pairs: Any, tmp_path: Path) -> None:
    """It has no config.json that could say so: the warning does."""
    pair = pairs("gpt2", "head")
    report = loratool.merge(pair.base, pair.adapter, tmp_path / "out.safetensors")
    loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    file, folder = load_file(tmp_path / "out.safetensors"), load_model(tmp_path / "out")
    assert file.keys() == folder.keys() and all(torch.equal(bits(file[k]), bits(folder[k])) for k in file)
    assert HEAD in file and any("untied" in warning for warning in report.warnings)


@pytest.fixture(scope="module", params=[False, True], ids=["one name", "every name"])
def flan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a T5 v1.1: a head of its own, and one embedding for both sides, whatever config.json says of ties."""
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32)
    base = tmp_path_factory.mktemp("flan") / "base"
    tensors = load_model(write_base(base, transformers.T5ForConditionalGeneration(config)))
    shared = tensors["shared.weight"]
    tensors[HEAD] = torch.randn(shared.shape, generator=torch.Generator().manual_seed(1), dtype=shared.dtype)
    if request.param:
        tensors |= {f"{side}.embed_tokens.weight": shared.clone() for side in ("encoder", "decoder")}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_config(base, tie_word_embeddings=False)
    return base


def seq2seq(model: Any) -> Tensor:
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        return model(input_ids=tokens, decoder_input_ids=tokens).logits


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q", "lm_head"]},
        {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q", "shared"]},
        {"target_modules": ["q"], "modules_to_save": ["shared"]},
        {"target_modules": ["q"], "trainable_token_indices": [3, 4]},
    ],
    ids=["head", "saved head", "embedding", "saved embedding", "tokens"],
)
def test_t5_with_a_head_of_its_own(flan: Path, tmp_path: Path, run: Any, config: dict[str, Any]) -> None:
    """Right, or refused with a flag that works: transformers keeps one embedding, and peft changes one name of it."""
    cls = transformers.T5ForConditionalGeneration
    wrapped = wrap(load(flan, cls), task_type="SEQ_2_SEQ_LM", **config)
    wrapped.save_pretrained(tmp_path / "a")
    done = run("merge", flan, tmp_path / "a", "-o", tmp_path / "out")
    if "lm_head" in str(config):
        assert done.exit_code == 0 and agree(seq2seq(load(tmp_path / "out", cls)), seq2seq(wrapped))
        return
    assert done.exit_code == 4 and "shared.weight: is the shared embedding of encoder and decoder" in done.stderr
    assert run("merge", flan, tmp_path / "a", "-o", tmp_path / "out", "--tied", "share").exit_code == 0
    merged = load_model(tmp_path / "out")
    assert torch.equal(merged[HEAD], load_model(flan)[HEAD])
    assert all(torch.equal(merged[k], merged["shared.weight"]) for k in merged if "embed_tokens" in k)
    assert run("merge", flan, tmp_path / "a", "-o", tmp_path / "rest", "--exclude", "shared").exit_code == 0


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "embed_tokens", "lm_head"]])
def test_a_vision_language_model(tmp_path: Path, targets: list[str]) -> None:
    """The flag stands in two places, and the head's name on disk is not the model's."""
    pair = write_pair(tmp_path, llava(tie_word_embeddings=True), target_modules=targets)
    loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    assert pair.holds(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config["text_config"].get("tie_word_embeddings", False) is False
    added = load_model(tmp_path / "out").keys() - load_model(pair.base).keys()
    assert len(added) == 1 and added.pop().endswith("lm_head.weight")


@pytest.mark.parametrize("tie", [True, False])
def test_a_vision_language_model_of_another_vocabulary(tmp_path: Path, tie: bool) -> None:
    model = llava(tie_word_embeddings=tie)
    cls, base = type(model), write_base(tmp_path / "base", model)
    model = load(base, cls)
    model.resize_token_embeddings(48)
    wrapped = wrap(model, target_modules=["q_proj"])
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    loratool.merge(base, tmp_path / "a", tmp_path / "out")
    tokens: Tensor = torch.tensor([[1, 2, 47, 40]])
    assert config_of(tmp_path / "out")["text_config"]["vocab_size"] == 48
    assert agree(answer(load(tmp_path / "out", cls), tokens), answer(wrapped, tokens))
