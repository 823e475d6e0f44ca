"""Microseconds and bandwidth of each fused pass on one CUDA device, for several widths of a warp's share.

    python -m benchmarks fused_passes [--tokens 30375]

`GB/s` counts the bytes a pass must read and write. Prints a table, then one line of JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.shared.options import make_parser
from benchmarks.shared.report import print_result, print_table
from benchmarks.shared.timing import require_cuda
from omniavatar.accel.kernels.rows import FP8

MODELS = {"14B": (5120, 40, 13824), "1.3B": (1536, 12, 8960)}
SHARES = (256, 512, 1024, 2048)


def passes(ops, tokens, width, heads, ffn):
    """(name, bytes read and written, function) of each pass."""

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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--tokens", type=int, default=30375)
    tokens = parser.parse_args(arguments).tokens
    require_cuda()
    import triton

    from omniavatar.accel.kernels.fused_triton import TritonOps

    rows = []
    for model, sizes in MODELS.items():
        for share in SHARES:
            for name, size, run in passes(TritonOps(share), tokens, *sizes):
                time = triton.testing.do_bench(run, warmup=10, rep=30, return_mode="median")
                rows.append({"model": model, "pass": name, "share": share, "us": time * 1e3, "bytes": size})
    by_pass: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        bandwidth = row["bytes"] / row["us"] / 1e3
        by_pass.setdefault((row["model"], row["pass"]), []).append(f"{row['us']:.0f} ({bandwidth:.0f})")
    heads = ["model", "pass", *(f"{share} a warp: us (GB/s)" for share in SHARES)]
    print_table(heads, [[*key, *cells] for key, cells in by_pass.items()])
    print_result("fused_passes", tokens=tokens, rows=rows)
