"""Blocks as graphs: a replayed forward sees the inputs of its call, and each shape has its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.graphs import FORWARDS_FIRST, MOST, GraphedBlocks
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.config.load import load_config
from omniavatar.engine.recorder import NullRecorder
from omniavatar.engine.residency import Residency
from omniavatar.errors import ResourceError
from omniavatar.model.dit import WanDiT
from omniavatar.model.layers import BlockInputs, TokenAudio
from omniavatar.model.rope import rope_table
from omniavatar.model.sizes import DiTConfig
from omniavatar.plan.placement import SMALL_BLOCK, Placement, launches_show, place, wants_graphs
from omniavatar.plan.run import window_shape

CPU = torch.device("cpu")
SMALL = DiTConfig(64, 96, 4, 8, text_dim=16, audio_dim=24, audio_hidden=8)


class Recording:
    """Captures as a graph does: the work runs on the tensors it saw, into the tensor it returned."""

    def __init__(self) -> None:
        self.captured = self.replayed = self.released = 0

    def release(self) -> None:
        self.released += 1

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        out = torch.full_like(work(), float("nan"))

        def replay() -> None:
            self.replayed += 1
            out.copy_(work())

        return replay, out


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    _, attention = create_attention("sdpa", CPU, torch.float32)
    return random_dit(SMALL, attention=attention, dtype=torch.float32, device="cpu", seed=0)


def call(dit: WanDiT, seed: int, frames: int = 3, shared: bool = False, silent: bool = False):
    """Tokens and inputs of a forward over `frames` of 15 tokens; of its second half if `shared`."""
    generator = torch.Generator().manual_seed(seed)
    total = frames * 15
    first = total // 2 if shared else 0
    tokens = torch.randn(1, total - first, dit.config.dim, generator=generator)
    text = dit.prepare_text(torch.randn(1, 7, dit.config.text_dim, generator=generator))
    heard = None if silent else torch.randn(1, 4 * frames - 3, dit.config.audio_dim, generator=generator)
    audio = dit.prepare_audio(heard)
    rope = rope_table((frames, 3, 5), dit.config.head_dim, CPU)
    rope = type(rope)(rope.cos[first:], rope.sin[first:])
    _, modulation = dit.embed_time(torch.tensor([100.0 * seed]))
    given = TokenAudio(audio, first, total - first, total) if shared else audio
    return tokens, BlockInputs(modulation, rope, text, given)


@torch.inference_mode()
@pytest.mark.parametrize("shared", [False, True])
def test_a_replayed_forward_is_that_of_its_inputs(dit: WanDiT, shared: bool) -> None:
    capture = Recording()
    graphed = GraphedBlocks(dit.run_blocks, capture)
    calls = [call(dit, seed, shared=shared) for seed in range(3)]
    for turn in range(FORWARDS_FIRST + 5):
        tokens, inputs = calls[turn % 3]
        assert torch.equal(graphed(tokens, inputs), dit.run_blocks(tokens, inputs))
    assert capture.captured == 1 and capture.replayed == 5


@torch.inference_mode()
def test_what_was_returned_stays_when_the_graph_runs_again(dit: WanDiT) -> None:
    graphed = GraphedBlocks(dit.run_blocks, Recording())
    first, second = call(dit, 1), call(dit, 2)
    for _ in range(FORWARDS_FIRST):
        graphed(*first)
    kept = graphed(*first)
    graphed(*second)
    assert torch.equal(kept, dit.run_blocks(*first))


@torch.inference_mode()
def test_shapes_silence_and_runs_of_tokens_are_captured_apart(dit: WanDiT) -> None:
    capture = Recording()
    graphed = GraphedBlocks(dit.run_blocks, capture)
    kinds = [call(dit, 1), call(dit, 1, silent=True), call(dit, 1, frames=4), call(dit, 1, shared=True)]
    assert len(kinds) == MOST
    for _ in range(FORWARDS_FIRST + 2):
        for each in kinds:
            assert torch.equal(graphed(*each), dit.run_blocks(*each))
    assert capture.captured == MOST
    for _ in range(FORWARDS_FIRST + 1):
        graphed(*call(dit, 1, frames=5))  # one too many: the one used longest ago goes
    graphed(*kinds[1])
    assert capture.captured == MOST + 1
    for _ in range(FORWARDS_FIRST + 1):
        graphed(*kinds[0])
    assert capture.captured == MOST + 2


@torch.inference_mode()
def test_cleared_graphs_are_made_anew(dit: WanDiT) -> None:
    capture = Recording()
    graphed = GraphedBlocks(dit.run_blocks, capture)
    for count in (1, 2):
        for _ in range(FORWARDS_FIRST + 1):
            graphed(*call(dit, 1))
        assert capture.captured == count
        graphed.clear()


def test_launches_show_where_a_block_is_short() -> None:
    """A block of the 1.3B at 15,750 tokens takes one H100 4.7 ms and two 2.3, of the 14B never below 10."""
    small, large = scale_spec("1.3B").dit, scale_spec("14B").dit
    assert launches_show(small, 15750, 2) and launches_show(small, 30375, 4)
    assert not launches_show(small, 15750) and not launches_show(small, 30375, 2)
    assert launches_show(small, 15750, quantised=True) and not launches_show(small, 20000, quantised=True)
    assert not launches_show(large, 15750, 2)
    assert SMALL_BLOCK < 5e12


def test_who_wants_graphs() -> None:
    small = scale_spec("1.3B").dit
    cuda = torch.device("cuda")

    def wants(*values: str, tokens: int = 15750, device: torch.device = cuda, captures: bool = True) -> bool:
        config = load_config(None, ["weights=random", "scale=1.3B", *values]).config
        return wants_graphs(config, small, tokens, device, captures)

    assert wants("sp_size=2") and not wants("sp_size=1") and wants("cuda_graphs=true")
    assert not wants("sp_size=2", "cuda_graphs=false") and not wants("sp_size=2", captures=False)
    assert not wants("sp_size=2", "use_fsdp=true") and not wants("sp_size=2", device=CPU)
    with pytest.raises(ResourceError, match="cuda_graphs: needs CUDA; leave it out"):
        wants("cuda_graphs=true", device=CPU)
    with pytest.raises(ResourceError, match="cuda_graphs: needs exchanges by direct copies"):
        wants("sp_size=2", "cuda_graphs=true", captures=False)


def test_graphs_never_cost_a_request_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their memory does not fit, the plan is that without them, streamed or not."""
    config = load_config(None, ["weights=random", "scale=nano"]).config
    shape = window_shape(config, config.video.sizes[0], has_audio=True)
    spec = scale_spec("nano").dit

    def placed(limit: int | None, wanted: bool) -> Placement:
        monkeypatch.setattr("omniavatar.plan.placement.wants_graphs", lambda *_: wanted)
        return place(config, spec, shape, "fast", CPU, limit)

    whole = placed(None, True)
    assert whole.graphs and "CUDA graphs" in whole.describe()
    least = placed(None, False).memory.peak
    for limit in range(least // 4, 2 * least, least // 40):
        try:
            plain = placed(limit, False)
        except ResourceError:
            with pytest.raises(ResourceError):
                placed(limit, True)
            continue
        graphed = placed(limit, True)
        assert graphed == plain or (graphed.graphs and graphed.memory.fits and not graphed.memory.streams)
    down = whole.step_down()
    assert down is not None and not down.graphs


@torch.inference_mode()
def test_a_window_goes_on_without_graphs_once_blocks_were_sent_away() -> None:
    """What runs the blocks is asked at every forward, not once a window."""
    config = load_config(None, ["weights=random", "scale=nano", "device=cpu", "dtype=fp32"]).config
    capture = Recording()
    dit_config = scale_spec("nano").dit
    residency = Residency(config, dit_config, "fast", CPU, NullRecorder(), capture=lambda: capture)
    shape = window_shape(config, config.video.sizes[0], has_audio=True)
    residency.adopt(replace(residency.place(shape, {}), graphs=True))
    attention = create_attention("sdpa", CPU, torch.float32)[1]
    dit = random_dit(dit_config, attention=attention, dtype=torch.float32, device=CPU, seed=0)
    residency.hold(dit)
    run = residency.run_blocks
    given = call(dit, 1)
    expected = dit.run_blocks(*given)
    for _ in range(FORWARDS_FIRST + 1):
        assert torch.equal(run(*given), expected)
    assert capture.replayed == 1
    residency.step_down("out of memory")
    for _ in range(FORWARDS_FIRST + 2):
        assert torch.equal(run(*given), expected)
    assert (capture.captured, capture.replayed, capture.released) == (1, 1, 1)
