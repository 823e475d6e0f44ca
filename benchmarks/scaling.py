"""One forward and one guided step of the full-size DiT with random weights on several GPUs.

    torchrun --standalone --nproc_per_node=2 -m benchmarks scaling [--scale 14B] [--cfg 2] [--fsdp]
        [--exchange collective] [--graphs]

The processes are cfg groups of sp = N / cfg ranks. One run times the forward of one GPU (every rank alone, at
the same time), of sp ranks, of sp ranks with exchanges that move nothing (the difference is the cost of the
exchanges), and the exchanges alone. Of the forward that moves nothing the slowest rank counts, because the
others wait for it.
--graphs also times the shared forward as a CUDA graph and compares it with the eager one.
--device cpu rehearses: `--nproc_per_node=8 -m benchmarks scaling --device cpu --scale nano --tokens 60`.
--cfg times a step of two branches instead, in series on one GPU and on all ranks.
Error: relative L2 of the shared forward against the same rank's own.
Rank 0 prints a table, then one line of JSON. `scaling_vae` does the same for the VAE.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.forward import GRIDS as FULL_GRIDS
from benchmarks.forward import inputs
from benchmarks.scaling_vae import SilentHeads, SilentPeers, SilentRows, ranks_of_host
from benchmarks.shared.options import add_device, add_repeats, make_parser
from benchmarks.shared.report import print_result, spread
from benchmarks.shared.timing import peak_gb, synchronize, timed
from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.graphs import CudaCapture, GraphedBlocks
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.parallel.rank_layout import Layout, deal
from omniavatar.parallel.ranks import Ranks
from omniavatar.parallel.weights import apply_shared_weights
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import plan_passes
from omniavatar.types import StepPlan

GRIDS = {**FULL_GRIDS, 60: (3, 8, 10)}
"""Latent frames, rows and columns by tokens; 60 is for rehearsals on a CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scale", default="14B")
    parser.add_argument("--tokens", type=int, default=30375, choices=sorted(GRIDS))
    parser.add_argument("--cfg", type=int, default=1, help="groups that share guidance")
    parser.add_argument("--fsdp", action="store_true", help="share the weights among the ranks too")
    parser.add_argument("--quantize", default="none", choices=["none", "fp8"])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--exchange", default="auto", choices=["auto", "direct", "collective"])
    parser.add_argument("--graphs", action="store_true", help="also the shared forward as a CUDA graph")
    add_device(parser)
    add_repeats(parser)
    options = parser.parse_args(arguments)
    with ranks_of_host(options.device) as (team, device):
        measure(options, team, device)


def measure(options, team: Ranks, device):
    """Measure on all ranks; the leader prints."""
    spec = scale_spec(options.scale).dit
    layout = Layout(options.cfg, team.size // options.cfg, spec.num_heads)
    exchange = team.arrange(layout, options.exchange)
    name, attention = create_attention(options.attention, device, torch.bfloat16)
    dit = random_dit(spec, attention=attention, dtype=torch.bfloat16, device=device, seed=0)
    ops = create_fused(device)
    apply_accelerations(dit, AccelConfig(options.quantize, True), ops)
    args = inputs(dit, GRIDS[options.tokens])
    found, slow = {}, {}

    def measured(label, run):
        team.meet()
        times = timed(run, options.repeats)
        found[label] = [times.median, *times.spread]
        slowest = torch.tensor(times.median, device=device)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        slow[label] = float(slowest)
        return times.median

    def forward():
        return dit(*args, run_blocks=team.shard(dit.run_blocks))

    passes = plan_passes(StepPlan((True,)), guidance_branches(4.5, 4.5, True), True)
    velocities = team.velocities(passes)

    def step():
        return list(velocities(passes[0], lambda each: forward(), args[0]))

    what, single, several = "forward", lambda: dit(*args), forward
    if layout.guidance > 1:
        what, single, several = "step", lambda: [dit(*args) for _ in passes[0]], step

    with torch.inference_mode():
        alone = dit(*args)
        one = measured(f"{what}, one GPU", single)
        team.apply(dit)
        if options.fsdp:
            apply_shared_weights(dit, team.weight_peers(), device)
            torch.cuda.empty_cache()
        error = float((forward() - alone).norm() / alone.norm())
        shared = measured(f"{what}, shared", several)
        if layout.sequence > 1 and layout.guidance == 1:
            sequence = team._sequence
            found["queued by the host"] = queued(forward, options.repeats)
            if options.graphs:
                graphed = GraphedBlocks(dit.run_blocks, CudaCapture())
                replayed = lambda: dit(*args, run_blocks=team.shard(graphed))  # noqa: E731
                eager = forward()
                found["error of the graph"] = max(float((replayed() - eager).abs().max()) for _ in range(6))
                measured("forward, shared, one graph", replayed)
                found["graph queued by the host"] = queued(replayed, options.repeats)
            real = sequence.whole, sequence.heads, sequence.rows
            whole = sequence.whole
            sequence.whole = SilentPeers(whole.group, whole.index, whole.size)
            sequence.heads = SilentHeads(sequence.heads.index, sequence.heads.size)
            sequence.rows = SilentRows(sequence.rows.index, sequence.rows.size)
            measured("forward, shared, nothing moved", forward)
            silent = slow["forward, shared, nothing moved"]  # exchanges wait for the slowest rank
            sequence.whole, sequence.heads, sequence.rows = real
            exchanges = measured("exchanges alone", lambda: exchange_all(sequence, spec, device))
            found["share of the exchanges hidden"] = 1 - (shared - silent) / exchanges
    found["peak GB"] = peak_gb(device)
    if not team.leads:
        return
    print(f"{options.scale}, {options.tokens} tokens, {name}, {options.quantize}, {layout}; {exchange}")
    for label, values in found.items():
        text = f"{values:.4f}" if isinstance(values, float) else f"{spread(*values, digits=4)} s"
        print(f"{label:32} {text}")
    for label, value in slow.items():
        print(f"slowest rank, {label:32} {value:.4f} s")
    print(f"{one / shared:.3f} times one GPU; error {error:.2e}")
    print_result(
        "scaling",
        device,
        **{key: value for key, value in vars(options).items() if key not in ("attention", "device")},
        attention=name,
        gpus=team.size,
        heads=exchange,
        seconds=found,
        slowest_rank=slow,
        speedup=one / shared,
        error=error,
        nccl_env={key: value for key, value in os.environ.items() if key.startswith("NCCL_")},
    )


def queued(run, repeats):
    """Seconds the host takes to queue `run` on an idle device: [median, fastest, slowest]."""
    times = []
    for _ in range(repeats):
        synchronize()
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    synchronize()
    return [statistics.median(times), min(times), max(times)]


def exchange_all(sequence, spec, device):
    """The exchanges of one forward, one after the other."""
    heads, whole = sequence.heads, sequence.whole
    counts = sequence.counts[sequence.rows.index * heads.size :][: heads.size]
    share = spec.num_heads // heads.size
    options = {"dtype": torch.bfloat16, "device": device}
    mine = torch.zeros(1, counts[heads.index], spec.num_heads, spec.head_dim, **options)
    out = torch.zeros(sum(counts), 1, share, spec.head_dim, **options)
    rows = [sum(part) for part in zip(*[iter(sequence.counts)] * heads.size, strict=True)]
    for _ in range(spec.num_layers):
        if heads.size > 1:
            for _ in range(3):
                heads.to_heads(mine, slice(0, share), counts).wait()
            heads.to_tokens(out, counts).wait()
        if sequence.rows.size > 1:
            for _ in range(2):
                sequence.rows.spread(out, rows).wait()
    total = deal(sum(sequence.counts), whole.size)
    whole.gather(mine.new_zeros(total[whole.index], spec.dim), total)
