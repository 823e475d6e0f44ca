"""SoulX-FlashHead against its recording: audio windows, projector, DiT, colour match, whole loop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compare import relative_error
from heads import check_chunk, chunk_rule, ears, head_dit, run_chunks, vae_of

from omniavatar.checkpoint.dit_sizes import unused_layers
from omniavatar.encoders.chunk_audio import chunk_sound, encode_sound
from omniavatar.encoders.image import prepare_image_bytes
from omniavatar.engine.window_loop import WindowSampling
from omniavatar.model.audio_tokens import later_rows
from omniavatar.model.colour import ColourMatch
from omniavatar.model.dit import WanDiT
from omniavatar.model.layers import BlockInputs
from omniavatar.sampling.chunks import chunk_windows, frame_windows, plan_chunks
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import plan_passes
from omniavatar.sampling.schedule import distilled_schedule
from omniavatar.sampling.step_cache import compute_all
from omniavatar.sampling.windows import frames_for


def test_every_frame_hears_the_recorded_rows(golden) -> None:
    tensors, metadata = golden("flashhead.safetensors")
    for number, case in enumerate(json.loads(metadata["windows"])):
        first = max(case["start"], 0)
        end = case["frames"] if case["end"] < 0 else case["end"]
        found = frame_windows(case["frames"], first, end)
        assert torch.equal(torch.tensor(found), tensors[f"windows{number}.indices"]), number
    rule = chunk_rule(json.loads(metadata["loop"]))
    whole = tensors["windows0.indices"] - (rule.buffer_frames - rule.rows)
    assert torch.equal(torch.tensor(chunk_windows(rule)), whole)


def test_every_latent_takes_the_recorded_rows(golden) -> None:
    tensors, _ = golden("flashhead.safetensors")
    later = tensors["latent_windows.later"]
    frames, window = 4 * len(later) + 1, len(tensors["latent_windows.first"])
    numbered = 10 * torch.arange(frames)[:, None] + torch.arange(window)
    assert torch.equal(later_rows(numbered[None, :, :, None])[0, :, :, 0], later)
    assert torch.equal(numbered[0], tensors["latent_windows.first"])


def test_chunks_of_every_recorded_length(golden) -> None:
    _, metadata = golden("flashhead.safetensors")
    loop = json.loads(metadata["loop"])
    rule = chunk_rule(loop)
    for samples, plans in json.loads(metadata["chunk_plans"]).items():
        frames = frames_for(int(samples), rule.fps, loop["sample_rate"])
        windows = plan_chunks(frames, rule)
        assert len(windows) == plans["stream"]["chunks"], samples
        assert sum(window.new_frames for window in windows) == frames
        assert [window.first_new_frame for window in windows] == [rule.new * n for n in range(len(windows))]


@pytest.mark.slow
def test_speech_of_every_recorded_chunk(golden, tmp_path) -> None:
    tensors, metadata = golden("flashhead.safetensors")
    audio, rule = json.loads(metadata["audio"]), chunk_rule(json.loads(metadata["loop"]))
    wave, listener = tensors["waveform"].numpy(), ears(golden, tmp_path / "speech", rule)
    for chunk in audio["recorded"]:
        (rows,) = listener.encode_buffers(chunk_sound(wave[: audio["samples"]], chunk, rule)[None])
        recorded = tensors[f"audio.chunk{chunk}.embedding_tail"]
        assert relative_error(rows[-rule.rows :], recorded.flatten(1)) <= 1e-4, chunk
        if (whole := tensors.get(f"audio.chunk{chunk}.embedding")) is not None:
            assert relative_error(rows, whole.flatten(1)) <= 1e-4, chunk
    once = json.loads(metadata["audio_once"])
    with torch.inference_mode():
        sound = torch.from_numpy(wave[None, : once["samples"]].copy())
        rows = encode_sound(listener.model, sound, once["frames"])
    assert relative_error(rows[0], tensors["audio.once.embedding"].flatten(1)) <= 1e-4


def test_the_dit_and_its_audio_tokens(golden, tmp_path) -> None:
    tensors, metadata = golden("flashhead.safetensors")
    notes: list[str] = []
    dit = head_dit(tmp_path, tensors, json.loads(metadata["config"]), notes)
    unused = unused_layers(key.removeprefix("weights.") for key in tensors if key.startswith("weights."))
    assert len(notes) == 1 and unused and all(name in notes[0] for name in unused)
    for number, _ in enumerate(json.loads(metadata["dit_cases"])):
        case = {name: tensors[f"case{number}.{name}"] for name in ("x", "y", "timestep", "windows")}
        windows = case["windows"].flatten(3)
        with torch.inference_mode():
            tokens = dit.audio_proj(windows)
            assert relative_error(tokens, tensors[f"case{number}.audio_tokens"]) <= 1e-5
            for heard, recorded in ((windows, "output"), (torch.zeros_like(windows), "output_silent")):
                first: list[torch.Tensor] = []
                context = dit.prepare_audio_tokens(heard)
                out = dit(
                    case["x"],
                    case["y"],
                    case["timestep"],
                    context,
                    dit.prepare_audio(None),
                    run_blocks=lambda x, inputs, kept=first: watched(dit, x, inputs, kept),
                )
                assert relative_error(out, tensors[f"case{number}.{recorded}"]) <= 1e-5
                if recorded == "output":
                    assert relative_error(first[0], tensors[f"case{number}.block0"]) <= 1e-5


def watched(dit: WanDiT, tokens: torch.Tensor, inputs: BlockInputs, kept: list[torch.Tensor]) -> torch.Tensor:
    """`WanDiT.run_blocks`, which also keeps the tokens after the first block."""
    block = dit.blocks[0]
    values = (inputs.modulation, inputs.rope, inputs.text[0], inputs.audio[0])
    kept.append(block(tokens, *values, dit.attention, dit.text_attention))
    return dit.run_blocks(tokens, inputs)


def test_colours_match_the_portrait(golden) -> None:
    tensors, metadata = golden("flashhead.safetensors")
    for number, case in enumerate(json.loads(metadata["colour"])):
        source, reference = ((tensors[f"colour{number}.{name}"] + 1) / 2 for name in ("source", "reference"))
        matched = ColourMatch.to(reference, case["strength"])(source) * 2 - 1
        assert relative_error(matched, tensors[f"colour{number}.output"]) <= 1e-4, number


def test_portraits(golden) -> None:
    tensors, metadata = golden("flashhead.safetensors")
    for number, size in enumerate(json.loads(metadata["image_targets"])):
        picture = prepare_image_bytes(tensors[f"image{number}.input"].numpy(), tuple(size))
        assert relative_error(picture, tensors[f"image{number}.output"][:, :, 0]) <= 1e-6, number


@pytest.mark.slow
def test_the_whole_loop(golden, tmp_path) -> None:
    tensors, metadata = golden("flashhead.safetensors")
    loop = json.loads(metadata["loop"])
    rule = chunk_rule(loop)
    dit = head_dit(tmp_path, tensors, json.loads(metadata["config"]))
    vae = vae_of(golden)
    picture = prepare_image_bytes(tensors["image0.input"].numpy(), tuple(loop["size"]))[:, :, None]
    assert relative_error(picture, tensors["loop.portrait"]) <= 1e-6
    with torch.inference_mode():
        reference = vae.encode(picture.expand(-1, -1, rule.frames, -1, -1))
    assert relative_error(reference[0], tensors["loop.reference_latent"]) <= 1e-4

    wave = tensors["waveform"][: loop["samples"]].numpy()
    windows = plan_chunks(frames_for(len(wave), rule.fps, loop["sample_rate"]), rule)
    assert len(windows) == loop["chunks"] and windows[-1].new_frames < rule.new
    schedule = distilled_schedule(loop["steps"], loop["shift"], whole=False)
    assert np.allclose(schedule.timesteps, loop["timesteps"], rtol=1e-6)
    passes = plan_passes(compute_all(loop["steps"]), guidance_branches(1.0, None, True), True)
    sampling = WindowSampling(0, schedule, passes, "renoise", None, rule, color_match=loop["colour_strength"])
    rows = np.concatenate(list(ears(golden, tmp_path / "speech", rule).encode(wave, len(windows))))

    def noises(chunk: int):
        yield tensors[f"loop.chunk{chunk}.noise"]
        for step in range(loop["steps"] - 1):
            yield tensors[f"loop.chunk{chunk}.renoise{step}"]

    given = reference[:, :, :1]
    for result in run_chunks(dit, vae, picture, reference, rows, sampling, windows, noises):
        check_chunk(result, tensors, f"loop.chunk{result.window.index}", rule.given, given)
        given = result.next_given
