"""Forwards and VAE passes of full-size models under enforced memory limits: peak, seconds, ratio to resident.

    python -m benchmarks memory [--scales 14B,1.3B] [--quantize none,fp8] [--repeats 3]

Random weights are made once a model, all on the device. Then the limits fall (GB, 10^9 bytes, enforced by
`torch.cuda.set_per_process_memory_fraction`), and blocks move to host memory as the planner decides, as in a
run. 400x720, 105 frames (30,375 tokens), two texts. The VAE and as many bytes as the audio encoder takes lie
beside the DiT; the text encoder leaves before the DiT is loaded.
Every forward must equal the resident one bit for bit. `steps_down`: how often an allocation failed and the
planner's next smaller plan was taken. The allocator's segments grow, as in the `omniavatar` command.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.forward import inputs
from benchmarks.shared.options import add_repeats, make_parser, words
from benchmarks.shared.report import print_result, print_table, spread
from benchmarks.shared.timing import require_cuda, timed
from omniavatar.accel.apply import AccelConfig, apply_accelerations, weight_form
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.offload import OffloadConfig, Offloader
from omniavatar.accel.vae_runners import create_vae
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.cli.main import grow_segments
from omniavatar.config.load import load_config
from omniavatar.engine.retry import retry_with_less
from omniavatar.plan.placement import place
from omniavatar.plan.run import window_shape
from omniavatar.plan.sizes import GB

DEVICE, DTYPE, SIZE, GRID = torch.device("cuda", 0), torch.bfloat16, (400, 720), (27, 50, 90)
CASES = (
    ("14B", "none", (None, 40, 24, 16, 10, 8)),
    ("14B", "fp8", (None, 24, 16, 10, 8)),
    ("1.3B", "none", (None, 6, 5)),
)


class Model:
    """One DiT and the VAE, with the blocks where the last placement puts them."""

    def __init__(self, scale: str, quantize: str) -> None:
        self.config = load_config(None, {"weights": "random", "scale": scale, "quantize": quantize}).config
        spec, ops, accel = scale_spec(scale), create_fused(DEVICE), AccelConfig(quantize, True)
        self.attention, attention = create_attention("auto", DEVICE, DTYPE)
        form = weight_form(accel, ops, DEVICE)
        self.dit = random_dit(spec.dit, attention=attention, dtype=DTYPE, device=DEVICE, seed=0, form=form)
        apply_accelerations(self.dit, accel, ops)
        self.vae = create_vae("fast", random_vae(spec.vae, dtype=DTYPE, device=DEVICE, seed=0), DEVICE)
        self.offloader = Offloader(self.dit, DEVICE)
        self.args = inputs(self.dit, GRID)
        self.second_text = self.dit.prepare_text(torch.zeros(1, 512, spec.dit.text_dim, device=DEVICE))
        shape = window_shape(self.config, SIZE, has_audio=True)
        self.placed = partial(place, self.config, spec.dit, shape, "fast", DEVICE)
        self.ballast = torch.empty(self.placed(None).run.audio_encoder, dtype=torch.uint8, device=DEVICE)
        self.steps_down = 0

    def go_to(self, limit: int | None) -> None:
        """Move the blocks as the plan for `limit` bytes says, and hold the allocator to that limit."""
        self.placement, self.steps_down = self.placed(limit), 0
        self.arrange()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit / total, DEVICE)

    def arrange(self) -> None:
        """Move the blocks as the current placement says."""
        memory = self.placement.memory
        self.offloader.apply(OffloadConfig(memory.resident_blocks, memory.ring))
        self.vae.use_pass(self.placement.vae_latents)
        gc.collect()
        torch.cuda.empty_cache()

    def step_down(self, reason: str) -> None:
        """Take the next smaller plan. Raises SystemExit where no smaller one exists."""
        smaller = self.placement.step_down()
        if smaller is None:
            held = torch.cuda.memory_allocated() / GB, torch.cuda.memory_reserved() / GB
            raise SystemExit(
                f"error: {self.placement.describe()}: {reason}; {held[0]:.1f} GB held, {held[1]:.1f} reserved"
            )
        self.placement, self.steps_down = smaller, self.steps_down + 1
        retry_with_less(self.arrange, self.step_down)


def decode(vae, latent) -> str:
    """Hash of the pixels, which leave the device piece by piece as in a run."""
    digest = hashlib.sha256()
    for piece in vae.decode_stream(latent):
        digest.update(piece.cpu().numpy().tobytes())
    return digest.hexdigest()


def decode_only(vae, latent) -> None:
    """Decode and drop the pixels."""
    for _ in vae.decode_stream(latent):
        pass


@torch.inference_mode()
def measure(scale: str, quantize: str, limits, repeats: int) -> list[dict]:
    """One row for each limit; the first has none and is what the others are compared with."""
    begun = time.perf_counter()
    model = Model(scale, quantize)
    print(f"{scale} {quantize}: made in {time.perf_counter() - begun:.1f} s", flush=True)
    sample, y, timestep, text, audio = model.args
    latent = torch.randn(1, 16, *GRID, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    tail = torch.zeros(1, 3, 13, *SIZE, device=DEVICE)
    texts = torch.randn(1, 512, model.dit.config.text_dim, device=DEVICE)
    expected = resident = pixels = None
    keys = None
    rows = []
    for limit in limits:
        begun = time.perf_counter()
        model.go_to(None if limit is None else limit * GB)
        moving = time.perf_counter() - begun
        torch.cuda.reset_peak_memory_stats()
        forward = partial(model.dit, sample, y, timestep, text, audio)
        times = retry_with_less(partial(timed, forward, repeats), model.step_down)
        out = forward().cpu()
        forward_peak = torch.cuda.max_memory_allocated()
        these_keys = torch.stack([k for k, _ in model.dit.prepare_text(texts)]).cpu()
        torch.cuda.reset_peak_memory_stats()
        coding = retry_with_less(partial(timed, partial(decode_only, model.vae, latent), 1), model.step_down)
        digest = decode(model.vae, latent)
        retry_with_less(partial(model.vae.encode, tail), model.step_down)
        coding_peak = torch.cuda.max_memory_allocated()
        if expected is None:
            expected, resident, pixels, keys = out, times.median, digest, these_keys
            model.vae.use_pass(1)
            small_pass_equal = decode(model.vae, latent) == pixels
        rows.append(
            {
                "scale": scale,
                "quantize": quantize,
                "limit_gb": limit,
                "plan": model.placement.describe(),
                "resident_blocks": model.placement.memory.resident_blocks,
                "latents_a_pass": model.placement.vae_latents,
                "steps_down": model.steps_down,
                "planned_gb": model.placement.memory.peak / GB,
                "forward_peak_gb": forward_peak / GB,
                "coding_peak_gb": coding_peak / GB,
                "reserved_gb": torch.cuda.memory_stats()["reserved_bytes.all.peak"] / GB,
                "seconds": times.median,
                "spread": times.spread,
                "ratio": times.median / resident,
                "decode_seconds": coding.median,
                "moving_seconds": moving,
                "attention": model.attention,
                "bits_equal": torch.equal(out, expected) and torch.equal(these_keys, keys),
                "pixels_equal": digest == pixels,
                "small_pass_pixels_equal": small_pass_equal,
            }
        )
        print(rows[-1], flush=True)
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scales", type=words, default=["14B", "1.3B"])
    parser.add_argument("--quantize", type=words, default=["none", "fp8"])
    add_repeats(parser, 3)
    options = parser.parse_args(arguments)
    grow_segments()
    require_cuda()
    rows = []
    for scale, quantize, limits in CASES:
        if scale in options.scales and quantize in options.quantize:
            rows += measure(scale, quantize, limits, options.repeats)
            gc.collect()
            torch.cuda.empty_cache()
    print_table(
        [
            "model",
            "limit, GB",
            "blocks resident",
            "forward peak, GB",
            "VAE peak",
            "s a forward",
            "ratio",
            "equal",
        ],
        map(cells, rows),
    )
    print_result("memory", repeats=options.repeats, rows=rows)
    if not all(row["bits_equal"] for row in rows):
        raise SystemExit("error: a streamed forward differs from the resident one")


def cells(row: dict) -> list[object]:
    """A row of the table."""
    return [
        f"{row['scale']}{' fp8' if row['quantize'] == 'fp8' else ''}",
        row["limit_gb"] or "-",
        row["resident_blocks"],
        f"{row['forward_peak_gb']:.1f}",
        f"{row['coding_peak_gb']:.1f}",
        spread(row["seconds"], *row["spread"]),
        f"{row['ratio']:.3f}",
        row["bits_equal"],
    ]
