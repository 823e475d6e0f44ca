"""FlashHead and LeapTalk at full size with random weights: the parts of a chunk, and how exact they are.

    python -m benchmarks family [--size 512x512] [--repeats 10]

Times on the device: a forward (bf16 and float8, as one graph), decoding and encoding by the VAE and by TAEHV,
colour match of a chunk, speech of eight chunks. Errors: relative L2 of a forward against the same weights in
float32; of the other parts against the CPU or against float32. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.options import add_repeats, make_parser
from benchmarks.shared.report import print_result, print_table
from benchmarks.shared.timing import require_cuda, timed
from omniavatar.accel.apply import AccelConfig, apply_accelerations, row_dtype
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.attention.timing import choose_attention
from omniavatar.accel.decoder import tiny_vae
from omniavatar.accel.graphs import CudaCapture, GraphedBlocks
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.chunk_audio import ChunkEars
from omniavatar.model.colour import ColourMatch
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import WINDOW_ROWS
from omniavatar.sampling.chunks import ChunkRule

CUDA, DTYPE = torch.device("cuda"), torch.bfloat16
RULE = ChunkRule()
VARIANTS = {"bf16": AccelConfig("none", True), "fp8": AccelConfig("fp8", True)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA)


def relative_l2(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of two tensors."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def forward_of(dit: WanDiT, size: tuple[int, int], run_blocks: Any = None) -> Callable[[], Tensor]:
    """One forward of a chunk, its audio tokens made before."""
    grid = (RULE.latents, size[0] // 8, size[1] // 8)
    windows = random(1, RULE.frames, WINDOW_ROWS, dit.config.audio_dim, seed=3)
    text, audio = dit.prepare_audio_tokens(windows), dit.prepare_audio(None)
    sample, y = random(1, 16, *grid), random(1, 16, *grid, seed=1)
    return partial(dit, sample, y, torch.tensor([1000.0], device=CUDA), text, audio, run_blocks=run_blocks)


def measured(name: str, run: Callable[[], object], repeats: int, error: float | None) -> dict[str, Any]:
    """A row: seconds of `run`."""
    times = timed(run, repeats)
    return {"part": name, "seconds": times.median, "spread": times.spread, "error": error}


@torch.inference_mode()
def forwards(size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Rows of the forwards."""
    spec = scale_spec("1.3B", "flashhead").dit
    attention = choose_attention("auto", CUDA, DTYPE, spec.num_heads, spec.dim // spec.num_heads)[1]
    plain = random_dit(spec, attention=attention, dtype=DTYPE, device=CUDA, seed=0)
    wide = copy.deepcopy(plain).float()
    exact = WanDiT(spec, create_attention("efficient", CUDA, torch.float32)[1])
    exact.load_state_dict(wide.state_dict(), assign=True)
    expected = forward_of(exact.eval(), size)()
    del wide, exact
    rows = []
    for name, config in VARIANTS.items():
        dit = copy.deepcopy(plain)
        apply_accelerations(dit, config, create_fused(CUDA, row_dtype(config.quantize)))
        error = relative_l2(forward_of(dit, size)(), expected)
        graphed = forward_of(dit, size, GraphedBlocks(dit.run_blocks, CudaCapture()))
        for _ in range(6):
            graphed()
        rows.append(measured(f"forward, {name}", graphed, repeats, error))
        windows = random(1, RULE.frames, WINDOW_ROWS, spec.audio_dim)
        rows.append(
            measured(f"audio tokens, {name}", partial(dit.prepare_audio_tokens, windows), repeats, None)
        )
    return rows


@torch.inference_mode()
def coders(size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Rows of decoding a chunk and of encoding its hand-over."""
    sizes = scale_spec("1.3B", "flashhead").vae
    latent = random(1, 16, RULE.latents, size[0] // 8, size[1] // 8)
    clip = random(1, 3, RULE.given, *size).clamp_(-1, 1)
    rows = []
    full = random_vae(sizes, dtype=DTYPE, device=CUDA, seed=0)
    made = {
        "vae": apply_fast_vae(full, FastVAEConfig("triton")),
        "taehv": tiny_vae(None, sizes, DTYPE, CUDA),
    }
    wide = {
        "vae": random_vae(sizes, dtype=torch.float32, device=CUDA, seed=0),
        "taehv": tiny_vae(None, sizes, torch.float32, CUDA),
    }
    wide["vae"].load_state_dict({key: value.float() for key, value in full.state_dict().items()})
    for half in ("encoder", "decoder"):
        stored = getattr(made["taehv"], half).state_dict()
        getattr(wide["taehv"], half).load_state_dict({key: value.float() for key, value in stored.items()})
    for name, coder in made.items():

        def decode(coder: Any = coder) -> Tensor:
            return torch.cat(list(coder.decode_stream(latent)), dim=2)

        error = relative_l2(decode(), decode(wide[name]))
        rows.append(measured(f"decode {RULE.frames} frames, {name}", decode, repeats, error))
        error = relative_l2(coder.encode(clip), wide[name].encode(clip))
        rows.append(
            measured(f"encode {RULE.given} frames, {name}", partial(coder.encode, clip), repeats, error)
        )
    return rows


@torch.inference_mode()
def others(size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Rows of the colour match and of the speech encoder, with their difference from the CPU."""
    frames = random(1, 3, RULE.new, *size).mul_(0.2).add_(0.5).clamp_(0, 1)
    portrait = random(1, 3, 1, *size, seed=1).mul_(0.1).add_(0.4).clamp_(0, 1)
    match = ColourMatch.to(portrait, 1.0)
    on_cpu = ColourMatch.to(portrait.cpu(), 1.0)(frames[:, :, :2].cpu())
    error = relative_l2(match(frames[:, :, :2]).cpu(), on_cpu)
    rows = [measured(f"colour match of {RULE.new} frames", partial(match, frames), repeats, error)]
    spec = scale_spec("1.3B", "flashhead").wav2vec
    sizes = {"hidden": spec.hidden, "layers": spec.num_layers, "heads": spec.num_heads}
    sound = np.random.default_rng(0).standard_normal((8, RULE.buffer_samples)).astype(np.float32) * 0.1
    ears = [
        ChunkEars(AudioEncoder.random(**sizes, device=device, seed=0).model, RULE)
        for device in ("cuda", "cpu")
    ]
    error = relative_l2(ears[0].encode_buffers(sound[:1]).cpu(), ears[1].encode_buffers(sound[:1]))
    for count in (8, 1):
        run = partial(ears[0].encode_buffers, sound[:count])
        rows.append(measured(f"speech of {count} chunks", run, repeats, error))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--size", default="512x512", help="height x width")
    add_repeats(parser)
    options = parser.parse_args(arguments)
    require_cuda()
    height, width = (int(side) for side in options.size.split("x"))
    rows = [row for part in (forwards, coders, others) for row in part((height, width), options.repeats)]
    shown = [
        (row["part"], f"{row['seconds'] * 1e3:.1f}", "" if row["error"] is None else f"{row['error']:.1e}")
        for row in rows
    ]
    print_table(("part of a chunk", "ms", "error"), shown)
    print_result("family", size=[height, width], rows=rows)


if __name__ == "__main__":
    main()
