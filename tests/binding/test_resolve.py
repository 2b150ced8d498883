"""Hold the binding of adapters by the base's own names: prefixes, square matrices, refusals with their remedy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import factors, write_kohya, write_peft

from loratool.adapters.formats import open_adapter
from loratool.binding.modules.resolve import Binding, bind
from loratool.binding.modules.selection import Selection, parse_patterns
from loratool.errors import InputError, NeedsFlag
from loratool.files.dtypes import TensorSpec

EVERYTHING = Selection()


def base_of(*modules: str, shape: tuple[int, int] = (6, 4), dtype: str = "F32") -> dict[str, TensorSpec]:
    return {f"{module}.weight": TensorSpec(dtype, shape) for module in modules}


def bound(
    tmp_path: Path, base: dict[str, TensorSpec], modules: list[str], selection: Selection = EVERYTHING, **config: Any
) -> Binding:
    adapter = open_adapter(write_peft(tmp_path / "a", {m: factors(6, 4, 2) for m in modules}, **config))
    return bind(base, {}, [(adapter, 1.0)], selection)


@pytest.mark.parametrize(
    ("base", "module"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),  # a backbone's file, an adapter of the task model
        ("model.layers.0.q", "layers.0.q"),
        ("h.0.c_attn", "transformer.h.0.c_attn"),  # gpt2 as it lies on the hub
        ("model.layers.0.q", "module.model.layers.0.q"),  # DDP
        ("model.layers.0.q", "_orig_mod.model.layers.0.q"),  # torch.compile
        ("model.layers.0.q", "model.layers.0._orig_mod.q"),
        ("_orig_mod.model.layers.0.q", "model.layers.0.q"),
        ("module.model.layers.0.q", "model.layers.0.q"),
        ("base_model.model.model.layers.0.q", "model.layers.0.q"),
        ("model.diffusion_model.input.0.q", "input.0.q"),
        ("bert.encoder.0.q", "encoder.0.q"),
    ],
)
def test_prefixes_are_resolved_by_the_bases_names(tmp_path: Path, base: str, module: str) -> None:
    """Wrappers and containers put prefixes before a path; no update may be dropped in silence for that."""
    assert list(bound(tmp_path, base_of(base, "other.x"), [module]).placements) == [f"{base}.weight"]


@pytest.mark.parametrize("backbone", ["mpnet", "longformer", "luke"])  # also the model type
@pytest.mark.parametrize("whole", [True, False])
def test_a_backbone_is_named_as_its_familys_task_models_hold_it(tmp_path: Path, backbone: str, whole: bool) -> None:
    paths = ["encoder.layer.0.q", f"{backbone}.encoder.layer.0.q"]
    base, module = paths if whole else paths[::-1]
    adapter = open_adapter(write_peft(tmp_path / "a", {module: factors(6, 4, 2)}))
    specs, config = base_of(base), {"model_type": backbone}
    assert list(bind(specs, {backbone: config}, [(adapter, 1.0)], EVERYTHING).placements) == [f"{base}.weight"]


def test_one_prefix_counts_for_all_paths_that_need_it(tmp_path: Path) -> None:
    base = base_of("layers.0.q", "layers.1.q", "lm_head")
    placements = bound(tmp_path, base, ["model.layers.0.q", "model.layers.1.q", "lm_head"]).placements
    assert list(placements) == list(base)


def test_a_path_that_could_be_two_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could be any of bert.x.weight, model.x.weight"):
        bound(tmp_path, base_of("model.x", "bert.x"), ["x"])
    with pytest.raises(InputError, match=r"could be any of _orig_mod.x.weight, x.weight"):
        bound(tmp_path, base_of("x", "_orig_mod.x"), ["x"])
    assert list(bound(tmp_path, base_of("model.x", "x"), ["x"]).placements) == ["x.weight"]


def test_two_paths_on_one_tensor_are_refused(tmp_path: Path) -> None:
    """Paths that are one after renaming would be added twice."""
    with pytest.raises(InputError, match="both bind to it"):
        bound(tmp_path, base_of("model.x"), ["model.x", "module.model.x"])


def test_what_does_not_bind_is_listed_with_the_exclude_that_lets_the_rest_pass(tmp_path: Path) -> None:
    base = base_of("model.layers.0.q_proj", "model.layers.0.k_proj")
    modules = ["model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.0.score", "model.layers.9.q_proj"]
    with pytest.raises(NeedsFlag) as caught:
        bound(tmp_path, base, modules)
    text = str(caught.value)
    assert "2 of 4 modules" in text and "nearest there: model.layers.0.q_proj.weight" in text
    patterns = re.search(r"--exclude '?([^']*)'?$", caught.value.remedy or "")
    assert patterns
    binding = bound(tmp_path, base, modules, Selection(exclude=parse_patterns([patterns[1]])))
    assert list(binding.placements) == list(base)
    assert sorted(binding.excluded) == sorted(modules[2:])


@pytest.mark.parametrize("odd", ["x.a,b", "x.*", "x.re:(", "a?", "it's", "x.k"])
def test_the_exclude_that_is_advised_works_on_any_name(tmp_path: Path, odd: str) -> None:
    """Two adapters, each with a module that the base lacks; the other's `m.k` must stay bound."""
    import shlex

    base = base_of("m.q", "m.k")
    first = open_adapter(write_peft(tmp_path / "1", {"m.q": factors(6, 4, 2), odd: factors(6, 4, 2)}))
    second = open_adapter(write_peft(tmp_path / "2", {"m.k": factors(6, 4, 2), "gone": factors(6, 4, 2)}))
    with pytest.raises(NeedsFlag) as caught:
        bind(base, {}, [(first, 1.0), (second, 1.0)], EVERYTHING)
    words = shlex.split(str(caught.value.remedy).partition(": ")[2])
    exclude = parse_patterns([word for word in words if word != "--exclude"])
    binding = bind(base, {}, [(first, 1.0), (second, 1.0)], Selection(exclude=exclude))
    assert list(binding.placements) == list(base) and set(binding.excluded) == {odd, "gone"}


def test_a_wrong_adapter_is_refused_without_a_flag(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 of 2 modules are not in the base"):
        bound(tmp_path, base_of("encoder.q"), ["decoder.x", "decoder.y"])
    with pytest.raises(InputError, match="nothing to do"):
        bound(tmp_path, base_of("x"), ["x"], Selection(exclude=("x",)))


def test_kohya_names_are_looked_up_and_never_split(tmp_path: Path) -> None:
    """`to_q` and `to.q` flatten to one name, so that only the base can tell them apart."""
    base = base_of("down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0", "mid_block.x_y")
    for prefix in ("lora_unet", "lora_transformer"):
        adapter = open_adapter(
            write_kohya(
                tmp_path / "k.safetensors", {n.removesuffix(".weight"): factors(6, 4, 2) for n in base}, prefix=prefix
            )
        )
        assert list(bind(base, {}, [(adapter, 1.0)], EVERYTHING).placements) == list(base)
    clash = base_of("a.to_q", "a.to.q")
    adapter = open_adapter(write_kohya(tmp_path / "k.safetensors", {"a.to_q": factors(6, 4, 2)}))
    with pytest.raises(InputError, match=r"could be any of a.to.q.weight, a.to_q.weight"):
        bind(clash, {}, [(adapter, 1.0)], EVERYTHING)
    nested = base_of("model.layers.0.q_proj")
    adapter = open_adapter(write_kohya(tmp_path / "k.safetensors", {"layers.0.q_proj": factors(6, 4, 2)}))
    assert list(bind(nested, {}, [(adapter, 1.0)], EVERYTHING).placements) == list(nested)


def test_a_kohya_text_encoder_part_is_left_out_by_one_pattern(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    unet = load_file(write_kohya(tmp_path / "u.safetensors", {"a.q": factors(6, 4, 2)}))
    text = load_file(
        write_kohya(tmp_path / "t.safetensors", {f"enc.{i}.q": factors(6, 4, 2) for i in range(20)}, prefix="lora_te")
    )
    save_file({**unet, **text}, tmp_path / "k.safetensors")
    adapter = open_adapter(tmp_path / "k.safetensors")
    with pytest.raises(NeedsFlag, match=r'exclude="lora_te_\*"'):
        bind(base_of("a.q"), {}, [(adapter, 1.0)], EVERYTHING)
    binding = bind(base_of("a.q"), {}, [(adapter, 1.0)], Selection(exclude=("lora_te_*",)))
    assert list(binding.placements) == ["a.q.weight"] and len(binding.excluded) == 20


@pytest.mark.parametrize("shape", [(5, 4), (6, 5), (24,), (6, 4, 2)])
def test_shapes_that_do_not_fit_are_refused_with_both(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = {"x.weight": TensorSpec("F32", shape)}
    with pytest.raises(
        InputError,
        match=re.escape(f"x.weight: A is (2, 4) and B is (6, 2) in {tmp_path / 'a'}, but the base weight is {shape}"),
    ):
        bound(tmp_path, base, ["x"])


@pytest.mark.parametrize("dtype", ["U8", "I8", "F8_E8M0", "I32", "BOOL"])
def test_codes_are_never_added_to(tmp_path: Path, dtype: str) -> None:
    """A sum of quantized codes is no weight: their scales are elsewhere."""
    with pytest.raises(InputError, match=f"is {dtype}, which cannot be added to"):
        bound(tmp_path, base_of("x", dtype=dtype), ["x"])


class TestOrientation:
    """Shapes decide; for squares model_type, then siblings, then the flag if none contradicts it; else a refusal."""

    def orient(
        self, tmp_path: Path, shapes: dict[str, tuple[int, int]], model_type: str | None = None, **config: Any
    ) -> dict[str, bool]:
        """Return for each module if the update is transposed; the factors fit (out, in) unless its name has `conv`."""
        specs = {f"{m}.weight": TensorSpec("F32", shape) for m, shape in shapes.items()}
        made = {m: factors(*(shape[::-1] if "conv" in m else shape), 2) for m, shape in shapes.items()}
        adapter = open_adapter(write_peft(tmp_path / "a", made, **config))
        binding = bind(specs, {model_type: {}}, [(adapter, 1.0)], EVERYTHING)
        return {name.removesuffix(".weight"): p[0].transposed for name, p in binding.placements.items()}

    def test_shapes_decide(self, tmp_path: Path) -> None:
        """The config's flag is one value for all layers, so it never overrules a shape."""
        for flag in (True, False):
            found = self.orient(tmp_path, {"l": (6, 4), "conv": (6, 4)}, fan_in_fan_out=flag)
            assert found == {"l": False, "conv": True}

    @pytest.mark.parametrize(
        ("model_type", "module", "expected"),
        [
            ("gpt2", "h.0.attn.c_proj", True),
            ("gpt2", "score", False),
            ("llama", "o_proj", False),
            ("imagegpt", "h.0.attn.c_proj", True),
        ],
    )
    def test_model_type_decides_squares_first(
        self, tmp_path: Path, model_type: str, module: str, expected: bool
    ) -> None:
        found = self.orient(tmp_path, {module: (4, 4), "plain": (6, 4)}, model_type, fan_in_fan_out=not expected)
        assert found[module] is expected

    @pytest.mark.parametrize(
        ("model_type", "module"), [("llama", "conv"), ("gpt2", "h.0.mlp.c_fc"), ("gpt2", "conv_head")]
    )
    def test_a_known_family_refuses_factors_of_the_other_layout(
        self, tmp_path: Path, model_type: str, module: str
    ) -> None:
        """A wrong adapter whose shapes happen to fit the other way round."""
        with pytest.raises(InputError, match=r"but the base weight is \(6, 4\) as \((out, in|in, out)\)"):
            self.orient(tmp_path, {module: (6, 4)}, model_type)
        kohya = open_adapter(write_kohya(tmp_path / "k.safetensors", {"x": factors(4, 6, 2)}))
        with pytest.raises(InputError, match=r"as \(out, in\)"):
            bind(base_of("x"), {}, [(kohya, 1.0)], EVERYTHING)

    def test_siblings_decide_next(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is square"):  # another module's Conv1D tells nothing of this one
            self.orient(tmp_path, {"a.sq": (4, 4), "conv": (6, 4)}, "unheard_of")
        assert self.orient(tmp_path, {"a.sq": (4, 4), "b": (6, 4)}, fan_in_fan_out=True)["a.sq"] is False
        # siblings of the same last name speak before the others
        assert (
            self.orient(tmp_path, {"attn.c_conv": (4, 4), "mlp.c_conv": (6, 4), "head": (6, 4)})["attn.c_conv"] is True
        )

    def test_the_flag_decides_where_nothing_contradicts_it(self, tmp_path: Path) -> None:
        for flag in (True, False):
            assert self.orient(tmp_path, {"sq": (4, 4)}, fan_in_fan_out=flag)["sq"] is flag

    def test_else_it_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is square, and nothing tells"):
            self.orient(tmp_path, {"sq": (4, 4)})
        with pytest.raises(InputError, match="is square, and nothing tells"):
            self.orient(tmp_path, {"sq": (4, 4), "conv": (6, 4), "plain": (6, 4)}, fan_in_fan_out=True)

    def test_kohya_targets_linear_layers_only(self, tmp_path: Path) -> None:
        adapter = open_adapter(write_kohya(tmp_path / "k.safetensors", {"sq": factors(4, 4, 2)}))
        binding = bind(base_of("sq", shape=(4, 4)), (), [(adapter, 1.0)], EVERYTHING)
        assert binding.placements["sq.weight"][0].transposed is False

    def test_the_table_is_transformers_own(self) -> None:
        """Every Conv1D of a tiny live model is in the table, and nothing else of it is."""
        from transformers import AutoConfig, AutoModel
        from transformers.pytorch_utils import Conv1D

        from loratool.architectures.conv1d import CONV1D_MODULES, stores_transposed

        sizes = {
            "n_embd": 8,
            "n_head": 2,
            "n_layer": 1,
            "vocab_size": 16,
            "hidden_size": 8,
            "add_cross_attention": True,
        }
        for model_type in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"):
            model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes))
            conv = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Conv1D)}
            assert conv and conv <= CONV1D_MODULES[model_type]
            for name, module in model.named_modules():
                if isinstance(module, Conv1D) or type(module).__name__ == "Linear":
                    assert stores_transposed((model_type,), name) is isinstance(module, Conv1D)

    def test_a_wrapper_of_no_conv1d(self, tmp_path: Path) -> None:
        """As an MLX adapter of Gemma 3 has it: the queries alone, which are square, and no fan_in_fan_out."""
        adapter = open_adapter(write_kohya(tmp_path / "k.safetensors", {"sq": factors(4, 4, 2)}))
        adapter = replace(adapter, updates={m: replace(u, transposed=None) for m, u in adapter.updates.items()})
        types = ("gemma3", "gemma3_text", "siglip_vision_model")
        binding = bind(base_of("sq", shape=(4, 4)), types, [(adapter, 1.0)], EVERYTHING)
        assert binding.placements["sq.weight"][0].transposed is False

    @pytest.mark.slow
    def test_no_type_of_linear_layers_has_a_conv1d(self) -> None:
        transformers = pytest.importorskip("transformers", minversion="5.0")
        from transformers.models.auto.configuration_auto import model_type_to_module_name

        from loratool.architectures.conv1d import LINEAR_MODEL_TYPES

        models = Path(transformers.__file__).parent / "models"
        files = ((file.parent.name, file.read_text()) for file in models.glob("*/modeling_*.py"))
        folders = {folder for folder, text in files if "Conv1D(" in text}
        assert "gpt2" in folders
        assert not [each for each in LINEAR_MODEL_TYPES if model_type_to_module_name(each) in folders]


@pytest.mark.parametrize(
    ("base", "rows", "split"),
    [
        ("model.layers.0.self_attn.qkv_proj", 12, ["q_proj", "k_proj", "v_proj"]),  # Phi-3, GQA: 8 + 2 + 2
        ("transformer.h.0.attn.c_attn", 24, ["q_proj"]),  # GPT-2
        ("gpt_neox.layers.0.attention.query_key_value", 24, ["query"]),  # a head after the other: q, k, v, q, k, v
    ],
)
def test_factors_of_a_part_of_a_fused_projection_are_refused_by_name(
    tmp_path: Path, base: str, rows: int, split: list[str]
) -> None:
    """A split adapter on a fused base, and the reverse: no rows are placed by a guess."""
    owner = base.rpartition(".")[0]
    modules = {f"{owner}.{name}": factors(8, 4, 2) for name in split}
    adapter = open_adapter(write_peft(tmp_path / "a", modules))
    fused = {f"{base}.weight": TensorSpec("F32", (rows, 4))}
    with pytest.raises(InputError, match=rf"(?s)not in the base:.*({'|'.join(split)})"):
        bind(fused, {}, [(adapter, 1.0)], EVERYTHING)
    reverse = open_adapter(write_peft(tmp_path / "b", {base: factors(rows, 4, 2)}))
    parts = {f"{module}.weight": TensorSpec("F32", (8, 4)) for module in modules}
    with pytest.raises(InputError, match=rf"(?s)not in the base:.*{base}"):
        bind(parts, {}, [(reverse, 1.0)], EVERYTHING)
