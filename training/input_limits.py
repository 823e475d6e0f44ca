"""Sets the limits of `omniavatar.encoders.input_limits` for trained weights, from portraits and sounds.

`python -m training.input_limits WEIGHTS_DIR [--recordings FILE.npz]` writes `WEIGHTS_DIR/input_limits.json`
in about five minutes on two cores. Three quarters of several hundred rendered portraits define the subspace
of thumbnails and, with as many pictures without a head (`no_heads`), the classifier of outlines. The last
quarter sets the limits, with some slack. Half of the takes (synthesised speech; hiss, hum and chords) train
the classifier of speech; the other half, and recordings of people if given, test it. `--others FILE...`
prints the measures of other pictures, to judge the limits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omniavatar.accel.vae_runners import choose_vae, create_vae
from omniavatar.checkpoint.vae import load_vae
from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.image import prepare_image
from omniavatar.encoders.input_limits import InputLimits, outlines, psnr, speech_vectors, thumbnail
from omniavatar.model.vae import VideoVAE
from training.head import Head
from training.looks import draw_looks
from training.phones import FPS
from training.portraits import portrait
from training.render import Renderer
from training.scale import SIZE
from training.speech import SpeechSet, synthesise
from training.takes import SAMPLES_A_FRAME, make_take, no_speech

PORTRAIT_SEED, SPEECH_SEED, TAKE_SEED = 70_000, 61_000, 50_000
COMPONENTS = 24
SLACK = 1.1
SCORE_SLACK = 0.05
PSNR_SLACK_DB = 1.5
RIDGE = 1e-2
LEAST_SPEECH_SHARE = 0.25
TAKE_FRAMES = 5 * FPS + 1


def as_picture(pixels: np.ndarray) -> Tensor:
    """A portrait (1, 3, SIZE, SIZE) in [-1, 1] from uint8 (h, w, 3), prepared as in the engine."""
    return prepare_image(pixels, (SIZE, SIZE))


def after_vae(vae: VideoVAE, picture: Tensor) -> Tensor:
    """The reconstruction of one picture by the VAE."""
    return vae.decode(vae.encode(picture[:, :, None]))[:, :, 0]


def subspace(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (P,) and principal components (K, P) of thumbnails (N, P)."""
    mean = thumbnails.mean(0)
    rows = np.linalg.svd(thumbnails - mean, full_matrices=False)[2]
    return mean, rows[: min(COMPONENTS, len(rows) - 1)]


def no_heads(heads: list[np.ndarray], backgrounds: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """uint8 pictures without a head in the centre, as many as `heads` (h, w, 3).

    They are made from the heads and their rooms: upside down, on the side, in shuffled tiles, moved over the
    edge, a small part of a head, empty rooms, coarse to fine noise.
    """
    result: list[np.ndarray] = []
    for number, head in enumerate(heads):
        side = len(head)
        kind = number % 7
        if kind == 0:
            other = head[::-1]
        elif kind == 1:
            other = np.rot90(head, int(rng.choice([1, 3])))
        elif kind == 2:
            tile = side // int(rng.choice([2, 3, 4, 6]))
            places = rng.permutation((side // tile) ** 2)
            tiles = (
                head.reshape(side // tile, tile, side // tile, tile, 3)
                .swapaxes(1, 2)
                .reshape(-1, tile, tile, 3)
            )
            mixed = tiles[places].reshape(side // tile, side // tile, tile, tile, 3)
            other = mixed.swapaxes(1, 2).reshape(side, side, 3)
        elif kind == 3:
            other = np.roll(head, tuple(rng.integers(side // 4, 3 * side // 4, 2)), (0, 1))
        elif kind == 4:
            part = int(rng.integers(side // 5, side // 2))
            top, left = rng.integers(0, side - part, 2)
            other = head[top : top + part, left : left + part]
        elif kind == 5:
            other = backgrounds[number % len(backgrounds)]
        else:
            grain = int(rng.integers(2, side))
            noise = rng.integers(0, 256, (grain, grain, 3), dtype=np.uint8)
            other = np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC))
        result.append(np.ascontiguousarray(other))
    return result


def classifier(positive: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights and bias from ridge regression of rows on +1 and -1; both classes have equal weight."""
    rows = np.concatenate([positive, other])
    middle, scale = rows.mean(0), rows.std(0) + 1e-6
    target = np.concatenate([np.ones(len(positive)), -np.ones(len(other))])
    weight = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in (positive, other)])
    inputs = np.concatenate([(rows - middle) / scale, np.ones((len(rows), 1))], 1)
    weighted = inputs * weight[:, None]
    solved = np.linalg.solve(weighted.T @ inputs + RIDGE * np.eye(inputs.shape[1]), weighted.T @ target)
    weights = solved[:-1] / scale
    return weights, float(solved[-1] - weights @ middle)


def speech_rows(encoder: AudioEncoder, sounds: Iterator[np.ndarray], hidden: int) -> list[np.ndarray]:
    """`speech_vectors` of each int16 sound."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            speech_vectors(
                encoder.encode(
                    sound.astype(np.float32) / 32768,
                    -(-len(sound) // SAMPLES_A_FRAME),
                    FPS,
                    Path(folder) / f"{number}.npy",
                ),
                hidden,
            )
            for number, sound in enumerate(sounds)
        ]


def speech_limits(
    encoder: AudioEncoder, takes: int, recordings: SpeechSet | None
) -> tuple[np.ndarray, float, dict[str, float]]:
    """The classifier of speech, and its results on sounds that did not train it."""
    hidden = int(encoder.model.config.hidden_size)
    names = Head("cpu").names
    spoken = synthesise(160, SPEECH_SEED, 2)
    seeds = iter(range(TAKE_SEED, TAKE_SEED + 10 * takes))
    made = (make_take(spoken, names, TAKE_FRAMES, seed) for seed in seeds)
    speaking = [
        take.sound for _, take in zip(range(takes), (t for t in made if t.phones.any()), strict=False)
    ]
    rng = np.random.default_rng(TAKE_SEED)
    other = [no_speech(rng, (TAKE_FRAMES - 1) * SAMPLES_A_FRAME) for _ in range(takes)]
    speech, noise = (speech_rows(encoder, iter(sounds), hidden) for sounds in (speaking, other))
    half = takes // 2
    weights, bias = classifier(np.concatenate(speech[:half]), np.concatenate(noise[:half]))
    measured = {
        "speech_seconds_known": float(np.mean(np.concatenate(speech[half:]) @ weights + bias > 0)),
        "other_seconds_known": float(np.mean(np.concatenate(noise[half:]) @ weights + bias <= 0)),
    }
    if recordings is not None:
        sounds = (recordings.utterance(number)[0] for number in range(len(recordings)))
        rows = [row for row in speech_rows(encoder, sounds, hidden) if len(row)]
        shares = [float(np.mean(row @ weights + bias > 0)) for row in rows]
        measured["least_share_of_a_recording"] = min(shares)
    return weights, bias, measured


def portrait_limits(
    heads: list[np.ndarray],
    rooms: np.ndarray,
    reconstruct: Callable[[Tensor], Tensor],
    speech: tuple[np.ndarray, float],
) -> tuple[InputLimits, dict[str, float]]:
    """The limits from portraits and empty rooms, uint8 (N, H, W, 3), and the values they were derived from.

    The classifier of speech is made before.
    """
    others = no_heads(heads, rooms, np.random.default_rng(PORTRAIT_SEED))
    pictures = [as_picture(pixels) for pixels in heads]
    small = np.stack([thumbnail(picture) for picture in pictures])
    edges = np.stack([outlines(picture) for picture in pictures])
    other_edges = np.stack([outlines(as_picture(pixels)) for pixels in others])
    fitted = len(heads) * 3 // 4
    mean, components = subspace(small[:fitted])
    head_weights, head_bias = classifier(edges[:fitted], other_edges[:fitted])
    open_ended = InputLimits(
        least_psnr_db=0.0,
        most_left_over=float("inf"),
        least_head_score=0.0,
        least_speech_share=LEAST_SPEECH_SHARE,
        mean=mean,
        components=components,
        head_weights=head_weights,
        head_bias=head_bias,
        speech_weights=speech[0],
        speech_bias=speech[1],
    )
    decibels = [psnr(picture, reconstruct(picture)) for picture in pictures[fitted:]]
    left_over = max(open_ended.left_over(row) for row in small[fitted:])
    scores = [open_ended.head_score(row) for row in edges[fitted:]]
    other_scores = np.array([open_ended.head_score(row) for row in other_edges[fitted:]])
    limits = replace(
        open_ended,
        least_psnr_db=round(min(decibels) - PSNR_SLACK_DB, 2),
        most_left_over=round(SLACK * left_over, 4),
        least_head_score=round(min(scores) - SCORE_SLACK, 3),
    )
    return limits, {
        "portraits": len(heads),
        "least_psnr_db": min(decibels),
        "median_psnr_db": float(np.median(decibels)),
        "most_left_over": left_over,
        "least_head_score": min(scores),
        "no_heads_known": float(np.mean(other_scores < limits.least_head_score)),
    }


def set_limits(weights: Path, portraits: int, takes: int, recordings: SpeechSet | None) -> InputLimits:
    """Measure, write `weights/input_limits.json`, and return it."""
    device = torch.device("cpu")
    plain = load_vae(weights / "vae.safetensors", dtype=torch.float32, device=device)
    vae = create_vae(choose_vae("auto", device), plain, device)
    renderer = Renderer(Head(device), SIZE)
    heads = [portrait(renderer, PORTRAIT_SEED + number) for number in range(portraits)]
    rooms = draw_looks(renderer.head, portraits // 7 + 1, PORTRAIT_SEED - 1, SIZE).background
    encoder = AudioEncoder.load(weights / "wav2vec", device)
    speech_weights, speech_bias, speech_measured = speech_limits(encoder, takes, recordings)
    limits, measured = portrait_limits(
        heads,
        (rooms * 255).byte().permute(0, 2, 3, 1).numpy(),
        partial(after_vae, vae),
        (speech_weights, speech_bias),
    )
    measured |= speech_measured
    limits.save(weights / "input_limits.json", measured)
    print(json.dumps(measured))
    return limits


def judge(weights: Path, limits: InputLimits, others: list[Path]) -> None:
    """Print the measures of pictures."""
    vae = load_vae(weights / "vae.safetensors", dtype=torch.float32, device="cpu")
    for path in others:
        picture = as_picture(np.array(Image.open(path).convert("RGB")))
        left_over, score = limits.left_over(thumbnail(picture)), limits.head_score(outlines(picture))
        again = after_vae(vae, picture)
        warned = "warning" if limits.portrait_notes(picture, again) else "accepted"
        decibels = psnr(picture, again)
        print(f"{path.name}: {decibels:.1f} dB, residual {left_over:.3f}, head {score:.2f}: {warned}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="folder written by training.export")
    parser.add_argument("--portraits", type=int, default=480)
    parser.add_argument("--takes", type=int, default=80)
    parser.add_argument(
        "--recordings", type=Path, help="SpeechSet file of real speech, to test the classifier"
    )
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="pictures to judge")
    arguments = parser.parse_args()
    recordings = SpeechSet.load(arguments.recordings) if arguments.recordings else None
    limits = set_limits(arguments.weights, arguments.portraits, arguments.takes, recordings)
    judge(arguments.weights, limits, arguments.others)


if __name__ == "__main__":
    main()
