"""Words of other programs: options and keys that do not exist here are answered with the right ones."""

from __future__ import annotations

import re
import shlex

import pytest

from command_line import NANO, plain, run
from omniavatar.config.hints import hint
from omniavatar.config.load import load_config
from omniavatar.errors import ConfigError

OPTIONS = {
    "--width 512 --height 900": ("image_sizes_720", ((896, 512),)),
    "--resolution 1280x720": ("image_sizes_720", ((720, 1280),)),
    "--resolution 720p": ("max_hw", 1280),
    "--size 9:16": ("image_sizes_720", ((720, 400),)),
    "--aspect-ratio 16:9": ("image_sizes_720", ((400, 720),)),
    "--minutes 2": ("seq_len", 3000),
    "--duration=90s": ("seq_len", 2250),
    "--duration 1.5min": ("seq_len", 2250),
    "--num-frames 81": ("seq_len", 81),
    "--output-dir a_folder": ("output_dir", "a_folder"),
    "--steps 20": ("num_steps", 20),
    "--num-inference-steps 20": ("num_steps", 20),
    "--num-steps 20": ("num_steps", 20),
    "--cfg-scale 3.5": ("guidance_scale", 3.5),
}


@pytest.mark.parametrize("command", ["generate", "demo", "plan", "batch"])
@pytest.mark.parametrize("written", ["--resolution 1280x720", "--num-steps 20"])
def test_every_command_knows_the_words(command: str, written: str) -> None:
    result = run(command, *written.split())
    assert result.exit_code == 2
    assert f"there is no option {written.split()[0]}: write --hp " in plain(result.stderr)


@pytest.mark.parametrize("written", OPTIONS)
def test_the_answer_to_an_option_works_as_it_is_written(written: str) -> None:
    result = run("generate", *written.split())
    assert result.exit_code == 2
    found = re.search(r"write (--hp .*?)(?: \(the|\(720|$)", " ".join(plain(result.stderr).split()))
    assert found is not None, result.stderr
    key, value = OPTIONS[written]
    loaded = load_config(None, shlex.split(found[1])[1])
    values = {**dict(loaded.config.video), **dict(loaded.config.sampling), **dict(loaded.config.output)}
    assert values[key] == value or str(values[key]) == value


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("--voice a.wav", "--audio a.wav"),
        ("--photo me.png", "--image me.png"),
        ("--model 14B", "--config 14B"),
        ("--gpu 1", "--gpus 1"),
    ],
)
def test_words_for_our_options(written: str, answer: str) -> None:
    assert f"write {answer} on the command line" in plain(run("generate", *written.split()).stderr)


def test_plan_has_an_option_for_the_length() -> None:
    assert "write --minutes 1.5 on the command line" in plain(run("plan", "--duration", "90s").stderr)


def test_an_unknown_word_is_only_refused() -> None:
    result = run("generate", "--bogus", "3")
    assert result.exit_code == 2 and "No such option: --bogus" in plain(result.stderr)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("resolution=1280x720", "write --hp 'image_sizes_720=[[720,1280]]' (the photo decides the shape"),
        ("width=512", "write --hp 'image_sizes_720=[[HEIGHT,512]]'"),
        ("size=big", "write --hp 'image_sizes_720=[[400,720]]'"),
        ("minutes=2", "write --hp seq_len=3000 (the voice decides the length"),
        ("steps=20", "write --hp num_steps=20"),
        ("audio=a.wav", "did you mean"),
    ],
)
def test_words_in_hp(key: str, answer: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(NANO, key)
    assert answer in str(error.value) and str(error.value).startswith("--hp: unknown key ")


def test_words_in_a_file_are_answered_as_lines_of_a_file(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("resolution: 1280x720\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(
        f"{path}:1: unknown key resolution; write image_sizes_720: [[720,1280]] (the photo"
    )


@pytest.mark.parametrize("value", ["", "x", "0", "9" * 400, "1:1", "1x1", "-5", "1e9"])
@pytest.mark.parametrize("word", ["width", "resolution", "minutes", "frames", "steps", "voice"])
def test_odd_values_give_a_short_answer(word: str, value: str) -> None:
    found = hint(word, {word: value})
    assert found is not None and len(found.text()) < 300
