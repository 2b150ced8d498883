"""Hold the readers of adapters: rank, scale and factors of each format, and the files that are refused by name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, factors, needs_shared, write_kohya, write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.config import AdapterConfig
from loratool.adapters.formats import FORMATS, is_adapter, open_adapter
from loratool.adapters.formats.other_methods import OTHER_METHODS
from loratool.adapters.formats.peft_config import BASE_MUTATING_INITS, base_mutating_init
from loratool.adapters.patterns import Patterns
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.numerics.tensors import tensor_of

Q, V = "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.v_proj"


def test_peft_folder(tmp_path: Path) -> None:
    A, B = factors(6, 4, 2)
    adapter = open_adapter(write_peft(tmp_path / "a", {Q: (A, B)}, lora_alpha=3, base_model_name_or_path="org/base"))
    update = adapter.updates[Q]
    assert (adapter.format, update.rank, update.shape, update.scale) == ("peft", 2, (6, 4), 1.5)
    assert (adapter.config.base_model, adapter.config.alpha) == ("org/base", 3)
    loaded: Any = adapter.load(update)
    assert torch.equal(tensor_of(loaded.A), A) and torch.equal(tensor_of(loaded.B), B)


def test_scales_are_pefts_own(tmp_path: Path) -> None:
    """rsLoRA and patterns (suffix expressions, the first match), module by module against a live PEFT model."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict(
        {n: torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "mlp": torch.nn.Linear(8, 12)}) for n in ("1", "11", "2")}
    )
    for use_rslora in (False, True):
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=use_rslora,
            target_modules=["q", "mlp"],
            rank_pattern={"1.q": 2, "^11.mlp": 3, "q": 5},
            alpha_pattern={"mlp": -7, r"(1|2)\.q": 1.5},
        )
        live = get_peft_model(torch.nn.ModuleDict(model), config)
        live.save_pretrained(tmp_path / "a")
        updates = open_adapter(tmp_path / "a").updates
        assert len(updates) == 6
        for module, update in updates.items():
            layer = live.base_model.model.get_submodule(module)
            assert (update.rank, update.scale) == (layer.r["default"], layer.scaling["default"])
        live.unload()


@given(
    patterns=st.lists(
        st.sampled_from(["q", "1.q", "layers.1.q", "^layers.1", "l.*", "a|q", ".*", "1$", "layers"]),
        max_size=4,
        unique=True,
    ),
    module=st.sampled_from(["q", "layers.1.q", "layers.11.q", "a.layers.1", "layersq", "x.aq", "layers"]),
)
def test_patterns_match_as_peft_matches_them(patterns: list[str], module: str) -> None:
    from peft.utils.other import get_pattern_key

    values = {pattern: i for i, pattern in enumerate(patterns)}
    assert Patterns(values).value(module, "default") == values.get(get_pattern_key(values.keys(), module), "default")


def test_kohya_file(tmp_path: Path) -> None:
    A, B = factors(6, 4, 2, dtype=torch.float16)
    adapter = open_adapter(write_kohya(tmp_path / "a.safetensors", {Q: (A, B)}, torch.tensor(1.0)))
    (update,) = adapter.updates.values()
    assert (adapter.format, adapter.flattened, update.scale) == ("kohya", True, 0.5)
    loaded: Any = adapter.load(update)
    assert torch.equal(tensor_of(loaded.B), B)


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),  # no alpha in the file: the rank
        (torch.tensor(0.0), 1.0),
        (torch.tensor([4.0]), 2.0),  # a 1-d alpha
        (torch.tensor(-2.0), -1.0),
        (torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625 / 2),  # rounded to bf16 when it was stored
        (torch.tensor(8, dtype=torch.int64), 4.0),
    ],
    ids=str,
)
def test_kohya_alpha(tmp_path: Path, alpha: torch.Tensor | None, scale: float) -> None:
    file = write_kohya(tmp_path / "a.safetensors", {Q: factors(6, 4, 2), V: factors(6, 4, 2)}, alpha)
    assert {u.scale for u in open_adapter(file).updates.values()} == {scale}


def test_kohya_mixed_ranks_without_alpha_each_have_scale_1(tmp_path: Path) -> None:
    """One alpha for all would scale the other ranks."""
    file = write_kohya(tmp_path / "a.safetensors", {Q: factors(6, 4, 2), V: factors(6, 4, 3)})
    assert [u.scale for u in open_adapter(file).updates.values()] == [1.0, 1.0]
    assert {u.rank: u.scale for u in open_adapter(file, alpha=6).updates.values()} == {2: 3.0, 3: 2.0}


@pytest.mark.parametrize(("alpha", "scale"), [(0, 0.0), (-4, -2.0), (0.5, 0.25)])
def test_peft_alpha_zero_is_scale_zero_and_negative_is_legal(tmp_path: Path, alpha: float, scale: float) -> None:
    adapter = open_adapter(write_peft(tmp_path / "a", {Q: factors(6, 4, 2)}, lora_alpha=alpha))
    assert adapter.updates[Q].scale == scale


class TestBareFile:
    """A lone PEFT file's config comes from its metadata, a config beside it or --alpha, never from a guess."""

    def bare(self, tmp_path: Path, metadata: dict[str, str] | None = None, prefix: str = "base_model.model.") -> Path:
        A, B = factors(6, 4, 2)
        file = tmp_path / "own.safetensors"
        save_file({f"{prefix}{Q}.lora_A.weight": A, f"{prefix}{Q}.lora_B.weight": B}, file, metadata=metadata)
        return file

    def test_without_any_config_alpha_is_demanded(self, tmp_path: Path) -> None:
        with pytest.raises(NeedsFlag, match="alpha"):
            open_adapter(self.bare(tmp_path))
        assert open_adapter(self.bare(tmp_path), alpha=5).updates[Q].scale == 2.5

    def test_from_the_sibling(self, tmp_path: Path) -> None:
        file = self.bare(tmp_path)
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
        assert open_adapter(file).updates[Q].scale == 4.0

    def test_from_our_metadata(self, tmp_path: Path) -> None:
        ours = json.dumps({"adapter_config": {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": True}})
        assert open_adapter(self.bare(tmp_path, {"loratool": ours})).updates[Q].scale == 3 / math.sqrt(2)

    def test_from_diffusers_metadata(self, tmp_path: Path) -> None:
        flat = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.use_rslora": False})
        file = self.bare(tmp_path, {"format": "pt", "lora_adapter_metadata": flat}, prefix="transformer.")
        assert open_adapter(file).updates[f"transformer.{Q}"].scale == 3.0
        flat = json.dumps({"transformer.r": 2, "text_encoder.r": 2})
        with pytest.raises(InputError, match="text_encoder, transformer"):
            open_adapter(self.bare(tmp_path, {"lora_adapter_metadata": flat}))

    @pytest.mark.parametrize("text", ["{", "[]", "nonsense"])
    def test_broken_metadata_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(InputError, match="lora_adapter_metadata"):
            open_adapter(self.bare(tmp_path, {"lora_adapter_metadata": text}))

    def test_a_contradicting_alpha_is_refused(self, tmp_path: Path) -> None:
        file = self.bare(tmp_path)
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
        assert open_adapter(file, alpha=8).updates[Q].scale == 4.0
        with pytest.raises(UsageError, match="contradicts"):
            open_adapter(file, alpha=9)
        kohya = write_kohya(tmp_path / "k.safetensors", {Q: factors(6, 4, 2)}, torch.tensor(2.0))
        with pytest.raises(UsageError, match="contradicts"):
            open_adapter(kohya, alpha=1)


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("alora_invocation_tokens", "ALORA"),
        ("arrow_config", "ARROW"),
        ("kasa_config", "KASA"),
        ("lora_nums", "LORAMOE"),
        ("use_qalora", "QALORA"),
    ],
)
def test_what_plain_lora_cannot_express_is_refused_by_its_field(tmp_path: Path, field: str, kind: str) -> None:
    """Every switch of LoraConfig that changes the arithmetic."""
    method = OTHER_METHODS[kind]
    with pytest.raises(InputError, match=rf"{kind} adapter \(its config sets {field}\), which {method.reason}"):
        open_adapter(write_peft(tmp_path / "a", {Q: factors(6, 4, 2)}, **{field: True}))
    open_adapter(write_peft(tmp_path / "b", {Q: factors(6, 4, 2)}, **{field: False}))


def test_a_default_config_of_peft_is_not_refused(tmp_path: Path) -> None:
    """Every field that today's PEFT writes by default passes, and an unknown one is kept for a newer PEFT."""
    from peft import LoraConfig

    LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]).save_pretrained(tmp_path / "c")
    fields = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    adapter = open_adapter(write_peft(tmp_path / "a", {Q: factors(6, 4, 2)}, **fields, a_field_of_tomorrow=[1]))
    assert adapter.config.peft["a_field_of_tomorrow"] == [1]


@pytest.mark.parametrize("init", [*BASE_MUTATING_INITS, "pissa_niter_16"])
def test_inits_that_changed_the_base_are_told(tmp_path: Path, init: str) -> None:
    """Such an adapter is wrong on the original base."""
    assert base_mutating_init(
        open_adapter(write_peft(tmp_path / "a", {Q: factors(6, 4, 2)}, init_lora_weights=init)).config
    )
    for harmless in (True, False, "gaussian", "orthogonal", "eva"):
        adapter = open_adapter(write_peft(tmp_path / "b", {Q: factors(6, 4, 2)}, init_lora_weights=harmless))
        assert base_mutating_init(adapter.config) is None


@pytest.mark.parametrize("kind", ["PSOFT", "XLORA", "PREFIX_TUNING", "BOTTLENECK"])
def test_other_peft_types_are_refused_by_name(tmp_path: Path, kind: str | None) -> None:
    with pytest.raises(InputError, match=f"is an? {kind} adapter"):
        open_adapter(write_peft(tmp_path / "a", {Q: factors(6, 4, 2)}, peft_type=kind))


A, B = factors(6, 4, 2)
KEY = f"base_model.model.{Q}"
BROKEN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "A alone": ({f"{KEY}.lora_A.weight": A}, "B factor of .* is missing"),
    "B alone": ({f"{KEY}.lora_B.weight": B}, "A factor of .* is missing"),
    "ranks differ": ({f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": torch.zeros(6, 3)}, "do not share a rank"),
    "rank 0": ({f"{KEY}.lora_A.weight": A[:0], f"{KEY}.lora_B.weight": B[:, :0]}, "do not share a rank"),
    "rank against config": (
        {f"{KEY}.lora_A.weight": A[:1], f"{KEY}.lora_B.weight": B[:, :1].contiguous()},
        "says rank 2",
    ),
    "vector": ({f"{KEY}.lora_A.weight": A[0], f"{KEY}.lora_B.weight": B}, "not a low-rank pair"),
    "conv": (
        {f"{KEY}.lora_A.weight": torch.zeros(2, 4, 3, 3), f"{KEY}.lora_B.weight": torch.zeros(6, 2, 2, 1)},
        "not a low-rank pair",
    ),
    "grouped conv": (
        {f"{KEY}.lora_A.weight": torch.zeros(2, 4, 3, 3), f"{KEY}.lora_B.weight": torch.zeros(6, 1, 1, 1)},
        "grouped",
    ),
    "extra bias": (
        {f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": B, f"{KEY}.lora_B.bias": torch.zeros(6)},
        "lora_B.bias",
    ),
    "magnitude": (
        {f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": B, f"{KEY}.lora_magnitude_vector": torch.zeros(6)},
        "magnitude",
    ),
    "embedding": ({"base_model.model.embed.lora_embedding_A": A}, "B factor"),
    "tokens": (
        {f"{KEY}.token_adapter.trainable_tokens_delta": A},
        "trainable_token_indices do not say which",
    ),
    "original": ({f"{KEY}.original_module.weight": A, f"{KEY}.lora_A.weight": A}, "untrained copy"),
    "bottleneck": ({"base_model.model.x.adapter_down.weight": A}, "adds layers"),
    "twice": (
        {f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": B, f"{Q}.lora_A.weight": A + 1},
        "its values differ",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_peft_file_names_its_tensor(tmp_path: Path, case: str) -> None:
    tensors, message = BROKEN[case]
    folder = write_peft(tmp_path / "a", {Q: (A, B)})
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lora_unet_x.alpha": torch.tensor(1.0)}, "no lora_down"),
        ({"lora_unet_x.lora_mid.weight": A}, "lora_mid"),
        ({"lora_unet_x.dora_scale": A}, "dora_scale"),
        ({"lora_unet_x.hada_w1_a": A}, "hada_w1_a"),
        ({"lora_unet_x.lora_down.weight": A}, "B factor"),
        (
            {
                "lora_unet_x.lora_down.weight": A,
                "lora_unet_x.lora_up.weight": B,
                "lora_unet_x.alpha": torch.tensor(math.nan),
            },
            "nan",
        ),
        (
            {"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B, "lora_unet_x.alpha": torch.ones(2)},
            "one number",
        ),
    ],
)
def test_a_broken_kohya_file_names_its_tensor(tmp_path: Path, extra: dict[str, torch.Tensor], message: str) -> None:
    file = write_kohya(tmp_path / "a.safetensors", {Q: (A, B)})
    save_file({**load_file(file), **{k: v.clone() for k, v in extra.items()}}, file)
    with pytest.raises(InputError, match=message):
        open_adapter(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern"),
        ({"use_rslora": "false"}, "neither true nor false"),
        ({"rank_pattern": {"a{99999999999999}": 2}}, "regular expression"),
        ({"r": 2.5}, "config sets r to"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": ["q"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
    ],
)
def test_a_broken_config_names_its_field(tmp_path: Path, fields: dict[str, Any], message: str | None) -> None:
    folder = write_peft(tmp_path / "a", {Q: factors(6, 4, 2)}, **fields)
    if message is None:
        open_adapter(folder)
        return
    with pytest.raises(InputError, match=message):
        open_adapter(folder)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    """One nan or inf would spread over whole rows of a merge."""
    broken = B.clone()
    broken[3, 1] = bad
    adapter = open_adapter(write_peft(tmp_path / "a", {Q: (A, broken)}))
    with pytest.raises(InputError, match=rf"{re.escape(Q)}.lora_B.weight: holds nan or inf"):
        adapter.load(adapter.updates[Q])


def test_what_no_format_claims_is_refused(tmp_path: Path) -> None:
    save_file({"model.weight": A}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"known format \\({', '.join(FORMATS)}\\): it has model.weight"):
        open_adapter(tmp_path / "x.safetensors")


def test_a_folder_with_one_adapter_file_opens_as_it(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    write_kohya(tmp_path / "f" / "style.safetensors", {Q: (A, B)})
    assert open_adapter(tmp_path / "f").format == "kohya"
    write_kohya(tmp_path / "f" / "other.safetensors", {Q: (A, B)})
    with pytest.raises(InputError, match="holds 2 files"):
        open_adapter(tmp_path / "f")


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(UsageError, match="not a finite number"):
        loratool.inspect(write_peft(tmp_path / "a", {Q: factors(6, 4, 2)}), alpha=alpha)


def test_wrappers_around_pefts_prefix(tmp_path: Path) -> None:
    A, B = factors(6, 4, 2)
    for prefix in ("module.base_model.model.", "_orig_mod.module.base_model.model.", "base_model.model.", ""):
        file = {f"{prefix}{Q}.lora_A.weight": A, f"{prefix}{Q}.lora_B.weight": B}
        save_file(file, tmp_path / "x.safetensors")
        assert list(open_adapter(tmp_path / "x.safetensors", alpha=2).updates) == [Q]


def test_a_base_under_pefts_prefix_is_no_adapter() -> None:
    assert not is_adapter([f"base_model.model.{Q}.weight", f"base_model.model.{Q}.bias"])
    for end in ("lora_A.weight", "ia3_l", "vera_lambda_b", "hada_w1_a"):
        assert is_adapter([f"base_model.model.{Q}.{end}"])


def test_scale_needs_an_alpha() -> None:
    assert AdapterConfig(alpha=8).scale_of("m", 4) == 2
    with pytest.raises(NeedsFlag):
        AdapterConfig().scale_of("m", 4)


@needs_shared
@pytest.mark.parametrize("name", ["9dd577d", "0b51ef8"])
def test_real_peft_adapters(name: str) -> None:
    adapter = open_adapter(SHARED / "minilm-lora-dee66" / f"peft_adapter_r4_a16_d0.0_e1_b16__{name}")
    assert len(adapter.updates) == 12 and {u.scale for u in adapter.updates.values()} == {4.0}


@needs_shared
def test_real_key_lists(tmp_path: Path) -> None:
    """Shapes of real Flux files: all open, one of PEFT's names without a config too, and no tensor is left out."""
    for file in sorted((SHARED / "keylists").glob("*.json")):
        shapes = json.loads(file.read_text())
        header: dict[str, Any] = {}
        offset = 0
        for key, shape in shapes.items():
            size = 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        with open(tmp_path / "x.safetensors", "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + offset)
        adapter = open_adapter(tmp_path / "x.safetensors")
        assert {t for u in adapter.updates.values() for t in u.tensors.values()} == {
            k for k in shapes if not k.endswith("alpha")
        }


def test_a_folder_of_adapterhub_is_a_bottleneck(tmp_path: Path) -> None:
    """The weights of its head are beside the adapter's."""
    torch.save({"bert.layer.0.adapters.x.adapter_down.0.weight": A}, tmp_path / "pytorch_adapter.bin")
    torch.save({"heads.x.1.weight": A}, tmp_path / "pytorch_model_head.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"config": {"mh_adapter": True}, "name": "x"}))
    with pytest.raises(InputError, match="bottleneck adapter .*Houlsby, Lin, Pfeiffer, Rücklé.* adds layers") as caught:
        open_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("key", ["x.adapter_down.weight", f"{KEY}.lora_E", f"{KEY}.lora_odd", f"{KEY}.lora_A.weight"])
def test_what_is_refused_by_a_tensors_name_is_said_of_which_adapter(tmp_path: Path, key: str) -> None:
    folder = write_peft(tmp_path / "a", {Q: (A, B)})
    save_file({key: A}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        open_adapter(folder)
    assert str(folder) in str(caught.value) and key.rpartition(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("to", "family", "component", "what"),
    [
        ("kohya", "bria", "unet", "the denoiser of Bria 3"),
        ("comfy", "bria_fibo", "unet", "the denoiser of Bria FIBO"),
        ("kohya", "wan", "text_encoder", "text_encoder of Wan"),
    ],
)
def test_a_model_that_a_format_has_no_files_of_is_refused(to: str, family: str, component: str, what: str) -> None:
    with pytest.raises(InputError, match=f"is for {what}, and {to} has no files"):
        FORMATS[to].module_name(component, "proj_out", family)
