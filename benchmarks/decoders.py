"""Seconds and memory of each decoder on one CUDA device: the full VAE's, LightVAE's, TAEHV's.

    python benchmarks/decoders.py [--repeats 5]

Released sizes, random weights, bf16, 400x720: decode of 105 and of 53 frames as a stream, warm-up 2, median,
fastest and slowest. TAEHV also with other numbers of latents a pass, and with weights that are not
channels-last. Error: relative L2 of 53 frames against the same weights in float32 (rounding only:
how the decoders differ from the full one can be told with trained weights alone).
A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
from collections.abc import Callable
from dataclasses import replace

import torch
from vae import HEIGHT, LATENTS, WIDTH, make_inputs, stream, timed

from omniavatar.accel.decoder import apply_decoder
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.tiny_decoder import light_vae_config, random_tiny_decoder
from omniavatar.checkpoint.vae import random_vae
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from omniavatar.model.vae import VideoDecoder, WanVAE

CUDA = torch.device("cuda")
TINY = TinyDecoderConfig()


def wan(config: VAEConfig, fast: bool) -> tuple[VideoDecoder, WanVAE]:
    """The decoder in bf16, and the plain module with its weights in float32."""
    half = random_vae(config, dtype=torch.bfloat16, device=CUDA, seed=0)
    exact = random_vae(config, dtype=torch.float32, device=CUDA, seed=0)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    return (apply_fast_vae(half, FastVAEConfig()) if fast else half), exact


def tiny(config: TinyDecoderConfig, channels_last: bool) -> tuple[VideoDecoder, TinyDecoder]:
    """The same of TAEHV."""
    half = random_tiny_decoder(config, dtype=torch.bfloat16, device=CUDA, seed=0)
    exact = random_tiny_decoder(config, dtype=torch.float32, device=CUDA, seed=0)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    if not channels_last:
        return half, exact
    vae = random_vae(VAEConfig(dim=8), dtype=torch.bfloat16, device=CUDA, seed=0)
    return apply_decoder(vae, half), exact


VARIANTS: dict[str, Callable[[], tuple[VideoDecoder, VideoDecoder]]] = {
    "full, fast": lambda: wan(VAEConfig(), True),
    "lightvae, plain": lambda: wan(light_vae_config(VAEConfig()), False),
    "lightvae, fast": lambda: wan(light_vae_config(VAEConfig()), True),
    "taehv, weights not channels-last": lambda: tiny(TINY, False),
    "taehv": lambda: tiny(TINY, True),
    "taehv, 1 latent": lambda: tiny(replace(TINY, latents_at_once=1), True),
    "taehv, 4 latents": lambda: tiny(replace(TINY, latents_at_once=4), True),
    "lighttae": lambda: tiny(replace(TINY, raw_latents=True), True),
}


@torch.inference_mode()
def measure(repeats: int) -> list[dict]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    inputs = make_inputs()
    rows = []
    for name, make in VARIANTS.items():
        decoder, exact = make()
        wanted, got = (
            torch.cat(list(each.decode_stream(inputs["decode_53"])), dim=2) for each in (exact, decoder)
        )
        row: dict = {"decoder": name, "error": ((got - wanted).norm() / wanted.norm()).item()}
        del exact, wanted, got
        torch.cuda.empty_cache()
        for case in LATENTS:
            row[case] = timed(functools.partial(stream, decoder, inputs[case]), repeats)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = measure(arguments.repeats)
    print("| decoder | decode 105, s (min..max) | decode 53, s | peak GiB | rounding |")
    print("|---|---|---|---|---|")
    for row in rows:
        long = row["decode_105"]
        print(
            f"| {row['decoder']} | {long['s']:.3f} ({long['min_s']:.3f}..{long['max_s']:.3f}) "
            f"| {row['decode_53']['s']:.3f} | {long['peak_gib']:.2f} | {row['error']:.1e} |"
        )
    where = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }
    summary = {"benchmark": "decoders", "size": [HEIGHT, WIDTH], "repeats": arguments.repeats, **where}
    print(json.dumps({**summary, "rows": rows}))


if __name__ == "__main__":
    main()
