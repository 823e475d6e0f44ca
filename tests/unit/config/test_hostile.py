"""Configurations that are no configurations: one line each, at once, and nothing computed from them."""

from __future__ import annotations

import json
import os
import pwd
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.config import yaml_values
from omniavatar.config.change import effective_sampling
from omniavatar.config.load import load_config
from omniavatar.config.schema import RuntimeConfig, SamplingConfig
from omniavatar.config.values import MOST_PROMPT_BYTES
from omniavatar.config.yaml_values import YamlError
from omniavatar.errors import ConfigError
from omniavatar.types import SamplingParams


def refused(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    begun = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - begun < 3
    line = str(caught.value)
    assert line.startswith(f"{path}") and "\n" not in line and len(line) < 500
    return line.removeprefix(str(path))


LAUGHS = "negative_prompt: [&b0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"
LAUGHS += "".join(f", &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 9)) + "]"
LADDER = "&a0 x, " + ", ".join(f"&a{n} [*a{n - 1}]" for n in range(1, 100))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("use_audio: !!bool maybe", ":1: not valid YAML: 'maybe' is not a bool"),
        ("fps: !!float abc", ":1: not valid YAML: 'abc' is not a float"),
        ("fps: !!int 2.5", ":1: not valid YAML: '2.5' is not a int"),
        ("fps: !!null x", ":1: not valid YAML: 'x' is not a null"),
        ("x: 1\nseed: !!timestamp 2024-01-01", ":2: not valid YAML: could not determine a constructor"),
        ("seed: !!binary aGk=", "could not determine a constructor"),
        ("loras: !!set {a, b}", "could not determine a constructor"),
        ("seed: !own 5", "could not determine a constructor"),
        (f"seed: {'9' * 5000}", ":1: not valid YAML: a number of 5000 digits"),
        ("seed: 1\x01", ":1: holds the control character \\x01; remove it"),
        ("fps: 25\nseed: 1\0", ":2: holds the control character \\x00; remove it"),
        ("seed: \ufffe", "not valid YAML"),
        (f"seed: {'[' * 2000}", ":1: not valid YAML: nested more than 20 levels deep"),
        (f"seed: {'{a: ' * 2000}", "nested more than 20 levels deep"),
        (
            f"a:\n{''.join(' ' * n + 'a:' + chr(10) for n in range(1, 100))}",
            "nested more than 20 levels deep",
        ),
        (LAUGHS, ":1: not valid YAML: more than 10000 values"),
        (f"loras: [{LADDER}]", "nested more than 20 levels deep"),
        (f"timesteps: [{'1,' * 20_000}]", "more than 10000 values"),
        ("model: &a\n  model: *a", ":2: not valid YAML: an alias stands inside of what it names"),
        ("seed: *none", "found undefined alias"),
        ("? {a: b}\n: 1", ":1: not valid YAML: a key must be text"),
        ("? [a]\n: 1", "a key must be text"),
        ("<<: {seed: 1}", "unknown key <<"),
        (f"{'k' * 900}: 1", f":1: unknown key {'k' * 77}..."),
        ("x\u202ey: 1", "unknown key x"),
        ("---\nseed: 1\n---\nseed: 2", "but found another document"),
        (b"seed: 1\nnegative_prompt: caf\xe9", ":2: not UTF-8 text (byte 0xe9)"),
        ("dit_path: '/**/*.safetensors'", ":1: dit_path: ** would search the whole tree"),
        ("vae_path: ~nosuchuser/vae", ":1: vae_path: the home folder of ~nosuchuser is not known"),
        ("exp_path: ~nosuchuser", ":1: exp_path: the home folder of ~nosuchuser is not known"),
        (f"exp_path: {'x' * 5000}", ":1: exp_path: is too long for a path"),
        ('vae_path: "a\\0b"', ":1: vae_path: holds a NUL character"),
        ('vae_path: "\\ud800"', ":1: vae_path: holds half of a character (\\ud800 at character 1)"),
        ('negative_prompt: "\\udfff"', "negative_prompt: holds half of a character"),
        (f"negative_prompt: {'x ' * 40_000}", "negative_prompt: has 79,999 bytes, the most is 65,536"),
        ("model_config: 5\nmodel_config.in_dim: 33", ":2: model.dit_config.in_dim: dit_config is set to 5"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path: Path, text: str | bytes, problem: str) -> None:
    assert problem in refused(tmp_path, text)


@pytest.mark.parametrize("special", ["/dev/zero", "/dev/urandom"])
def test_a_config_is_a_regular_file(tmp_path: Path, special: str) -> None:
    with pytest.raises(ConfigError, match="is a device, not a regular file"):
        load_config(special)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "config.json").symlink_to(tmp_path / "fifo")
    for wrong in (tmp_path / "fifo", None):
        with pytest.raises(ConfigError, match="is a FIFO, not a regular file"):
            load_config(wrong, {} if wrong else {"exp_path": tmp_path})
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    with pytest.raises(ConfigError, match="more than 1,000,000 bytes"):
        load_config(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"lora_rank": ' + "[" * 5000, "nested more than 100 levels deep; download the file again"),
        ('{"lora_rank": 1e999}', "config.json: not valid JSON: the number '1e999' is too large"),
        ('{"lora_rank": NaN}', "NaN is not a number"),
        ('{"lora_rank": 1, "lora_rank": 2}', "key 'lora_rank' occurs twice"),
        (f'{{"lora_rank": {"9" * 5000}}}', "a number of 5000 digits"),
        ('{"model_config": {"in_dim": {"a": 1}}}', "in_dim: must be a whole number"),
        ('{"model_config": [1]}', "dit_config: "),
        ('"text"', "must be a JSON object"),
    ],
)
def test_a_hostile_config_json_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"exp_path": tmp_path})
    assert problem in str(caught.value) and "\n" not in str(caught.value)


NUMBERS = [
    ("7", 7),
    ("+7", 7),
    ("0", 0),
    ("1e3", 1000),
    ("1E3", 1000),
    ("2.0", 2),
    ("14e-1", 1.4),
    (".5", 0.5),
]
TEXTS = ["12:30", "1:2:3", "1:30.5", "010", "0o10", "0x10", "0b1", "1_000", "2024-01-01", "٣", "1 000", "00"]
TEXTS += [".inf", ".nan", "1e", "e5", "0x1.8p3", "1,5", "2024-01-01T10:00:00Z", "--1", "1.2.3", "infinity"]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_decimal(tmp_path: Path, text: str, value: float) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"guidance_scale: {text}")
    assert load_config(path).config.sampling.guidance_scale == value
    assert load_config(None, [f"guidance_scale={text}"]).config.sampling.guidance_scale == value
    if float(value).is_integer():
        path.write_text(f"seed: {text}")
        assert load_config(path).config.sampling.seed == value


@pytest.mark.parametrize("text", TEXTS)
def test_other_spellings_are_text_and_no_seed(tmp_path: Path, text: str) -> None:
    assert f":1: seed: must be a whole number; got {text!r}" in refused(tmp_path, f"seed: {text}")
    path = tmp_path / "c.yaml"
    path.write_text(f"negative_prompt: {text}")
    assert load_config(path).config.sampling.negative_prompt == text
    with pytest.raises(ConfigError, match="seed"):
        load_config(None, [f"seed={text}"])


@pytest.mark.parametrize(
    "value", ["true", "yes", "1.5", "-1", "9223372036854775808", "1e17", "[1]", "{a: 1}"]
)
def test_a_seed_is_a_whole_number_that_is_exact(tmp_path: Path, value: str) -> None:
    assert ":1: seed: must be " in refused(tmp_path, f"seed: {value}")
    (tmp_path / "good.yaml").write_text("seed: 9223372036854775807")
    assert load_config(tmp_path / "good.yaml").config.sampling.seed == 2**63 - 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("timesteps=[1\x00000,750]", "holds the control character \\x00; remove it"),
        ("x\x1b[31m=5", "holds the control character \\x1b; remove it"),
        ("loras=[&a [*a]]", "an alias stands inside of what it names"),
        ("seed=[" + "[" * 2000 + "]" * 2001, "nested more than 20 levels deep"),
        ("seed=" + "9" * 5000, "a number of 5000 digits"),
        ("dit_path=/*/*/*/*/*/*.st", "dit_path: looks at more than 10,000 names; name the folder"),
        ("loras=[{path: ~nosuchuser}]", "loras: the home folder of ~nosuchuser is not known"),
        ("negative_prompt=caf\udce9", "holds a byte that is not UTF-8 (0xe9 at character 4)"),
        ("x" * 10_000, "is not key=value"),
        ("num\n_steps\r=5", "holds the control character \\x0d"),
        ("num\n_steps=5", "unknown key num _steps; did you mean num_steps?"),
    ],
)
def test_hostile_overrides_are_one_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [text])
    line = str(caught.value)
    assert line.startswith("--hp: ") and problem in line and "\n" not in line and len(line) < 400


YAML = st.text(st.sampled_from(list("ab:- \n[]{},&*!?|>'\"#%@`0123.eE~<\t")), max_size=60)


@given(YAML)
def test_any_yaml_is_a_value_or_a_yaml_error(text: str) -> None:
    try:
        json.dumps(yaml_values.value(yaml_values.compose(text)))
    except YamlError as error:
        assert "\n" not in str(error)


def test_patterns_find_shards_in_folders(tmp_path: Path) -> None:
    for name in ("b/m-2.st", "a/m-1.st", "a/x.bin", "c/m-9.st/inside"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = load_config(None, {"dit_path": f"{tmp_path}/[ab]/m-?.st"}).config.model.dit_path
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/m-1.st", "b/m-2.st"]
    assert load_config(None, {"dit_path": f"{tmp_path}/*/none/*"}).config.model.dit_path[0].name == "*"


def test_sampling_of_a_request_has_the_same_rules() -> None:
    for params in (
        SamplingParams(negative_prompt="x" * (MOST_PROMPT_BYTES + 1)),
        SamplingParams(negative_prompt="\ud800"),
        SamplingParams(seed=True),
        SamplingParams(seed=10**5000),
        SamplingParams(guidance_scale=float("nan")),
        SamplingParams(shift=10**400),
        SamplingParams(timesteps="1000"),  # type: ignore[arg-type]
        SamplingParams(sampler=["euler"]),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=r"^request: "):
            effective_sampling(SamplingConfig(), params)


def test_without_a_home_folder_a_configured_cache_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert RuntimeConfig().text_cache is None
    assert RuntimeConfig(text_cache_dir=Path("cache")).text_cache == Path("cache")
    with pytest.raises(ConfigError, match="the home folder of ~ is not known"):
        load_config(None, ["vae_path=~/vae.pth"])
