"""`omniavatar calibrate` on CUDA: the numbers of the CPU, and plans that match the verification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import make_pipeline, overrides, request
from omniavatar.accel.residual_meter import compare_residuals
from omniavatar.config.load import load_config
from omniavatar.measure.calibrate import CalibrationRun, calibrate
from omniavatar.plan.calibration import find_constants

pytestmark = pytest.mark.gpu
STEPS = 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_are_compared_as_on_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, 9001, 96, generator=generator).to(dtype)
    new = (old.float() * 0.98 + 0.05 * torch.randn(1, 9001, 96, generator=generator)).to(dtype)
    wanted = compare_residuals(new, old)
    torch.testing.assert_close(compare_residuals(new.cuda(), old.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-6)


def run(nano: Path, folder: Path, device: str) -> CalibrationRun:
    settings = overrides(nano, folder / "cache", num_steps=STEPS, device=device, vae="plain")
    output = folder / f"{device}.json"
    return calibrate(load_config(None, settings).config, request(), output, verify=device == "cuda")


def test_the_same_constants_as_on_the_cpu(nano_checkpoint: Path, tmp_path: Path) -> None:
    gpu, cpu = (run(nano_checkpoint, tmp_path, device) for device in ("cuda", "cpu"))
    for name, branch in cpu.calibration.branches.items():
        other = gpu.calibration.branches[name]
        assert other.magnitude_ratios == pytest.approx(branch.magnitude_ratios, abs=5e-3)
        assert other.changes == pytest.approx(branch.changes, abs=1e-2)
    assert gpu.calibration.time_changes == pytest.approx(cpu.calibration.time_changes, rel=1e-2)
    (row,) = gpu.verified
    assert row.computed < STEPS and row.seconds > 0 and 0 < row.error < 0.5
    settings = overrides(nano_checkpoint, tmp_path / "cache", num_steps=STEPS, step_cache="magcache")
    config = load_config(None, {**settings, "step_cache_file": str(tmp_path / "cuda.json")}).config
    dit = make_pipeline(nano_checkpoint, tmp_path / "cache").models.dit_config
    found = find_constants(config.model, config.sampling, dit)
    assert found is not None and found.digest == gpu.calibration.constants("").digest
