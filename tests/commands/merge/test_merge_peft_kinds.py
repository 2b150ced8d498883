"""Hold every kind of PEFT adapter on models that transformers loads. The oracle is peft's forward pass, in float64."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model
from lib.models.peft_models import (
    FAMILIES,
    Pair,
    agree,
    answer,
    by_peft,
    kinds,
    kinds_of_families,
    llama,
    load,
    peft,
    randomize,
    transformers,
    wrap,
    write_base,
    write_pair,
)
from safetensors.torch import save_file

import loratool
from loratool.errors import InputError, NeedsFlag

pytestmark = [pytest.mark.filterwarnings("ignore")]  # peft's and transformers', of what these tests do on purpose


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """Return a function (family, kind) -> its folders, which writes each pair once."""
    made: dict[tuple[str, str], Pair] = {}

    def pair(family: str, kind: str) -> Pair:
        if (family, kind) not in made:
            names = FAMILIES[family]
            made[family, kind] = write_pair(tmp_path_factory.mktemp("pair"), names.make(), **kinds(names)[kind])
        return made[family, kind]

    return pair


@pytest.mark.parametrize(("family", "kind"), [*kinds_of_families()])
def test_the_merged_model_answers_as_peft(pairs: Any, tmp_path: Path, family: str, kind: str) -> None:
    """Scales, patterns, orientation, magnitudes, saved modules, token rows and biases each have a rule of their own."""
    pair = pairs(family, kind)
    loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    assert pair.holds(tmp_path / "out")
    assert load_model(tmp_path / "out").keys() == load_model(pair.base).keys()


@pytest.mark.parametrize(("family", "kind"), [*kinds_of_families()])
def test_a_weight_is_a_part_of_the_way(pairs: Any, tmp_path: Path, family: str, kind: str) -> None:
    """Also for updates that are no sum: W + w * (U(W) - W), never w squared, with U(W) from peft's own merge."""
    pair = pairs(family, kind)
    W, full = load(pair.base, pair.cls).state_dict(), by_peft(pair.base, pair.adapter, pair.cls)
    # a norm of DoRA has 36 bits, so half of 2^-36 and, where a part of the way is a difference, more of W
    tolerance = 1e-10 if "dora" in kind or "all at once" in kind else 1e-11
    for w in (0.5, -1.0, 0.0):
        loratool.merge(pair.base, (pair.adapter, w), tmp_path / str(w))
        for name, found in load_model(tmp_path / str(w)).items():
            wanted = W[name] + w * (full[name] - W[name])
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(found, W[name]) for name, found in load_model(tmp_path / "0.0").items())


@pytest.mark.parametrize("kind", ["all at once", "embedding and head, dora", "lora_bias, bias=all", "saved head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_base(tmp_path: Path, family: str, kind: str) -> None:
    names = FAMILIES[family]
    pair = write_pair(tmp_path, names.make(), {"max_shard_size": "8KB"}, **kinds(names)[kind])
    assert len(list(pair.base.glob("*.safetensors"))) > 3
    report = loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    assert pair.holds(tmp_path / "out") and len(report.files) > 3


def merged_bytes(base: Path, adapter: Path, out: Path) -> dict[str, bytes]:
    loratool.merge(base, adapter, out, force=True)
    return {k: bytes(v.contiguous().view(torch.uint8).numpy()) for k, v in load_model(out).items()}


@pytest.mark.parametrize("kind", ["all at once", "embedding and head", "saved embedding and head", "lora_bias"])
class TestOtherSpellings:
    """An adapter saved in the other ways that peft and its users have is the same merge."""

    def test_a_torch_file(self, pairs: Any, tmp_path: Path, kind: str) -> None:
        """Older PEFT saves adapter_model.bin."""
        pair = pairs("llama", kind)
        model = peft.PeftModel.from_pretrained(load(pair.base, pair.cls), pair.adapter)
        model.save_pretrained(tmp_path / "torch", safe_serialization=False)
        assert (tmp_path / "torch" / "adapter_model.bin").is_file()
        expected = merged_bytes(pair.base, pair.adapter, tmp_path / "out")
        assert merged_bytes(pair.base, tmp_path / "torch", tmp_path / "out") == expected

    def test_a_named_adapter_in_its_folder(self, pairs: Any, tmp_path: Path, kind: str) -> None:
        pair = pairs("llama", kind)
        model = wrap(load(pair.base, pair.cls), name="x", **kinds(FAMILIES["llama"])[kind])
        model.save_pretrained(tmp_path / "a")
        loratool.merge(pair.base, tmp_path / "a" / "x", tmp_path / "direct")
        loratool.merge(pair.base, tmp_path / "a", tmp_path / "out")
        wanted = answer(model)
        assert all(agree(answer(load(tmp_path / o, pair.cls)), wanted) for o in ("direct", "out"))

    def test_raw_keys_of_the_model(self, pairs: Any, tmp_path: Path, kind: str) -> None:
        """A state dict saved by hand has `lora_A.default.weight`, `.modules_to_save.default.` and the like."""
        pair = pairs("llama", kind)
        model = peft.PeftModel.from_pretrained(load(pair.base, pair.cls), pair.adapter)
        saved = load_model(pair.adapter)
        raw = {k: v.contiguous() for k, v in model.state_dict().items() if re.search(r"\.default(\.|$)", k)}
        plain = {k: v for k, v in saved.items() if ".base_layer." in k or (k.endswith("bias") and "lora" not in k)}
        plain = {k: v for k, v in plain.items() if k.replace("lm_head.", "lm_head.modules_to_save.default.") not in raw}
        (tmp_path / "a").mkdir()
        save_file({**raw, **plain}, tmp_path / "a" / "adapter_model.safetensors")
        assert raw and set(raw).isdisjoint(saved) and len(raw) + len(plain) == len(saved)
        config = (pair.adapter / "adapter_config.json").read_text()
        (tmp_path / "a" / "adapter_config.json").write_text(config)
        expected = merged_bytes(pair.base, pair.adapter, tmp_path / "out")
        assert merged_bytes(pair.base, tmp_path / "a", tmp_path / "out") == expected


def test_of_several_named_adapters_none_is_taken(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama", "lora")
    model = wrap(load(pair.base, pair.cls), name="x", target_modules=["q_proj"])
    model.add_adapter("y", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    randomize(model).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=r"holds several adapters \(x, y\)\nname one, like .*x"):
        loratool.merge(pair.base, tmp_path / "a", tmp_path / "out")
    loratool.merge(pair.base, tmp_path / "a" / "y", tmp_path / "out")
    model.set_adapter("y")
    assert agree(answer(load(tmp_path / "out", pair.cls)), answer(model))


class TestClassifiers:
    """A head that a task model has and the base's checkpoint lacks is added."""

    @pytest.mark.parametrize("base", ["LlamaForCausalLM", "LlamaModel"])
    def test_score_of_a_causal_model(self, tmp_path: Path, base: str) -> None:
        folder = write_base(tmp_path / "base", llama(base))
        cls, options = transformers.LlamaForSequenceClassification, {"num_labels": 3, "pad_token_id": 0}
        model = wrap(load(folder, cls, **options), task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"])
        model.save_pretrained(tmp_path / "adapter")
        report = loratool.merge(folder, tmp_path / "adapter", tmp_path / "out")
        assert any("score.weight" in warning and "are added" in warning for warning in report.warnings)
        assert agree(answer(load(tmp_path / "out", cls, **options)), answer(model))
        with pytest.raises(InputError, match=r"score.weight: is not in the base"):
            loratool.merge(folder, (tmp_path / "adapter", 0.5), tmp_path / "half")

    @pytest.mark.parametrize("base", ["BertForMaskedLM", "BertModel"])
    def test_classifier_of_bert(self, tmp_path: Path, base: str) -> None:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32, "num_labels": 3}
        config = transformers.BertConfig(num_attention_heads=2, **sizes)
        folder = write_base(tmp_path / "base", getattr(transformers, base)(config))
        cls = transformers.BertForSequenceClassification
        model = wrap(load(folder, cls), task_type="SEQ_CLS", target_modules=["query", "value"], use_dora=True)
        model.save_pretrained(tmp_path / "adapter")
        saved = load_model(tmp_path / "adapter")
        pooler = {k.removeprefix("base_model.model."): v for k, v in model.state_dict().items() if ".pooler." in k}
        loratool.merge(folder, tmp_path / "adapter", tmp_path / "out")
        merged = load(tmp_path / "out", cls)
        if base == "BertForMaskedLM":  # which has no pooler, so that transformers made one up each time
            merged.load_state_dict(pooler, strict=False)
        assert agree(answer(merged), answer(model))
        assert {"classifier.weight", "classifier.bias"} <= set(load_model(tmp_path / "out"))
        assert any(k.endswith("classifier.bias") for k in saved)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_every_bias_of_a_masked_language_model(tmp_path: Path, family: str) -> None:
    """PEFT saves the head's bias under two names, of which the base has one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    config = getattr(transformers, f"{family}Config")(num_attention_heads=2, max_position_embeddings=40, **sizes)
    pair = write_pair(
        tmp_path, getattr(transformers, f"{family}ForMaskedLM")(config), target_modules=["query"], bias="all",
        task_type=None,
    )  # fmt: skip
    (twice,) = [k for k in load_model(pair.adapter) if k.endswith("decoder.bias")]
    report = loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    assert pair.holds(tmp_path / "out") and not report.left_out
    assert load_model(tmp_path / "out").keys() == load_model(pair.base).keys()
    tensors = load_model(pair.adapter)
    save_file({**tensors, twice: tensors[twice] + 1}, pair.adapter / "adapter_model.safetensors")
    with pytest.raises(NeedsFlag, match=r"decoder.bias"):
        loratool.merge(pair.base, pair.adapter, tmp_path / "no")


@pytest.mark.parametrize(
    ("config", "mark", "message"),
    [
        ({"modules_to_save": ["norm"]}, ".norm.", "modules_to_save names norm, but the file has no tensors of it"),
        (
            {"modules_to_save": ["lm_head"]},
            "lm_head",
            "modules_to_save names lm_head, but the file has no tensors of it",
        ),
        ({"trainable_token_indices": [1, 2]}, "token", "sets trainable_token_indices, but the file has no rows"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            "lm_head",
            "name lm_head, but the file has no rows",
        ),
        ({"bias": "all"}, "bias", "sets bias to all, but the file has no bias"),
        ({"bias": "lora_only"}, "bias", "sets bias to lora_only, but the file has no bias"),
        ({"lora_bias": True}, "lora_B.bias", "sets lora_bias, but the file has no lora_B.bias"),
    ],
)
def test_what_the_config_announces_and_the_file_lacks(
    tmp_path: Path, run: Any, config: dict[str, Any], mark: str, message: str
) -> None:
    pair = write_pair(tmp_path, llama(), target_modules=["q_proj"], **config)
    whole = loratool.merge(pair.base, pair.adapter, tmp_path / "whole")
    assert not any("the config" in warning for warning in whole.warnings)
    assert run("inspect", pair.adapter, "--base", pair.base, "--strict").exit_code == 0
    tensors = {k: v for k, v in load_model(pair.adapter).items() if mark not in k}
    save_file(tensors, pair.adapter / "adapter_model.safetensors")
    report = loratool.merge(pair.base, pair.adapter, tmp_path / "out")
    assert [message in warning and str(pair.adapter) in warning for warning in report.warnings] == [True]
    strict = run("inspect", pair.adapter, "--base", pair.base, "--strict")
    assert strict.exit_code == 1 and strict.stdout.count(message) == 1


def test_a_bias_that_no_module_has_is_not_missed(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, llama(attention_bias=False), target_modules=["q_proj"], bias="all")
    assert not loratool.merge(pair.base, pair.adapter, tmp_path / "out").warnings


PAIRS = [
    ("lora", "rslora"),
    ("dora", "lora"),
    ("patterns", "dora, rslora"),
    ("embedding and head, dora", "embedding and head"),
    ("saved embedding and head", "embedding and head"),
    ("tokens", "embedding"),
    ("bias=all", "lora_bias"),
]


def two_adapters() -> Iterator[Any]:
    """Yield family, pair and weights: by default each pair on Llama in parts, and one of them in all ways."""
    for w, family, pair in itertools.product([(1.0, 1.0), (0.5, -2.0)], FAMILIES, PAIRS):
        few = (family == "llama" and w == (0.5, -2.0)) or pair == ("dora", "lora")
        name = f"{w[0]:g}, {w[1]:g}-{family}-{'-'.join(pair)}"
        yield pytest.param(family, *pair, w, id=name, marks=() if few else pytest.mark.slow)


class TestSeveralAdapters:
    """Their sum is taken with peft's own merges: W + sum of w * (U(W) - W)."""

    @pytest.mark.parametrize(("family", "one", "two", "w"), [*two_adapters()])
    def test_two(self, pairs: Any, tmp_path: Path, family: str, one: str, two: str, w: tuple[float, float]) -> None:
        a, b = pairs(family, one), pairs(family, two)
        W = load_model(a.base)
        assert all(torch.equal(W[name], other) for name, other in load_model(b.base).items())
        both = [by_peft(a.base, adapter, a.cls) for adapter in (a.adapter, b.adapter)]
        wanted = {n: W[n] + sum(x * (U[n] - W[n]) for x, U in zip(w, both, strict=True)) for n in W}
        report = loratool.merge(a.base, [(a.adapter, w[0]), (b.adapter, w[1])], tmp_path / "out")
        found = load_model(tmp_path / "out")
        assert found.keys() == wanted.keys() and any("+" in row.update or row.rank > 3 for row in report.tensors)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10)  # norms of DoRA have 36 bits

    @pytest.mark.parametrize(
        ("one", "two"),
        [("dora", "dora, rslora"), ("dora", "dora"), ("saved head", "saved head"), ("tokens", "saved embedding")],
    )
    def test_two_that_are_no_sums_are_refused(self, pairs: Any, tmp_path: Path, one: str, two: str) -> None:
        a, b = pairs("llama", one), pairs("llama", two)
        with pytest.raises(InputError, match="do not add up\nmerge them one after the other"):
            loratool.merge(a.base, [a.adapter, b.adapter], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_one_after_the_other(self, pairs: Any, tmp_path: Path) -> None:
        """The remedy of the refusal works, and gives what peft computes of the second on the first's result."""
        a, b = pairs("llama", "dora"), pairs("llama", "dora, rslora")
        loratool.merge(a.base, a.adapter, tmp_path / "first")
        loratool.merge(tmp_path / "first", b.adapter, tmp_path / "out")
        stacked = peft.PeftModel.from_pretrained(load(tmp_path / "first", a.cls), b.adapter).eval()
        assert agree(answer(load(tmp_path / "out", a.cls)), answer(stacked))


def edit_config(adapter: Path, copy: Path, **fields: Any) -> Path:
    copy.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    (copy / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    return copy


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("lora_bias", {"lora_bias": False}, "config does not set lora_bias"),
        ("dora", {"use_dora": False}, "config does not set use_dora"),
        ("lora", {"use_dora": True}, "config sets use_dora"),
        ("tokens", {"trainable_token_indices": None}, "do not say which"),
        ("tokens", {"trainable_token_indices": [3]}, "lists 1 different rows"),
        ("tokens", {"trainable_token_indices": [3, 3]}, "lists 1 different rows|lists 2 different rows"),
        ("tokens", {"trainable_token_indices": [3, 32]}, "has 32 rows, but .* replaces row 32"),
        ("patterns", {"rank_pattern": {}}, "the config says rank 2"),
    ],
)
def test_a_config_of_another_adapter_is_refused(
    pairs: Any, tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    """A tensor that the config does not announce is never dropped, as PEFT does in silence."""
    pair = pairs("llama", kind)
    with pytest.raises(InputError, match=message):
        loratool.merge(pair.base, edit_config(pair.adapter, tmp_path / "a", **fields), tmp_path / "out")


BD = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj", "v_proj"], "nblocks": 2}
LORAS: dict[str, dict[str, Any]] = {
    "velora": {"velora_config": {"num_groups": 4, "init_type": "random"}},
    "velora, rslora, patterns": {"velora_config": {"num_groups": 2}, "use_rslora": True, "rank_pattern": {"v_proj": 3}},
    "monteclora": {"monteclora_config": {"num_samples": 3}},
    "bdlora": {"r": 4, "use_bdlora": BD},
    "bdlora of A alone": {"r": 4, "use_bdlora": {**BD, "target_modules_bd_b": None, "match_strict": False}},
    "bdlora of one layer": {"r": 4, "use_bdlora": {**BD, "target_modules_bd_a": ["s.1.mlp"], "match_strict": False}},
    "bdlora, rslora, four blocks": {"r": 8, "use_rslora": True, "use_bdlora": {**BD, "nblocks": 4}},
}


@pytest.mark.parametrize("variant", LORAS)
def test_a_variant_that_is_lora_when_merged(tmp_path: Path, variant: str) -> None:
    """By peft's merge; and what is written of it, which has no tensors of training, by peft too."""
    targets = ["q_proj", "v_proj", "down_proj"]
    pair = write_pair(tmp_path / "pair", llama(), target_modules=targets, **LORAS[variant])
    full = by_peft(pair.base, pair.adapter, pair.cls)
    loratool.convert(pair.adapter, tmp_path / "plain", to="peft")
    for adapter in (pair.adapter, tmp_path / "plain"):
        loratool.merge(pair.base, adapter, tmp_path / "out", force=True)
        assert pair.holds(tmp_path / "out")
        for name, found in load_model(tmp_path / "out").items():
            torch.testing.assert_close(found, full[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_peft(pair.base, tmp_path / "plain", pair.cls), full, rtol=1e-12, atol=1e-12)
    report: Any = loratool.inspect(pair.adapter)
    assert any("are only for training" in note for note in report.notes) == ("bdlora" not in variant)


@pytest.mark.parametrize(
    "said",
    [
        {**BD, "nblocks": 0}, {**BD, "nblocks": 3}, {**BD, "nblocks": 10**6}, {**BD, "nblocks": True},
        {**BD, "target_modules_bd_a": "down_proj"}, {**BD, "target_modules_bd_b": [3]}, True, [1],
    ],
)  # fmt: skip
def test_blocks_that_no_factor_has_are_refused(tmp_path: Path, said: Any) -> None:
    config = {"r": 4, "use_bdlora": BD, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    pair = write_pair(tmp_path / "pair", llama(), **config)
    with pytest.raises(InputError):
        loratool.merge(pair.base, edit_config(pair.adapter, tmp_path / "a", use_bdlora=said), tmp_path / "out")


ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [17, 3, 30, 0]}),
    "tokens of a head": ("TrainableTokensConfig", {"target_modules": ["lm_head"], "token_indices": [5, 2]}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "model.norm"]}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ALONE)
def test_tokens_and_norms_alone(tmp_path: Path, kind: str, tied: bool) -> None:
    """Merged as by peft; undone; and beside LoRA in one file, which peft loads."""
    if tied and kind == "tokens of a head":
        return  # peft tells tied tokens of the embedding
    name, fields = ALONE[kind]
    pair = write_pair(tmp_path / "pair", llama(tie_word_embeddings=tied), target_modules=["q_proj"])
    live = peft.get_peft_model(load(pair.base, pair.cls), getattr(peft, name)(task_type="CAUSAL_LM", **fields))
    for number, parameter in enumerate(each for each in live.parameters() if each.requires_grad):
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    live.save_pretrained(tmp_path / "alone")
    wanted = answer(live)
    loratool.merge(pair.base, tmp_path / "alone", tmp_path / "out")
    assert agree(answer(load(tmp_path / "out", pair.cls)), wanted)
    assert not agree(answer(load(pair.base, pair.cls)), wanted)
    assert loratool.verify(pair.base, tmp_path / "alone", tmp_path / "out").status == "proven"
    loratool.unmerge(tmp_path / "out", tmp_path / "alone", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (pair.base / file).read_bytes()
    for order in ([pair.adapter, tmp_path / "alone"], [tmp_path / "alone", pair.adapter]):
        loratool.combine([(each, 1.0) for each in order], tmp_path / "both", force=True)
        loratool.merge(pair.base, order, tmp_path / "two", force=True)
        loratool.merge(pair.base, tmp_path / "both", tmp_path / "one", force=True)
        by_both = answer(load(tmp_path / "two", pair.cls))
        assert agree(answer(load(tmp_path / "one", pair.cls)), by_both)
        live = peft.PeftModel.from_pretrained(load(pair.base, pair.cls), tmp_path / "both").eval()
        assert agree(answer(live), by_both)


def test_tokens_alone_of_unknown_rows_are_refused(tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "pair", llama(), target_modules=["q_proj"])
    name, fields = ALONE["tokens"]
    live = peft.get_peft_model(load(pair.base, pair.cls), getattr(peft, name)(task_type="CAUSAL_LM", **fields))
    live.save_pretrained(tmp_path / "alone")
    for number, indices in enumerate((None, [3], [3, 3, 30, 0], [17, 3, 30, 32], "all", [17.0, 3, 30, 0])):
        copy = edit_config(tmp_path / "alone", tmp_path / str(number), token_indices=indices)
        with pytest.raises(InputError, match="rows|replaces row 32"):
            loratool.merge(pair.base, copy, tmp_path / "out")
