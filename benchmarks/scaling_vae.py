"""The VAE's work on one GPU, and shared by rows among all GPUs of one host.

    torchrun --standalone --nproc_per_node=2 -m benchmarks scaling_vae [--exchange collective]
    torchrun --standalone --nproc_per_node=8 -m benchmarks scaling_vae --device cpu --scale nano --size 64x96

Released sizes, random weights, bf16, 400x720: decode of 105 frames and encode of 13. Each is timed on one GPU
(every rank alone, at the same time), shared, and shared with exchanges that move nothing (the difference is
the cost of the exchanges). "queued" is the host's time to launch it all.
Errors: relative L2 of the shared result against the same rank's own.
Rank 0 prints the seconds, then one line of JSON.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.shared.options import add_device, add_repeats, make_parser, size_of
from benchmarks.shared.report import print_result, spread
from benchmarks.shared.timing import peak_gb, require_cuda, reset_peak, synchronize, timed
from omniavatar.accel.vae import coding_dtype
from omniavatar.accel.vae_runners import create_vae
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.parallel.exchange import Arrived
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.picture_rows import PictureRows
from omniavatar.parallel.process import Process, connect, disconnect
from omniavatar.parallel.rank_layout import Layout
from omniavatar.parallel.ranks import Ranks
from omniavatar.parallel.vae import apply_shared_vae

LATENTS, FRAMES = 27, 13


class SilentPeers(Peers):
    """Gives this rank's own rows back in the right shapes; moves nothing."""

    def exchange(self, rows, send, receive):
        count = sum(receive)
        return rows[:count] if count <= len(rows) else rows.new_zeros((count, *rows.shape[1:]))

    def gather(self, rows, counts):
        return torch.cat([rows] * self.size + [rows])[: sum(counts)]


class SilentHeads:
    """Gives this rank's own heads back in the right shapes; moves nothing."""

    def __init__(self, index, size):
        self.index, self.size = index, size

    def to_heads(self, x_BlHD, span, counts):
        parts = x_BlHD.unflatten(2, (self.size, -1))[:, :, :, span]
        rows = parts.permute(2, 1, 0, 3, 4).flatten(0, 1)
        missing = sum(counts) - len(rows)
        return Arrived(torch.cat([rows, rows[:missing]]) if missing > 0 else rows[: sum(counts)])

    def to_tokens(self, out_LBhD, counts):
        return Arrived([out_LBhD[: counts[self.index]]] * self.size)


class SilentRows:
    """Gives this rank's own rows back in the right shape; moves nothing."""

    def __init__(self, index, size):
        self.index, self.size = index, size

    def spread(self, rows, counts):
        return Arrived(torch.cat([rows] * (self.size + 1))[: sum(counts)] if self.size > 1 else rows)


class CountingPeers(Peers):
    """Counts what leaves this rank."""

    swaps = gathers = sent = 0

    def exchange(self, rows, send, receive):
        self.swaps += 1
        self.sent += rows.numel() * rows.itemsize
        return super().exchange(rows, send, receive)

    def gather(self, rows, counts):
        self.gathers += 1
        self.sent += rows.numel() * rows.itemsize * (self.size - 1)
        return super().gather(rows, counts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--exchange", default="auto", choices=["auto", "direct", "collective"])
    parser.add_argument("--scale", default="14B", help="whose VAE")
    parser.add_argument("--size", type=size_of, default=(400, 720), help="height x width")
    add_device(parser)
    add_repeats(parser)
    options = parser.parse_args(arguments)
    with ranks_of_host(options.device) as (team, device):
        exchange = team.arrange(Layout(1, team.size, team.size), options.exchange)
        measure(team, device, options, exchange)


@contextmanager
def ranks_of_host(kind: str) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, connected, and this rank's device of that kind (cuda, cpu)."""
    process = Process.from_environment()
    if kind == "cuda":
        require_cuda()
        device = torch.device("cuda", process.local_rank)
    else:
        device = torch.device(kind)
    team = connect(process, device)
    yield team, device
    team.meet()
    disconnect()


def measure(team: Ranks, device, options, exchange):
    """Measure on all ranks; the leader prints. exchange: how the ranks exchange, for the report."""
    height, width = options.size
    sizes = scale_spec(options.scale).vae
    dtype = coding_dtype(torch.bfloat16, device)
    alone = create_vae("fast", random_vae(sizes, dtype=dtype, device=device, seed=0), device)
    whole = Peers(torch.distributed.group.WORLD, team.rank, team.size)
    silent, counting = (kind(whole.group, whole.index, whole.size) for kind in (SilentPeers, CountingPeers))
    kinds = {
        "one GPU": alone,
        "shared": apply_shared_vae(alone, team.picture_rows),
        "shared, nothing moved": apply_shared_vae(alone, lambda rows: PictureRows(silent, rows)),
    }
    generator = torch.Generator(device).manual_seed(1)
    latent = torch.randn(1, 16, LATENTS, height // 8, width // 8, device=device, generator=generator)
    video = torch.rand(1, 3, FRAMES, height, width, device=device, generator=generator) * 2 - 1

    def decode(vae):
        for _ in vae.decode_stream(latent):
            pass

    found, facts = {}, {}
    with torch.inference_mode():
        for name, run in (("decode", decode), ("encode", lambda vae: vae.encode(video))):
            for kind, vae in kinds.items():
                team.meet()
                reset_peak(device)
                times = timed(lambda run=run, vae=vae: run(vae), options.repeats)
                label = f"{name}, {kind}"
                found[label] = [times.median, *times.spread]
                begun = time.perf_counter()
                run(vae)
                facts[f"{label}: queued s"] = time.perf_counter() - begun
                synchronize()
                facts[f"{label}: peak GB"] = peak_gb(device)
        counted = apply_shared_vae(alone, lambda rows: PictureRows(counting, rows))
        decode(counted)
        facts["decode: swaps"], facts["decode: gathers"] = counting.swaps, counting.gathers
        facts["decode: MB sent by rank 0"] = counting.sent / 1e6
        facts["decode: error"] = _error(_pixels(kinds["shared"], latent), _pixels(alone, latent))
        facts["encode: error"] = _error(kinds["shared"].encode(video), alone.encode(video))
    for name in ("decode", "encode"):
        facts[f"{name}: times one GPU"] = found[f"{name}, one GPU"][0] / found[f"{name}, shared"][0]
    if not team.leads:
        return
    print(f"VAE, {height}x{width}, {team.size} GPUs: {4 * LATENTS - 3} frames decoded, {FRAMES} encoded")
    print(exchange)
    for label, values in found.items():
        print(f"{label:34} {spread(*values, digits=4)} s")
    for label, value in facts.items():
        print(f"{label:42} {value:.4g}")
    print_result(
        "scaling_vae",
        device,
        gpus=team.size,
        scale=options.scale,
        size=options.size,
        exchange=exchange,
        seconds=found,
        **facts,
    )


def _pixels(vae, latent):
    """The first 53 frames."""
    return torch.cat(list(vae.decode_stream(latent[:, :, :14])), dim=2)


def _error(found, alone):
    return float((found.double() - alone.double()).norm() / alone.double().norm())
