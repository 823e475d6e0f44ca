"""Model families (`family`): what differs between models that the same engine runs.

A family is one record. The engine reads the record's values and never compares names. The parts that a value
selects live in one place each:

| value | part |
|---|---|
| `chunk` | plan of windows, features of speech, portrait as a clip (`plan.run`, `encoders.chunk_audio`) |
| `samplers`, `levels` | `sampling.samplers`, `sampling.schedule` |
| `hand_overs` | `engine.window_loop` |
| `text` | prompts and the text encoder (`engine.prepare`) |
| `refused` | settings that the family cannot follow, each with the reason (`config.family_checks`) |

How audio enters the DiT is read from the DiT's sizes (`model.sizes.DiTConfig.audio_tokens`).

`create` takes nothing and returns the settings that the family's released weights need, by section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from omniavatar.device import Backend, Registry
from omniavatar.sampling.chunks import ChunkRule

Levels = Literal["even", "spread", "whole"]
HandOver = Literal["pixels", "clean", "latents"]


@dataclass(frozen=True, kw_only=True)
class Family(Backend):
    """A family.

    - text: it takes a prompt.
    - chunk: its chunks; None for windows of `max_tokens` that overlap.
    - samplers: names of the samplers that its weights follow; empty for all that start from noise.
    - levels: noise levels of a number of steps. even: `sampling.schedule.make_schedule`; spread and whole:
      `distilled_schedule`.
    - hand_overs: what a window may leave for the next one.
    - adapter: its DiT is a base with an adapter (`exp_path`).
    - refused: setting (with its section), or `setting=value` for one value of it: the reason why the family
      cannot follow it.
    """

    text: bool = True
    chunk: ChunkRule | None = None
    samplers: tuple[str, ...] = ()
    levels: Levels = "even"
    hand_overs: tuple[HandOver, ...] = ("pixels", "clean")
    adapter: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)


CHUNKS = ChunkRule()
_DISTILLED = "guidance is distilled into the weights; leave it out"
_ONE_GPU = (
    "a video is made on one GPU, because each latent frame attends to separate audio tokens; make several "
    "videos with `omniavatar batch`"
)
_NO_SPARSE = (
    "each latent frame attends to separate audio tokens, which need the order of the frames; leave it out"
)
_SPARSE = tuple(
    f"sparsity.sparse_{name}"
    for name in ("attention", "density", "mass", "dense_steps", "block_size", "file", "backend")
)
_CHUNKED: Mapping[str, str] = MappingProxyType(
    {
        "video.max_tokens": f"a chunk has {CHUNKS.frames} frames; leave it out",
        "video.overlap_frame": f"a chunk starts from {CHUNKS.given} frames; leave it out",
        "video.fps": f"the weights are for {CHUNKS.fps} frames a second; leave it out",
        "sampling.guidance_scale": "there is no text to follow; set it to 1",
        "sampling.guidance_interval": "there is no text to follow; leave it out",
        "sampling.step_cache": "every one of its few steps is computed; leave it out",
        "sampling.tea_cache_l1_thresh": "every one of its few steps is computed; leave it out",
        "model.exp_path": "its weights are no adapter of Wan; leave it out",
        "model.input_limits": "they belong to the pocket model; leave it out",
        **dict.fromkeys(_SPARSE, _NO_SPARSE),
        "runtime.sp_size": _ONE_GPU,
        "runtime.cfg_parallel": _ONE_GPU,
        "runtime.use_fsdp": _ONE_GPU,
        "runtime.exchange=direct": _ONE_GPU,
    }
)


def _omniavatar() -> dict[str, dict[str, Any]]:
    return {}


def _flashhead() -> dict[str, dict[str, Any]]:
    return {
        "model": {"use_audio": True},
        "sampling": {"sampler": "renoise", "num_steps": 4, "shift": 5.0, "guidance_scale": 1.0},
        "video": {
            "image_sizes_720": [[512, 512]],
            "fps": CHUNKS.fps,
            "silence_duration_s": 0.0,
            "color_match": 1.0,
        },
    }


def _leaptalk() -> dict[str, dict[str, Any]]:
    settings = _flashhead()
    return {
        **settings,
        "sampling": {**settings["sampling"], "sampler": "bridge", "num_steps": 1},
        "output": {"key_frame_s": 0.0},
    }


FAMILIES: Registry[Family] = Registry(
    "model.family",
    Family(
        name="omniavatar",
        create=_omniavatar,
        exact=True,
        doc="OmniAvatar, LiveTalk and the pocket model: a whole figure, directed by a prompt.",
        adapter=True,
        refused=MappingProxyType(
            {
                "model.audio_proj_path": "it belongs to LeapTalk; leave it out",
                "model.latent_encoder": "the model was trained with the VAE, which codes the first frame "
                "alone; use full",
            }
        ),
    ),
    Family(
        name="flashhead",
        create=_flashhead,
        exact=True,
        doc="SoulX-FlashHead Pro 1.3B: heads without a prompt, in 4 steps.",
        text=False,
        chunk=CHUNKS,
        samplers=("renoise",),
        levels="spread",
        refused=MappingProxyType(
            {
                **_CHUNKED,
                "sampling.audio_scale": _DISTILLED,
                "model.audio_proj_path": "it belongs to LeapTalk; set family to leaptalk",
            }
        ),
    ),
    Family(
        name="leaptalk",
        create=_leaptalk,
        exact=True,
        doc="LeapTalk, a LoRA on SoulX-FlashHead Pro: heads without a prompt, in one step.",
        text=False,
        chunk=CHUNKS,
        samplers=("bridge",),
        levels="whole",
        hand_overs=("pixels", "clean", "latents"),
        refused=_CHUNKED,
    ),
    words=("auto",),
)


def family_of(name: str) -> Family:
    """The family for a value of the setting. auto: OmniAvatar, until the weights' keys say otherwise."""
    return FAMILIES.get("omniavatar" if name == "auto" else name)
