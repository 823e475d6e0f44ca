"""Microseconds and bandwidth of each fused pass on one CUDA device, for several widths of a warp's share and
numbers of programs.

    python benchmarks/fused_passes.py [--tokens 30375] [--shares 512 1024 2048] [--warps 8 12 16 24 32]

`GB/s` counts the bytes a pass must read and write. A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json

import torch
import triton

from omniavatar.ops.fused import FP8
from omniavatar.ops.fused_triton import TritonOps

MODELS = {"14B": (5120, 40, 13824), "1.3B": (1536, 12, 8960)}


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
    parser.add_argument("--shares", type=int, nargs="+", default=[512, 1024, 2048], help="values of a warp")
    parser.add_argument("--warps", type=int, nargs="+", default=[8, 12, 16, 24, 32], help="a multiprocessor")
    arguments = parser.parse_args()
    rows = []
    for model, sizes in MODELS.items():
        for share, warps in itertools.product(arguments.shares, arguments.warps):
            ops = TritonOps(share, warps_per_processor=warps)
            for name, size, run in passes(ops, arguments.tokens, *sizes):
                time = triton.testing.do_bench(run, warmup=10, rep=30, return_mode="median")
                row = {"model": model, "pass": name, "share": share, "warps": warps}
                rows.append({**row, "us": time * 1e3, "bytes": size})
    print("| model | pass | us (GB/s) of the ten fastest, by values a warp x warps a multiprocessor |")
    print("|---|---|---|")
    for model in MODELS:
        for name in dict.fromkeys(row["pass"] for row in rows):
            these = [row for row in rows if row["model"] == model and row["pass"] == name]
            cells = [
                f"{row['us']:.0f} ({row['bytes'] / row['us'] / 1e3:.0f}) {row['share']} x {row['warps']}"
                for row in sorted(these, key=lambda row: row["us"])[:10]
            ]
            print(f"| {model} | {name} | {'; '.join(cells)} |")
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "fused_passes", "tokens": arguments.tokens, **where, "rows": rows}))


if __name__ == "__main__":
    main()
