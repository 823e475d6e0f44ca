"""Registries: a backend is one record, found in doctor, `auto`, errors, settings rows and configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from docs.generate import settings
from typer.testing import CliRunner

from engine import request
from omniavatar import AvatarPipeline
from omniavatar.accel.attention.registry import ATTENTION, choose_backend, create_attention
from omniavatar.accel.attention.timing import choose_attention
from omniavatar.accel.decoder import DECODERS, PictureDecoder
from omniavatar.accel.precision import PRECISIONS, best_quantize
from omniavatar.accel.vae_runners import VAES, VAERunner, choose_vae
from omniavatar.assets.pocket import CONFIG
from omniavatar.cli import app
from omniavatar.config.backends import REGISTRIES, BackendRow, backend_rows, registry
from omniavatar.config.load import load_config
from omniavatar.device import Backend, Registry
from omniavatar.errors import ConfigError, ResourceError
from omniavatar.media.h264 import ENCODERS, H264Encoder, choose_encoder
from omniavatar.sampling.samplers import SAMPLERS, Sampler

CPU = torch.device("cpu")
Register = Callable[[Any, Any], None]
NANO = dict(
    weights="random", scale="nano", dtype="fp32", device="cpu", num_steps=2, guidance_scale=1.0,
    image_sizes_720=[[64, 64]], max_tokens=56, overlap_frame=5,
)  # fmt: skip


@pytest.fixture
def register() -> Iterator[Register]:
    """Registers backends through the public functions, and removes them after the test."""
    added: list[tuple[Any, str]] = []

    def add(found: Any, backend: Any) -> None:
        found.register(backend)
        added.append((found, backend.name))

    yield add
    for found, name in added:
        found.unregister(name)


def doctor() -> dict[str, Any]:
    result = CliRunner().invoke(app, ["doctor", "--configs", str(CONFIG), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def frames(**settings: Any) -> np.ndarray:
    pipe = AvatarPipeline.from_config(load_config(None, {**NANO, **settings}).config)
    return np.concatenate([chunk.frames for chunk in pipe.stream(request(0.3))])


def test_a_fake_attention_backend_is_one_record(register: Register) -> None:
    made: list[torch.device] = []

    def create(device: torch.device) -> Any:
        made.append(device)
        return create_attention("math", device, torch.float32)[1]

    assert choose_backend(CPU, torch.float32) == "sdpa"
    fake = Backend(name="fake", create=create, exact=True, doc="A fake.", needs="imagination", rank=1000)
    register(ATTENTION, fake)

    found = doctor()
    assert {each["auto"] for each in found["attention"].values()} == {"fake"}
    assert all("fake" in each["available"] for each in found["attention"].values())
    row = {"setting": "runtime.attention", "name": "fake", "exact": True, "doc": "A fake."}
    assert {**row, "available": True, "reason": None} in found["backends"]
    assert not made, "doctor makes no backend"

    assert choose_backend(CPU, torch.float32) == "fake"
    assert create_attention("auto", CPU, torch.float32)[0] == "fake" and made == [CPU]
    assert "fake " in str(choose_attention("fastest", CPU, torch.float32, 1, 8)[2]), "timed as well"
    with pytest.raises(ResourceError, match=r"attention: 'fkae' is not known; use one of: .*sdpa.*, fake$"):
        create_attention("fkae", CPU, torch.float32)
    assert BackendRow("runtime.attention", "fake", True, "A fake.", "imagination") in backend_rows()
    row = "| [`attention`](#attention) | `fake` | exact | A fake. | imagination |"
    assert row in settings.page().splitlines()


def test_a_fake_attention_backend_makes_the_video(register: Register) -> None:
    calls: list[int] = []

    def create(device: torch.device) -> Any:
        def attention(q: Any, k: Any, v: Any) -> Any:
            calls.append(q.shape[1])
            return torch.zeros_like(q)

        return attention

    plain = frames()
    register(ATTENTION, Backend(name="fake", create=create, exact=True, doc="A fake.", rank=1000))
    assert not np.array_equal(frames(), plain) and calls


def test_why_a_backend_cannot_be_used_is_in_doctor_and_in_the_error(register: Register) -> None:
    fake = Backend(
        name="fake",
        create=lambda device: None,
        exact=True,
        doc="A fake.",
        unavailable=lambda device: f"needs a quantum computer, not {device.type}; buy one",
        rank=1000,
    )
    register(ATTENTION, fake)
    assert choose_backend(CPU, torch.float32) == "sdpa"
    reason = "needs a quantum computer, not cpu; buy one"
    with pytest.raises(
        ResourceError, match=rf"fake cannot be used here \({reason}\); use one of: auto, .*flash$"
    ):
        create_attention("fake", CPU, torch.float32)
    rows = {(each["setting"], each["name"]): each for each in doctor()["backends"]}
    row = rows["runtime.attention", "fake"]
    assert row["reason"] == reason and not row["available"]
    text = CliRunner().invoke(app, ["doctor", "--configs", str(CONFIG)]).stdout
    assert f"runtime.attention: fake ({reason})" in text


class Grey:
    """Decodes every latent to the same grey."""

    def decode_stream(self, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        batch, _, count, height, width = latent.shape
        for index in range(count):
            yield torch.zeros(batch, 3, 4 if index else 1, 8 * height, 8 * width)


def test_a_fake_decoder_is_one_record(register: Register) -> None:
    with pytest.raises(ConfigError, match=r"decoder: must be 'full', 'lightvae', 'taehv' or 'lighttae'"):
        load_config(None, {"decoder": "grey"})
    register(
        DECODERS, PictureDecoder(name="grey", create=lambda source: Grey(), exact=False, doc="All grey.")
    )
    made = frames(decoder="grey")
    assert made.shape == (16, 64, 64, 3) and len(np.unique(made)) == 1
    with pytest.raises(ConfigError, match=r"decoder: must be 'full', 'lightvae', .* or 'grey'; got 'gray'"):
        load_config(None, {"decoder": "gray"})
    with pytest.raises(
        ConfigError, match=r"has no effect with decoder: grey; set decoder to lightvae, taehv or"
    ):
        load_config(None, {"decoder": "grey", "decoder_path": "x.pth"})
    assert BackendRow("model.decoder", "grey", False, "All grey.", "any device") in backend_rows()
    assert ("model.decoder", "grey") in {(each["setting"], each["name"]) for each in doctor()["backends"]}


def test_a_fake_sampler_is_one_record(register: Register) -> None:
    steps: list[tuple[float, bool]] = []

    def step(sample: Any, velocity: Any, sigma: float, next_sigma: float, noise: Any) -> Any:
        steps.append((next_sigma, noise is not None))
        return sample + velocity * (next_sigma - sigma)

    with pytest.raises(
        ConfigError, match=r"sampler: must be 'euler', 'renoise', 'causal' or 'bridge'; got 'counted'"
    ):
        load_config(None, {"sampler": "counted"})
    register(
        SAMPLERS, Sampler(name="counted", create=lambda: step, exact=True, doc="Counts.", fresh_noise=True)
    )
    assert np.array_equal(frames(sampler="counted"), frames(sampler="euler"))
    assert steps and len(steps) % 2 == 0 and all(noise is (sigma > 0) for sigma, noise in steps)
    assert BackendRow("sampling.sampler", "counted", True, "Counts.", "any device") in backend_rows()
    assert ("sampling.sampler", "counted") in {
        (each["setting"], each["name"]) for each in doctor()["backends"]
    }


def test_fakes_of_the_other_settings_are_chosen_by_auto(register: Register) -> None:
    def run(vae: Any, device: torch.device) -> Any:
        return vae

    register(VAES, VAERunner(name="fake", create=run, exact=True, doc="A fake.", rank=9))
    assert choose_vae("auto", CPU) == "fake" and doctor()["vae"] == "fake"
    with pytest.raises(
        ResourceError, match="vae: 'fats' is not known; use one of: auto, plain, fast, fp8, fake"
    ):
        choose_vae("fats", CPU)
    register(PRECISIONS, Backend(name="fake", create=lambda: None, exact=False, doc="A fake.", rank=9))
    assert best_quantize(CPU) == "fake"
    assert load_config(None, {"quantize": "fake", "vae": "fake"}).config.runtime.quantize == "fake"
    fake = H264Encoder(
        name="fake", create=lambda crf, preset: {}, exact=True, doc="A fake.", rank=9, codec="mpeg4"
    )
    register(ENCODERS, fake)
    assert choose_encoder("auto", (64, 64)) == "fake" and doctor()["encoder"]["auto"] == "fake"
    assert load_config(None, {"encoder": "fake"}).config.output.encoder == "fake"


def test_every_record_can_stand_on_the_settings_page() -> None:
    rows = backend_rows()
    assert [row.setting for row in rows] == sorted((row.setting for row in rows), key=list(REGISTRIES).index)
    for row in rows:
        assert row.doc.endswith(".") and "\n" not in row.doc and len(row.doc) < 110, row
        assert row.needs and row.name == row.name.lower()
    for setting in REGISTRIES:
        section, field = setting.split(".")
        found = registry(setting)
        assert found.setting == setting and any(each.exact for each in found)
        default = getattr(getattr(load_config(None, {}).config, section), field)
        assert default in found.values


def test_a_name_is_registered_once() -> None:
    one = Backend(name="one", create=dict, exact=True, doc="One.")
    registry: Registry[Backend] = Registry("a.b", one, words=("auto",))
    for taken in ("one", "auto"):
        with pytest.raises(ValueError, match=f"a.b: '{taken}' is registered already"):
            registry.register(Backend(name=taken, create=dict, exact=True, doc="Again."))
    with pytest.raises(ConfigError, match="b: 'two' is not known; use one of: auto, one"):
        registry.get("two")
    with pytest.raises(ResourceError, match="b: no backend can be used here"):
        registry.resolve("auto", CPU)
    registry.unregister("one")
    assert registry.names == ()
    with pytest.raises(KeyError):
        registry.unregister("one")


@pytest.mark.slow
def test_checking_names_loads_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "from omniavatar.config.load import load_config\n"
        "from omniavatar.config.backends import backend_rows\n"
        "values = dict(decoder='full', sampler='renoise', encoder='nvenc', quantize='fp8', vae='fast')\n"
        "load_config(None, values)\n"
        "assert len(backend_rows()) >= 22\n"
        "heavy = {'torch', 'av', 'numpy', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
