"""Strict loading: each weight once with the right shape, or one error that lists all problems."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.strict import TensorSource, file_sources, load_strict
from omniavatar.errors import CheckpointError


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(4)
        self.register_buffer("table", torch.zeros(2, dtype=torch.int64))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(5, 2)
        self.inner = nn.Module()
        self.inner.embed = self.shared


def on_meta(make):
    with torch.device("meta"):
        return make()


def sources(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSource]:
    return {
        key: TensorSource(tuple(value.shape), lambda value=value: value.clone())
        for key, value in tensors.items()
    }


def load(module: nn.Module, tensors: dict[str, torch.Tensor], dtype=torch.float32) -> nn.Module:
    load_strict(module, sources(tensors), dtype=dtype, device="cpu", origin="file.pt")
    return module


def problem(tensors: dict[str, torch.Tensor], layers: int = 2) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(on_meta(lambda: Model(layers)), tensors)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fills_everything_with_the_right_dtypes():
    tensors = {
        key: value.double() if value.is_floating_point() else value
        for key, value in Model().state_dict().items()
    }
    tensors["table"] = torch.tensor([7, 8])
    model = load(
        on_meta(Model), tensors, lambda name: torch.float32 if name.startswith("norm") else torch.bfloat16
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors[key].to(value.dtype))
        assert not value.requires_grad
    assert model.norm.weight.dtype == torch.float32
    assert model.layers[0].weight.dtype == torch.bfloat16
    assert model.table.tolist() == [7, 8] and model.table.dtype == torch.int64
    assert isinstance(model.layers[0].weight, nn.Parameter)


def test_lists_missing_unexpected_and_misshaped_in_one_line():
    tensors = dict(Model().state_dict())
    tensors["extra"] = torch.zeros(1)
    del tensors["layers.1.bias"]
    tensors["norm.weight"] = torch.zeros(5)
    message = problem(tensors)
    assert "file.pt" in message
    assert "1 missing: layers.1.bias" in message
    assert "1 unexpected: extra" in message
    assert "1 misshaped: norm.weight is 5, not 4" in message


def test_long_lists_are_abbreviated():
    message = problem({}, layers=20)
    assert "43 missing" in message and "and 35 more" in message


def test_nothing_is_loaded_when_something_is_wrong():
    def fail() -> torch.Tensor:
        raise AssertionError("loaded")

    with pytest.raises(CheckpointError):
        load_strict(
            on_meta(Model),
            {"norm.weight": TensorSource((4,), fail)},
            dtype=torch.float32,
            device="cpu",
            origin="f",
        )


@pytest.mark.parametrize("name", ["shared.weight", "inner.embed.weight"])
def test_tied_weights_under_either_name_stay_tied(name):
    model = load(on_meta(Tied), {name: torch.ones(5, 2)})
    assert model.shared.weight is model.inner.embed.weight
    assert model.shared.weight.sum() == 10


def test_tied_weight_given_twice_is_unexpected():
    with pytest.raises(CheckpointError, match=r"1 unexpected: inner\.embed\.weight"):
        load(on_meta(Tied), {"shared.weight": torch.ones(5, 2), "inner.embed.weight": torch.ones(5, 2)})


def test_weight_norm_parametrisation():
    def make() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3), dim=2)

    expected = make()
    model = load(on_meta(make), dict(expected.state_dict()))
    x = torch.randn(1, 2, 8)
    assert torch.equal(model(x), expected(x))


def test_what_no_file_can_fill_is_a_bug_not_raw_memory():
    """When keys were missing, the original code left those weights uninitialised."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("secret", torch.zeros(2), persistent=False)

    with pytest.raises(RuntimeError, match="secret"):
        load(on_meta(Hidden), {})


def test_renaming(tmp_path):
    save_file({"old.a": torch.ones(2), "unused": torch.ones(1)}, tmp_path / "f.safetensors")
    with TensorFiles(tmp_path / "f.safetensors") as files:
        found = file_sources(files, lambda key: None if key == "unused" else key.removeprefix("old."))
        assert list(found) == ["a"] and found["a"].load().tolist() == [1, 1]
        with pytest.raises(CheckpointError, match="two tensors both mean x"):
            file_sources(files, lambda key: "x")
