"""The block-causal student in training: all blocks of a story in one forward, and roll-outs of the engine.

In the engine a block is denoised from noise while it sees the keys and values that earlier blocks left in the
cache, when they were finished (`engine.block_loop`). A training step computes all blocks of a run at once:
the run goes through the model twice side by side, once finished, at timestep 0, and once noisy. Every block
of both sees the finished ones that `CausalWindow.seen` names, and itself. So the keys that a block leaves for
later ones are trained too.

Shapes: B stories, T latents of a story, R of a run of its blocks, h w latent pixels, L tokens of a story, H
heads, E head dim, D audio width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omniavatar.engine.block_loop import CLEAN, BlockGenerator
from omniavatar.model.attention import AttentionFn
from omniavatar.model.dit import RunBlocks, TextState, WanDiT
from omniavatar.model.layers import BlockInputs
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.schedule import Schedule
from omniavatar.sampling.windows import block_frames


def block_causal(window: CausalWindow, tokens: int, blocks: int) -> AttentionFn:
    """Self-attention (2B, L, H, E) of B finished stories, then the same B noisy.

    tokens: of a block.
    blocks: of a story.
    """
    plan = tuple(groups(window, blocks))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.unflatten(1, (blocks, tokens)) for each in (q, k, v))
        made = []
        for first, last, seen in plan:
            keys, values = (with_past(each, first, last, seen) for each in (k, v))
            alone = q[:, first:last].flatten(0, 1).transpose(1, 2)
            out = scaled_dot_product_attention(alone, keys, values).transpose(1, 2)
            made.append(out.unflatten(0, (-1, last - first)))
        return torch.cat(made, 1).flatten(1, 2)

    return attend


Seen = tuple[tuple[int, ...], ...]
"""For each place in the past of some blocks, the number of the earlier block that each of them sees there."""


def groups(window: CausalWindow, blocks: int) -> Iterator[tuple[int, int, Seen]]:
    """First and last + 1 of the blocks that see equally many others, and these others."""
    for _, group in itertools.groupby(range(blocks), lambda block: len(window.seen(block))):
        numbers = list(group)
        yield numbers[0], numbers[-1] + 1, tuple(zip(*(window.seen(n)[:-1] for n in numbers), strict=True))


def with_past(x: Tensor, first: int, last: int, seen: Seen) -> Tensor:
    """Keys or values (2B*n, H, S, E) for blocks first..last of `x` (2B, blocks, tokens, H, E).

    They are those of the past, which is always finished, and their own.
    """
    finished = x[: x.shape[0] // 2]
    past = [picked(finished, numbers) for numbers in seen]
    both = [torch.cat([each, each]) for each in past]
    return torch.cat([*both, x[:, first:last]], 2).flatten(0, 1).transpose(1, 2)


def picked(blocks: Tensor, numbers: Sequence[int]) -> Tensor:
    """Rows (B, n, ...) of `blocks` (B, N, ...): one row n times, or n rows that follow each other."""
    if len(set(numbers)) == 1:
        one = blocks[:, numbers[0] : numbers[0] + 1]
        return one.expand(-1, len(numbers), *one.shape[2:])
    if list(numbers) != list(range(numbers[0], numbers[-1] + 1)):
        raise ValueError(f"neither one block nor blocks that follow each other: {numbers}")
    return blocks[:, numbers[0] : numbers[-1] + 1]


def blocks_runner(dit: WanDiT, attend: AttentionFn, compiled: bool) -> RunBlocks:
    """`WanDiT.run_blocks` with another self-attention."""
    blocks: list[Callable[..., Tensor]] = [
        torch.compile(block) if compiled else block for block in dit.blocks
    ]

    def run_blocks(tokens: Tensor, inputs: BlockInputs) -> Tensor:
        for block, text, audio in zip(blocks, inputs.text, inputs.audio, strict=True):
            tokens = block(tokens, inputs.modulation, inputs.rope, text, audio, attend, dit.text_attention)
        return tokens

    return run_blocks


def portrait_condition(portrait: Tensor, first: Tensor, latents: int) -> Tensor:
    """y (B, 17, R, h, w): the portrait on every latent; the mask gives only the video's first one.

    first: (B,), whether the run begins with it.
    """
    wide = portrait.expand(-1, -1, latents, -1, -1)
    mask = torch.ones_like(wide[:, :1])
    mask[:, :, 0] = 1 - first.to(mask.dtype).view(-1, 1, 1, 1)
    return torch.cat([wide, mask], 1)


def velocity(
    dit: WanDiT,
    finished: Tensor,
    noisy: Tensor,
    portrait: Tensor,
    first: Tensor,
    timestep: Tensor,
    text: TextState,
    audio: Tensor,
    run_blocks: RunBlocks,
) -> Tensor:
    """Velocity (B, 16, R, h, w) of the blocks of `noisy` (B, 16, R, h, w) after those of `finished`.

    portrait: (B, 16, 1, h, w); first: (B,), whether a run begins with it.
    timestep: (B,) of the noisy ones.
    audio: (B, 4R, D), with zeros for the portrait's latent.
    run_blocks: of `blocks_runner` with `block_causal`.
    """
    y = portrait_condition(portrait, first, finished.shape[2])
    made = dit(
        torch.cat([finished, noisy]),
        torch.cat([y, y]),
        torch.cat([torch.full_like(timestep, CLEAN), timestep]),
        tuple((torch.cat([k, k]), torch.cat([v, v])) for k, v in text),
        tuple(
            None if part is None else torch.cat([part, part])
            for part in dit.prepare_audio(audio, continued=True)
        ),
        run_blocks,
    )
    return made[len(finished) :]


def roll_out(
    dit: WanDiT,
    window: CausalWindow,
    schedule: Schedule,
    portrait: Tensor,
    text: TextState,
    audio: Tensor,
    noise: Tensor,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Latents (B, 16, T, h, w) made block after block from the portrait (B, 16, 1, h, w), as the engine does.

    audio: (B, 4T-3, D).
    noise: (B, 16, T, h, w), which the blocks start from; see `training.live_drive`.
    dtype: of the cached keys and values.
    """
    blocks = BlockGenerator(dit, portrait, text, schedule, window, dtype)
    made, frame = [], 0
    for block in range(noise.shape[2] // window.block):
        initial = iter([noise[:, :, block * window.block : (block + 1) * window.block].clone()])

        def draw(initial: Iterator[Tensor] = initial) -> Tensor:
            first = next(initial, None)
            if first is not None:
                return first
            return torch.randn(blocks.shape, device=noise.device, generator=generator)

        length = block_frames(block, window.block)
        made.append(blocks.make(audio[:, frame : frame + length], draw))
        frame += length
    return torch.cat(made, 2)
