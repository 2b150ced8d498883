"""Untie masked language models and encoder-decoders: transformers loads each with nothing missing, and it answers as
peft's forward pass of base and adapter. Then unmerge gives the base back, and verify knows the merge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, load_model, spread
from lib.models.language_families import TOKENS, made
from lib.models.language_families import answer as answer_to
from lib.models.peft_models import agree, config_of, load, peft, transformers, wrap, write_base
from lib.models.tied_models import CLASSES, MASKED
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.architectures.ties import FLAG_SCALES, ONE_MODULE_BEFORE_5
from loratool.errors import InputError, NeedsFlag

pytestmark = [pytest.mark.filterwarnings("ignore")]


KINDS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "embedding": lambda embed, head, other: {"target_modules": [embed]},
    "head": lambda embed, head, other: {"target_modules": [head]},
    "both, dora, biases": lambda embed, head, other: {"target_modules": [embed, head], "use_dora": True, "bias": "all"},
    "saved embedding": lambda embed, head, other: {"target_modules": [other], "modules_to_save": [embed]},
    "saved head": lambda embed, head, other: {"target_modules": [other], "modules_to_save": [head]},
    "tokens": lambda embed, head, other: {"target_modules": [other], "trainable_token_indices": [3, 30]},
    "tokens and head": lambda embed, head, other: {"target_modules": [head], "trainable_token_indices": [3, 30]},
}
IN_FULL = ("BertForMaskedLM", "BartForConditionalGeneration", "T5ForConditionalGeneration")
CASES = [
    *((name, kind) for name in IN_FULL for kind in KINDS),
    *((name, "both, dora, biases") for name in CLASSES if name not in IN_FULL),
    ("MarianMTModel", "tokens"),
    ("MT5ForConditionalGeneration", "saved head"),
]


def make(name: str) -> Any:
    model = name.partition("For")[0].removesuffix("MTModel")
    return getattr(transformers, name)(getattr(transformers, f"{model}Config")(**CLASSES[name][0]))


def answer(model: Any) -> Tensor:
    tokens = torch.arange(16)[None]
    features = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = {"input_features": features} if model.config.model_type == "whisper" else {"input_ids": tokens}
    with torch.no_grad():
        out = model(**inputs, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}))
    return out.logits if "logits" in out else out.prediction_logits


def files_of(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = write_base(tmp_path_factory.mktemp("base") / "base", make(name))
        return made[name]

    return base


@pytest.mark.parametrize(("name", "kind"), spread(CASES, 14))
def test_untied_it_answers_as_base_and_adapter(bases: Any, tmp_path: Path, name: str, kind: str) -> None:
    cls, base = getattr(transformers, name), bases(name)
    before = files_of(base)
    wrapped = wrap(load(base, cls), task_type=None, **KINDS[kind](*CLASSES[name][1:]))
    wrapped.save_pretrained(tmp_path / "a")
    wanted = answer(wrapped)
    report = loratool.merge(base, tmp_path / "a", tmp_path / "out")
    merged, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = answer(merged.eval())
    head = merged.get_output_embeddings()
    if "tokens" in kind and head.bias is not None:  # which peft forgets there
        assert any("PEFT's forward pass leaves it out" in warning for warning in report.warnings)
        found = found - head.bias.detach()
    assert agree(found, wanted) and not agree(answer(load(base, cls)), wanted)
    parted = kind != "tokens"
    assert any("untied from" in warning for warning in report.warnings) is parted
    old = config_of(base)["model_type"] in FLAG_SCALES | ONE_MODULE_BEFORE_5 and parted
    assert any("transformers before 5" in warning for warning in report.warnings) is old
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is not (parted and config["model_type"] not in FLAG_SCALES)
    judged = loratool.verify(base, tmp_path / "a", tmp_path / "out")
    assert judged.status == "proven" and judged.rounded == 0
    loratool.unmerge(tmp_path / "out", tmp_path / "a", tmp_path / "again")
    assert files_of(tmp_path / "again") == before == files_of(base)


OTHER_HEADS = {
    "causal": "gpt_neox_japanese biogpt trocr",
    "masked": "flaubert fnet layoutlm luke mra nomic_bert squeezebert tapas yoso",
}


@pytest.mark.parametrize(
    ("table", "family"),
    [
        pytest.param(table, family, marks=[] if i == 0 else [pytest.mark.slow])
        for table, families in OTHER_HEADS.items()
        for i, family in enumerate(families.split())
    ],
)
def test_heads_of_other_names_are_untied(tmp_path: Path, table: str, family: str) -> None:
    """An adapter of the embedding alone, or of the head alone, of the classes of `tiny`."""
    kind, model = made(table, family, tmp_path)
    names = {id(module): name for name, module in model.named_modules()}
    before = answer_to(model, {"input_ids": TOKENS})
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        plain = kind.from_pretrained(tmp_path / "base")
        wrapped = wrap(plain, task_type=None, target_modules=[names[id(module)]]).float()
        wrapped.save_pretrained(tmp_path / "a")
        loratool.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", force=True)
        merged, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        found, wanted = (answer_to(m, {"input_ids": TOKENS}) for m in (merged.eval(), wrapped.base_model.model))
        changed = (wanted - before).abs().max()
        assert (found - wanted).abs().max() < 1e-4 * changed and changed > 1e-3


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_what_is_written_says_so(bases: Any, tmp_path: Path, run: Any, name: str) -> None:
    """Each of the four matrices of an encoder-decoder is written, unless the flag still ties those that are equal."""
    base = bases(name)
    wrap(load(base, getattr(transformers, name)), task_type=None, target_modules=[CLASSES[name][2]]).save_pretrained(
        tmp_path / "a"
    )
    report = loratool.merge(base, tmp_path / "a", tmp_path / "out")
    added = load_model(tmp_path / "out").keys() - load_model(base).keys()
    assert added == {
        "BertForMaskedLM": {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
        "BartForConditionalGeneration": {
            "lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
        },
        "T5ForConditionalGeneration": {"lm_head.weight"},
    }[name]  # fmt: skip
    assert {row.name for row in report.tensors if "untied" in row.update} == added
    for mode, code in (("refuse", 4), ("share", 0)):
        done = run("merge", base, tmp_path / "a", "-o", tmp_path / mode, "--tied", mode)
        assert done.exit_code == code, done.stderr
    assert load_model(tmp_path / "share").keys() == load_model(base).keys()


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("config", [{"target_modules": ["shared"]}, {"modules_to_save": ["shared"]}])
def test_the_shared_name_alone_is_refused(bases: Any, tmp_path: Path, run: Any, name: str, config: Any) -> None:
    """Encoder and decoder compute with their own names, so that to peft such an adapter has no effect."""
    base, cls = bases(name), getattr(transformers, name)
    model = wrap(load(base, cls), task_type=None, **{"target_modules": [CLASSES[name][3]], **config})
    model.save_pretrained(tmp_path / "a")
    if "modules_to_save" not in config:
        assert agree(answer(model), answer(load(base, cls)))
    done = run("merge", base, tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 4 and "shared.weight: is the shared embedding of encoder and decoder" in done.stderr
    assert "--tied share" in done.stderr and not (tmp_path / "out").exists()
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "out", "--tied", "share").exit_code == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [("MobileBertForMaskedLM", {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}),
     ("DebertaV2ForMaskedLM", {"legacy": False})],
)  # fmt: skip
def test_heads_that_are_no_module_are_refused(tmp_path: Path, run: Any, name: str, fields: Any) -> None:
    cls = getattr(transformers, name)
    config = getattr(transformers, name.replace("ForMaskedLM", "Config"))(**MASKED, **fields)
    base = write_base(tmp_path / "base", cls(config))
    wrap(load(base, cls), task_type=None, target_modules=["word_embeddings"]).save_pretrained(tmp_path / "a")
    done = run("merge", base, tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 4 and "--tied share" in done.stderr
    assert "is tied to a head that is not known to be read, or trained, as a matrix of its own" in done.stderr


def test_electra_for_pretraining_has_no_tied_head(tmp_path: Path) -> None:
    cls = transformers.ElectraForPreTraining
    base = write_base(tmp_path / "base", cls(transformers.ElectraConfig(**MASKED, embedding_size=16)))
    wrapped = wrap(load(base, cls), task_type=None, target_modules=["word_embeddings"])
    wrapped.save_pretrained(tmp_path / "a")
    loratool.merge(base, tmp_path / "a", tmp_path / "out", tied="refuse")
    assert agree(load(tmp_path / "out", cls)(torch.arange(16)[None]).logits, wrapped(torch.arange(16)[None]).logits)


def test_two_values_of_one_bias_are_refused(bases: Any, tmp_path: Path, run: Any) -> None:
    """With the saved head's own bias and the one of bias="all", it is the head's that counts."""
    base, cls = bases("BertForMaskedLM"), transformers.BertForMaskedLM
    config = {"target_modules": ["query"], "modules_to_save": ["decoder"], "bias": "all"}
    wrapped = wrap(load(base, cls), task_type=None, **config)
    wrapped.save_pretrained(tmp_path / "a")
    with pytest.raises(NeedsFlag, match="cls.predictions.bias under another name") as caught:
        loratool.merge(base, tmp_path / "a", tmp_path / "out")
    assert "--exclude cls.predictions.bias" in str(caught.value.remedy)
    done = run("merge", base, tmp_path / "a", "-o", tmp_path / "out", "--exclude", "cls.predictions.bias")
    assert done.exit_code == 0 and agree(answer(load(tmp_path / "out", cls)), answer(wrapped))


@pytest.mark.parametrize("save", [[], ["head"]], ids=["resized", "saved head"])
@pytest.mark.parametrize(
    ("name", "size"), [("BertForMaskedLM", 40), ("RobertaForMaskedLM", 24), ("DistilBertForMaskedLM", 40)]
)
def test_a_masked_vocabulary_of_another_size(bases: Any, tmp_path: Path, name: str, size: int, save: Any) -> None:
    """The head's bias has a row a token too, and peft saves it with the head."""
    base, cls = bases(name), getattr(transformers, name)
    model = load(base, cls)
    model.resize_token_embeddings(size)
    model.config._name_or_path = str(base)  # where peft looks for the size that it was
    wrapped = wrap(model, task_type=None, target_modules=[CLASSES[name][3]])
    wrapped.save_pretrained(tmp_path / "a")
    if save:
        file = tmp_path / "a" / "adapter_model.safetensors"
        (key,) = [k for k in load_file(file) if k.endswith(f"{CLASSES[name][2]}.weight")]
        tensors = load_file(file)
        save_file({**tensors, key: tensors[key] * 2, key[:-6] + "bias": tensors[key[:-6] + "bias"] + 1}, file)
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
        head = wrapped.get_output_embeddings()  # peft loads it into both sides
        head.weight = torch.nn.Parameter(tensors[key] * 2)
        wrapped.get_input_embeddings().weight.data = tensors[key]
    loratool.merge(base, tmp_path / "a", tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == size
    merged, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.tensor([[1, 2, size - 2, size - 1]])
    assert agree(merged.eval()(tokens).logits, wrapped(tokens).logits)
    assert loratool.verify(base, tmp_path / "a", tmp_path / "out").status == "proven"
    loratool.unmerge(tmp_path / "out", tmp_path / "a", tmp_path / "again")
    assert all(torch.equal(bits(v), bits(load_model(base)[k])) for k, v in load_model(tmp_path / "again").items())


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BartForConditionalGeneration"])
def test_what_stays_equal_may_be_left_to_the_config(bases: Any, tmp_path: Path, name: str) -> None:
    """Savers that part the head alone store what is not tied any more, and no more; transformers 5 reads that right."""
    base, cls = bases(name), getattr(transformers, name)
    wrapped = wrap(load(base, cls), task_type=None, target_modules=[CLASSES[name][2]])
    wrapped.save_pretrained(tmp_path / "a")
    loratool.merge(base, tmp_path / "a", tmp_path / "out")
    file, config = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    kept = {
        k: v for k, v in load_file(file).items() if k in load_model(base) or k.endswith(("lm_head.weight", "r.weight"))
    }
    save_file(kept, file, metadata={"format": "pt"})
    assert loratool.verify(base, tmp_path / "a", tmp_path / "out").missing
    config.write_text((base / "config.json").read_text())
    assert loratool.verify(base, tmp_path / "a", tmp_path / "out").status == "proven"
    assert agree(answer(load(tmp_path / "out", cls)), answer(wrapped))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_what_was_untied_can_be_extracted(bases: Any, tmp_path: Path, name: str) -> None:
    """Each side is a change of its own, also where a shard has nothing that the base has too."""
    base = bases(name)
    config = {"target_modules": [*CLASSES[name][1:3]], "bias": "all"}
    wrap(load(base, getattr(transformers, name)), task_type=None, **config).save_pretrained(tmp_path / "a")
    loratool.merge(base, tmp_path / "a", tmp_path / "tuned", max_shard_size=1 << 10)
    report = loratool.extract(base, tmp_path / "tuned", tmp_path / "extracted", rank=2)
    assert not report.only_tuned and not report.left_out
    loratool.merge(base, tmp_path / "extracted", tmp_path / "out")
    merged, wanted = load_model(tmp_path / "out"), load_model(tmp_path / "tuned")
    assert merged.keys() == wanted.keys()
    assert all(torch.allclose(merged[key], wanted[key], atol=1e-6) for key in wanted)


def test_a_buffer_of_the_vocabularys_size_has_no_source(bases: Any, tmp_path: Path) -> None:
    """peft saves nothing of BART's final_logits_bias; on a base that transformers resized the adapter merges."""
    base, cls = bases("BartForConditionalGeneration"), transformers.BartForConditionalGeneration
    model = load(base, cls)
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "resized")
    model.config._name_or_path = str(base)
    wrapped = wrap(model, task_type=None, target_modules=["q_proj"])
    wrapped.save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="final_logits_bias: is .* vocabulary would have 40 rows") as caught:
        loratool.merge(base, tmp_path / "a", tmp_path / "out")
    assert "resize_token_embeddings(40)" in str(caught.value.remedy)
    loratool.merge(tmp_path / "resized", tmp_path / "a", tmp_path / "out")
    assert agree(answer(load(tmp_path / "out", cls)), answer(wrapped))
