"""Hold the reader of DeepSpeed's ZeRO states against what was saved, against DeepSpeed itself, and against damage."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.models.training_runs import write_zero
from torch import Tensor

from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.states.zero_file import ZeroFile

torch.manual_seed(0)

GROUPS = (
    {"module.a.weight": torch.randn(7, 5), "a.bias": torch.randn(7), "b.weight": torch.randn(3, 2, 2)},
    {"c.weight": torch.randn(1), "d.weight": torch.randn(4, 4)},
)
FROZEN = {"e.weight": torch.randn(5, 3).bfloat16(), "f.weight": torch.randn(2, 2).half()}
BUFFERS = {"n": torch.arange(4), "scale": torch.ones(3)}
SHARED = {"head.weight": "d.weight"}


def opened(step: Path) -> ZeroFile:
    return ZeroFile(min(step.glob("*_optim_states.pt")))


def refusal(step: Path) -> str:
    with pytest.raises(InputError) as caught:
        opened(step)
    return str(caught.value)


def check(file: ZeroFile, expected: dict[str, Tensor]) -> None:
    assert set(file.specs) == set(expected)
    for name, tensor in expected.items():
        assert file.specs[name].shape == tuple(tensor.shape)
        assert bytes(file.read(name)) == tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("gaps", [0, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trained_parameters_are_in_float32_and_the_others_as_they_are(
    tmp_path: Path, stage: int, world: int, gaps: int
) -> None:
    if stage == 3 and gaps:
        return  # stage 3 has none
    step = write_zero(tmp_path / "global_step1", stage, world, GROUPS, FROZEN, BUFFERS, SHARED, gaps)
    trained = {name.removeprefix("module."): tensor for group in GROUPS for name, tensor in group.items()}
    file = opened(step)
    check(file, {**trained, **FROZEN, **BUFFERS, "head.weight": trained["d.weight"]})
    assert file.storage("head.weight") == file.storage("d.weight") != file.storage("a.bias")
    assert file.frozen == {*FROZEN, *BUFFERS} and file.ignored == ("optimizer",)


def test_what_stage_1_does_not_list_as_frozen_is_in_the_model(tmp_path: Path) -> None:
    step = write_zero(tmp_path / "global_step1", 1, 2, GROUPS, buffers=BUFFERS)
    path = step / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["module"]["e.weight"] = FROZEN["e.weight"]
    torch.save(state, path)
    file = opened(step)
    assert torch.equal(file.tensor("e.weight"), FROZEN["e.weight"]) and "e.weight" in file.frozen


def test_the_folder_that_a_trainer_saves(tmp_path: Path) -> None:
    for number in (1, 2):
        write_zero(tmp_path / f"global_step{number}", 2, 2, [{"w": torch.full((3, 3), float(number))}])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "zero_to_fp32.py").write_text("")
    with pytest.raises(InputError, match="global_step1/"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("global_step2")
    for path, value in ((tmp_path, 2.0), (tmp_path / "global_step1", 1.0)):
        found = open_checkpoint(path)
        assert found.model_type == "llama" and torch.equal(found["w"], torch.full((3, 3), value))
    for tag in ("global_step3", "../global_step1", "/etc"):
        (tmp_path / "latest").write_text(tag)
        with pytest.raises(InputError, match="which is missing"):
            open_checkpoint(tmp_path)


def test_universal_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    place = tmp_path / "step" / "zero" / "w"
    place.mkdir(parents=True)
    torch.save({"param": torch.ones(2)}, place / "fp32.pt")
    (tmp_path / "latest_universal").write_text("step")
    for path in (tmp_path, tmp_path / "step"):
        with pytest.raises(InputError, match="universal checkpoint"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
        ("layer_00-model_states.pt", "pipeline"),
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallelism"),
    ],
)
def test_other_parallelism_is_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    step = write_zero(tmp_path / "global_step1", 2, 2, GROUPS)
    torch.save({}, step / name)
    assert what in refusal(step)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank(tmp_path: Path, stage: int) -> None:
    step = write_zero(tmp_path / "a", stage, 3, GROUPS)
    (step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "ranks 0 to 2" in refusal(step)
    step = write_zero(tmp_path / "b", stage, 3, GROUPS)
    (step / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert "of 3" in refusal(step).replace("[3, 3]", "3")
    step = write_zero(tmp_path / "c", stage, 3, GROUPS)
    model = max(step.glob("*model_states.pt"))
    model.unlink()
    assert model.name in refusal(step)


def edited(step: Path, pattern: str, change: Callable[[Any], None]) -> Path:
    for path in step.glob(pattern):
        state = torch.load(path, weights_only=False)
        change(state)
        torch.save(state, path)
    return step


@pytest.mark.parametrize("stage", [2, 3])
def test_sizes_that_lie(tmp_path: Path, stage: int) -> None:
    def larger(state: Any) -> None:
        state["param_shapes"][0]["a.bias"] = torch.Size([1 << 40])

    def smaller(state: Any) -> None:
        del state["param_shapes"][1]["d.weight"]

    def negative(state: Any) -> None:
        state["param_shapes"][0]["a.bias"] = (-7,)

    for name, change in (("larger", larger), ("smaller", smaller), ("negative", negative)):
        step = write_zero(tmp_path / name, stage, 2, GROUPS)
        assert refusal(edited(step, "*model_states.pt", change))
    keys = {2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}

    def short(state: Any) -> None:
        vectors = state["optimizer_state_dict"][keys[stage]]
        vectors[0] = vectors[0][:5].clone()

    assert refusal(edited(write_zero(tmp_path / "short", stage, 2, GROUPS), "*_0_*optim_states.pt", short))


def test_a_stage_that_is_none(tmp_path: Path) -> None:
    step = write_zero(tmp_path / "a", 2, 2, GROUPS)
    assert "stage 4" in refusal(
        edited(step, "*optim*", lambda state: state["optimizer_state_dict"].update(zero_stage=4))
    )


def drop_group(state: Any) -> None:
    del state["param_shapes"][1]


OPTIMIZER_STATE = {2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


@pytest.mark.parametrize(
    ("stage", "pattern", "change", "message"),
    {
        "types in a group": (
            2, "*_1_*optim*", lambda s: s.update(single_partition_of_fp32_groups=halves(s, 2)), "vectors of 2 types"
        ),
        "types of ranks": (3, "*_1_*optim*", lambda s: s.update(fp32_flat_groups=halves(s, 3)), "several types"),
        "no vector": (2, "*_1_*optim*", lambda s: s.update(single_partition_of_fp32_groups=[5, 5]), "is not a tensor"),
        "experts": (2, "*model*", lambda s: s.update(autoep_layers=[1]), "experts over several ranks"),
        "two groups": (2, "*model*", lambda s: rename(s, "d.weight", "b.weight"), "a parameter is in two groups"),
        "a reserved name": (2, "*model*", lambda s: rename(s, "d.weight", "__metadata__"), "is reserved or not text"),
        "no module": (2, "*model*", lambda s: s.update(module=None), "has no module, and is not of DeepSpeed"),
        "a group less": (2, "*model*", drop_group, "has 2 vectors, for 1 groups of parameters"),
    }.values(),
)  # fmt: skip
def test_states_that_lie(tmp_path: Path, stage: int, pattern: str, change: Callable[[Any], None], message: str) -> None:
    step = write_zero(tmp_path / "a", stage, 2, GROUPS)
    check(opened(step), {name.removeprefix("module."): x for group in GROUPS for name, x in group.items()})
    own = (lambda state: change(state["optimizer_state_dict"])) if "optim" in pattern else change
    assert message in refusal(edited(step, pattern, own))


def halves(state: Any, stage: int) -> list[Tensor]:
    return [vector.half() for vector in state[OPTIMIZER_STATE[stage]]]


def rename(state: Any, old: str, new: str) -> None:
    state["param_shapes"][1][new] = state["param_shapes"][1].pop(old)


def test_an_optimizer_without_its_state(tmp_path: Path) -> None:
    step = write_zero(tmp_path / "a", 2, 2, GROUPS)
    torch.save({"step": 1}, step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert "has no optimizer_state_dict, and is not of DeepSpeed" in refusal(step)


def test_what_stage_3_has_nowhere(tmp_path: Path) -> None:
    """A parameter of no number that is no buffer is a second name of one that is not here; it is named."""
    step = write_zero(tmp_path / "a", 3, 2, GROUPS, buffers={"n": torch.empty(0)})
    file = opened(edited(step, "*model*", lambda state: state["module"].update(lost=torch.empty(0))))
    assert file.ignored == ("optimizer", "lost") and file.specs["n"].shape == (0,)


def test_the_tag_of_a_step_without_zero(tmp_path: Path) -> None:
    """Its weights are in one file; without it, and the optimizer's files, the step has no weights."""
    step = tmp_path / "global_step1"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step1")
    torch.save({"module": {"w": torch.ones(2)}}, step / "mp_rank_00_model_states.pt")
    assert torch.equal(open_checkpoint(tmp_path)["w"], torch.ones(2))
    (step / "mp_rank_00_model_states.pt").rename(step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="the weights are in the optimizer's files, which are missing"):
        open_checkpoint(tmp_path)


def test_nested_tuples_are_not_hashed(tmp_path: Path) -> None:
    """Each is twice the one before it, so that to hash or to print the last takes 2^60 steps."""
    nested: Any = ("x",)
    for _ in range(60):
        nested = (nested, nested)
    changes: dict[str, Callable[[Any], None]] = {
        "*optim*": lambda state: state["optimizer_state_dict"].update(partition_count=nested),
        "*model_states.pt": lambda state: state.update(shared_params={"a": nested}),
        "mp_rank_*.pt": lambda state: state.update(buffer_names=[nested]),
    }
    for number, (pattern, change) in enumerate(changes.items()):
        assert len(refusal(edited(write_zero(tmp_path / str(number), 2, 2, GROUPS), pattern, change))) < 500


def test_a_gap_below_zero(tmp_path: Path) -> None:
    """With it two parameters would share numbers."""
    step = write_zero(tmp_path / "a", 2, 2, GROUPS, gaps=1)
    paddings = [[-1, *[1] * (len(group) - 1)] for group in GROUPS]
    assert "an invalid gap after" in refusal(
        edited(step, "*optim*", lambda state: state["optimizer_state_dict"].update(param_alignment_paddings=paddings))
    )


def test_nothing_in_the_pickles_is_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for number, name in enumerate(("*_1_*optim_states.pt", "mp_rank_00_model_states.pt")):
        step = write_zero(tmp_path / str(number), 2, 2, GROUPS)
        path = next(step.glob(name))
        state = torch.load(path, weights_only=False)
        torch.save({**state, "client": Runs()}, path)
        assert "wants to run" in refusal(step) and path.name in refusal(step)
    assert not (tmp_path / "ran").exists()


DEEPSPEED = """
import os, sys
os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", LOCAL_SIZE="2", WORLD_SIZE="2")
import torch
from torch.multiprocessing import spawn

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(5, 7), torch.nn.Linear(7, 7, bias=False), torch.nn.Linear(7, 3)
        self.head = torch.nn.Linear(7, 7, bias=False)
        self.head.weight = self.b.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("n", torch.arange(4))

    def forward(self, x):
        return self.c(self.head(self.b(self.a(x)))) * self.scale

def run(rank, out, port):
    os.environ.update(MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
    import deepspeed
    for stage in (1, 2, 3):
        for frozen in (False, True):
            torch.manual_seed(0)
            net = Net()
            net.a.weight.requires_grad_(not frozen)
            trained = [p for p in net.parameters() if p.requires_grad]
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": True},
            }
            groups = [{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.0}]
            engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
            engine.backward(engine(torch.randn(2, 5).bfloat16()).sum())
            engine.step()
            engine.save_checkpoint(os.path.join(out, f"{stage}_{frozen}"), tag="global_step1")

if __name__ == "__main__":
    spawn(run, (sys.argv[1], sys.argv[2]), 2)
"""


@pytest.mark.slow
def test_what_deepspeed_saves_itself(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed, which is in the extra `oracles`")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    script = tmp_path / "run.py"
    script.write_text(DEEPSPEED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path, "29617"], check=True, env=environment, capture_output=True)
    for folder in (path for path in tmp_path.iterdir() if path.is_dir()):
        expected = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        found = open_checkpoint(folder)
        for name, tensor in expected.items():
            assert torch.equal(found.shards[0].tensor(name).float() if tensor.is_floating_point() else tensor, tensor)
        beyond = found.specs.keys() - expected.keys()
        # zero_to_fp32 leaves out what is frozen in stage 1, which is in the model's file in 16 bits
        assert beyond == ({"a.weight"} if folder.name == "1_True" else set())
