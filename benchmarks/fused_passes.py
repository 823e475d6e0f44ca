"""Microseconds and bandwidth of each fused pass on one CUDA device, for several widths of a warp's share.

    python benchmarks/fused_passes.py [--tokens 30375]

`GB/s` counts the bytes a pass must read and write. A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json

import torch
import triton

from omniavatar.accel.kernels.fused_triton import TritonOps
from omniavatar.accel.kernels.rows import FP8

MODELS = {"14B": (5120, 40, 13824), "1.3B": (1536, 12, 8960)}
SHARES = (256, 512, 1024, 2048)


def passes(ops, tokens, width, heads, ffn):
    def random(*shape, kind=torch.bfloat16):
        return torch.randn(shape, device="cuda", dtype=kind)

    x, update = random(1, tokens, width), random(1, tokens, width)
    vector = random(1, 1, width, kind=torch.float32)
    packed, hidden = random(1, tokens, 3 * width), random(1, tokens, ffn)
    part, weight = packed[..., :width], random(width, kind=torch.float32)
    cos = random(tokens, width // heads // 2, kind=torch.float32)
    row = tokens * width
    yield "norm", 4 * row, lambda: ops.norm(x, vector, vector, 1e-6)
    added = {"update_BLC": update, "gate": vector}
    yield "add norm", 8 * row, lambda: ops.norm(x, vector, vector, 1e-6, **added)
    yield "add norm fp8", 7 * row, lambda: ops.norm(x, vector, vector, 1e-6, quantize=True, **added)
    yield "add gated", 6 * row, lambda: ops.add_gated(x, update, vector)
    yield "rms", 4 * row, lambda: ops.rms(part, weight, 1e-6)
    turned = (cos, cos, heads)
    yield "rms rotate", 4 * row, lambda: ops.rms_rotate(part, weight, 1e-6, *turned, torch.bfloat16)
    yield "rms rotate fp8", 3 * row, lambda: ops.rms_rotate(part, weight, 1e-6, *turned, FP8)
    yield "quantize", 3 * row, lambda: ops.quantize(x)
    yield "gelu quantize", 3 * tokens * ffn, lambda: ops.quantize(hidden, gelu=True)
    yield "quantize heads", 3 * row, lambda: ops.quantize_heads(part.unflatten(-1, (heads, -1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=30375)
    tokens = parser.parse_args().tokens
    rows = []
    for model, sizes in MODELS.items():
        for share in SHARES:
            for name, size, run in passes(TritonOps(share), tokens, *sizes):
                time = triton.testing.do_bench(run, warmup=10, rep=30, return_mode="median")
                rows.append({"model": model, "pass": name, "share": share, "us": time * 1e3, "bytes": size})
    print("| model | pass | " + " | ".join(f"{share} a warp: us (GB/s)" for share in SHARES) + " |")
    print("|---|---|" + "---|" * len(SHARES))
    for model in MODELS:
        for name in dict.fromkeys(row["pass"] for row in rows):
            cells = [
                f"{row['us']:.0f} ({row['bytes'] / row['us'] / 1e3:.0f})"
                for row in rows
                if row["model"] == model and row["pass"] == name
            ]
            print(f"| {model} | {name} | " + " | ".join(cells) + " |")
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": tokens}
    print(json.dumps({"benchmark": "fused_passes", **where, "rows": rows}))


if __name__ == "__main__":
    main()
