"""`torchrun ... -m turnrow train` on two processes ends where one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.torchrun import torchrun
from turnrow.errors import UserError
from turnrow.training import Recipe, RunResult, evaluate_adapter, train
from turnrow.training.checkpoints import check_processes

from .conftest import MakeRecipe

WORKER = str(Path(__file__).with_name("distributed_worker.py"))

# Seventeen test rows in batches of three: the last round has one batch too few, and one batch is not full. Without momentum
# and Adam's division by the gradient's size, a wrong gradient shows, and one that is only rounding does not grow.
TRAINING = {"optim": "sgd", "learning_rate": 0.5, "save_steps": 2, "logging_steps": 1}


@pytest.fixture
def calm_recipe(make_recipe: MakeRecipe, tiny_base: Path, films: Path) -> MakeRecipe:
    """As `make_recipe`, without dropout: processes draw different masks than one process does."""
    config = json.loads((tiny_base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tiny_base / "config.json").write_text(json.dumps(config))
    with (films / "test.jsonl").open("a") as file:
        file.writelines((films / "train.jsonl").read_text().splitlines(keepends=True)[:7])

    def make(**changes: Any) -> Recipe:
        training = {**TRAINING, **changes.pop("training", {})}
        return make_recipe(**changes, training=training)

    return make


def on_two(recipe: Recipe, folder: Path, *options: str, worker: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """The same global batch on two processes, in `folder`/run."""
    recipe.to_yaml(folder / "recipe.yaml")
    half = recipe.training["per_device_train_batch_size"] // 2
    program = [WORKER, *worker] if worker else ["-m", "turnrow"]
    overrides = [f"--training.per_device_train_batch_size={half}", f"--output_dir={folder / 'run'}"]
    return torchrun(*program, "train", "--config", str(folder / "recipe.yaml"), *overrides, *options)


def one_process(make: MakeRecipe, folder: Path, **changes: Any) -> tuple[Recipe, RunResult]:
    recipe = make(**changes, output_dir=str(folder / "one"))
    return recipe, train(recipe)


def entries(history: Path, name: str) -> list[float]:
    return [entry[name] for entry in map(json.loads, history.read_text().splitlines()) if name in entry]


def check_equal(one: RunResult, run: Path) -> None:
    history = run / "history.jsonl"
    for name in ("loss", "eval_loss", "grad_norm"):
        expected = entries(one.folder.history, name)
        assert len(expected) >= 2
        assert entries(history, name) == pytest.approx(expected, rel=0, abs=1e-6), name
    name = "model.safetensors" if one.metrics["method"] == "full" else "adapter_model.safetensors"
    expected_weights, weights = load_file(one.adapter / name), load_file(run / "adapter" / name)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-6)


def test_two_processes_train_what_one_does(calm_recipe: MakeRecipe, tmp_path: Path, films: Path) -> None:
    recipe, one = one_process(calm_recipe, tmp_path, method={"name": "rocoft", "r": 3})
    code, out, err = on_two(recipe, tmp_path, "--training.disable_tqdm=false")
    assert code == 0, err
    run = tmp_path / "run"
    check_equal(one, run)

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["steps"] == one.metrics["steps"]
    assert metrics["before"] == one.metrics["before"]
    assert metrics["after"] == evaluate_adapter(run / "adapter", str(films / "test.jsonl"), quiet=True)
    one_by_one = [json.loads(line)["sentence"] for line in one.folder.predictions.read_text().splitlines()]
    assert [json.loads(line)["sentence"] for line in (run / "predictions.jsonl").read_text().splitlines()] == one_by_one
    assert {path.name for path in run.iterdir()} == {path.name for path in one.folder.root.iterdir()}
    assert out.count("rocoft: test metric") == 1
    assert err.count("test, before") == err.count("test, after") == 1


@pytest.mark.slow
def test_ctrl_c_on_torchrun_leaves_a_folder_that_goes_on(calm_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, one = one_process(calm_recipe, tmp_path)
    code, _, err = on_two(recipe, tmp_path, worker=("SIGINT", "1", "3"))
    assert code != 0
    assert err.count("interrupted after step") == 1
    assert err.count("Go on with the same recipe and --resume") == 1
    assert not (tmp_path / "run" / "metrics.json").exists()
    code, _, err = on_two(recipe, tmp_path, "--resume")
    assert code == 0, err
    assert err.count("resuming from") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed_from_step"] >= 3
    check_equal(one, tmp_path / "run")


def test_what_is_wrong_for_all_is_said_once(calm_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    code, out, err = on_two(calm_recipe(), tmp_path)
    assert (code, out) == (1, "")  # torchrun's own exit code
    assert err.count("error: ") == 1
    assert "so it is no run of turnrow" in err
    assert "exitcode  : 2" in err


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(calm_recipe: MakeRecipe, tmp_path: Path) -> None:
    code, _, err = on_two(calm_recipe(), tmp_path, worker=("error", "1", "5"))
    assert code == 1
    assert err.count("OSError: the disk of this process is full") == 1
    assert "Connection closed" not in err
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "complete.json").exists()


@pytest.mark.slow
def test_sigterm_on_torchrun_leaves_a_folder_that_goes_on(calm_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, one = one_process(calm_recipe, tmp_path)
    code, _, _ = on_two(recipe, tmp_path, worker=("SIGTERM", "0", "4"))
    assert code != 0
    code, _, err = on_two(recipe, tmp_path, "--resume")
    assert code == 0, err
    assert "checkpoint-2" in err
    check_equal(one, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "method": {"name": "rocoft", "mode": "column", "r": 3, "bias": "rocoft_only"},
            "learning_rate_factors": {"classifier": 0.5, "layer.0": 2},
        },
        {"method": {"name": "road", "variant": "road_1", "group_size": 8}},
        {"method": {"name": "full"}, "training": {"learning_rate": 0.05}},
        {"training": {"gradient_accumulation_steps": 2}},
        {"task": {"name": "regression", "text": ["sentence"], "label": "stars"}, "training": {"learning_rate": 0.01}},
    ],
    ids=["columns and biases", "road", "full", "accumulated", "regression"],
)
def test_other_runs_equal_one_process(calm_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe, one = one_process(calm_recipe, tmp_path, **changes)
    code, _, err = on_two(recipe, tmp_path)
    assert code == 0, err
    check_equal(one, tmp_path / "run")


@pytest.mark.slow
def test_a_sharded_run_equals_one_process_and_goes_on_after_ctrl_c(calm_recipe: MakeRecipe, tmp_path: Path) -> None:
    """FSDP2 through Trainer and accelerate, which has it for GPUs only: the worker lifts that."""
    # torch cannot load the state of a sharded optimizer that has none, as SGD; with so large an epsilon Adam is tame.
    adam = {"optim": "adamw_torch", "adam_epsilon": 1.0}
    factors = {"classifier": 0.5, "layer.0": 2}
    recipe, one = one_process(
        calm_recipe, tmp_path, method={"name": "rocoft", "r": 3}, training=adam, learning_rate_factors=factors
    )
    config = '{"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}'
    fsdp = ("--training.fsdp=true", f"--training.fsdp_config={config}")
    code, _, err = on_two(recipe, tmp_path, *fsdp, worker=("fsdp", "SIGINT", "0", "5"))
    assert code != 0
    assert err.count("interrupted after step") == 1, err
    code, _, err = on_two(recipe, tmp_path, *fsdp, "--resume", worker=("fsdp", "nothing", "0", "99"))
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed_from_step"] >= 5
    check_equal(one, tmp_path / "run")
    assert evaluate_adapter(tmp_path / "run" / "adapter", recipe.data.test, quiet=True) == one.metrics["after"]


def test_another_number_of_processes_does_not_go_on(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    check_processes(tmp_path, 2)
    with pytest.raises(UserError, match="written by a run of 2 processes, and this one has 1; .*--nproc_per_node 2"):
        check_processes(tmp_path, 1)
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "rng_state.pth").touch()
    check_processes(tmp_path, 1)
    with pytest.raises(UserError, match="written by a run of 1 process, and this one has 2"):
        check_processes(tmp_path, 2)


def test_accumulated_batches_equal_one_large_batch(calm_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Trainer alone takes the mean over a batch for a sum, and the gradient comes out twice as large."""
    _, one = one_process(calm_recipe, tmp_path)
    halves = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    accumulated = train(calm_recipe(training=halves, output_dir=str(tmp_path / "run")))
    check_equal(one, accumulated.folder.root)
