"""Peak host memory and time of loading the full-size DiT (base shards and adapter) from files.

    python benchmarks/load_memory.py [--scale 14B] [--device cpu|cuda] [--folder DIR]

The shards are sparse files in the official layout (right headers, zeros as data), so that 57 GB need no
disk and no time; they are read like any other. One line of JSON; fails above 1.2 times the files' size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import DiTFiles, load_dit
from omniavatar.checkpoint.layout import adapter_tensors, scale_spec
from omniavatar.checkpoint.layout_files import checkpoint_layout
from omniavatar.checkpoint.tensor_writer import safetensors_header

LIMIT = 1.2


def write_sparse(path: Path, tensors) -> None:
    header = safetensors_header(tensors, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.num_bytes for entry in tensors))


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="14B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    spec = scale_spec(arguments.scale)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, shards = Path(name), []
        for layout in checkpoint_layout(spec):
            if layout.format == "safetensors" and "diffusion_pytorch_model" in layout.path:
                shards.append(folder / Path(layout.path).name)
                write_sparse(shards[-1], layout.tensors)
        adapter = folder / "adapter"
        adapter.mkdir()
        tensors = {key: torch.zeros(shape) for key, shape in adapter_tensors(spec.dit, spec.lora_rank)}
        torch.save(tensors, adapter / "pytorch_model.pt")
        del tensors
        settings = {
            "lora_rank": spec.lora_rank,
            "lora_alpha": spec.lora_alpha,
            "model_config": {"in_dim": 33},
        }
        (adapter / "config.json").write_text(json.dumps(settings))
        size = sum(path.stat().st_size for path in (*shards, adapter / "pytorch_model.pt"))
        device = torch.device(arguments.device)
        _, attention = create_attention("sdpa", device, torch.bfloat16)
        if device.type == "cuda":
            torch.zeros(1, device=device)
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak_kib(), time.perf_counter()
        files = DiTFiles(shards, adapter)
        dit = load_dit(files, attention=attention, dtype=torch.bfloat16, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        report = {
            "benchmark": "load_memory",
            "scale": arguments.scale,
            "device": arguments.device,
            "torch": torch.__version__,
            "files_gb": size / 1e9,
            "shards": len(shards),
            "seconds": time.perf_counter() - start,
            "host_before_gb": before * 1024 / 1e9,
            "host_peak_gb": peak_kib() * 1024 / 1e9,
            "ratio": peak_kib() * 1024 / size,
            "parameters": sum(parameter.numel() for parameter in dit.parameters()),
        }
    print(json.dumps(report))
    if report["ratio"] > LIMIT:
        raise SystemExit(f"error: peak of {report['ratio']:.2f} times the files, {LIMIT} allowed")


if __name__ == "__main__":
    main()
