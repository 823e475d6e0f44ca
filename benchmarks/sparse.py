"""Block-sparse attention: errors against the eager twin, times at each share kept, whole forwards.

    python -m benchmarks sparse [--parts errors,times,forwards] [--sizes 40x30375] [--shares 1,0.5]

errors: each backend against the twin in float32, on inputs of order one that differ a head, with uneven
lists and tokens that do not fill the last block.
times: random lists (the twin of a calibrated plan) and the window plan, beside dense FlashAttention-3.
forwards: the full-size DiT with random weights and float8 layers, tokens in tile order, window plan; the
distance to the same model with FlashAttention-3 in bf16, of which a share below 1 is what was left out.
Prints rows as they are measured, then for each part a table and one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import math
import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.shared.options import add_repeats, make_parser, numbers, words
from benchmarks.shared.report import print_result, print_table
from benchmarks.shared.timing import require_cuda
from omniavatar.accel.attention.sparse import BlockLists, block_mass, eager_sparse_attention
from omniavatar.accel.attention.sparse_registry import SPARSE
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.kernels.rows import FP8, FP8_MAX
from omniavatar.sampling.sparsity import (
    FRAME_DISTANCE,
    PlanShape,
    calibrated_plan,
    nearest_blocks,
    window_plan,
)
from omniavatar.sampling.token_order import tile_order

DEVICE, BLOCK = torch.device("cuda"), 128
GRIDS = {30375: (27, 25, 45), 15750: (14, 25, 45)}
LATENTS = {30375: (27, 50, 90), 15750: (14, 50, 90)}


def relative_l2(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def inputs(heads, tokens, seed=0):
    """q, k, v (1, L, H, D) bf16: rows of order one with a common part, so that some keys matter more."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    shared = random(1, tokens // 64 + 1, heads, 128).repeat_interleave(64, 1)[:, :tokens]
    q, k = (0.5 * shared + random(1, tokens, heads, 128) for _ in range(2))
    v = random(1, tokens, heads, 128) * (1 + random(1, 1, heads, 1).abs()) + random(1, 1, heads, 128)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def random_lists(heads, tokens, share, seed=0):
    """Lists of about `share`, of different lengths; every block keeps itself."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    blocks = math.ceil(tokens / BLOCK)
    kept = torch.rand(heads, blocks, blocks, generator=generator, device=DEVICE) < share
    kept |= torch.eye(blocks, dtype=torch.bool, device=DEVICE)
    return BlockLists.of(kept, BLOCK, tokens)


def window_lists(heads, tokens, share):
    table = nearest_blocks(tile_order(GRIDS[tokens]), BLOCK, share, FRAME_DISTANCE)
    kept = torch.from_numpy(table).to(DEVICE).expand(heads, -1, -1)
    return BlockLists.of(kept, BLOCK, tokens)


def backends(wanted):
    """The wanted sparse backends by name; one that is not installed is named and left out."""
    reasons = {name: SPARSE.get(name).unavailable(DEVICE) for name in wanted}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name} is left out: {reason}")
    return {name: SPARSE.get(name).create(DEVICE) for name in wanted if reasons[name] is None}


def rounded(x):
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def without_lists(attention):
    return lambda q, k, v, lists: attention(q, k, v)


def measure_errors(found):
    """Against the twin in float32 on the bf16 inputs, and on inputs as the float8 kernel rounds q and k."""
    rows = []
    for heads, tokens, share in [
        (3, 128, 1.0),
        (3, 1000, 0.4),
        (2, 4096 + 39, 0.3),
        (12, 5000, 1.0),
        (2, 30375, 1.0),
        (2, 30375, 0.35),
    ]:
        q, k, v = inputs(heads, tokens)
        lists = random_lists(heads, tokens, share)
        exact = eager_sparse_attention(q.float(), k.float(), v.float(), lists)
        same = eager_sparse_attention(rounded(q).float(), rounded(k).float(), v.float(), lists)
        dense = {name: without_lists(each) for name, each in dense_backends().items()} if share == 1 else {}
        for name, attention in (found | dense).items():
            row = {"heads": heads, "tokens": tokens, "share": share, "backend": name}
            out = attention(q, k, v, lists)
            row["error"] = relative_l2(out, exact)
            row["error_to_rounded"] = relative_l2(out, same)
            row["repeats_exactly"] = bool(torch.equal(out, attention(q, k, v, lists)))
            rows.append(row)
            print(row, flush=True)
    return rows


def timed(run, seconds):
    """Milliseconds by device events: median, least, most."""
    run()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    repeats = max(5, min(200, int(seconds * 1e3 / max(begin.elapsed_time(end), 1e-2))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in events]
    return statistics.median(times), min(times), max(times)


def dense_backends():
    """FlashAttention-3 as the engine uses it: in bf16, and float8 with q and k handed over in float8."""
    from omniavatar.accel.attention.registry import create_attention

    return {name: create_attention(name, DEVICE, torch.bfloat16)[1] for name in ("fa3", "fa3_fp8")}


@torch.inference_mode()
def measure_times(found, sizes, shares, seconds, plans):
    rows = []
    for heads, tokens in sizes:
        q, k, v = inputs(heads, tokens)
        q8, k8 = rounded(q), rounded(k)
        work = 4 * heads * tokens**2 * 128
        for name, attention in dense_backends().items():
            ms = timed(partial(attention, *((q8, k8) if name == "fa3_fp8" else (q, k)), v), seconds)
            rows.append(
                {
                    "heads": heads,
                    "tokens": tokens,
                    "backend": name,
                    "share": 1.0,
                    "ms": ms[0],
                    "spread": ms[1:],
                }
            )
            rows[-1]["tflops"] = work / ms[0] / 1e9
            print(rows[-1], flush=True)
        for name, attention in found.items():
            if name == "float8":
                ms = timed(partial(attention.transposed, v[0]), seconds)[0]
                print({"heads": heads, "tokens": tokens, "prepare v": ms}, flush=True)
        ms = timed(partial(block_mass, q, k, BLOCK), 0.0)
        rows.append({"heads": heads, "tokens": tokens, "backend": "block_mass", "ms": ms[0]})
        print(rows[-1], flush=True)
        for share in shares:
            for plan in plans:
                lists = {"random": random_lists, "window": window_lists}[plan](heads, tokens, share)
                kept = lists.counts.float().mean().item() / lists.counts.shape[1]
                for name, attention in found.items():
                    given = (q8, k8) if name == "float8" else (q, k)
                    row = {"heads": heads, "tokens": tokens, "backend": name, "plan": plan, "share": share}
                    ms = timed(partial(attention, *given, v, lists), seconds)
                    row |= {"kept": kept, "ms": ms[0], "spread": ms[1:], "tflops": kept * work / ms[0] / 1e9}
                    rows.append(row)
                    print(row, flush=True)
        del q, k, v, q8, k8
    return rows


def forward_inputs(dit, grid):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    text = dit.prepare_text(random(1, 512, dit.config.text_dim))
    audio = dit.prepare_audio(random(1, 4 * grid[0] - 3, dit.config.audio_dim))
    return random(1, 16, *grid), random(1, 17, *grid), torch.tensor([800.0], device=DEVICE), text, audio


@torch.inference_mode()
def measure_forwards(found, scales, shares, repeats, sizes, scattered):
    from omniavatar.accel.apply import AccelConfig, apply_accelerations
    from omniavatar.accel.attention.registry import create_attention
    from omniavatar.accel.sparse_blocks import OrderedBlocks
    from omniavatar.accel.sparse_steps import SparseSteps
    from omniavatar.checkpoint.dit import random_dit
    from omniavatar.checkpoint.layout import scale_spec

    rows = []
    for scale in scales:
        spec = scale_spec(scale)
        exact, attention = (create_attention(name, DEVICE, torch.bfloat16)[1] for name in ("fa3", "fa3_fp8"))
        dit = random_dit(spec.dit, attention=attention, dtype=torch.bfloat16, device=DEVICE, seed=0)
        apply_accelerations(dit, AccelConfig("fp8", True), create_fused(DEVICE))
        dit.text_attention = create_attention("cudnn", DEVICE, torch.bfloat16)[1]
        torch.cuda.empty_cache()
        heads, layers = spec.dit.num_heads, spec.dit.num_layers
        for tokens in sizes:
            args = forward_inputs(dit, LATENTS[tokens])
            order = tile_order(GRIDS[tokens])
            dit.attention = exact
            expected = dit(*args)
            bf16 = forward_times(partial(dit, *args), repeats)
            dit.attention = attention
            ordered = OrderedBlocks(dit.run_blocks, order, DEVICE)
            cases = {("fa3_fp8", 1.0): None, ("fa3_fp8, tile order", 1.0): ordered}
            shape = PlanShape(1, layers, heads, GRIDS[tokens], BLOCK)
            for share in shares:
                plan = window_plan(shape, order, share)
                for name, sparse in found.items():
                    cases[name, share] = by_plan(SparseSteps(dit, plan, sparse, dit.run_blocks, DEVICE))
            for name, sparse in found.items() if scattered else ():
                plan = scattered_plan(shape, scattered)
                steps = SparseSteps(dit, plan, sparse, dit.run_blocks, DEVICE)
                cases[f"{name}, own blocks in each head", scattered] = by_plan(steps)
            rows.append({"scale": scale, "tokens": tokens, "attention": "fa3", "share": 1.0, **figures(bf16)})
            print(rows[-1], flush=True)
            for (name, share), run_blocks in cases.items():
                run = partial(dit, *args, run_blocks=run_blocks)
                row = {"scale": scale, "tokens": tokens, "attention": name, "share": share}
                row["distance_to_bf16"] = relative_l2(run(), expected)
                row |= figures(forward_times(run, repeats))
                rows.append(row)
                print(row, flush=True)
        del dit, args, expected
        torch.cuda.empty_cache()
    return rows


def by_plan(steps):
    """The blocks of the only step of a plan, in tile order."""
    return steps.ordered(steps, always=True)


def scattered_plan(shape, share):
    """Other blocks in every head of every layer, of different numbers, as a calibrated plan has them."""
    generator = np.random.default_rng(0)

    def mass(step, layer):
        kept = generator.random((shape.heads, shape.blocks, shape.blocks), np.float32) < share
        kept |= np.eye(shape.blocks, dtype=bool)
        return kept / kept.sum(-1, keepdims=True, dtype=np.float32)

    return calibrated_plan(shape, mass, 1 - 1e-4)


def figures(times):
    return {"ms": statistics.median(times), "spread": [min(times), max(times)]}


def forward_times(run, repeats):
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def versions():
    """Versions of the packages with kernels; None for one that is not installed."""
    found = {}
    for package in ("triton", "fa3-fwd", "flash-attn-4", "nvidia-cutlass-dsl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def shares(text):
    """The shares of a comma-separated list."""
    return [float(word) for word in words(text)]


def head_sizes(text):
    """(heads, tokens) of each HEADSxTOKENS of a comma-separated list."""
    return [tuple(int(each) for each in word.split("x")) for word in words(text)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--parts", type=words, default=["errors", "times", "forwards"])
    parser.add_argument(
        "--sizes", type=head_sizes, default=[(40, 30375), (40, 15750), (12, 30375), (12, 15750)]
    )
    parser.add_argument("--shares", type=shares, default=[1.0, 0.75, 0.5, 0.35, 0.25, 0.15])
    parser.add_argument("--plans", type=words, default=["random", "window"], help="of the times")
    parser.add_argument("--backends", type=words, default=["fa4", "float8"])
    parser.add_argument("--scales", type=words, default=["14B", "1.3B"])
    parser.add_argument("--forward-shares", type=shares, default=[1.0, 0.35, 0.25])
    parser.add_argument("--forward-tokens", type=numbers, default=list(GRIDS))
    parser.add_argument(
        "--scattered", type=float, default=0.35, help="share of a plan whose heads keep other blocks; 0: none"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measured time")
    add_repeats(parser)
    given = parser.parse_args(arguments)
    require_cuda()
    found = backends(given.backends)
    parts = {
        "errors": lambda: measure_errors(found),
        "times": lambda: measure_times(found, given.sizes, given.shares, given.seconds, given.plans),
        "forwards": lambda: measure_forwards(
            found, given.scales, given.forward_shares, given.repeats, given.forward_tokens, given.scattered
        ),
    }
    for part in given.parts:
        rows = parts[part]()
        heads = list(dict.fromkeys(key for row in rows for key in row))
        print_table(heads, [[cell(row.get(key, "-")) for key in heads] for row in rows])
        print_result(f"sparse {part}", **versions(), rows=rows)


def cell(value):
    """A value of the table."""
    return f"{value:.4g}" if isinstance(value, float) else value
