"""The student travels as differences from the packaged DiT, the small decoder as a TAEHV file."""

import pytest
import torch
from safetensors.torch import save_file
from training.export_live import CONFIG, DECODER, HIGHEST, STUDENT, TEMPLATE, differences, export
from training.live_drive import SPAN, WHITE
from training.nets import make_dit, save_shards
from training.settings import read_live_settings
from training.stage_tiny import fill_in
from training.student_batch import window_of

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import DiTFiles, LoraFile, load_dit
from omniavatar.checkpoint.tiny_decoder import load_tiny_decoder
from omniavatar.config.load import load_config
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig

SETTINGS = TEMPLATE.parent / "live.yaml"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    torch.manual_seed(0)
    base = {name: value.bfloat16().contiguous() for name, value in make_dit().state_dict().items()}
    save_file(base, folder / "dit.safetensors")
    student = {name: value.float() + 0.01 * torch.randn(value.shape) for name, value in base.items()}
    save_shards(student, folder, "student")
    tiny = TinyDecoder(TinyDecoderConfig((16, 8, 8, 8)))
    fill_in(tiny)
    save_shards(tiny.state_dict(), folder, "tiny")
    strength = export(folder, folder, folder / "out", folder)
    return folder, base, student, tiny, strength


def test_the_engine_merges_the_student_from_its_differences(exported):
    folder, base, student, _, strength = exported
    attention = create_attention("sdpa", torch.device("cpu"), torch.float32)[1]
    files = DiTFiles(
        (folder / "dit.safetensors",), loras=[LoraFile(folder / "out" / STUDENT, strength)], num_heads=4
    )
    made = load_dit(files, attention=attention, dtype=torch.float32, device="cpu").state_dict()
    assert set(made) == set(student)
    for name, value in made.items():
        left = float((value - student[name]).norm() / (student[name] - base[name].float()).norm())
        assert left < 0.04, name
    assert (folder / "out" / STUDENT).stat().st_size < 10.5 * 2**20


def test_the_decoder_is_a_file_that_the_engine_reads(exported):
    folder, _, _, tiny, _ = exported
    read = load_tiny_decoder(
        folder / "out" / DECODER, raw_latents=False, z_dim=16, dtype=torch.float32, device="cpu"
    )
    assert read.config.widths == (16, 8, 8, 8)
    for name, value in tiny.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], value.bfloat16().float(), atol=1e-2, rtol=1e-2)


def test_the_configuration_names_the_files_and_the_strength(exported):
    folder, *_, strength = exported
    model = load_config(folder / "out" / CONFIG).config.model
    model.check_files_named()
    assert model.decoder_path == (folder / "out" / DECODER).resolve()
    assert [(lora.path, lora.strength) for lora in model.loras] == [
        ((folder / "out" / STUDENT).resolve(), strength)
    ]
    live, trained = load_config(folder / "out" / CONFIG).config.sampling, read_live_settings(SETTINGS).student
    assert live.causal == window_of(trained)
    assert list(live.timesteps) == trained.timesteps[:1]
    assert (live.noise_span, live.noise_white) == (SPAN, WHITE)


def test_the_factor_uses_the_range_of_float8_and_never_leaves_it():
    base = {"a.weight": torch.zeros(3), "b.modulation": torch.zeros(1)}
    student = {"a.weight": torch.tensor([0.3, -0.001, 0.0]), "b.modulation": torch.tensor([1.9])}
    changes, strength = differences(student, base)
    assert HIGHEST / 2 <= 1.9 / strength <= HIGHEST
    assert set(changes) == {"a.diff", "b.modulation.diff"}
    torch.testing.assert_close(
        changes["a.diff"].float() * strength, student["a.weight"], atol=1e-3, rtol=0.07
    )


def test_a_student_of_another_model_is_refused():
    with pytest.raises(ValueError, match="other weights than its base"):
        differences({"a.weight": torch.zeros(1)}, {"c.weight": torch.zeros(1)})
