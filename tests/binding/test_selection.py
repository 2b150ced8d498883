"""Hold --target, --exclude and --layers: patterns against peft's own rule, and the modules that they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import factors, write_peft

from loratool.adapters.formats import open_adapter
from loratool.binding.modules.resolve import bind
from loratool.binding.modules.selection import Selection, matches_pattern, parse_layers, parse_patterns
from loratool.errors import UsageError
from loratool.files.dtypes import TensorSpec


@pytest.mark.parametrize("path", ["a.q_proj", "q_proj", "a.aq_proj", "a.q_proj.x", "model.layers.1.q_proj"])
@pytest.mark.parametrize("pattern", ["q_proj", "a.q_proj", "layers.1.q_proj", "proj"])
def test_a_bare_name_matches_as_peft_matches_it(pattern: str, path: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    assert matches_pattern(pattern, path) == bool(
        check_target_module_exists(LoraConfig(target_modules=[pattern]), path)
    )


def test_other_patterns() -> None:
    assert (
        matches_pattern("model.*.q", "model.a.b.q")
        and not matches_pattern("*.q", "q")
        and matches_pattern("?.q", "a.q")
    )
    assert matches_pattern(r"re:layers\.[02]\.", "model.layers.2.q") and not matches_pattern("re:^q", "a.q")
    for expression in ("re:(", "re:a{99999999999999}", "re:" + "(" * 5000):
        with pytest.raises(UsageError, match="not a regular expression"):
            matches_pattern(expression, "q")
    for nothing in ("", ",", " , "):
        with pytest.raises(UsageError, match="names nothing"):
            parse_patterns([nothing])
    assert parse_patterns(["a, b,", "re:x{1,2}|y", "c,re:d,e"]) == ("a", "b", "re:x{1,2}|y", "c", "re:d,e")


def test_layers() -> None:
    assert parse_layers("0-2,7") == {0, 1, 2, 7} and parse_layers(None) is None
    for bad in ("", "a", "1-", "-1", "1,,2", "5-2", "9" * 5000, "0-99999999999"):
        with pytest.raises(UsageError, match="is not a list like 0-3,7|the range ends before it starts"):
            parse_layers(bad)
    assert parse_layers(range(2)) == parse_layers([1, 0]) == parse_layers(n for n in (0, 1)) == {0, 1}
    for wrong in ([], 3, [True], [0.0], [-1], [10**6], ["1"], {0: 1}, b"1", range(10**9), [None]):
        with pytest.raises(
            UsageError, match="is not a list like|has something that is not a layer number|has no number"
        ):
            parse_layers(wrong)  # type: ignore[arg-type]
    chosen = Selection(layers=parse_layers("1,11"))
    assert [
        p for p in ("l.1.q", "l.11.q", "l.2.q", "lm_head", "lora_unet_x_1_q", "l.2.e.1.q") if chosen.selects(p)
    ] == [
        "l.1.q",
        "l.11.q",
        "lora_unet_x_1_q",
    ]


def test_selection_limits_what_is_bound(tmp_path: Path) -> None:
    modules = ["l.0.q", "l.0.k", "l.1.q", "l.1.k"]
    base = {f"{module}.weight": TensorSpec("F32", (6, 4)) for module in modules}
    adapter = open_adapter(write_peft(tmp_path / "a", {module: factors(6, 4, 2) for module in modules}))
    binding = bind(base, {}, [(adapter, 1.0)], Selection(target=("q",), layers=frozenset({1})))
    assert list(binding.placements) == ["l.1.q.weight"] and sorted(binding.excluded) == ["l.0.k", "l.0.q", "l.1.k"]
