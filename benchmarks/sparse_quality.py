"""What plans of sparse attention lose on the pocket model: frames of one window against dense attention.

    python -m benchmarks sparse_quality [--block 16] [--section 2,2] [--shares 0.75,0.5,0.35,0.25]

Each plan makes window 0 of the packaged portrait and speech with the first step dense; calibrated plans are
measured on window 1 with another seed. Rows: PSNR of the frames to those of dense attention, relative L2 of
the latents, share of the attention matrix computed in the steps that are not dense.
Prints rows as they are made, then a table and one line of JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks.shared.options import make_parser, numbers, words
from benchmarks.shared.report import print_result, print_table
from omniavatar.accel.attention.sparse import BlockLists, block_mass, eager_sparse_attention
from omniavatar.accel.sparse_blocks import OrderedBlocks, SparseBlocks
from omniavatar.assets import PORTRAIT, SPEECH
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.recorder import NullRecorder
from omniavatar.engine.window_loop import WindowGenerator
from omniavatar.measure.quality import psnr
from omniavatar.sampling.sparsity import PlanShape, calibrated_plan, dense_plan, window_plan
from omniavatar.sampling.token_order import row_order, tile_order
from omniavatar.types import AvatarRequest

CPU = torch.device("cpu")
PROMPT = "A person talks to the camera."


class Planned:
    """`run_blocks` that follows a plan from step to step; every pass of a step attends alike."""

    def __init__(self, dit, plan, order, passes):
        self.calls, self.passes = 0, passes
        shape = plan.shape
        self.steps = []
        for step in range(shape.steps):
            kept = [plan.kept(step, layer) for layer in range(shape.layers)]
            lists = [
                None if each is None else BlockLists.of(torch.from_numpy(each), shape.block, shape.tokens)
                for each in kept
            ]
            self.steps.append(OrderedBlocks(SparseBlocks.of(dit, eager_sparse_attention, lists), order, CPU))

    def __call__(self, tokens, inputs):
        step = self.calls // self.passes % len(self.steps)
        self.calls += 1
        return self.steps[step](tokens, inputs)


class Measured:
    """`run_blocks` with dense attention that adds up the block masses of the passes of one window."""

    def __init__(self, dit, shape, order, passes, window):
        self.calls, self.passes, self.window, self.shape = 0, passes, window, shape
        self.masses = np.zeros((shape.steps, shape.layers, shape.heads, shape.blocks, shape.blocks))
        every = torch.ones(shape.heads, shape.blocks, shape.blocks, dtype=torch.bool)
        lists = [BlockLists.of(every, shape.block, shape.tokens)] * shape.layers
        self.blocks = OrderedBlocks(SparseBlocks.of(dit, self.attend, lists), order, CPU)
        self.dense = dit.attention

    def attend(self, q, k, v, lists):
        window, step = divmod(self.calls // self.passes, self.shape.steps)
        if window == self.window:
            mass = block_mass(q, k, lists.block).numpy() / self.passes
            self.masses[step, self.layer] += mass
        self.layer += 1
        return self.dense(q, k, v)

    def __call__(self, tokens, inputs):
        self.layer = 0
        out = self.blocks(tokens, inputs)
        self.calls += 1
        return out


def make(pipeline, ready, run_blocks, count, seed):
    """Frames and latents of the first `count` windows."""
    loop = WindowGenerator(
        pipeline.models.dit,
        pipeline.models.window_vae,
        ready.conditioning,
        replace(ready.window_sampling, seed=seed),
        NullRecorder(),
        run_blocks=run_blocks,
    )
    results = list(loop.run(ready.plan.windows[:count]))
    return np.concatenate([frame for result in results for frame in result.frames]), results[0].latent


def at_share(shape, mass, share, dense_steps):
    """The calibrated plan that computes `share` of the matrix in its sparse steps, and the mass it keeps."""
    low, high = 0.0, 1.0
    sparse = [step for step in range(shape.steps) if step not in dense_steps]
    for _ in range(12):
        middle = (low + high) / 2
        plan = calibrated_plan(shape, mass, middle, dense_steps)
        low, high = (middle, high) if plan.shares()[sparse].mean() < share else (low, middle)
    return plan, middle


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument(
        "--section", type=numbers, default=[2, 2], help="frames and rows of a tile's cross-section"
    )
    parser.add_argument("--shares", type=words, default=["0.75", "0.5", "0.35", "0.25"])
    given = parser.parse_args(arguments)
    shares = [float(share) for share in given.shares]
    pipeline = AvatarPipeline.from_config("pocket")
    rows = []
    with pipeline.prepare(AvatarRequest(PROMPT, PORTRAIT, SPEECH)) as ready:
        pipeline.models.load_for_windows()
        dit, sampling = pipeline.models.dit, ready.window_sampling
        passes, steps = len(sampling.passes[0]), len(sampling.passes)
        latent = ready.conditioning.reference_latent.shape
        grid = (ready.plan.windows[0].latent_frames, latent[-2] // 2, latent[-1] // 2)
        tiles = tile_order(grid, tuple(given.section))
        shape = PlanShape(steps, dit.config.num_layers, dit.config.num_heads, grid, given.block)
        print(f"{grid} tokens, {shape.blocks} blocks, {steps} steps of {passes} passes", flush=True)
        dense, dense_latent = make(pipeline, ready, dit.run_blocks, 1, 42)

        def add(name, plan, order, **more):
            frames, made = make(pipeline, ready, Planned(dit, plan, order, passes), 1, 42)
            sparse = [step for step in range(steps) if plan.kept(step, 0) is not None]
            row = {"plan": name, "share": float(plan.shares()[sparse].mean()) if sparse else 1.0, **more}
            row["psnr"] = psnr(frames, dense)
            row["latent_error"] = ((made - dense_latent).norm() / dense_latent.norm()).item()
            rows.append(row)
            print(row, flush=True)

        add("dense, tile order", dense_plan(shape), tiles)
        masses = {}
        for name, order in (("tiles", tiles), ("rows", row_order(grid))):
            meter = Measured(dit, shape, order, passes, window=1)
            make(pipeline, ready, meter, 2, 7)
            masses[name] = meter.masses
        for share in shares:
            add("window", window_plan(shape, tiles, share, [0]), tiles)
            plan, mass = at_share(shape, lambda step, layer: masses["tiles"][step, layer], share, [0])
            add("calibrated", plan, tiles, mass=mass)
        share = shares[-2]
        plan, mass = at_share(shape, lambda step, layer: masses["rows"][step, layer], share, [0])
        add("calibrated, row order", plan, row_order(grid), mass=mass)
        add("window, row order", window_plan(shape, row_order(grid), share, [0]), row_order(grid))
        plan, mass = at_share(shape, lambda step, layer: masses["tiles"][step, layer], share, [])
        add("calibrated, first step sparse", plan, tiles, mass=mass)
        mean = masses["tiles"].mean(0)
        plan, mass = at_share(shape, lambda step, layer: mean[layer], share, [0])
        add("calibrated, one for all steps", plan, tiles, mass=mass)
    heads = ["plan", "share", "mass", "psnr", "latent_error"]
    print_table(
        heads,
        [
            [f"{row[key]:.4g}" if key in row and key != "plan" else row.get(key, "-") for key in heads]
            for row in rows
        ],
    )
    print_result("sparse_quality", CPU, block=given.block, section=given.section, grid=grid, rows=rows)
