"""One forward of the full-size DiT with random weights: each optimisation added to the ones before it.

    python -m benchmarks forward [--scales 14B] [--repeats 5] [--profile] [--variants fused] [--backends fa3]

Times at 400x720 with 27 and 14 latent frames (30,375 and 15,750 tokens) and at 480x832 with 21 (32,760).
Error: relative L2 of the output against the same weights run block by block in float32, at 5 latent frames.
Twin: the same error against the same blocks with the eager passes and PyTorch's own attention, which round
where the kernels round and add up in float32.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.shared.options import add_repeats, make_parser, words
from benchmarks.shared.report import print_result, print_table, spread
from benchmarks.shared.timing import require_cuda, timed
from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import ATTENTION, create_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.kernels.rows import EagerOps
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
GRIDS = {30375: (27, 50, 90), 15750: (14, 50, 90), 32760: (21, 60, 104)}
ERROR_GRID = (5, 50, 90)
LADDER = (
    ("plain", AccelConfig(), ("cudnn", "fa3")),
    ("fused", AccelConfig(fuse=True), ("cudnn", "fa3", "fa3_fp8")),
    ("fp8 fused", AccelConfig("fp8", True), ("fa3", "fa3_fp8")),
)


def inputs(dit, grid):
    """Random arguments of one forward on a latent clip `grid` (T, h, w)."""
    device = next(dit.parameters()).device
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device)

    frames = 4 * grid[0] - 3
    text = dit.prepare_text(random(1, 512, dit.config.text_dim))
    audio = dit.prepare_audio(random(1, frames, dit.config.audio_dim))
    return random(1, 16, *grid), random(1, 17, *grid), torch.tensor([800.0], device=device), text, audio


def reference(dit):
    """The output with every block in float32, copied one block at a time."""
    _, attention = create_attention("efficient", DEVICE, torch.float32)
    args = inputs(dit, ERROR_GRID)

    def run_blocks(tokens, given):
        tokens = tokens.float()
        for block, (k, v), audio in zip(dit.blocks, given.text, given.audio, strict=True):
            wide = copy.deepcopy(block).float()
            heard = None if audio is None else audio.float()
            tokens = wide(tokens, given.modulation, given.rope, (k.float(), v.float()), heard, attention)
        return tokens

    return dit(*args, run_blocks=run_blocks)


def twin(dit, ops):
    """The output with the eager passes and attention instead of the kernels."""
    _, attention = create_attention("efficient", DEVICE, DTYPE)
    fast = dit.attention
    dit.attention = dit.text_attention = attention
    use(dit, EagerOps())
    out = dit(*inputs(dit, ERROR_GRID))
    use(dit, ops)
    dit.attention = dit.text_attention = fast
    return out


def use(dit, ops):
    """Give every fused block and float8 layer these passes."""
    for module in dit.modules():
        if "_ops" in vars(module):
            module._ops = ops


def relative_l2(a, b):
    """Relative L2 distance of two tensors."""
    return ((a - b).norm() / b.norm()).item()


def profile(dit, grid, rows=18):
    """Print the kernels of one forward by the time they take."""
    args = inputs(dit, grid)
    dit(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        dit(*args)
        torch.cuda.synchronize()
    print(
        trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=70)
    )


@torch.inference_mode()
def measure(scale, repeats, with_profile, variants, only):
    """The rows of one scale. only: attention backends; all of a variant's if empty."""
    spec, ops = scale_spec(scale), create_fused(DEVICE)
    available = ATTENTION.available(DEVICE)
    expected, rows = None, []
    for name, config, backends in LADDER:
        if name not in variants:
            continue
        _, attention = create_attention("cudnn", DEVICE, DTYPE)
        dit = random_dit(spec.dit, attention=attention, dtype=DTYPE, device=DEVICE, seed=0)
        if expected is None:
            expected = reference(dit)
        apply_accelerations(dit, config, ops)
        torch.cuda.empty_cache()
        for backend in backends:
            if only and backend not in only:
                continue
            if backend not in available:
                print(f"attention {backend} is not available: skipped")
                continue
            dit.attention = dit.text_attention = create_attention(backend, DEVICE, DTYPE)[1]
            row = {"scale": scale, "variant": name, "attention": backend}
            out = dit(*inputs(dit, ERROR_GRID))
            row["error"] = relative_l2(out, expected)
            row["twin_error"] = relative_l2(out, twin(dit, ops))
            for tokens, grid in GRIDS.items():
                if tokens == 32760 and (scale != "14B" or name == "plain"):
                    continue
                torch.cuda.reset_peak_memory_stats()
                args = inputs(dit, grid)
                times = timed(partial(dit, *args), repeats)
                row[str(tokens)] = times.median
                row[f"{tokens}_spread"] = times.spread
                row[f"{tokens}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row)
            print(row, flush=True)
            if with_profile and backend == backends[-1] and name != "plain":
                profile(dit, GRIDS[30375])
        del dit
        torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scales", type=words, default=["14B", "1.3B"])
    add_repeats(parser)
    parser.add_argument("--profile", action="store_true", help="print the kernels of fused variants too")
    parser.add_argument("--variants", type=words, default=[name for name, _, _ in LADDER])
    parser.add_argument(
        "--backends", type=words, default=[], help="attention backends (default: all of the variant's)"
    )
    options = parser.parse_args(arguments)
    require_cuda()
    rows = []
    for scale in options.scales:
        rows += measure(scale, options.repeats, options.profile, options.variants, options.backends)
    heads = ["model", "variant", "attention", "error", "twin", *(f"{n:,}" for n in GRIDS), "peak GiB"]
    print_table(heads, map(cells, rows))
    print_result("forward", repeats=options.repeats, rows=rows)


def cells(row):
    """A row of the table."""
    times = [spread(row[str(n)], *row[f"{n}_spread"]) if str(n) in row else "-" for n in GRIDS]
    errors = f"{row['error']:.2e}", f"{row['twin_error']:.2e}"
    return row["scale"], row["variant"], row["attention"], *errors, *times, f"{row['30375_peak_gib']:.1f}"
