"""Parts of the long-video loop, and faults of the original code in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import make_pipeline, portrait, request
from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.engine.window_inputs import audio_slice, image_condition
from omniavatar.engine.window_loop import to_uint8
from omniavatar.media.inspect import probe_video
from omniavatar.model.audio_adapter import AudioPack
from omniavatar.model.sizes import audio_block_indices
from omniavatar.sampling.windows import plan_windows


def test_each_frame_gets_its_own_audio_row():
    rows = np.arange(1, 61, dtype=np.float32)[:, None].repeat(2, 1)
    windows = plan_windows(40, 17, 5)
    first = audio_slice(rows, windows[0])[0, :, 0]
    assert first.tolist() == [0, *range(1, 17)]  # zeros for the portrait frame, row f - 1 for frame f
    second = audio_slice(rows, windows[1])[0, :, 0]
    assert second.tolist() == list(range(12, 29))
    assert torch.equal(second[:5], first[-5:])  # a window starts with the last vectors of the previous one
    with pytest.raises(ValueError, match="needs audio rows"):
        audio_slice(rows[:20], windows[1])


def test_mask_is_zero_on_given_latents_only():
    reference = torch.randn(1, 16, 1, 2, 3)
    for window, given in zip(plan_windows(40, 17, 5)[:2], (1, 2), strict=True):
        y = image_condition(reference, window)
        assert y.shape == (1, 17, 5, 2, 3)
        assert torch.equal(y[:, :16], reference.expand(-1, -1, 5, -1, -1))
        assert y[0, 16, :, 0, 0].tolist() == [0.0] * given + [1.0] * (5 - given)


def test_frames_are_rounded_not_truncated():
    """Fault of the original: float frames are truncated to bytes, half a grey level darker on average."""
    values = torch.tensor([0.0, 0.4, 0.6, 1.4, 254.6, 255.0]) / 255
    frames = to_uint8(values.view(1, 1, 1, 1, -1).expand(1, 3, 2, 1, -1).clone())
    assert frames.shape == (2, 1, 6, 3)
    assert frames[1, 0, :, 2].tolist() == [0, 0, 1, 1, 255, 255]


def test_samples_of_a_batch_are_independent():
    """Fault of the original: batched conditioning mixes samples."""
    _, attention = create_attention("sdpa", torch.device("cpu"), torch.float32)
    spec = scale_spec("nano").dit
    dit = random_dit(spec, attention=attention, dtype=torch.float32, device="cpu", seed=0)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, channels, 2, 4, 6, generator=generator) for channels in (16, 17))
    text = torch.randn(3, 9, spec.text_dim, generator=generator)
    audio = torch.randn(3, 5, spec.audio_dim, generator=generator)
    timesteps = torch.tensor([900.0, 500.0, 20.0])

    def run(which: slice) -> torch.Tensor:
        states = dit.prepare_text(text[which]), dit.prepare_audio(audio[which])
        return dit(x[which], y[which], timesteps[which], *states)

    with torch.inference_mode():
        together = run(slice(None))
        for i in range(3):
            alone = run(slice(i, i + 1))
            assert (together[i] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


def test_audio_is_packed_four_by_four_with_the_first_repeated():
    pack = AudioPack(1, 4)
    with torch.no_grad():
        pack.proj.weight.copy_(torch.eye(4))
        pack.proj.bias.zero_()
    seen = []
    pack.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pack(torch.arange(1.0, 10.0).view(1, 9, 1))
    assert seen[0][0].tolist() == [[1, 1, 1, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    assert list(audio_block_indices(40)) == list(range(2, 21)) and len(audio_block_indices(30)) == 14


def test_file_names_never_reach_a_shell(nano_checkpoint, tmp_path):
    """Fault of the original: file names in shell commands."""
    import PIL.Image

    folder = tmp_path / 'it\'s a "folder"; $(touch pwned) & more'
    folder.mkdir()
    picture = folder / "fa ce'.png"
    PIL.Image.fromarray(portrait()).save(picture)
    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache")
    result = pipe.generate(request(0.2, image=picture), folder / "-o u't.mp4")
    assert probe_video(result.output).frames == 14
    assert not list(tmp_path.rglob("pwned"))
