"""Names that people give to a setting, and the key or option that it has here.

`hint` knows words of other programs (`width`, `duration`, `steps`). It names the right key and computes the
value to write from the one that was given.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

SHAPE = "the photo decides the shape, and this setting lists the allowed sizes as [height,width]"
LENGTH = "the voice decides the length, and this setting is the number of frames of a video without a voice"
FRAMES_PER_SECOND = 25
_MAX_SHOWN = 60


@dataclass(frozen=True)
class Hint:
    """What to write instead of an unknown word.

    name: a key of the configuration, or an option such as `--audio`.
    value: what to give it.
    why: a remark; may be empty.
    """

    name: str
    value: str
    why: str = ""

    def text(self, in_file: bool = False) -> str:
        """`write <setting> (<remark>)`. in_file: as a line of a configuration file, not as `--hp`."""
        remark = f" ({self.why})" if self.why else ""
        if self.name.startswith("--"):
            return f"write {self.name} {self.value} on the command line{remark}"
        if in_file:
            return f"write {self.name}: {self.value}{remark}"
        return f"write --hp {shlex.quote(f'{self.name}={self.value}')}{remark}"


_SHAPES = (
    "width",
    "height",
    "resolution",
    "size",
    "image_size",
    "video_size",
    "aspect",
    "aspect_ratio",
    "ratio",
)
_SECONDS: Mapping[str, float] = {"minutes": 60, "duration": 1, "seconds": 1, "length": 1, "video_length": 1}
_FRAMES = ("frames", "num_frames", "n_frames", "max_frames", "video_frames")
_KEYS: Mapping[str, tuple[str, str]] = {
    "steps": ("num_steps", "25"),
    "num_inference_steps": ("num_steps", "25"),
    "inference_steps": ("num_steps", "25"),
    "sampling_steps": ("num_steps", "25"),
    "cfg": ("guidance_scale", "4.5"),
    "cfg_scale": ("guidance_scale", "4.5"),
    "guidance": ("guidance_scale", "4.5"),
    "audio_cfg": ("audio_scale", "4.5"),
    "audio_guidance": ("audio_scale", "4.5"),
    "negative": ("negative_prompt", "TEXT"),
    "output_folder": ("output_dir", "FOLDER"),
    "out_dir": ("output_dir", "FOLDER"),
    "outdir": ("output_dir", "FOLDER"),
    "save_dir": ("output_dir", "FOLDER"),
    "output_dir": ("output_dir", "FOLDER"),
    "frame_rate": ("fps", "25"),
    "num_frame_per_block": ("causal_block", "3"),
    "local_attn_size": ("causal_window", "15"),
    "sink_size": ("causal_sink", "9"),
    "denoising_step_list": ("timesteps", "[1000,750,500,250]"),
}
_OPTIONS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("voice", "sound", "speech", "wav", "audio_path", "audio_file"), ("--audio", "FILE")),
    **dict.fromkeys(
        ("picture", "photo", "portrait", "face", "avatar", "image_path", "ref_image"), ("--image", "FILE")
    ),
    **dict.fromkeys(("text", "description"), ("--prompt", "TEXT")),
    **dict.fromkeys(
        ("out", "output_path", "output_file", "save_path", "save_file"), ("--output", "FILE.mp4")
    ),
    **dict.fromkeys(("model", "model_path", "checkpoint", "ckpt", "config_file"), ("--config", "YAML")),
    **dict.fromkeys(("gpu", "gpu_id", "gpu_ids"), ("--gpus", "0")),
}


def plain_word(word: str) -> str:
    """`word` as a key is spelled: no leading dashes, small letters, `_` for `-`."""
    return word.lstrip("-").lower().replace("-", "_")


def hint(word: str, given: Mapping[str, str]) -> Hint | None:
    """What to write for `word`, or None for a word that is not known.

    given: the value that was given for each such word, by `plain_word`; may be empty.
    """
    word = plain_word(word)
    value = given.get(word, "")
    if word in _SHAPES:
        return _shape_hint(given)
    if word in _SECONDS:
        return Hint("seq_len", _frames(value, _SECONDS[word]), LENGTH)
    if word in _FRAMES:
        return Hint("seq_len", value if re.fullmatch(r"\d{1,9}", value) else "200", LENGTH)
    for table in (_KEYS, _OPTIONS):
        if word in table:
            name, example = table[word]
            return Hint(name, shown(value) or example)
    return None


def shown(value: str) -> str:
    """`value` for a message, in quotes where YAML or `--hp` needs them, cut to a readable length."""
    value = " ".join(value.split())
    value = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
    return f'"{value}"' if re.search(r"[\s,:#\[\]{}]", value) else value


def _shape_hint(given: Mapping[str, str]) -> Hint:
    size = next((given[word] for word in _SHAPES[2:] if given.get(word)), "").lower()
    if named := re.fullmatch(r"(480|720|1080)p", size):
        larger = named[1] != "480"
        return Hint(
            "max_hw", "1280" if larger else "720", "720 is for sizes of 480p, 1280 for 720p, the largest"
        )
    if ratio := re.fullmatch(r"(\d+) ?[:/] ?(\d+)", size):
        wide = int(ratio[1]) - int(ratio[2])
        sizes = "[[400,720]]" if wide > 0 else "[[720,400]]" if wide < 0 else "[[720,720]]"
        return Hint("image_sizes_720", sizes, SHAPE)
    width, height = (_sixteens(given.get(word, "")) for word in ("width", "height"))
    numbers = re.findall(r"\d+", size)
    if not width and not height and len(numbers) == 2:
        width, height = map(_sixteens, numbers)
    if not width and not height:
        width, height = "720", "400"
    return Hint("image_sizes_720", f"[[{height or 'HEIGHT'},{width or 'WIDTH'}]]", SHAPE)


def _sixteens(text: str) -> str:
    """The multiple of 16 next to the number in `text`; empty if there is none."""
    found = re.search(r"\d{1,6}", text)
    return str(max(16, round(int(found[0]) / 16) * 16)) if found else ""


def _frames(text: str, unit: float) -> str:
    """Frames of a length such as `2`, `90s` or `1.5min`; a bare number counts units of `unit` seconds."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?) ?(s|sec|seconds|m|min|minutes)?", text.strip().lower())
    if found is None:
        return "200"
    if found[2]:
        unit = 60 if found[2].startswith("m") else 1
    return str(max(1, round(float(found[1]) * unit * FRAMES_PER_SECOND)))
