"""The file of block masses, and the plan that a configuration leads to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omniavatar.checkpoint.layout import scale_spec
from omniavatar.config.identity import config_hash, result_values
from omniavatar.config.load import load_config
from omniavatar.errors import CheckpointError, ConfigError
from omniavatar.plan.calibration import measured_schedule, model_identity
from omniavatar.plan.placement import launches_show
from omniavatar.plan.run import window_shape
from omniavatar.plan.sparsity import (
    HEADER,
    LEVELS,
    Limit,
    SparseHeader,
    always_sparse,
    find_sparsity,
    is_sparse_file,
    plan_shape,
    plan_sparse_run,
    read_levels,
    write_levels,
)
from omniavatar.sampling.sparsity import cut_of_mass, mass_levels

NANO = {
    "weights": "random", "scale": "nano", "device": "cpu", "dtype": "fp32", "num_steps": 4,
    "image_sizes_720": [[64, 64]], "max_tokens": 56, "overlap_frame": 5,
}  # fmt: skip
CALIBRATED = {"sparse_attention": "calibrated", "sparse_block_size": 8}
DIT = scale_spec("nano").dit


def config_of(**changes: Any):
    return load_config(None, {**NANO, **changes}).config


def plan_of(size: tuple[int, int] = (64, 64), limit: Limit = always_sparse, **changes: Any):
    config = config_of(**changes)
    return find_sparsity(config, window_shape(config, size, True), DIT, None, limit)


def written(path: Path, groups: int = 1, **changes: Any) -> Path:
    config = config_of(**{**CALIBRATED, **changes})
    shape = plan_shape(config, window_shape(config, (64, 64), True), DIT)
    sizes = (groups, shape.layers, shape.heads, shape.blocks)
    mass = np.random.default_rng(0).dirichlet(np.full(shape.blocks, 0.3), sizes)
    header = SparseHeader(
        model=model_identity(config.model, DIT),
        schedule=measured_schedule(config.sampling),
        grid=shape.grid,
        block=shape.block,
        dense_steps=1,
        measured={"windows": 2},
        sha256="",
    )
    write_levels(path, header, mass_levels(mass))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("plan") / "masses.safetensors")


def test_the_file_reads_back(file):
    header, levels = read_levels(file)
    assert header.block == 8 and header.measured == {"windows": 2} and header.dense_steps == 1
    assert levels.shape == (1, DIT.num_layers, DIT.num_heads, header.grid[0] * 2, header.grid[0] * 2)
    assert (levels.min(-1) == 0).all()
    again = written(file.with_name("again.safetensors"))
    assert again.read_bytes() == file.read_bytes(), "equal masses make equal files"


def test_the_limit_above_which_a_layer_runs_dense_is_that_of_the_windows_tokens():
    asked: list[int] = []

    def limit(tokens: int) -> float:
        asked.append(tokens)
        return 0.4

    window = {"sparse_attention": "window", "sparse_block_size": 8}
    assert plan_of(limit=limit, **window, sparse_density=0.5).sparse_steps == ()
    assert plan_of(limit=limit, **window, sparse_density=0.3).sparse_steps == (1, 2, 3)
    tokens = window_shape(config_of(), (64, 64), True).tokens
    assert asked == [tokens, tokens]


@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_one_file_serves_every_density(file, density):
    plan = plan_of(**CALIBRATED, sparse_file=str(file), sparse_density=density)
    assert plan.name == "calibrated" and plan.sparse_steps == (1, 2, 3)
    assert density - 0.1 < plan.kept_share <= density and 0 < plan.mass < 1


def test_a_stated_mass_is_kept(file):
    plan = plan_of(**CALIBRATED, sparse_file=str(file), sparse_mass=0.8)
    assert plan.mass >= 0.8
    _, levels = read_levels(file)
    assert (plan.kept(1, 0) == (levels[0, 0] < cut_of_mass(0.8))).all()


def test_dense_attention_has_no_plan_and_the_identity_it_had():
    assert plan_of() is None
    values = result_values(config_of())
    assert not [name for name in values if "spars" in name]
    assert config_hash(config_of()) != config_hash(config_of(sparse_attention="window"))


@pytest.mark.parametrize(
    ("steps", "configured", "dense"), [(4, None, 1), (25, None, 7), (50, None, 13), (4, 0, 0), (4, 3, 3)]
)
def test_first_steps_stay_dense(steps, configured, dense):
    changes = {} if configured is None else {"sparse_dense_steps": configured}
    plan = plan_of(sparse_attention="window", sparse_block_size=8, num_steps=steps, **changes)
    assert plan.sparse_steps == tuple(range(dense, steps))
    assert plan.step_shares[:dense] == (1.0,) * dense and max(plan.step_shares[dense:]) < 1


def test_groups_of_steps_have_blocks_of_their_own(tmp_path):
    path = written(tmp_path / "two.safetensors", groups=2)
    plan = plan_of(**CALIBRATED, sparse_file=str(path), num_steps=8)
    same = [(plan.table_of[step] == plan.table_of[7]).all() for step in range(2, 8)]
    assert same == [False] * 3 + [True] * 3


def test_the_plan_of_a_run_tells_what_it_keeps():
    config = config_of(sparse_attention="window", sparse_block_size=8, sparse_density=0.5)
    plan = plan_sparse_run(config, (64, 64), 16000, DIT)
    values = json.loads(json.dumps(plan.as_dict()))["sparsity"]
    assert values["attention"] == "window" and values["step_shares"][0] == 1
    share = plan.sparsity.kept_share
    assert values["kept_share"] == share and 0.5 <= share < 0.65
    assert values["kept_share_of_forwards"] == pytest.approx((1 + 3 * share) / 4)
    dense = plan_sparse_run(config_of(), (64, 64), 16000, DIT)
    assert dense.kept_share == 1 and "sparsity" not in dense.as_dict()


def test_fewer_blocks_make_launches_show():
    small = scale_spec("1.3B").dit
    assert not launches_show(small, 15750) and launches_show(small, 15750, 1, 0.35)


# What is refused


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sparse_density": 0.3}, "sparse_density: has no effect with sparse_attention: dense"),
        ({"sparse_block_size": 64}, "sparse_block_size: has no effect with sparse_attention: dense"),
        ({"sparse_attention": "window", "sparse_mass": 0.9}, "sparse_mass: has no effect with sparse_attent"),
        ({"sparse_attention": "window", "sparse_file": "a"}, "set sparse_attention to calibrated"),
        ({"sparse_attention": "window", "sparse_density": 0}, "sparse_density: must be greater than 0"),
        ({"sparse_attention": "window", "sparse_density": 1.5}, "sparse_density: must be less than or equal"),
        ({"sparse_attention": "window", "sparse_density": True}, "sparse_density"),
        ({"sparse_attention": "windows"}, "sparse_attention: must be 'dense', 'window' or 'calibrated'"),
        ({"sparse_attention": "window", "sparse_block_size": 0}, "sparse_block_size"),
        ({"sparse_attention": "window", "sparse_backend": "fa5"}, "sparse_backend: must be 'auto', 'eager'"),
        ({**CALIBRATED, "sparse_mass": 0.9, "sparse_density": 0.3}, "set only one"),
        ({**CALIBRATED, "sparse_file": "none"}, "sparse_file: must be a path or auto"),
    ],
)
def test_settings_without_sense_are_one_line(changes, line):
    with pytest.raises(ConfigError) as error:
        config_of(**changes)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_block_causal_models_are_dense():
    values = {name: NANO[name] for name in NANO if name not in ("max_tokens", "overlap_frame")}
    causal = {"sampler": "causal", "guidance_scale": 1, "sparse_attention": "window"}
    with pytest.raises(ConfigError, match="sparse_attention: sampler: causal attends to a cache"):
        load_config(None, {**values, **causal})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_steps": 1}, "sparse_dense_steps: 1 of 1 steps stay dense, so nothing is sparse"),
        ({"sparse_dense_steps": 9}, "sparse_dense_steps: 4 of 4 steps stay dense"),
        ({"sp_size": 3}, "sparse_attention: sp_size must divide the model's 2 heads, 3 does not"),
    ],
)
def test_plans_that_do_not_fit_the_run(changes, line):
    with pytest.raises(ConfigError) as error:
        plan_of(sparse_attention="window", sparse_block_size=8, **changes)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image_sizes_720": [[64, 96]], "size": (64, 96)}, "columns of tokens, the run has"),
        ({"sparse_block_size": 16}, "measured for blocks of 8 tokens, the run has 16; run `omniavatar calib"),
        ({"max_tokens": 100}, "measured for windows of"),
        ({"shift": 3.0}, "measured with shift 5.0, the run has 3.0"),
        ({"sampler": "renoise"}, 'measured with sampler "euler", the run has "renoise"'),
    ],
)
def test_a_file_of_another_run_is_refused(file, changes, line):
    changes = dict(changes)
    size = changes.pop("size", (64, 64))
    with pytest.raises(ConfigError) as error:
        plan_of(size, **{**CALIBRATED, "sparse_file": str(file), **changes})
    assert line in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_model_is_refused(file):
    config = config_of(**CALIBRATED, sparse_file=str(file))
    shape = window_shape(config, (64, 64), True)
    with pytest.raises(CheckpointError, match=r"measured on another model .ffn_dim: 5"):
        find_sparsity(config, shape, replace(DIT, ffn_dim=DIT.ffn_dim + 8))
    other = config_of(**CALIBRATED, sparse_file=str(file), scale="1.3B")
    with pytest.raises(CheckpointError, match=r"random weights: nano then, 1.3B now"):
        find_sparsity(other, shape, DIT)


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.safetensors does not exist; make it with"):
        plan_of(**CALIBRATED, sparse_file="nowhere.safetensors")
    with pytest.raises(ConfigError, match=f"{tmp_path} is a folder; make it with"):
        plan_of(**CALIBRATED, sparse_file=str(tmp_path))
    with pytest.raises(ConfigError, match="random weights have no folder; name the file, or use window"):
        plan_of(**CALIBRATED)


def _header(values: dict[str, Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        header, _ = read_levels(path)
        save_file(tensors, path, {HEADER: json.dumps({**header.model_dump(mode="json"), **values})})

    return spoil


def _tensors(change: Callable[[np.ndarray], dict[str, np.ndarray]], sign: bool = False):
    def spoil(path: Path) -> None:
        header, levels = read_levels(path)
        tensors = change(levels.copy())
        if sign:
            write_levels(path, header, tensors[LEVELS])
        else:
            save_file(tensors, path, {HEADER: header.model_dump_json()})

    return spoil


def _no_block(levels: np.ndarray) -> dict[str, np.ndarray]:
    levels[0, 1, 0, 2] = 9
    return {LEVELS: levels}


def _one_less(levels: np.ndarray) -> dict[str, np.ndarray]:
    levels[0, 0, 0, 0, 0] ^= 1
    return {LEVELS: levels}


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"[1, 2]" * 40), "damaged"),
        (_header({"format": 2}), "format"),
        (_header({"block": 0}), "block"),
        (_header({"grid": [4, 4]}), "grid"),
        (_header({"grid": [4, 4, -4]}), "sizes"),
        (_header({"extra": 1}), "extra"),
        (_header({"sha256": "0" * 64}), "not those that were written"),
        (_tensors(_one_less), "not those that were written"),
        (_tensors(_no_block, sign=True), "a row keeps no block"),
        (_tensors(lambda levels: {LEVELS: levels[:, 1:]}, sign=True), "levels are uint8"),
        (_tensors(lambda levels: {LEVELS: levels.astype(np.float32)}), "levels are float32"),
        (_tensors(lambda levels: {LEVELS: levels, "more": levels}), "it does not hold 'levels'"),
        (_tensors(lambda levels: {LEVELS: levels[:0]}, sign=True), "levels are uint8"),
    ],
)
def test_a_damaged_file_is_one_clear_line(file, tmp_path, spoil, line):
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(file.read_bytes())
    spoil(path)
    with pytest.raises(CheckpointError) as error:
        plan_of(**CALIBRATED, sparse_file=str(path))
    text = str(error.value)
    assert line in text and text.startswith(str(path)) and "\n" not in text
    assert "run `omniavatar calibrate --mode sparse`" in text


def test_only_files_of_the_command_are_written_over(file, tmp_path):
    assert is_sparse_file(file) and is_sparse_file(tmp_path / "new")
    other = tmp_path / "weights.safetensors"
    save_file({"a": np.zeros(3)}, other)
    assert not is_sparse_file(other)
    other.write_text("notes")
    assert not is_sparse_file(other)
