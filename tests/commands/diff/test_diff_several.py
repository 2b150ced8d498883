"""Hold the comparison of any number of adapters against dense float64 matrices, whatever their order and formats."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, ROOT, factors, weights, write_kohya, write_model, write_peft
from lib.oracles.task_interference import task_interference
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, UsageError
from loratool.views.diff_several import AdaptersDiff
from loratool.views.diff_shared import COSINES, CROSSING, LEAST, MEANINGS, TIMES_RANDOM, relation

MODULES = {f"model.layers.{i}.self_attn.{p}_proj": (40, 32) for i in range(2) for p in "qv"}
Q0, V0, Q1, V1 = MODULES
Factors = Mapping[str, tuple[Tensor, Tensor]]


def pairs(rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    return {m: factors(*shape, rank, seed=seed + i) for i, (m, shape) in enumerate(MODULES.items())}


def dense(found: Factors, scale: float = 1.0) -> dict[str, Tensor]:
    return {m: scale * B.double() @ A.double() for m, (A, B) in found.items()}


def whole(D: Mapping[str, Tensor]) -> Tensor:
    """All changes as one block diagonal matrix, 0 where a module is not."""
    return torch.block_diag(*(D.get(m, torch.zeros(*shape).double()) for m, shape in MODULES.items()))


def interference(*changes: Tensor) -> float:
    """The paper's interference of dense matrices over the sum of their singular values."""
    found, size = task_interference(changes)
    return found / size


def within(x: Tensor, y: Tensor) -> float:
    """The share of the energy of both that is in the span of the other's columns."""
    energy = 0.0
    for one, other in ((x, y), (y, x)):
        U, S, _ = torch.linalg.svd(other, full_matrices=False)
        energy += float((U[:, 1e-9 * S[0] < S].T @ one).square().sum())
    return energy / float(x.square().sum() + y.square().sum())


def compare(*paths: Path, **options: Any) -> AdaptersDiff:
    report = loratool.diff(*paths, **options)
    assert isinstance(report, AdaptersDiff)
    return report


@pytest.fixture
def four(tmp_path: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Of ranks 4, 6 and 3, scaled, one without half of the modules, and one in kohya's format."""
    one, two, three = pairs(4), pairs(6, 11), {m: pairs(3, 22)[m] for m in (Q0, Q1)}
    last = {m: (A, B + weights(*B.shape)) for m, (A, B) in one.items()}
    return {
        "one": (write_peft(tmp_path / "one", one), dense(one)),
        "two": (write_peft(tmp_path / "two", two, lora_alpha=3), dense(two, 0.5)),
        "three": (write_peft(tmp_path / "three", three), dense(three)),
        "kohya": (write_kohya(tmp_path / "k.safetensors", last, torch.tensor(8.0)), dense(last, 2.0)),
    }


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_the_numbers_are_those_of_the_dense_changes(
    order: tuple[int, ...], four: dict[str, tuple[Path, dict[str, Tensor]]]
) -> None:
    chosen = [list(four.values())[i] for i in order]
    report = compare(*(path for path, _ in chosen))
    D = [whole(changes) for _, changes in chosen]
    assert report.shared is not None and len(report.modules) == 4 and not report.same
    assert math.isclose(report.shared.interference, interference(*D), rel_tol=1e-9)
    for i, j in itertools.product(range(4), repeat=2):
        cosine = float((D[i] * D[j]).sum() / D[i].norm() / D[j].norm())
        assert abs(report.shared.cosines[i][j] - cosine) < 1e-12
        apart = float((D[i] - D[j]).norm() / max(D[i].norm(), D[j].norm()))
        assert abs(report.relatives[i][j] - apart) < 1e-12
    assert [(p.first, p.second) for p in report.shared.pairs] == list(itertools.combinations(range(4), 2))
    for pair in report.shared.pairs:
        assert pair.cosine == report.shared.cosines[pair.first][pair.second]
        assert math.isclose(pair.interference, interference(D[pair.first], D[pair.second]), rel_tol=1e-9)
        x, y = D[pair.first], D[pair.second]
        for share, sides in (pair.outputs, (x, y)), (pair.inputs, (x.T, y.T)):
            assert math.isclose(share, within(*sides), rel_tol=1e-9)
    for norm, each in zip(report.norms, D, strict=True):
        assert math.isclose(norm, float(each.norm()), rel_tol=1e-12)
    three = order.index(2)
    path = ("unet_" if report.modules[0].name.startswith("unet_") else "") + "{}"  # kohya's, if that comes first
    names = {path.format(m.replace(".", "_")): m for m in MODULES}
    assert report.lacking[three] == tuple(row.name for row in report.modules if not row.ranks[three])
    assert {names[name] for name in report.lacking[three]} == {V0, V1} and report.worst >= 1
    for row in report.modules:
        of = {i: changes[names[row.name]] for i, (_, changes) in enumerate(chosen) if names[row.name] in changes}
        cosines = {
            (i, j): float((of[i] * of[j]).sum() / of[i].norm() / of[j].norm()) for i, j in itertools.combinations(of, 2)
        }
        assert row.pair is not None and row.cosine is not None and row.interference is not None
        assert row.pair == min(cosines, key=lambda ij: cosines[ij]) and abs(row.cosine - cosines[row.pair]) < 1e-12
        assert math.isclose(row.interference, interference(*of.values()), rel_tol=1e-9)
        relatives = [
            float((of[i] - of[j]).norm() / max(of[i].norm(), of[j].norm())) for i, j in itertools.combinations(of, 2)
        ]
        assert math.isclose(row.relative, max(relatives + [1.0] * (len(of) < 4)), rel_tol=1e-12)
    assert set(report.fields) == {"format", "alpha"} and report.fields["format"][order.index(3)] == "kohya"


def test_two_adapters_have_the_interference_too(four: dict[str, tuple[Path, dict[str, Tensor]]]) -> None:
    (one, D), (three, D3) = four["one"], four["three"]
    report = loratool.diff(one, three)
    assert isinstance(report, loratool.AdapterDiff)
    assert report.pair and math.isclose(report.pair.interference, interference(whole(D), whole(D3)), rel_tol=1e-9)
    for row in report.modules:
        if row.name in D3:
            assert math.isclose(row.interference or 0, interference(D[row.name], D3[row.name]), rel_tol=1e-9)
        else:
            assert row.interference is None
    again = loratool.diff(one, one)
    assert isinstance(again, loratool.AdapterDiff) and again.pair and again.pair.relation == "alike"
    assert math.isclose(again.pair.interference, 1, rel_tol=1e-12)


def test_one_adapter_several_times(tmp_path: Path, run: Callable[..., Any]) -> None:
    one = pairs(6)
    M = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q * torch.logspace(0, 1, 6)
    other = {m: (torch.linalg.inv(M) @ A, B @ M) for m, (A, B) in one.items()}
    a, b = write_peft(tmp_path / "a", one), write_peft(tmp_path / "b", other)
    report = compare(a, b, a)
    assert report.same and report.shared is not None and report.relatives[0][2] == 0 < report.worst < 1e-6
    assert {pair.relation for pair in report.shared.pairs} == {"alike"}
    for pair in report.shared.pairs:
        assert math.isclose(pair.cosine, 1, abs_tol=1e-12) and math.isclose(pair.interference, 1, rel_tol=1e-4)
    assert math.isclose(report.shared.interference, 4, rel_tol=1e-4)  # (T - 1)^2
    assert run("diff", a, a, a, "--fail-above", "0").exit_code == 0
    assert run("diff", a, b, a, "--fail-above", "1e-5").stdout.endswith(
        "\nsame: all have the same delta in 4 modules\n"
    )


def test_zeros_and_adapters_with_nothing_in_common(tmp_path: Path, run: Callable[..., Any]) -> None:
    zero = write_peft(tmp_path / "z", {m: (A, 0 * B) for m, (A, B) in pairs(4).items()})
    queries, values = ({m: pairs(4)[m] for m in half} for half in ((Q0, Q1), (V0, V1)))
    apart = write_peft(tmp_path / "q", queries), write_peft(tmp_path / "v", values)
    report = compare(zero, *apart)
    assert report.shared is not None and report.shared.interference == 0 and report.worst == 1
    assert all(pair.relation == "unrelated" and pair.cosine == pair.interference == 0 for pair in report.shared.pairs)
    assert report.shared.cosines[0] == (0, 0, 0) and compare(zero, zero, zero).same
    text = run("diff", zero, *apart).stdout
    assert "no fight: none of 3 pairs are opposed or crossing" in text
    assert "not in B: model.layers.0-1.self_attn.v_proj" in text or "not in B: self_attn.v_proj, layers 0-1 (2)" in text


def test_twelve_adapters_of_long_names(tmp_path: Path, run: Callable[..., Any]) -> None:
    paths = [write_peft(tmp_path / f"a-very-long-name-of-an-adapter-{i}", pairs(2, 10 * i)) for i in range(12)]
    report = compare(*paths)
    assert report.shared is not None and len(report.shared.pairs) == 66
    for verbose in (False, True):
        shown = report.document(verbose)
        drawn = ["".join(span.text for span in line) for line in shown.pictures]
        assert max(map(len, drawn)) <= 60 and sum(line[0] == "L" for line in drawn) == 1 + verbose
    text = run("diff", *paths).stdout
    assert all(f"{letter}  {path}" in text for letter, path in zip("ABCDEFGHIJKL", paths, strict=True))


def test_experts_dora_and_whole_tensors(tmp_path: Path) -> None:
    base = {
        "model.layers.0.mlp.experts.gate_up_proj": weights(3, 32, 24),
        "model.layers.0.self_attn.q_proj.weight": weights(24, 24, seed=4),
    }
    write_model(tmp_path / "base", base, {"model_type": "mixtral"})
    paths = []
    for i in range(3):
        loratool.init(tmp_path / "base", tmp_path / f"{i}", target=["q_proj", "re:experts"], rank=4, seed=i)
        file = tmp_path / f"{i}" / "adapter_model.safetensors"
        tensors = {k: t + 0.1 * weights(*t.shape, seed=9 + i) for k, t in load_file(file).items()}
        tensors["base_model.model.model.norm.weight"] = (1 + i) * torch.ones(24)
        save_file(tensors, file, {"format": "pt"})
        paths.append(tmp_path / f"{i}")
    report = compare(*paths)
    norms = [weight * 24**0.5 for weight in (1.0, 2.0, 3.0)]
    (norm,) = report.values
    assert [round(x or 0, 9) for x in norm.norms] == [round(x, 9) for x in norms]
    assert math.isclose(norm.relative, 2 / 3, rel_tol=1e-9)
    merged = []
    for path in paths:
        loratool.merge(tmp_path / "base", path, tmp_path / "m", exclude=["norm"], undo=False, dtype="fp32", force=True)
        whole = load_file(tmp_path / "m" / "model.safetensors")
        merged.append({k: whole[k].double() - W.double() for k, W in base.items()})
    for row in report.modules:
        key = row.name if row.name in base else f"{row.name}.weight"
        D = [each[key] for each in merged]
        stacked = [torch.block_diag(*d) if d.dim() == 3 else d for d in D]
        assert row.pair is not None and row.cosine is not None
        x, y = (D[i] for i in row.pair)
        assert math.isclose(row.cosine, float((x * y).sum() / x.norm() / y.norm()), abs_tol=1e-5)
        rank = 4 * (3 if D[0].dim() == 3 else 1)
        assert math.isclose(row.interference or 0, approximate(stacked, rank), rel_tol=1e-2)


def approximate(changes: list[Tensor], rank: int) -> float:
    """As `interference`, of changes whose rank is told, since merging rounded them."""
    cut = [torch.linalg.svd(D, full_matrices=False) for D in changes]
    return interference(*((U[:, :rank] * S[:rank]) @ Vh[:rank] for U, S, Vh in cut))


def test_dora_is_compared_before_the_norm(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.q_proj.weight": weights(24, 24)})
    for i, name in enumerate("abc"):
        loratool.init(base, tmp_path / name, dora=True, method="orthogonal", rank=4)
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(file)
        key = "base_model.model.model.q_proj.lora_magnitude_vector"
        save_file({**tensors, key: tensors[key] * (1 + i)}, file)
    report = compare(*(tmp_path / name for name in "abc"))
    assert report.modules[0].same and not report.same and math.isclose(report.worst, 2 / 3, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("cosine", "interference", "random", "word"),
    [
        (1.0, 1.0, 0.01, "alike"),
        (0.9, 1.0, 0.01, "alike"),
        (0.89, 0.9, 0.01, "related"),
        (0.29, 0.5, 0.01, CROSSING),
        (0.0, 0.1, 0.01, CROSSING),
        (0.0, 0.09, 0.01, "unrelated"),
        (0.0, 0.3, 0.2, "unrelated"),  # random directions of such ranks have as much
        (-0.3, 0.0, 0.01, "unrelated"),
        (-0.31, 1.0, 0.01, "opposed"),
    ],
)
def test_a_word_for_two(cosine: float, interference: float, random: float, word: str) -> None:
    assert relation(cosine, interference, random) == word in MEANINGS


def test_the_guides_table_has_the_words_and_their_limits() -> None:
    guide = (ROOT / "loratool" / "guides" / "init-and-resize.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in guide.splitlines() if line.startswith("| ")]
    table = {word: (cosine, found) for word, cosine, found in cells if word in MEANINGS}
    assert table.keys() == MEANINGS.keys()
    for least, word in COSINES.items():
        assert table[word][0] == (f"from {least}" if least > -1 else f"below {min(x for x in COSINES if x > -1)}")
    assert table[CROSSING] == (table["unrelated"][0], f"from {LEAST}, and twice `random`") and TIMES_RANDOM == 2


def test_what_the_words_say_of_adapters_that_were_made_so(tmp_path: Path, run: Callable[..., Any]) -> None:
    one, other = pairs(4), pairs(4, 50)
    Q = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    unit = {m: (torch.linalg.qr(A.T).Q.T, torch.linalg.qr(B).Q) for m, (A, B) in one.items()}
    made = {
        "one": unit,
        "stronger": {m: (A, 3 * B) for m, (A, B) in unit.items()},
        "opposite": {m: (-A, B) for m, (A, B) in unit.items()},
        "crossing": {m: (Q @ A, B) for m, (A, B) in unit.items()},
        "near": {m: (A, B + 0.3 * other[m][1] / other[m][1].norm() * B.norm()) for m, (A, B) in unit.items()},
    }
    paths = [write_peft(tmp_path / name, found) for name, found in made.items()]
    report = compare(*paths)
    assert report.shared is not None
    words = {(pair.first, pair.second): pair.relation for pair in report.shared.pairs}
    assert words[0, 1] == "alike" and words[0, 2] == "opposed" and words[0, 3] == words[2, 3] == CROSSING
    assert words[0, 4] == "alike" and len(report.shared.fighting) == 7
    text = run("diff", *paths).stdout
    assert "\nopposed: A-C B-C C-E, cosine -1.00..-0.96, " in text
    assert "\ncrossing: A-D B-D C-D D-E, cosine " in text and "\nalike: A-B A-E B-E, " in text
    assert text.splitlines()[-1].startswith("they fight: 7 of 10 pairs are opposed or crossing, interference ")
    assert json.loads(run("diff", *paths, "--json").stdout)["report"]["shared"]["pairs"][0]["relation"] == "alike"


def test_a_dry_run_of_combine_says_what_the_weighted_changes_share(tmp_path: Path, run: Callable[..., Any]) -> None:
    one, two = pairs(4), pairs(4, 7)
    near = {m: (torch.cat([A, two[m][0]]), torch.cat([B, 0.5 * two[m][1]], 1)) for m, (A, B) in one.items()}
    a, b, c = (write_peft(tmp_path / n, f) for n, f in (("a", one), ("b", near), ("c", two)))
    D = [whole(dense(found)) for found in (one, near, two)]
    report = loratool.combine({a: 1.0, b: -0.5, c: 2.0}, dry_run=True, method="tsv")
    shared = report.shared
    assert shared is not None
    weighted = [D[0], -0.5 * D[1], 2 * D[2]]
    assert math.isclose(shared.interference, interference(*weighted), rel_tol=1e-9)
    for pair in shared.pairs:
        x, y = weighted[pair.first], weighted[pair.second]
        assert abs(pair.cosine - float((x * y).sum() / x.norm() / y.norm())) < 1e-12
        assert math.isclose(pair.interference, interference(x, y), rel_tol=1e-9)
    assert shared.pairs[0].relation == "opposed"
    assert "cosine of each pair" in run("combine", a, f"{b}:-1", c, "-o", tmp_path / "o", "--dry-run").stdout
    lines = run("combine", a, b, "-o", tmp_path / "o", "--dry-run").stdout.splitlines()
    assert any(line.startswith("related: cosine 0.") for line in lines) and "cosine of each pair" not in lines
    lone = loratool.combine(a, tmp_path / "o", dry_run=True)
    assert lone.shared is None and loratool.combine([a, b], tmp_path / "o").shared is None


def test_what_does_not_belong_together(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    with pytest.raises(UsageError, match="diff compares two models, not 3"):
        loratool.diff(base, base, base)
    with pytest.raises(InputError, match="is a model"):
        loratool.diff(adapter, adapter, base)
    with pytest.raises(UsageError, match="base is for two adapters"):
        loratool.diff(adapter, adapter, adapter, base=base)
    with pytest.raises(InputError, match="no adapter has a selected module"):
        loratool.diff(adapter, adapter, adapter, exclude=["*"])
    a, b = write_peft(tmp_path / "a", pairs(4)), write_peft(tmp_path / "b", pairs(2))
    wrong = write_peft(tmp_path / "w", {Q0: factors(30, 20, 4)})
    with pytest.raises(InputError, match="different models"):
        loratool.diff(a, b, wrong)
    with pytest.raises(InputError, match="nothing can be compared"):
        loratool.diff(a, b, FIXTURES / "gpt2" / "adapter")
    with pytest.raises(UsageError, match="takes no argument 'others'"):
        loratool.diff(a, b, others=[a])  # type: ignore[call-arg]
    assert run("diff", a, b, a, "--fail-above", "0.5").exit_code == 1
    assert run("diff", a, a, a, "--target", "q_proj", "--layers", "1").stdout.endswith("the same delta in 1 module\n")
