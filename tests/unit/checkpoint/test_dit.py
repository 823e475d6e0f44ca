"""The DiT from base, adapter and LoRAs: sizes, merge, dtypes, and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import DiTFiles, LoraFile, load_dit, random_dit
from omniavatar.checkpoint.dit_sizes import inspect_dit, keep_float32
from omniavatar.checkpoint.layout import SCALES, dit_tensors, scale_spec
from omniavatar.checkpoint.vae import inspect_vae, load_vae, random_vae
from omniavatar.errors import CheckpointError
from omniavatar.model.dit import WanDiT

ATTENTION = create_attention("sdpa", torch.device("cpu"), torch.float32)[1]
NANO = scale_spec("nano")


@pytest.fixture
def files(nano_checkpoint):
    return {
        "base": nano_checkpoint / "Wan2.1-T2V-nano" / "diffusion_pytorch_model.safetensors",
        "adapter": nano_checkpoint / "OmniAvatar-nano",
        "vae": nano_checkpoint / "Wan2.1-T2V-nano" / "Wan2.1_VAE.pth",
    }


def load(base, adapter=None, dtype=torch.float32, **options) -> WanDiT:
    files = DiTFiles(base, adapter, **options)
    return load_dit(files, attention=ATTENTION, dtype=dtype, device="cpu")


def copied_adapter(files, folder: Path, change=lambda tensors: None, settings=None) -> Path:
    """A copy of the nano adapter with changed tensors or settings."""
    folder.mkdir()
    tensors = torch.load(files["adapter"] / "pytorch_model.pt", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.pt")
    table = json.loads((files["adapter"] / "config.json").read_text()) | (settings or {})
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def forward(dit: WanDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, y = (torch.randn(1, channels, 2, 4, 4, generator=generator) for channels in (16, 17))
    text = torch.randn(1, 7, dit.config.text_dim, generator=generator)
    audio = torch.randn(1, 5, dit.config.audio_dim, generator=generator)
    with torch.inference_mode():
        return dit(sample, y, torch.tensor([500.0]), dit.prepare_text(text), dit.prepare_audio(audio))


def test_sizes_from_headers(files):
    assert inspect_dit(files["base"], files["adapter"]) == NANO.dit
    assert inspect_dit(files["base"]) == replace(NANO.dit, in_dim=16, audio_dim=0)
    assert inspect_dit(files["base"], files["adapter"], num_heads=4).num_heads == 4


def test_adapter_is_merged_in_float32(files):
    base = load_file(files["base"])
    adapter = torch.load(files["adapter"] / "pytorch_model.pt", weights_only=True)
    weights = load(files["base"], files["adapter"]).state_dict()
    changed = 0
    for key, value in weights.items():
        layer = key.removesuffix(".weight")
        if key in adapter:
            assert torch.equal(value, adapter[key]), key
        elif f"{layer}.lora_A.default.weight" in adapter:
            down, up = (adapter[f"{layer}.lora_{half}.default.weight"] for half in "AB")
            torch.testing.assert_close(value, base[key] + NANO.lora_alpha / NANO.lora_rank * up @ down)
            assert not torch.equal(value, base[key])
            changed += 1
        else:
            assert torch.equal(value, base[key]), key
    assert changed == 10 * NANO.dit.num_layers


def test_the_sum_is_cast_once(files):
    exact = load(files["base"], files["adapter"]).state_dict()
    for key, value in load(files["base"], files["adapter"], torch.bfloat16).state_dict().items():
        assert value.dtype == (torch.float32 if keep_float32(key) else torch.bfloat16)
        assert torch.equal(value, exact[key].to(value.dtype))


def test_dtype_policy():
    kept = {key for key, _ in dit_tensors(NANO.dit) if keep_float32(key)}
    for key in (
        *("time_embedding.0.weight", "time_projection.1.bias", "blocks.3.modulation", "head.modulation"),
        *("blocks.0.self_attn.norm_q.weight", "blocks.5.norm3.bias", "audio_proj.norm_out.weight"),
    ):
        assert key in kept
    for key in ("blocks.0.self_attn.q.weight", "blocks.0.ffn.2.bias", "text_embedding.0.weight"):
        assert key not in kept
    for spec in SCALES[1:]:
        sizes = {key: torch.Size(shape).numel() for key, shape in dit_tensors(spec.dit)}
        assert sum(size for key, size in sizes.items() if keep_float32(key)) < 0.02 * sum(sizes.values())


def test_merged_checkpoint_loads_without_an_adapter(files, tmp_path):
    """A file like LiveTalk's: plain names, 33 channels, audio layers."""
    merged = load(files["base"], files["adapter"])
    save_file(merged.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path):
        again = load(path)
        assert again.config == NANO.dit
        assert torch.equal(forward(again), forward(merged))


def test_plain_text_to_video_model(files):
    dit = load(files["base"])
    assert dit.config.in_dim == 16 and not dit.config.audio_dim


def test_keys_without_default(files, tmp_path):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace(".default", "")] = tensors.pop(key)

    plain = load(files["base"], copied_adapter(files, tmp_path / "plain", rename))
    assert torch.equal(forward(plain), forward(load(files["base"], files["adapter"])))


def test_further_loras_add_up_in_any_order(files, tmp_path):
    generator = torch.Generator().manual_seed(1)
    loras = []
    for number in range(2):
        tensors = {
            "diffusion_model.blocks.1.ffn.0.lora_down.weight": torch.randn(3, 256, generator=generator),
            "diffusion_model.blocks.1.ffn.0.lora_up.weight": torch.randn(512, 3, generator=generator),
            "diffusion_model.patch_embedding.diff": torch.randn(256, 16, 1, 2, 2, generator=generator),
        }
        save_file(tensors, tmp_path / f"{number}.safetensors")
        loras.append(LoraFile(tmp_path / f"{number}.safetensors", 0.5 + number))
    plain = load(files["base"], files["adapter"]).state_dict()
    merged = load(files["base"], files["adapter"], loras=loras).state_dict()
    swapped = load(files["base"], files["adapter"], loras=loras[::-1]).state_dict()
    wanted = plain["blocks.1.ffn.0.weight"].clone()
    patch = plain["patch_embedding.weight"].clone()
    for lora in loras:
        tensors = load_file(lora.path)
        up, down = (tensors[f"diffusion_model.blocks.1.ffn.0.lora_{half}.weight"] for half in ("up", "down"))
        wanted += lora.strength * up @ down
        patch[:, :16] += lora.strength * tensors["diffusion_model.patch_embedding.diff"]
    torch.testing.assert_close(merged["blocks.1.ffn.0.weight"], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged["patch_embedding.weight"], patch, rtol=1e-5, atol=1e-5)
    for key, value in merged.items():
        torch.testing.assert_close(swapped[key], value, rtol=1e-5, atol=1e-5)
        if key not in ("blocks.1.ffn.0.weight", "patch_embedding.weight"):
            assert torch.equal(value, plain[key])


def test_rank_and_alpha_can_be_overridden(files):
    base = load_file(files["base"])["blocks.0.ffn.0.weight"]
    once, twice = (
        load(files["base"], files["adapter"], lora_alpha=alpha).state_dict()["blocks.0.ffn.0.weight"] - base
        for alpha in (2, 4)
    )
    torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-5)
    with pytest.raises(CheckpointError, match="has rank 8, but lora_rank is 16"):
        load(files["base"], files["adapter"], lora_rank=16)


def problem(*arguments, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_extra_keys(files, tmp_path):
    tensors = load_file(files["base"])
    del tensors["blocks.2.ffn.0.bias"]
    tensors["img_emb.proj.0.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "base.safetensors")
    message = problem(tmp_path / "base.safetensors", files["adapter"])
    assert "1 missing: blocks.2.ffn.0.bias" in message
    assert "1 unexpected: img_emb.proj.0.weight" in message


def test_base_and_adapter_of_different_models(files, tmp_path):
    def narrow(tensors):
        tensors["blocks.0.ffn.0.lora_B.default.weight"] = torch.zeros(511, 8)

    adapter = copied_adapter(files, tmp_path / "narrow", narrow)
    assert "blocks.0.ffn.0.lora_B.default.weight" in problem(files["base"], adapter) or "511x256" in problem(
        files["base"], adapter
    )
    adapter = copied_adapter(files, tmp_path / "wide", settings={"model_config": {"in_dim": 49}})
    message = problem(files["base"], adapter)
    assert "model_config.in_dim is 49" in message and "33" in message


def test_adapter_without_its_audio_layers(files, tmp_path):
    adapter = copied_adapter(files, tmp_path / "a", lambda tensors: tensors.pop("audio_cond_projs.0.weight"))
    assert "1 missing: audio_cond_projs.0.weight" in problem(files["base"], adapter)


def test_adapter_configuration(files, tmp_path):
    adapter = copied_adapter(files, tmp_path / "a", settings={"model_config": {"num_heads": 4}})
    assert inspect_dit(files["base"], adapter).num_heads == 4
    (adapter / "config.json").write_text("[]")
    assert "config.json" in problem(files["base"], adapter)
    (adapter / "config.json").unlink()
    message = problem(files["base"], adapter)
    assert "config.json" in message and "omniavatar download" in message
    bad_heads = copied_adapter(files, tmp_path / "b", settings={"model_config": {"num_heads": 3}})
    assert "3 heads" in problem(files["base"], bad_heads)


def test_not_a_wan_model(files):
    assert "not a Wan DiT" in problem(files["vae"])
    with pytest.raises(CheckpointError, match="not a Wan video VAE"):
        load_vae(files["base"], dtype=torch.float32, device="cpu")


def test_truncated_shard(files, tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(files["base"].read_bytes()[:-1000])
    assert "damaged" in problem(path, files["adapter"])


def test_random_models_are_finite_and_of_order_one():
    dit = random_dit(NANO.dit, attention=ATTENTION, dtype=torch.bfloat16, device="cpu", seed=3)
    for key, value in dit.state_dict().items():
        assert value.dtype == (torch.float32 if keep_float32(key) else torch.bfloat16)
    assert 0.2 < forward(dit).std() < 5
    again = random_dit(NANO.dit, attention=ATTENTION, dtype=torch.bfloat16, device="cpu", seed=3)
    other = random_dit(NANO.dit, attention=ATTENTION, dtype=torch.bfloat16, device="cpu", seed=4)
    assert torch.equal(forward(again), forward(dit)) and not torch.equal(forward(other), forward(dit))
    vae = random_vae(NANO.vae, dtype=torch.float32, device="cpu", seed=0)
    with torch.inference_mode():
        video = vae.decode(vae.encode(torch.rand(1, 3, 5, 16, 16) * 2 - 1))
    assert video.isfinite().all() and 0.05 < video.std() < 5


def test_vae(files):
    assert inspect_vae(files["vae"]) == NANO.vae
    vae = load_vae(files["vae"], dtype=torch.bfloat16, device="cpu")
    assert {value.dtype for value in vae.state_dict().values()} == {torch.bfloat16}
    stored = torch.load(files["vae"], weights_only=True)
    for key, value in vae.state_dict().items():
        assert torch.equal(value, stored[key].bfloat16())


PEAK = """
import gc, pathlib, sys, torch
from omniavatar.checkpoint.dit import DiTFiles, load_dit
from omniavatar.accel.attention.registry import create_attention
options = dict(attention=create_attention("sdpa", torch.device("cpu"), torch.float32)[1], device="cpu")
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
# Loads a small model first, so that memory which libraries take at first use is not counted.
root, nano = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
base = nano / "Wan2.1-T2V-nano" / "diffusion_pytorch_model.safetensors"
dit = load_dit(DiTFiles(base, nano / "OmniAvatar-nano"), dtype=torch.bfloat16, **options)
for form, dtype in (("dit", torch.float32), ("pth", torch.float32), ("dit", torch.bfloat16)):
    del dit
    gc.collect()
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    files = DiTFiles(sorted((root / form).iterdir()), root / "adapter")
    dit = load_dit(files, dtype=dtype, **options)
    print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """300 MB of float32 weights in three shards, an adapter for them, and the same weights as one .pth."""
    from omniavatar.checkpoint.layout import FileLayout, TensorEntry, adapter_tensors
    from omniavatar.checkpoint.tensor_writer import write_random

    root = tmp_path_factory.mktemp("large")
    config = replace(NANO.dit, dim=768, ffn_dim=4096, num_heads=6, num_layers=6)
    base = replace(config, in_dim=16, audio_dim=0)
    entries = [TensorEntry(key, shape, torch.float32) for key, shape in dit_tensors(base)]
    third = len(entries) // 3 + 1
    for number in range(3):
        name = f"dit/diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors"
        shard = tuple(entries[number * third : (number + 1) * third])
        write_random(root, FileLayout(name, "safetensors", shard), 0, lambda count: None)
    write_random(root, FileLayout("pth/dit.pth", "torch", tuple(entries)), 0, lambda count: None)
    adapter = tuple(TensorEntry(key, shape, torch.float32) for key, shape in adapter_tensors(config, 8))
    write_random(root, FileLayout("adapter/pytorch_model.pt", "torch", adapter), 0, lambda count: None)
    (root / "adapter" / "config.json").write_text('{"lora_rank": 8, "lora_alpha": 4}')
    return root, sum(entry.num_bytes for entry in entries)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_loading_needs_no_second_copy_of_the_weights(large, nano_checkpoint):
    root, size = large
    assert size > 250e6
    arguments = [sys.executable, "-c", PEAK, root, nano_checkpoint]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    full, pickled, half = (int(line) / size for line in done.stdout.split())
    assert 0.8 < full < 1.2
    assert pickled < 1.2
    assert half < 0.95
