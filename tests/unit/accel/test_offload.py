"""Streamed blocks on the CPU: equal to resident ones bit for bit, and a ring that never mixes blocks up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.block_storage import block_tensors, fill, layout_of
from omniavatar.accel.kernels.rows import EagerOps
from omniavatar.accel.offload import (
    Copies,
    DirectCopies,
    OffloadConfig,
    Offloader,
    RingSlot,
    StreamedBlock,
    apply_offload,
    streamed_blocks,
)
from omniavatar.accel.residual_cache import ResidualCache
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import plan_passes
from omniavatar.types import StepPlan

CPU = torch.device("cpu")
VARIANTS = [AccelConfig(), AccelConfig(fuse=True), AccelConfig("fp8"), AccelConfig("fp8", True)]


class LateCopies(Copies):
    """Fills a slot with NaN bytes when a copy begins and with the weights only when it is waited for."""

    def __init__(self) -> None:
        self.copies: list[int] = []
        self._pending: dict[int, torch.Tensor] = {}
        self._computing: set[int] = set()

    def copy(self, slot: RingSlot, host: torch.Tensor) -> None:
        assert id(slot) not in self._computing, "a slot was given up before its computation was handed over"
        slot.buffer.fill_(0xFF)
        self._pending[id(slot)] = host
        self.copies.append(host.data_ptr())

    def wait(self, slot: RingSlot) -> None:
        if id(slot) in self._pending:
            slot.buffer.copy_(self._pending.pop(id(slot)))
        self._computing.add(id(slot))

    def computed(self, slot: RingSlot) -> None:
        self._computing.remove(id(slot))


def nano(variant: AccelConfig, dtype=torch.float32, blocks: int = 6):
    _, attention = create_attention("sdpa", CPU, dtype)
    config = replace(scale_spec("nano").dit, num_layers=blocks)
    dit = random_dit(config, attention=attention, dtype=dtype, device="cpu", seed=0)
    apply_accelerations(dit, variant, EagerOps())
    return dit


def inputs(dit):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 16, 3, 4, 6, generator=generator)
    y = torch.randn(1, 17, 3, 4, 6, generator=generator)
    text = torch.randn(1, 20, dit.config.text_dim, generator=generator)
    audio = torch.randn(1, 9, dit.config.audio_dim, generator=generator)
    return sample, y, torch.tensor([700.0]), dit.prepare_text(text), dit.prepare_audio(audio)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("resident", "ring"), [(0, 1), (2, 2), (1, 3), (0, 9), (6, 2)])
@torch.inference_mode()
def test_streamed_equals_resident(variant, resident, ring):
    dit = nano(variant, torch.bfloat16)
    expected = [dit(*inputs(dit)) for _ in range(2)]
    state = {key: value.clone() for key, value in dit.state_dict().items()}
    copies = LateCopies()
    offloader = apply_offload(dit, OffloadConfig(resident, ring), CPU, copies)
    assert sum(isinstance(block, StreamedBlock) for block in dit.blocks) == 6 - resident
    for each in expected:
        assert torch.equal(dit(*inputs(dit)), each)
    assert dit.state_dict().keys() == state.keys()
    assert all(torch.equal(dit.state_dict()[key], value) for key, value in state.items())
    if offloader.ring is not None:
        assert len(offloader.ring.slots) == min(ring, 6 - resident)
    if 0 < 6 - resident <= ring:
        assert len(copies.copies) == 6 - resident  # all fit: copied once, then kept


def test_next_block_is_on_its_way_before_the_one_before_returns():
    dit = nano(AccelConfig())
    copies = LateCopies()
    ring = apply_offload(dit, OffloadConfig(0, 2), CPU, copies).ring
    with torch.inference_mode():
        dit(*inputs(dit))
        assert len(copies.copies) == 8  # six blocks, and the first two of the next forward
        assert {slot.holds for slot in ring.slots} == {0, 1}
        dit(*inputs(dit))
    assert len(copies.copies) == 14


def test_slot_tensors_lie_in_the_slots_and_nothing_else_is_read():
    """Every weight a forward reads is in a slot: it computes with host memory spoilt after the copy."""
    dit = nano(AccelConfig(fuse=True))
    with torch.inference_mode():
        args = inputs(dit)
        expected = dit(*args)

    class SpoilingCopies(DirectCopies):
        def copy(self, slot: RingSlot, host: torch.Tensor) -> None:
            super().copy(slot, host)
            host.fill_(0xFF)

    ring = apply_offload(dit, OffloadConfig(4, 2), CPU, SpoilingCopies()).ring
    with torch.inference_mode():
        assert torch.equal(dit(*args), expected)
    for slot in ring.slots:
        low, high = slot.buffer.data_ptr(), slot.buffer.data_ptr() + slot.buffer.numel()
        cross = slot.block.cross_attn
        kept = {id(p) for layer in (cross.k, cross.v, cross.norm_k) for p in layer.parameters()}
        assert all(low <= tensor.data_ptr() < high for tensor in block_tensors(slot.block, kept))


def test_text_layers_take_no_room_in_the_ring():
    dit = nano(AccelConfig())
    whole = sum(p.numel() * p.itemsize for p in dit.blocks[0].parameters())
    parked = sum(p.numel() * 4 for name in "kv" for p in getattr(dit.blocks[0].cross_attn, name).parameters())
    ring = apply_offload(dit, OffloadConfig(0), CPU).ring
    assert whole - parked - 4096 <= ring.slots[0].buffer.numel() <= whole - parked + 8192


@torch.inference_mode()
def test_step_cache_on_top():
    dit = nano(AccelConfig(fuse=True))
    plan = StepPlan((True, False, True, True), "teacache")
    passes = plan_passes(plan, guidance_branches(1.0, None, True), has_audio=True)

    def run():
        cache = ResidualCache(dit.run_blocks)
        return [dit(*inputs(dit), run_blocks=cache.runner(row[0])) for row in passes]

    expected = run()
    apply_offload(dit, OffloadConfig(2), CPU, LateCopies())
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@torch.inference_mode()
def test_blocks_out_of_order_and_after_an_error():
    dit = nano(AccelConfig())
    args = inputs(dit)
    expected = dit(*args)
    apply_offload(dit, OffloadConfig(0, 2), CPU, LateCopies())
    calls = []

    def failing(q, k, v):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("injected")
        return working(q, k, v)

    working, dit.attention = dit.attention, failing
    with pytest.raises(torch.OutOfMemoryError):
        dit(*args)
    dit.attention = working
    assert torch.equal(dit(*args), expected)


@torch.inference_mode()
def test_more_blocks_go_later():
    dit = nano(AccelConfig("fp8", True))
    expected = dit(*inputs(dit))
    offloader = Offloader(dit, CPU, LateCopies())
    for resident, ring in ((6, 2), (4, 2), (1, 2), (0, 1)):
        offloader.apply(OffloadConfig(resident, ring))
        assert torch.equal(dit(*inputs(dit)), expected)
        assert sum(isinstance(block, StreamedBlock) for block in dit.blocks) == 6 - resident


def test_streamed_blocks_are_spread():
    assert streamed_blocks(6, 6) == [] and streamed_blocks(6, 0) == [0, 1, 2, 3, 4, 5]
    assert streamed_blocks(40, 36) == [0, 10, 20, 30]
    for resident in range(41):
        chosen = streamed_blocks(40, resident)
        assert len(set(chosen)) == 40 - resident and all(0 <= i < 40 for i in chosen)


def test_views_stay_views_in_a_layout():
    packed = torch.arange(24.0).view(6, 4)
    tensors = [packed[:2], torch.ones(3, dtype=torch.bfloat16), packed, packed[2:]]
    layout = layout_of(tensors)
    buffer = torch.zeros(layout.size, dtype=torch.uint8)
    fill(buffer, tensors, layout)
    views = [place.view(buffer) for place in layout.places]
    assert all(torch.equal(a, b) for a, b in zip(views, tensors, strict=True))
    assert views[3].data_ptr() == views[2].data_ptr() + 32 and layout.size < 2 * packed.numel() * 4 + 256
