"""Weights that are not finite are found on the device they are loaded to."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from omniavatar.checkpoint.finite import is_finite
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.staging import Staging
from omniavatar.checkpoint.strict import file_sources, load_strict
from omniavatar.errors import CheckpointError

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def load(path, dtype, device_of=None):
    with torch.device("meta"):
        module = nn.Linear(300, 200)
    with TensorFiles(path) as files, Staging(CUDA) as staging:
        sources = file_sources(files, load=staging.load)
        load_strict(module, sources, dtype=dtype, device=device_of or CUDA, origin=files.origin)
    return module


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_one_number_of_a_file(tmp_path, value, streamed):
    """Also for blocks that move to host memory after they are read."""
    path = tmp_path / "a.safetensors"
    weight = torch.ones(200, 300)
    weight[17, 211] = value
    save_file({"weight": weight, "bias": torch.zeros(200)}, path)
    device_of = (lambda key: torch.device("cpu")) if streamed else None
    with pytest.raises(CheckpointError, match=r"a\.safetensors: weight"):
        load(path, torch.float16, device_of)
    if value == 7e4:
        assert torch.equal(load(path, torch.float32).weight.cpu(), weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_every_pattern_of_bits(dtype):
    kind = torch.uint8 if dtype.itemsize == 1 else torch.int16
    values = torch.arange(256**dtype.itemsize).to(kind).view(dtype)
    finite = values.float().isfinite()
    assert is_finite(values[finite].to(CUDA))
    for number in values[~finite][:40]:
        assert not is_finite(torch.stack([values[0], number]).to(CUDA))
