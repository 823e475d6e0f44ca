"""Peak host memory and time of loading the full-size DiT (base shards and adapter) from files.

    python -m benchmarks load_memory [--scale 14B|1.3B|flashhead] [--device cpu|cuda] [--folder DIR]

The shards are sparse files in the official layout (right headers, zeros as data), so 57 GB need no disk and
no time; they are read like any other files. Prints one line of JSON. Fails above 1.2 times the files' size.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.shared.options import make_parser
from benchmarks.shared.report import print_result
from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import DiTFiles, load_dit
from omniavatar.checkpoint.layout import TOKEN_FAMILIES, ScaleSpec, adapter_tensors, checkpoint_spec
from omniavatar.checkpoint.layout_files import checkpoint_layout
from omniavatar.checkpoint.tensor_writer import safetensors_header

LIMIT = 1.2


def write_sparse(path: Path, tensors) -> None:
    """A safetensors file of zeros that takes no disk."""
    header = safetensors_header(tensors, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.num_bytes for entry in tensors))


def write_adapter(folder: Path, spec: ScaleSpec) -> Path:
    """OmniAvatar's adapter with zeros as weights."""
    folder.mkdir()
    tensors = {key: torch.zeros(shape) for key, shape in adapter_tensors(spec.dit, spec.lora_rank)}
    torch.save(tensors, folder / "pytorch_model.pt")
    settings = {
        "lora_rank": spec.lora_rank,
        "lora_alpha": spec.lora_alpha,
        "model_config": {"in_dim": 33},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def peak_bytes() -> int:
    """Peak resident memory of this process since the last reset."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scale", default="14B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    spec = checkpoint_spec(options.scale)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, shards = Path(name), []
        for layout in checkpoint_layout(spec):
            if layout.format == "safetensors" and "diffusion_pytorch_model" in layout.path:
                shards.append(folder / Path(layout.path).name)
                write_sparse(shards[-1], layout.tensors)
        adapter = None if spec.family in TOKEN_FAMILIES else write_adapter(folder / "adapter", spec)
        whole = shards if adapter is None else [*shards, adapter / "pytorch_model.pt"]
        size = sum(path.stat().st_size for path in whole)
        device = torch.device(options.device)
        _, attention = create_attention("sdpa", device, torch.bfloat16)
        if device.type == "cuda":
            torch.zeros(1, device=device)
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak_bytes(), time.perf_counter()
        files = DiTFiles(shards, adapter)
        dit = load_dit(files, attention=attention, dtype=torch.bfloat16, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        report = {
            "scale": options.scale,
            "files_gb": size / 1e9,
            "shards": len(shards),
            "seconds": time.perf_counter() - start,
            "host_before_gb": before / 1e9,
            "host_peak_gb": peak_bytes() / 1e9,
            "ratio": peak_bytes() / size,
            "parameters": sum(parameter.numel() for parameter in dit.parameters()),
        }
    print_result("load_memory", device, **report)
    if report["ratio"] > LIMIT:
        raise SystemExit(f"error: the peak is {report['ratio']:.2f} times the files' size; limit {LIMIT}")
