"""Float8 convolutions of the video VAE on one Hopper GPU: against their twin, alone, and in the VAE.

    python -m benchmarks float8_vae [--parts check,times,vae,pocket] [--share 1/1] [--repeats 5]

check: the kernel against its slow equivalent at odd and real sizes, with the tilings of `times`.
times: one convolution at real sizes beside cuDNN's in bf16: its sum, and where a program has all channels its
norm.
vae: decode of 105 frames and encode of 13 at 400x720, exact and float8, random weights; PSNR (of pixels
within -1 to 1) and relative L2 of 53 frames against the exact path.
pocket: the same error with the packaged VAE and a moving piece of the packaged portrait, on any device.
`--share 2/5` checks the second fifth of the cases, so that five processes compile at once.
Prints tables, then one line of JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shared.options import add_repeats, make_parser
from benchmarks.shared.report import print_result, print_table, spread
from benchmarks.shared.timing import require_cuda
from benchmarks.vae import coding_times, make_inputs, profile, stream
from omniavatar.accel.kernels import channel_norm
from omniavatar.accel.kernels.float8_conv import (
    Float8Conv,
    NormTo,
    convolve,
    input_gain,
    joins_norm,
    quantise_conv,
)
from omniavatar.accel.kernels.rows import FP8
from omniavatar.accel.vae import FastVAE, FastVAEConfig, apply_fast_vae
from omniavatar.assets import PORTRAIT
from omniavatar.assets.pocket import FOLDER
from omniavatar.checkpoint.vae import load_vae, random_vae
from omniavatar.device import choose_device
from omniavatar.encoders.input_limits import psnr
from omniavatar.media.image import load_image
from omniavatar.model.sizes import VAEConfig

TILINGS = {
    (96, True): ((2, 64, 4), (4, 64, 3), (1, 64, 5)),
    (96, False): ((2, 32, 6), (4, 32, 6)),
    (192, False): ((1, 64, 3), (2, 64, 3), (1, 32, 6)),
    (384, False): ((2, 64, 3), (1, 64, 3)),
}
"""(channels, padded): frames, inner numbers and stages of the tilings that are timed, the usual one first."""
REAL = {96: (8, 400, 720), 192: (8, 200, 360), 384: (4, 100, 180)}


class Case:
    """One convolution of N channels from C with inputs like those of the VAE, on the GPU."""

    def __init__(
        self, size: tuple[int, int, int], inputs: int, outputs: int, padded: bool, border: bool
    ) -> None:
        frames, height, width = size
        generator = torch.Generator("cuda").manual_seed(0)
        random = functools.partial(torch.randn, generator=generator, device="cuda")
        gamma = random(inputs).abs() + 0.5
        gain = input_gain(gamma)
        weight = random(outputs, inputs, 3, 3, 3) / (27 * inputs) ** 0.5
        self.conv: Float8Conv = quantise_conv(weight, random(outputs), gain, padded)
        self.weight, self.border = weight.bfloat16(), border
        shape = (2 + frames, height + 2 * border, width + 2 * padded, inputs)
        self.window = torch.zeros(shape, dtype=FP8, device="cuda")
        for frame in self.window:
            normed = F.normalize(random(*frame.shape), dim=-1) * inputs**0.5 * gamma
            frame.copy_((F.silu(normed) * gain).to(FP8))
        if padded:
            self.window.view(torch.uint8)[:, :, :: width + 1] = 0
        self.residual = random(*size, outputs).bfloat16()
        self.next_gamma = random(outputs).abs() + 0.5
        self.flops = 54 * frames * height * width * inputs * outputs

    def run(self, kernel: Callable[..., None], parts: str) -> tuple[Tensor, Tensor]:
        """The sum and the next input; places that nothing may write hold 7 and 9."""
        size = self.residual.shape
        total = torch.full(size, 7.0, dtype=torch.bfloat16, device="cuda")
        wide = torch.full((size[0] + 2, size[1] + 2, size[2] + 2, size[3]), 9.0, device="cuda").to(FP8)
        norm = NormTo(self.next_gamma, wide[2:, 1:-1, 1:-1], input_gain(self.next_gamma))
        kernel(
            self.window,
            self.conv,
            self.residual if "residual" in parts else None,
            border=self.border,
            total=total if "total" in parts else None,
            norm=norm if "norm" in parts else None,
        )
        return total, wide


def cases() -> Iterator[tuple[str, Case, tuple[int, int, int] | None, str]]:
    """Name, convolution, tiling (None: the usual one) and what is given of each check."""
    for (channels, padded), tilings in TILINGS.items():
        for cut in tilings:
            parts = "residual total norm" if joins_norm(channels) else "residual total"
            case = Case((5, 21, 45), channels, channels, padded, False)
            yield f"{channels} odd {cut} {padded}", case, cut, parts
    sizes = (((1, 50, 90), 384, 384), ((3, 13, 16), 192, 384), ((1, 40, 72), 96, 96), ((6, 24, 40), 192, 192))
    for size, inputs, outputs in sizes:
        for border in (False, True):
            case = Case(size, inputs, outputs, inputs % 64 != 0, border)
            yield f"{size} {inputs} to {outputs} border {border}", case, None, "total"
    for channels in (16, 32, 48, 64):
        case = Case((5, 20, 33), channels, channels, channels % 64 != 0, False)
        parts = "residual norm" if joins_norm(channels) else "total"
        yield f"small {channels}", case, None, parts
    for channels, size in REAL.items():
        case = Case((size[0], size[1] // 2, size[2]), channels, channels, channels == 96, False)
        parts = "norm" if joins_norm(channels) else "total"
        yield f"{channels} large", case, None, parts


def check(share: str) -> list[dict]:
    """Relative L2 of the kernel against its twin."""
    from omniavatar.accel.kernels import float8_conv_cuda as gluon

    torch.backends.cudnn.allow_tf32 = False
    part, of = map(int, share.split("/"))
    rows = []
    for number, (name, case, cut, parts) in enumerate(cases()):
        if number % of != part - 1:
            continue
        kernel = gluon.convolve if cut is None else functools.partial(gluon.convolve, cut=gluon.Tiling(*cut))
        row: dict = {"case": name, "parts": parts}
        expected, got = case.run(convolve, parts), case.run(kernel, parts)
        for kind, want, have in zip(("total", "norm"), expected, got, strict=True):
            a, b = want.float(), have.float()
            row[kind] = ((a - b).norm() / a.norm()).item()
            row[kind + "_slope"] = ((a * b).sum() / (a * a).sum()).item()
        again = case.run(kernel, parts)
        row["same"] = all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, again, strict=True)
        )
        row["good"] = bool(row["total"] < 6e-3 and row["norm"] < 3e-2 and row["same"])
        rows.append(row)
        print(row, flush=True)
        del case, expected, got, again
        torch.cuda.empty_cache()
    return rows


def milliseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median by CUDA events."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def times() -> list[dict]:
    """One convolution at real sizes."""
    from omniavatar.accel.kernels import float8_conv_cuda as gluon

    rows = []
    for (channels, padded), tilings in TILINGS.items():
        size = REAL[channels]
        case = Case(size, channels, channels, padded, False)
        total, out = torch.empty_like(case.residual), torch.zeros_like(case.window)
        new = out[2:, :, 1:-1] if padded else out[2:]
        norm = NormTo(case.next_gamma, new, input_gain(case.next_gamma))

        def add(name: str, run: Callable[[], object], case: Case = case, channels: int = channels) -> None:
            ms = milliseconds(run)
            rows.append({"channels": channels, "what": name, "ms": ms, "tflops": case.flops / ms / 1e9})
            print(rows[-1], flush=True)

        if padded or channels != 96:
            frames = case.window.to(torch.bfloat16)
            if padded:
                frames = frames.view(*frames.shape[:2], -1, 2 * channels)
                weight, padding = channel_norm.pair_weight(case.weight), (0, 1, 0)
            else:
                weight, padding = case.weight, (0, 1, 1)
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
            images = frames[None].permute(0, 4, 1, 2, 3)
            add("cuDNN bf16", functools.partial(F.conv3d, images, weight, None, 1, padding))
            del frames, images, weight
        for cut in tilings:
            kinds = {"total": (None, total, None)}
            if joins_norm(channels):
                kinds |= {"norm": (None, None, norm), "residual total norm": (case.residual, total, norm)}
            else:
                kinds["residual total"] = (case.residual, total, None)
            for name, (residual, sums, after) in kinds.items():
                run = functools.partial(
                    gluon.convolve, case.window, case.conv, residual,
                    border=False, total=sums, norm=after, cut=gluon.Tiling(*cut),
                )  # fmt: skip
                try:
                    add(f"{'padded ' if padded else ''}{cut} {name}", run)
                except Exception as error:  # one tiling must not end the table
                    print(channels, cut, name, str(error)[:200], flush=True)
        del case, total, out, new, norm
        torch.cuda.empty_cache()
    return rows


def vae(repeats: int) -> tuple[list[dict], list[dict]]:
    """The whole VAE, exact and float8, and the kernels of the float8 decode."""
    plain = random_vae(VAEConfig(), dtype=torch.bfloat16, device="cuda", seed=0)
    inputs = make_inputs()
    variants = {
        "exact": FastVAEConfig(),
        "float8": FastVAEConfig(float8=True),
        "float8, not padded": FastVAEConfig(float8=True, padded_float8=False),
        "float8, 4 latents": FastVAEConfig(float8=True, latents_at_once=4),
    }
    rows: list[dict] = []
    expected: dict[str, Tensor] = {}
    made: dict[str, FastVAE] = {}
    for name, config in variants.items():
        made[name] = fast = apply_fast_vae(plain, config)
        row: dict = {"variant": name}
        for case, run in (("decode_105", functools.partial(stream, fast)), ("encode_13", fast.encode)):
            row[case] = coding_times(functools.partial(run, inputs[case]), repeats)
        got = {
            "decode": torch.cat(list(fast.decode_stream(inputs["decode_53"])), dim=2),
            "encode": fast.encode(inputs["encode_13"]),
        }
        expected = expected or got
        row["error"] = {key: ((got[key] - expected[key]).norm() / expected[key].norm()).item() for key in got}
        row["psnr"] = psnr(expected["decode"].clamp(-1, 1), got["decode"])
        rows.append(row)
        print(row, flush=True)
        torch.cuda.empty_cache()
    return rows, profile(made["float8"], inputs["decode_105"], 14)


def pocket() -> dict[str, float]:
    """dB of the pocket VAE's frames: float8 from exact, and both from the film."""
    cuda = torch.cuda.is_available()
    vae = load_vae(FOLDER / "weights" / "vae.safetensors", dtype=torch.float32, device=choose_device("auto"))
    exact = FastVAEConfig("triton" if cuda else "eager", paired_columns=cuda)
    picture = torch.from_numpy(np.array(load_image(PORTRAIT))).float() / 127.5 - 1
    small = F.interpolate(picture.permute(2, 0, 1)[None], (192, 144), mode="area")[0]
    film = torch.stack([small[:, 8 + step : 168 + step, step : 128 + step] for step in range(9)], 1)[None]
    film = film.to(vae.conv1.weight.device)
    latent = apply_fast_vae(vae, exact).encode(film)
    frames = [apply_fast_vae(vae, replace(exact, float8=on)).decode(latent) for on in (False, True)]
    return {
        "float8 from exact": psnr(frames[0].clamp(-1, 1), frames[1]),
        "exact from film": psnr(film, frames[0]),
        "float8 from film": psnr(film, frames[1]),
    }


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_repeats(parser)
    parser.add_argument("--parts", default="check,times,vae")
    parser.add_argument("--share", default="1/1", help="part of the checks, such as 2/5")
    options = parser.parse_args(arguments)
    parts, found = options.parts.split(","), {}
    if parts != ["pocket"]:
        require_cuda()
    if "check" in parts:
        found["check"] = check(options.share)
    if "times" in parts:
        found["times"] = times()
        print_table(
            ["channels", "what", "ms", "TFLOP/s"],
            [[str(r["channels"]), r["what"], f"{r['ms']:.3f}", f"{r['tflops']:.0f}"] for r in found["times"]],
        )
    if "vae" in parts:
        found["vae"], found["kernels"] = vae(options.repeats)
        print_table(
            ["VAE", "decode 105, s", "encode 13, s", "peak GiB", "error dec / enc", "PSNR"],
            [
                [
                    row["variant"],
                    *(
                        spread(*(row[case][key] for key in ("s", "min_s", "max_s")))
                        for case in ("decode_105", "encode_13")
                    ),
                    f"{row['decode_105']['peak_gib']:.2f}",
                    f"{row['error']['decode']:.1e} / {row['error']['encode']:.1e}",
                    f"{row['psnr']:.1f}",
                ]
                for row in found["vae"]
            ],
        )
        print_table(
            ["kernel", "calls", "ms"], [(k["kernel"], k["calls"], f"{k['ms']:.1f}") for k in found["kernels"]]
        )
    if "pocket" in parts:
        found["pocket"] = pocket()
        print_table(["pocket VAE", "dB"], [[name, f"{each:.2f}"] for name, each in found["pocket"].items()])
    print_result("float8_vae", repeats=options.repeats, **found)
