"""Cost of the check that a window's numbers are finite, beside the window itself, on one CUDA device.

    python -m benchmarks finite [--scale 1.3B] [--tokens 30000] [--steps 4] [--repeats 5]

A window at 400x720 with random weights: `--steps` forwards (4 is the fewest of any configuration, so the
check weighs most), and decoding. The check reads the latents, every decoded piece and the hand-over once.
Prints a table, then one line of JSON; ends with an error if the check takes more than 0.1 % of the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.shared.options import add_repeats, make_parser
from benchmarks.shared.report import print_result, print_table
from benchmarks.shared.timing import require_cuda, timed
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.vae_runners import create_vae
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.engine.numbers import WindowNumbers
from omniavatar.sampling.windows import window_length

SIZE = (400, 720)
MOST_SHARE = 0.001
OVERLAP = 13
"""Frames of the hand-over."""


@torch.inference_mode()
def measure(scale: str, tokens: int, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of a forward, of decoding, and of the check; `share` is the check's part of a window."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    _, attention = create_attention("auto", device, dtype)
    spec, length = scale_spec(scale), window_length(tokens, *SIZE)
    dit = random_dit(spec.dit, attention=attention, dtype=dtype, device=device, seed=0)
    vae = create_vae("fast", random_vae(spec.vae, dtype=dtype, device=device, seed=0), device)
    shape = ((length + 3) // 4, SIZE[0] // 8, SIZE[1] // 8)
    sample = torch.randn(1, 16, *shape, device=device)
    y = torch.randn(1, 17, *shape, device=device)
    text = dit.prepare_text(torch.randn(1, 512, spec.dit.text_dim, device=device))
    audio = dit.prepare_audio(torch.randn(1, length, spec.dit.audio_dim, device=device))
    timestep = torch.tensor([800.0], device=device)
    pieces = list(vae.decode_stream(sample))
    handed_over = sample[:, :, : (OVERLAP + 3) // 4].contiguous()

    def check() -> None:
        numbers = WindowNumbers("window", "", device)
        for values in (sample, *pieces, handed_over):
            numbers.add("numbers", values)
        numbers.send()

    def decode() -> None:
        for _ in vae.decode_stream(sample):
            pass

    forward = timed(lambda: dit(sample, y, timestep, text, audio), repeats).median
    decoding, checking = timed(decode, repeats).median, timed(check, repeats).median
    window = steps * forward + decoding
    return {
        "forward_s": forward,
        "decode_s": decoding,
        "window_s": window,
        "check_s": checking,
        "pieces": len(pieces),
        "share": checking / window,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--steps", type=int, default=4, help="forwards of a window")
    add_repeats(parser)
    options = parser.parse_args(arguments)
    require_cuda()
    row = measure(options.scale, options.tokens, options.steps, options.repeats)
    cells = [f"{row['window_s']:.3f}", f"{row['check_s'] * 1e3:.3f}", f"{row['share']:.4%}"]
    print_table(["window, s", "check, ms", "share"], [cells])
    print_result("finite", scale=options.scale, tokens=options.tokens, steps=options.steps, **row)
    if row["share"] > MOST_SHARE:
        raise SystemExit(f"error: the check takes {row['share']:.3%} of a window, more than {MOST_SHARE:.1%}")
