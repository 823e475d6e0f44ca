"""`omniavatar convert`: writes the DiT of a configuration to one file, in the form in which it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from omniavatar import __version__
from omniavatar.accel.apply import AccelConfig, row_dtype, weight_form
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.checkpoint.convert import convert_dit
from omniavatar.checkpoint.dit import open_dit, random_weights
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device, torch_dtype
from omniavatar.engine.loading import dit_files
from omniavatar.errors import ConfigError
from omniavatar.plan.preview import model_spec, with_family


@dataclass(frozen=True)
class Converted:
    """The written file, its size, and the settings that load it instead of the original files."""

    path: Path
    num_bytes: int
    settings: dict[str, str | None]


def convert_checkpoint(
    config: PipelineConfig, out: Path, progress: Callable[[int, int], None] | None = None
) -> Converted:
    """Write the configured DiT to `out`: merged, in `model.dtype`, quantised as `runtime.quantize` says.

    Random weights can be converted too, for timings.

    - progress: called with (done, total).

    Raises CheckpointError, ConfigError, OutputError, ResourceError.
    """
    config = with_family(config)
    model, quantize = config.model, config.runtime.quantize
    if quantize == "auto":
        raise ConfigError("quantize: auto depends on the machine that runs it; convert with none or fp8")
    device, dtype = choose_device(config.runtime.device), torch_dtype(model.dtype)
    form = weight_form(AccelConfig(quantize), create_fused(device, row_dtype(quantize)), device)
    stored = None if form is None else form.name
    made_from: dict[str, object] = {"omniavatar": __version__, "dtype": model.dtype, "quantize": quantize}
    placeholder = torch.nn.functional.scaled_dot_product_attention
    if model.weights == "random":
        made_from["random"] = model.scale
        weights = random_weights(
            model_spec(model).dit, attention=placeholder, dtype=dtype, device=device, seed=0, form=form
        )
        size = convert_dit(weights, out, form=stored, made_from=made_from, progress=progress)
    else:
        model.check_files_named()
        files = dit_files(model)
        made_from["base"] = [path.name for path in model.dit_path]
        made_from["adapter"] = model.exp_path.name if model.exp_path else None
        made_from["loras"] = [[lora.path.name, lora.strength] for lora in model.loras]
        with open_dit(files, attention=placeholder, dtype=dtype, device=device, form=form) as opened:
            size = convert_dit(opened, out, form=stored, made_from=made_from, progress=progress)
    settings: dict[str, str | None] = {
        "dit_path": str(out),
        "exp_path": None,
        "quantize": quantize,
        "dtype": model.dtype,
    }
    if model.audio_proj_path is not None:
        settings["audio_proj_path"] = None
    return Converted(out, size, settings)
