"""The block-causal loop against a twin that keeps no cache, and far from the video's start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omniavatar.accel.apply import AccelConfig, apply_accelerations, row_dtype
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.engine.block_loop import BlockGenerator
from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.model.layers import BlockInputs
from omniavatar.model.rope import rope_table, rotate
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.schedule import make_schedule

WINDOW = CausalWindow(block=2, window=6, sink=2)
SCHEDULE = make_schedule(1, 1.0, (1000.0, 625.0))
HEIGHT, WIDTH = 4, 6
TOKENS = WINDOW.block * HEIGHT * WIDTH // 4


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    _, attention = create_attention("sdpa", torch.device("cpu"), torch.float32)
    spec = scale_spec("nano").dit
    return random_dit(spec, attention=attention, dtype=torch.float32, device="cpu", seed=0)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(dit: WanDiT, window: CausalWindow = WINDOW, **options: Any) -> BlockGenerator:
    with torch.inference_mode():
        text = dit.prepare_text(random(1, 7, dit.config.text_dim, seed=1))
    reference = random(1, 16, 1, HEIGHT, WIDTH, seed=2)
    return BlockGenerator(dit, reference, text, SCHEDULE, window, torch.float32, **options)


def noises(shape: tuple[int, ...], block: int) -> Callable[[], Tensor]:
    source = torch.Generator().manual_seed(100 + block)
    return lambda: torch.randn(shape, generator=source)


def audio(dit: WanDiT, rows: int, block: int) -> Tensor:
    return random(1, rows, dit.config.audio_dim, seed=1000 + block)


def make(dit: WanDiT, made: BlockGenerator, block: int) -> Tensor:
    return made.make(audio(dit, made.audio_rows(block), block), noises(made.shape, block))


class Rolled:
    """A twin of the cache: keys and values in a list of blocks, from which the oldest after the sink go."""

    def __init__(self, dit: WanDiT, window: CausalWindow) -> None:
        self.dit, self.window = dit, window
        self.kept: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in dit.blocks]

    def run_blocks(self, block: int) -> Callable[..., Tensor]:
        def run(tokens: Tensor, inputs: BlockInputs) -> Tensor:
            for layer, module in enumerate(self.dit.blocks):

                def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                    self.kept[layer][block] = (k, v)
                    seen = [self.kept[layer][each] for each in self.window.seen(block)]
                    keys, values = (torch.cat(parts, dim=1) for parts in zip(*seen, strict=True))
                    return self.dit.attention(q, keys, values)

                tokens = module(
                    tokens, inputs.modulation, inputs.rope, inputs.text[layer], inputs.audio[layer], attend,
                    self.dit.text_attention,
                )  # fmt: skip
            return tokens

        return run


@torch.inference_mode()
def twin(dit: WanDiT, blocks: int, window: CausalWindow) -> list[Tensor]:
    """The latents of `blocks` blocks, written out step by step."""
    text = dit.prepare_text(random(1, 7, dit.config.text_dim, seed=1))
    reference = random(1, 16, 1, HEIGHT, WIDTH, seed=2)
    rolled, made = Rolled(dit, window), []
    whole = torch.cat([audio(dit, 4 * window.block - (0 if n else 3), n) for n in range(blocks)], dim=1)
    states = dit.prepare_audio(whole)
    for block in range(blocks):
        first = block * window.block
        state = tuple(None if s is None else s[:, first : first + window.block] for s in states)
        draw = noises((1, 16, window.block, HEIGHT, WIDTH), block)
        mask = torch.ones(1, 1, window.block, HEIGHT, WIDTH)
        mask[:, :, 0] = 0 if block == 0 else 1
        y = torch.cat([reference.expand(-1, -1, window.block, -1, -1), mask], dim=1)
        run, sample = rolled.run_blocks(block), draw()
        grid = (window.block, HEIGHT // 2, WIDTH // 2)
        rope = rope_table(grid, dit.config.head_dim, sample.device, first)
        for sigma, lower in ((1.0, 0.625), (0.625, 0.0)):
            if block == 0:
                sample[:, :, :1] = reference
            velocity = dit(sample, y, torch.tensor([1000 * sigma]), text, state, run, rope)
            sample = sample - sigma * velocity
            if lower:
                sample = (1 - lower) * sample + lower * draw()
        if block == 0:
            sample[:, :, :1] = reference
        dit(sample, y, torch.tensor([0.0]), text, state, run, rope)
        made.append(sample)
    return made


@pytest.mark.parametrize(
    "window", [WINDOW, CausalWindow(2, 4, 2), CausalWindow(2, 6, 0), CausalWindow(1, 3, 1)]
)
def test_blocks_equal_those_of_a_loop_without_a_cache_of_fixed_size(
    dit: WanDiT, window: CausalWindow
) -> None:
    made, blocks = generator(dit, window), 6
    for block, expected in enumerate(twin(dit, blocks, window)):
        torch.testing.assert_close(make(dit, made, block), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("quantize", "most"), [("none", 1e-5), ("fp8", 0.03), ("int8", 0.03)])
def test_fused_and_quantised_blocks_equal_those_without_a_cache(quantize: str, most: float) -> None:
    """The twin runs the same layers; another order of sums may move a value to the next step of 8 bits."""
    _, attention = create_attention("sdpa", torch.device("cpu"), torch.float32)
    spec = scale_spec("nano").dit
    fast = random_dit(spec, attention=attention, dtype=torch.float32, device="cpu", seed=0)
    ops = create_fused(torch.device("cpu"), row_dtype(quantize))
    apply_accelerations(fast, AccelConfig(quantize, fuse=True), ops)
    made = generator(fast)
    for block, expected in enumerate(twin(fast, 5, WINDOW)):
        error = (make(fast, made, block) - expected).norm() / expected.norm()
        assert error <= most, (block, error)


def test_what_a_blocks_passes_share_is_made_once(dit: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions and audio: once a block, not once a pass or layer."""
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        return rope_table(*arguments)

    monkeypatch.setattr("omniavatar.engine.block_loop.rope_table", counted)
    made = generator(dit)
    for block in range(4):
        make(dit, made, block)
    assert calls == [0, 2, 4, 6]


def test_an_endless_video_needs_no_more_memory(dit: WanDiT) -> None:
    made = generator(dit)
    buffers = [tensor.data_ptr() for tensor in (*made.cache.keys, *made.cache.values)]
    for block in range(40):
        latent = make(dit, made, block)
    assert latent.isfinite().all() and made.done == 40
    assert [tensor.data_ptr() for tensor in (*made.cache.keys, *made.cache.values)] == buffers
    config = dit.config
    assert made.cache.num_bytes == 2 * config.num_layers * WINDOW.slots * TOKENS * config.dim * 4


def test_the_functions_of_a_full_cache_are_wrapped_once_for_each_slot(dit: WanDiT) -> None:
    """A captured forward is replayed for every later block that writes the same slot."""
    calls: list[int] = []

    def wrap(run: RunBlocks) -> RunBlocks:
        number = len(calls)
        calls.append(0)

        def counted(tokens: Tensor, inputs: BlockInputs) -> Tensor:
            calls[number] += 1
            return run(tokens, inputs)

        return counted

    wrapped, plain = generator(dit, wrap=wrap), generator(dit)
    for block in range(8):
        assert torch.equal(make(dit, wrapped, block), make(dit, plain, block))
    passes = len(SCHEDULE) + 1
    assert calls == [passes * 3, passes * 3], "blocks 2, 4, 6 and blocks 3, 5, 7"


def test_attention_far_from_the_start_is_that_at_the_start() -> None:
    """Only distances matter, and a week of video at 16 frames a second keeps them exact."""
    query, key = random(1, 12, 2, 24, seed=3), random(1, 12, 2, 24, seed=4)
    cpu = torch.device("cpu")

    def scores(first: int) -> Tensor:
        q, k = (
            rotate(x, rope_table((3, 2, 2), 24, cpu, first + later)) for x, later in ((query, 5), (key, 0))
        )
        return torch.einsum("blhd,bshd->bhls", q, k)

    torch.testing.assert_close(scores(2_419_200), scores(0), rtol=1e-5, atol=1e-5)


def test_a_block_with_too_few_audio_vectors_is_refused(dit: WanDiT) -> None:
    made = generator(dit)
    with pytest.raises(ValueError, match="block 0 needs 5 audio vectors, not 4"):
        made.make(audio(dit, 4, 0), noises(made.shape, 0))
    assert made.done == 0
