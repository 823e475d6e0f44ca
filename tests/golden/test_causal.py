"""The block-causal student against its recording: whole loop, cache, sink and rolling window."""

import json
from collections.abc import Iterator

import pytest
import torch
from compare import build_dit, relative_error, under

from omniavatar.engine.block_loop import BlockGenerator
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.schedule import make_schedule


class Recorded:
    """The recorded run, and this project's generator for it."""

    def __init__(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        self.tensors = tensors
        self.window = CausalWindow(
            int(metadata["frames_per_block"]),
            int(metadata["local_attention_frames"]),
            int(metadata["sink_frames"]),
        )
        self.schedule = make_schedule(1, 1.0, tuple(json.loads(metadata["timesteps"])))
        self.dit = build_dit(metadata, under(tensors, "weights."))
        self.blocks = tensors["noise"].shape[0] // self.window.block

    def generator(self, window: CausalWindow | None = None) -> BlockGenerator:
        with torch.inference_mode():
            text = self.dit.prepare_text(self.tensors["context"])
        reference = self.tensors["reference_latent"]
        return BlockGenerator(self.dit, reference, text, self.schedule, window or self.window, torch.float32)

    def noises(self, block: int) -> Iterator[torch.Tensor]:
        first = block * self.window.block
        yield self.tensors["noise"][first : first + self.window.block].movedim(1, 0)[None]
        for step in range(len(self.schedule) - 1):
            yield self.tensors[f"renoise.block{block}.step{step}"].movedim(1, 0)[None]

    def audio(self, generator: BlockGenerator, block: int) -> torch.Tensor:
        """The vectors of a block. The first latent has one, the others have four."""
        first = 4 * self.window.block * block - (3 if block else 0)
        return self.tensors["audio"][:, first : first + generator.audio_rows(block)]

    def latents(self, block: int) -> torch.Tensor:
        first = block * self.window.block
        return self.tensors["latents"][first : first + self.window.block].movedim(1, 0)[None]

    def make(self, generator: BlockGenerator, block: int) -> torch.Tensor:
        noises = self.noises(block)
        return generator.make(self.audio(generator, block), lambda: next(noises))


@pytest.fixture
def recorded(golden) -> Recorded:
    return Recorded(*golden("causal.safetensors"))


def test_every_block_equals_the_recording(recorded: Recorded) -> None:
    generator = recorded.generator()
    assert recorded.blocks > recorded.window.slots, "the recording must roll the cache"
    for block in range(recorded.blocks):
        assert relative_error(recorded.make(generator, block), recorded.latents(block)) <= 1e-4, block


def test_a_smaller_window_gives_something_else(recorded: Recorded) -> None:
    """Without the past, the comparison above fails."""
    smaller = CausalWindow(
        recorded.window.block, recorded.window.sink + recorded.window.block, recorded.window.sink
    )
    generator = recorded.generator(smaller)
    errors = [
        relative_error(recorded.make(generator, block), recorded.latents(block))
        for block in range(recorded.blocks)
    ]
    assert max(errors) > 1e-3


def test_replayed_blocks_leave_the_same_cache(recorded: Recorded) -> None:
    """A resumed video goes on with the same bits."""
    whole, resumed = recorded.generator(), recorded.generator()
    half = recorded.blocks // 2
    for block in range(half):
        resumed.replay(recorded.audio(resumed, block), recorded.make(whole, block))
    for block in range(half, recorded.blocks):
        assert torch.equal(recorded.make(whole, block), recorded.make(resumed, block)), block
