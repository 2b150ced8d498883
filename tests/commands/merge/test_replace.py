"""Hold a swap of adapters against a merge into the base: the same files, byte for byte, without the base."""

from __future__ import annotations

import errno
import filecmp
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, run_command, weights, write_model, write_peft
from lib.files.undo_bytes import join_undo, split_undo
from lib.models.peft_models import FAMILIES, FEW, kinds, write_base, write_pair
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.durable import disk
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.streaming import workers
from loratool.streaming.workers import Worker
from loratool.undo import checks
from loratool.undo.records import EDITED

pytestmark = [pytest.mark.filterwarnings("ignore")]
LLAMA, GPT2, SDXL = FIXTURES / "llama", FIXTURES / "gpt2", FIXTURES / "sdxl"
BF16 = torch.bfloat16
CARD = "README.md"


def differing(one: Path, two: Path) -> list[str]:
    """Return the files of two folders that are only in one, or have other bytes, but for the cards."""
    names = {path.relative_to(folder).as_posix() for folder in (one, two) for path in folder.rglob("*")}
    files = {name for name in names if (one / name).is_file() or (two / name).is_file()}
    _, other, missing = filecmp.cmpfiles(one, two, sorted(files - {CARD}), shallow=False)
    return [*other, *missing]


def is_as_fresh(folder: Path, base: Path, old: Any, new: Any, **options: Any) -> None:
    """Merge the new adapter into the base, and in place of the old one, and compare."""
    end = options.pop("end", "")
    folder.mkdir(exist_ok=True)
    loratool.merge(base, new, folder / f"fresh{end}", **options)
    loratool.merge(base, old, folder / f"old{end}")
    loratool.merge(folder / f"old{end}", new, folder / f"swapped{end}", replace=old, **options)
    if end:
        for name in (f"{{}}{end}", *(["{}.undo"] if options.get("undo", True) else [])):
            one, two = (folder / name.format(each) for each in ("fresh", "swapped"))
            assert filecmp.cmp(one, two, shallow=False)
    else:
        assert differing(folder / "fresh", folder / "swapped") == []


class TestKinds:
    """Each kind of update in place of another, on one base."""

    @pytest.fixture(scope="class")
    def adapters(self, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
        folder, made = tmp_path_factory.mktemp("kinds"), dict[tuple[str, str], Path]()
        for family, names in FAMILIES.items():
            write_base(folder / family, names.make())
            recast(folder / family / "model.safetensors")

        def adapter(family: str, kind: str) -> tuple[Path, Path]:
            if (family, kind) not in made:
                names = FAMILIES[family]
                pair = write_pair(folder / f"{family} {len(made)}", names.make(), **kinds(names)[kind])
                made[family, kind] = pair.adapter
            return folder / family, made[family, kind]

        return adapter

    @pytest.mark.parametrize(
        ("family", "kind"),
        [
            pytest.param(family, kind, id=f"{family}-{kind}", marks=() if kind in FEW[family] else pytest.mark.slow)
            for family, names in FAMILIES.items()
            for kind in kinds(names)
        ],
    )
    def test_each_in_place_of_the_one_before(
        self,
        tmp_path: Path,
        adapters: Callable[[str, str], tuple[Path, Path]],
        family: str,
        kind: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(checks, "RECORD", 250)  # a few rows
        every = [*kinds(FAMILIES[family])]
        base, old = adapters(family, every[every.index(kind) - 1])
        is_as_fresh(tmp_path, base, old, adapters(family, kind)[1])


def recast(file: Path) -> None:
    save_file({name: x.to(BF16) for name, x in load_file(file).items()}, file, metadata={"format": "pt"})


def plain(folder: Path, shards: int = 1) -> tuple[Path, Path, Path]:
    """A base, and two adapters that change other rows and tensors of it."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tensors: dict[str, Tensor] = {
        f"model.layers.0.self_attn.{name}.weight": weights(48, 32, seed=k, dtype=BF16) for k, name in enumerate(names)
    }
    tensors["model.norm.weight"] = weights(32, dtype=BF16)
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 1, "head_dim": 48}
    base = write_model(folder / "base", tensors, config, shards)
    (base / "tokenizer.json").write_text("{}")
    (base / "notes.txt").write_text("a side file")
    (base / CARD).write_text("---\nlicense: mit\n---\nThe base.\n")
    old, new = (
        write_peft(
            folder / each,
            {f"model.layers.0.self_attn.{name}": factors(48, 32, 2, seed) for name in some},
        )
        for seed, each, some in ((1, "first", names[:3]), (2, "second", names[2:]))
    )
    return base, old, new


class TestShapes:
    @pytest.mark.parametrize("shards", [1, 3])
    def test_shards_and_side_files(self, tmp_path: Path, shards: int) -> None:
        base, old, new = plain(tmp_path, shards)
        is_as_fresh(tmp_path, base, old, new)
        loratool.unmerge(tmp_path / "swapped", new, tmp_path / "back")
        assert differing(base, tmp_path / "back") == []
        assert (tmp_path / "back" / CARD).read_text() == (base / CARD).read_text()

    def test_a_file(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        is_as_fresh(tmp_path, base / "model.safetensors", old, new, end=".safetensors")

    def test_a_file_that_became_a_folder_and_the_other_way_round(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        is_as_fresh(tmp_path / "a", base / "model.safetensors", old, new)
        is_as_fresh(tmp_path / "b", base, old, new, end=".safetensors")

    @pytest.mark.parametrize("weight", [0.5, {"te": 0.25, "unet": 2.0}])
    def test_an_image_model(self, tmp_path: Path, weight: Any) -> None:
        base, adapter = SDXL / "base.safetensors", SDXL / "adapter.safetensors"
        new = (adapter, 1.0, weight) if isinstance(weight, dict) else (adapter, weight)
        is_as_fresh(tmp_path, base, adapter, new, end=".safetensors")

    def test_several_adapters(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        is_as_fresh(tmp_path, base, [(old, 0.5), (new, -1.0)], [(new, 0.25), old])

    @pytest.mark.parametrize("model", [LLAMA, GPT2])
    def test_the_fixtures(self, tmp_path: Path, model: Path) -> None:
        is_as_fresh(tmp_path, model / "base", model / "adapter", (model / "adapter", -0.5))

    @pytest.mark.parametrize(
        "options",
        [
            {"undo": False},
            {"undo": False, "dtype": "fp32"},
            {"max_shard_size": 4000},
            {"card": False},
            {"target": ["k_proj"], "workers": 1},
            {"undo": False, "like": LLAMA / "fp8"},
        ],
        ids=str,
    )
    def test_options(self, tmp_path: Path, options: dict[str, Any]) -> None:
        base, old, new = plain(tmp_path)
        if "like" in options:
            base, old, new = LLAMA / "base", LLAMA / "adapter", (LLAMA / "adapter", 0.5)
        if "target" in options:
            new = write_peft(tmp_path / "third", {"model.layers.0.self_attn.k_proj": factors(48, 32, 2)})
        is_as_fresh(tmp_path, base, old, new, **options)

    def test_a_pipeline(self, tmp_path: Path) -> None:
        base = tmp_path / "base"
        tensors = {"down_blocks.0.attentions.0.to_q.weight": weights(16, 16, dtype=BF16)}
        write_model(base / "unet", tensors, {"_class_name": "UNet2DConditionModel"})
        (base / "unet" / "model.safetensors").rename(base / "unet" / "diffusion_pytorch_model.safetensors")
        write_model(base / "vae", {"x.weight": weights(4, 4, dtype=BF16)}, {"_class_name": "AutoencoderKL"})
        (base / "vae" / "model.safetensors").rename(base / "vae" / "diffusion_pytorch_model.safetensors")
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["d", "U"], "vae": ["d", "V"]}
        (base / "model_index.json").write_text(json.dumps(index))
        one, two = (self.of_unet(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
        is_as_fresh(tmp_path, base, one, two)

    @staticmethod
    def of_unet(file: Path, seed: int) -> Path:
        A, B = factors(16, 16, 2, seed)
        name = "unet.down_blocks.0.attentions.0.to_q"
        save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, file)
        return file

    def test_experts_in_a_stack(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.experts.down_proj"
        base = {name: weights(3, 14, 10, dtype=BF16), "model.norm.weight": weights(4, dtype=BF16)}
        write_model(tmp_path / "base", base, {"model_type": "gpt_oss", "num_local_experts": 3})
        adapters = []
        for seed in (1, 2):
            A, B = factors(10, 14, 6, seed)
            adapter = write_peft(
                tmp_path / str(seed), {"x": (A, B)}, r=2, target_parameters=["mlp.experts.down_proj"], target_modules=[]
            )
            prefix = "base_model.model.model.layers.0.mlp.experts"
            own = {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
            save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
            adapters.append(adapter)
        is_as_fresh(tmp_path, tmp_path / "base", *adapters)

    @pytest.mark.parametrize("rows", [18, 20, 24])
    def test_a_table_of_other_rows(self, tmp_path: Path, rows: int) -> None:
        embed = "model.embed_tokens.weight"
        tensors = {"model.x.weight": weights(6, 4, dtype=BF16), embed: weights(rows, 8, dtype=BF16)}
        tensors["model.count.weight"] = torch.arange(70)
        write_model(tmp_path / "base", tensors, {"model_type": "llama", "vocab_size": rows})
        old = write_peft(
            tmp_path / "first", {"model.x": factors(6, 4, 2)}, modules_to_save=["embed_tokens", "model.count"]
        )
        own = load_file(old / "adapter_model.safetensors")
        own |= {f"base_model.model.{embed}": weights(20, 8, seed=7)}
        own["base_model.model.model.count.weight"] = torch.arange(70) * 3
        save_file(own, old / "adapter_model.safetensors", metadata={"format": "pt"})
        new = write_peft(tmp_path / "new", {"model.embed_tokens": factors(8, rows, 2)})
        own = {
            "base_model.model.model.embed_tokens.lora_embedding_A": factors(8, rows, 2)[0],
            "base_model.model.model.embed_tokens.lora_embedding_B": factors(8, rows, 2)[1],
        }
        save_file(own, new / "adapter_model.safetensors", metadata={"format": "pt"})
        is_as_fresh(tmp_path, tmp_path / "base", old, new)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"])
    def test_other_types(self, tmp_path: Path, dtype: str) -> None:
        base, old, new = plain(tmp_path)
        file = base / "model.safetensors"
        tensors = {name: (20 * x).to(getattr(torch, dtype)) for name, x in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        is_as_fresh(tmp_path, base, (old, 8.0), (new, 8.0))

    @pytest.mark.parametrize("first", ["head", "embedding", "both"])
    @pytest.mark.parametrize("second", ["head", "embedding", "both"])
    def test_a_tied_head(self, tmp_path: Path, first: str, second: str) -> None:
        """One side alone unties them: the output has a tensor and a config that the base has not."""
        embed = "model.embed_tokens.weight"
        tensors = {embed: weights(20, 8, dtype=BF16), "model.norm.weight": weights(8, dtype=BF16)}
        config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 20}
        write_model(tmp_path / "base", tensors, config, shards=2)

        def adapter(name: str, sides: str, seed: int) -> Path:
            A, B = factors(20, 8, 2, seed)
            own = {}
            if sides != "embedding":
                own |= {"lm_head.lora_A.weight": A, "lm_head.lora_B.weight": B}
            if sides != "head":
                embedding = {"A": B.T.contiguous(), "B": A.T.contiguous()}
                own |= {f"model.embed_tokens.lora_embedding_{side}": x for side, x in embedding.items()}
            folder = write_peft(tmp_path / name, {"x": (A, B)})
            own = {f"base_model.model.{key}": x for key, x in own.items()}
            save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            return folder

        is_as_fresh(tmp_path, tmp_path / "base", adapter("one", first, 1), adapter("two", second, 2))

    @pytest.mark.parametrize("has_tokenizer", [True, False])
    def test_a_vocabulary_with_its_tokenizer(self, tmp_path: Path, has_tokenizer: bool) -> None:
        """What the old adapter brought is not in the output, and the base's is."""
        tensors = {name: weights(20, 8, dtype=BF16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        base = write_model(tmp_path / "base", tensors, {"model_type": "llama", "vocab_size": 20})
        if has_tokenizer:
            (base / "tokenizer.json").write_text('{"of": "the base"}')
            (base / "tokenizer_config.json").write_text("{}")
        old = write_peft(tmp_path / "one", {"x": factors(6, 4, 2)}, modules_to_save=["embed_tokens", "lm_head"])
        own = {f"base_model.model.{name}": weights(24, 8, seed=k) for k, name in enumerate(tensors)}
        save_file(own, old / "adapter_model.safetensors", metadata={"format": "pt"})
        (old / "tokenizer.json").write_text('{"of": "the adapter"}')
        (old / "tokenizer_config.json").write_text('{"a": 1}')
        is_as_fresh(tmp_path, base, old, write_peft(tmp_path / "two", {"lm_head": factors(20, 8, 2)}))
        assert (tmp_path / "old" / "tokenizer.json").read_text() == '{"of": "the adapter"}'
        assert (tmp_path / "swapped" / "tokenizer.json").exists() is has_tokenizer

    def test_a_model_of_sentence_transformers(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        outer = tmp_path / "outer"
        outer.mkdir()
        base.rename(outer / "0_Transformer")
        (outer / "1_Pooling").mkdir()
        (outer / "1_Pooling" / "config.json").write_text("{}")
        listed = [{"idx": i, "name": str(i), "path": each} for i, each in enumerate(("0_Transformer", "1_Pooling"))]
        (outer / "modules.json").write_text(json.dumps(listed))
        (outer / CARD).write_text("---\nlicense: mit\n---\nThe base.\n")
        is_as_fresh(tmp_path, outer, old, new)
        assert (tmp_path / "swapped" / "0_Transformer" / "loratool.undo").is_file()

    def test_a_second_merge(self, tmp_path: Path) -> None:
        """Only the last merge is replaced; the undo file of the first goes with it, as with a merge on the first."""
        base, old, new = plain(tmp_path)
        loratool.merge(base, new, tmp_path / "once")
        is_as_fresh(tmp_path, tmp_path / "once", old, (new, 0.5))
        assert (tmp_path / "swapped" / "loratool.undo.1").is_file()
        for end in ("", ".safetensors"):
            loratool.unmerge(tmp_path / f"swapped{end}", (new, 0.5), tmp_path / f"twice{end}")
            loratool.unmerge(tmp_path / f"twice{end}", new, tmp_path / f"back{end}")
            if not end:
                assert differing(base, tmp_path / "back") == []
                once = tmp_path / "once.safetensors"
                loratool.merge(base / "model.safetensors", new, once)
                is_as_fresh(tmp_path, once, old, (new, 0.5), end=".safetensors")
        assert filecmp.cmp(base / "model.safetensors", tmp_path / "back.safetensors", shallow=False)


class TestReport:
    def test_it_names_what_was_replaced(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        loratool.merge(base, old, tmp_path / "old")
        planned = loratool.merge(tmp_path / "old", new, tmp_path / "out", replace=old, dry_run=True)
        assert (planned.replaced, planned.dry_run, (tmp_path / "out").exists()) == ((str(old),), True, False)
        result = run_command("merge", tmp_path / "old", new, "--replace", old, "-o", tmp_path / "out", "--json")
        report = json.loads(result.stdout)["report"]
        assert report["replaced"] == [str(old)]
        fresh = loratool.merge(base, new, tmp_path / "fresh", digest=True)
        digests = report["digests"]
        assert digests[str(tmp_path / "out")] == fresh.digests[str(tmp_path / "fresh")]
        merged = loratool.inspect(tmp_path / "old", digest=True)
        assert digests[str(tmp_path / "old")] == merged.digest  # type: ignore[union-attr]
        assert [row["changed"] for row in report["tensors"]] == [row.changed for row in fresh.tensors]

    def test_the_card(self, tmp_path: Path) -> None:
        """It has the base's licence and digest, and the call that made it."""
        base, old, new = plain(tmp_path)
        is_as_fresh(tmp_path, base, (old, 0.5), new)
        card, fresh = ((tmp_path / each / CARD).read_text() for each in ("swapped", "fresh"))
        assert "base: that of `old`, a merge with `first`, licence `mit`" in card
        assert "loratool merge old second --replace first:0.5 -o swapped" in card
        own, of_fresh = (
            [line for line in each.splitlines() if "sha256" in line or "digest" in line or "changed" in line]
            for each in (card, fresh)
        )
        assert own == of_fresh and len(own) == 3

    def test_a_recipe(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        loratool.merge(base, old, tmp_path / "old")
        loratool.merge(base, new, tmp_path / "fresh")
        recipe = tmp_path / "recipe.yaml"
        step = {"base": tmp_path / "old", "adapters": new, "replace": [old], "out": tmp_path / "swapped"}
        recipe.write_text(json.dumps({"command": "merge", **step}, default=str))
        loratool.run(recipe)
        assert differing(tmp_path / "fresh", tmp_path / "swapped") == []


@pytest.fixture
def merged(tmp_path: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A merged model, its adapter and another one; at the end nothing is written."""
    base, old, new = plain(tmp_path)
    loratool.merge(base, old, tmp_path / "old")
    yield tmp_path / "old", old, new
    assert not list(tmp_path.glob("out*"))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


class TestRefused:
    def refused(
        self, merged: tuple[Path, Path, Path], match: str, error: type[Exception] = InputError, **o: Any
    ) -> None:
        model, old, new = merged
        with pytest.raises(error, match=match):
            loratool.merge(model, new, model.parent / "out", **{"replace": old, **o})

    def test_without_an_undo_file(self, merged: tuple[Path, Path, Path]) -> None:
        (merged[0] / "loratool.undo").unlink()
        self.refused(merged, "has no undo file")

    def test_another_adapter_than_the_merges(self, merged: tuple[Path, Path, Path]) -> None:
        self.refused(merged, "is not an adapter of the merge", replace=merged[2])
        self.refused(merged, "was merged with weight 1, not 0.5", replace=(merged[1], 0.5))
        self.refused(merged, "was not part of the merge", replace=[merged[1], merged[2]])
        self.refused(merged, "no adapter given", UsageError, replace=[])

    def test_one_of_two(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        loratool.merge(base, [old, new], tmp_path / "both")
        self.refused((tmp_path / "both", old, new), "the merge also used second")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["q_proj", "o_proj"])
    def test_a_model_that_was_edited(self, merged: tuple[Path, Path, Path], name: str) -> None:
        """In a tensor that is restored, and in one that is not."""
        file = merged[0] / "model.safetensors"
        tensors = load_file(file)
        tensors[f"model.layers.0.self_attn.{name}.weight"].view(torch.int16)[3, 4] ^= 1
        header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
        edited = merged[0].parent / "edited.safetensors"
        save_file(tensors, edited)
        data = edited.read_bytes()
        file.write_bytes(header + data[8 + int.from_bytes(data[:8], "little") :])
        edited.unlink()
        assert load_model(merged[0]).keys() == tensors.keys()
        for options in ({}, {"undo": False}):
            self.refused(merged, EDITED, **options)

    def test_a_tensor_that_was_added(self, merged: tuple[Path, Path, Path]) -> None:
        file = merged[0] / "model.safetensors"
        save_file({**load_file(file), "more": torch.zeros(2)}, file)
        self.refused(merged, "is not in the output of the merge")

    def test_every_byte_of_the_payload(self, merged: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """A damaged record is seen before anything is written, by its hash, though the index does not have it."""
        undo = merged[0] / "loratool.undo"
        whole = undo.read_bytes()
        _, index = split_undo(whole)
        end = index["table"][0]
        assert end > 16
        written = list[Path]()
        monkeypatch.setattr(disk, "truncate", lambda file, nbytes: written.append(Path(file.name)))
        for place in range(16, end, max(1, (end - 16) // 20)):
            flip(undo, place)
            self.refused(merged, "its records do not match their hashes")
            undo.write_bytes(whole)
        assert not written

    def test_the_hashes_of_another_payload(self, merged: tuple[Path, Path, Path]) -> None:
        """Of a forger who writes them again, what the other checks do not see is their own."""
        undo = merged[0] / "loratool.undo"
        body, index = split_undo(undo.read_bytes())
        undo.write_bytes(join_undo(body, {**index, "payload": index["hashes"]}))
        self.refused(merged, "cut off or damaged")
        del index["payload"]
        undo.write_bytes(join_undo(body, index))
        self.refused(merged, "cut off or damaged")

    def test_an_attestation(self, merged: tuple[Path, Path, Path]) -> None:
        self.refused(merged, "replace and attest exclude each other", UsageError, attest="a.json")

    def test_the_merged_model_as_output(self, merged: tuple[Path, Path, Path]) -> None:
        model, old, new = merged
        before = {path: path.read_bytes() for path in model.iterdir()}
        for options in ({}, {"force": True}):
            with pytest.raises((UsageError, NeedsFlag, InputError)):
                loratool.merge(model, new, model, replace=old, **options)
        assert before == {path: path.read_bytes() for path in model.iterdir()}

    @pytest.mark.parametrize("way", ["dequantize", "requantize"])
    def test_a_quantized_base(self, tmp_path: Path, way: Any) -> None:
        loratool.merge(LLAMA / "fp8", LLAMA / "adapter", tmp_path / "old", quantized=way)
        args = tmp_path / "old", LLAMA / "adapter", "--replace", LLAMA / "adapter", "-o", tmp_path / "out"
        result = run_command("merge", *args)
        assert result.exit_code == 3 and "is quantized in the base" in result.stderr
        assert f"unmerge, then merge: loratool unmerge {tmp_path / 'old'} {LLAMA / 'adapter'}" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_a_torch_base(self, tmp_path: Path) -> None:
        base, old, new = plain(tmp_path)
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        loratool.merge(base, old, tmp_path / "old")
        self.refused((tmp_path / "old", old, new), "has torch files")

    def test_an_adapter_as_the_model(self, tmp_path: Path) -> None:
        _, old, new = plain(tmp_path)
        self.refused((old, old, new), "is an adapter, but the first argument must be a merged model")


class TestDisk:
    def test_the_base_is_never_on_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No row of a restored tensor is in anything that is written."""
        base, old, _ = plain(tmp_path)
        loratool.merge(base, old, tmp_path / "old")
        written, real = list[bytes](), disk.write_some

        def kept(file: Any, data: memoryview, offset: int) -> int:
            written.append(bytes(data))
            return real(file, data, offset)

        both = write_peft(tmp_path / "third", {f"model.layers.0.self_attn.{n}_proj": factors(48, 32, 2) for n in "qkv"})
        monkeypatch.setattr(disk, "write_some", kept)
        loratool.merge(tmp_path / "old", both, tmp_path / "out", replace=old)
        everything = b"".join(written)
        for name, tensor in load_model(base).items():
            rows = [bytes(row.contiguous().view(torch.uint8).numpy()) for row in tensor.reshape(-1, 32)]
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                assert not any(row in everything for row in rows), name
        for row in load_model(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]:
            assert bytes(row.contiguous().view(torch.uint8).numpy()) in everything

    def test_no_folder_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base, old, new = plain(tmp_path)
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        is_as_fresh(tmp_path, base, old, new)
        with pytest.raises(InputError):
            loratool.merge(tmp_path / "old", new, tmp_path / "out", replace=old, architecture="None")
        assert not list(temporary.iterdir())

    def test_without_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on Windows, where side files are copied instead."""

        def none(path: Path, new: Path) -> None:
            raise OSError("no privilege")

        monkeypatch.setattr(disk, "symlink", none)
        base, old, new = plain(tmp_path)
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "x.jinja").write_text("x")
        is_as_fresh(tmp_path, base, old, new)

    def test_a_run_that_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base, old, new = plain(tmp_path, shards=2)
        loratool.merge(base, old, tmp_path / "old")
        loratool.merge(base, new, tmp_path / "fresh")
        done = list[object]()

        class Dying(Worker):
            def __call__(self, item: Any) -> Any:
                if len(done) == 4:
                    raise OSError(errno.EIO, "the disk is gone")
                done.append(item)
                return super().__call__(item)

        with monkeypatch.context() as patch:
            patch.setattr(workers, "Worker", Dying)
            with pytest.raises(OSError, match="the disk is gone"):
                loratool.merge(tmp_path / "old", new, tmp_path / "out", replace=old, workers=1)
        assert list(tmp_path.glob("out.loratool-journal"))
        with pytest.raises(UsageError):  # what a merge of another kind left
            loratool.merge(tmp_path / "old", new, tmp_path / "out", resume=True)
        loratool.merge(tmp_path / "old", new, tmp_path / "out", replace=old, resume=True)
        assert differing(tmp_path / "fresh", tmp_path / "out") == []

    def test_an_undo_file_of_another_merge(self, tmp_path: Path) -> None:
        """Of the same adapters and shapes, on another base: nothing but the numbers differs."""
        base, old, new = plain(tmp_path)
        loratool.merge(base, old, tmp_path / "old")
        tensors = {name: x + 1 for name, x in load_model(base).items()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        loratool.merge(base, old, tmp_path / "other")
        shutil.copy(tmp_path / "other" / "loratool.undo", tmp_path / "old" / "loratool.undo")
        with pytest.raises(InputError):
            loratool.merge(tmp_path / "old", new, tmp_path / "out", replace=old)
        assert not list(tmp_path.glob("out*"))
