"""LoRA files: every key style merges to the same weights; an error names what cannot be applied."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from omniavatar.checkpoint.layout import dit_tensors
from omniavatar.checkpoint.lora import plan_lora
from omniavatar.checkpoint.lora_keys import PREFIXES, LayerNames, diffusers_name, strip_prefixes
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.errors import CheckpointError
from omniavatar.model.sizes import DiTConfig

CONFIG = DiTConfig(32, 48, 1, 4, text_dim=24, freq_dim=16, audio_dim=20)
SHAPES = dict(dit_tensors(CONFIG))
RANK = 4
LAYERS = (
    "blocks.0.self_attn.q", "blocks.1.self_attn.k", "blocks.1.self_attn.v", "blocks.3.self_attn.o",
    "blocks.0.cross_attn.q", "blocks.2.cross_attn.k", "blocks.2.cross_attn.v", "blocks.0.cross_attn.o",
    "blocks.0.ffn.0", "blocks.3.ffn.2", "text_embedding.0", "text_embedding.2", "time_embedding.0",
    "time_embedding.2", "time_projection.1", "head.head",
)  # fmt: skip
PATCH = "patch_embedding"
NORMS = ("blocks.0.self_attn.norm_q", "blocks.1.cross_attn.norm_k", "blocks.2.norm3")


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE = {key: randn(number, *shape) for number, (key, shape) in enumerate(SHAPES.items())}
PAIRS = {
    layer: (randn(1000 + n, RANK, columns), randn(2000 + n, rows, RANK))
    for n, layer in enumerate(LAYERS)
    for rows, columns in [SHAPES[f"{layer}.weight"]]
}
PAIRS[PATCH] = (randn(1, RANK, 16, 1, 2, 2), randn(2, 32, RANK, 1, 1, 1))


def flat(name: str) -> str:
    return name.replace(".", "_")


# style -> (spelling of a layer, ending of down, ending of up)
AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
STYLES = {
    "bare down/up": (lambda n: n, *DOWN_UP),
    "bare A/B": (lambda n: n, *AB),
    "default adapter": (lambda n: n, ".lora_A.default.weight", ".lora_B.default.weight"),
    "named adapter": (lambda n: n, ".lora_A.distill.weight", ".lora_B.distill.weight"),
    "no .weight": (lambda n: n, ".lora_A", ".lora_B"),
    "comfy down/up": (lambda n: f"diffusion_model.{n}", *DOWN_UP),
    "comfy A/B": (lambda n: f"diffusion_model.{n}", *AB),
    "comfy checkpoint": (lambda n: f"model.diffusion_model.{n}", *DOWN_UP),
    "DiffSynth": (lambda n: f"pipe.dit.{n}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "model.": (lambda n: f"model.{n}", *AB),
    "unet.": (lambda n: f"unet.{n}", *AB),
    "peft": (lambda n: f"base_model.model.{n}", *AB),
    "DataParallel": (lambda n: f"module.{n}", *AB),
    "compiled": (lambda n: f"_orig_mod.{n}", *DOWN_UP),
    "compiled peft": (lambda n: f"base_model.model._orig_mod.{n}", *AB),
    "compiled blocks": (lambda n: re.sub(r"^(diffusion_model\.)?(blocks\.\d+)", r"\2._orig_mod", n), *AB),
    "compiled and wrapped": (lambda n: f"transformer._orig_mod.module.{n}", *AB),
    "compiled kohya": (lambda n: f"lora_unet__orig_mod_{flat(n)}", *DOWN_UP),
    "peft default": (lambda n: f"base_model.model.{n}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": (lambda n: f"transformer.{diffusers_name(n)}", *AB),
    "diffusers bare": (lambda n: diffusers_name(n), *AB),
    "diffusers _lora": (lambda n: f"transformer.{diffusers_name(n)}", "_lora.down.weight", "_lora.up.weight"),
    "diffusers .lora": (lambda n: f"transformer.{diffusers_name(n)}", ".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": (lambda n: n, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "kohya two underscores": (lambda n: f"lora_unet__{flat(n)}", *DOWN_UP),
    "musubi": (lambda n: f"lora_unet_{flat(n)}", *DOWN_UP),
    "lycoris": (lambda n: f"lycoris_{flat(n)}", *DOWN_UP),
    "kohya of diffusers": (lambda n: f"lora_unet_{flat(diffusers_name(n))}", *DOWN_UP),
}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)
    return path


def merged(path: Path, shapes=SHAPES, **options) -> dict[str, torch.Tensor]:
    weights = {key: value.clone() for key, value in BASE.items()}
    with TensorFiles(path) as files:
        plan = plan_lora(files, shapes, **options)
        for delta in plan.deltas:
            delta.add_to(weights[delta.target])
    return weights


def failure(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        merged(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(scale: float = 1.0) -> dict[str, torch.Tensor]:
    weights = {key: value.clone() for key, value in BASE.items()}
    for layer in LAYERS:
        down, up = PAIRS[layer]
        weights[f"{layer}.weight"] += scale * (up @ down)
    down, up = PAIRS[PATCH]
    weights[f"{PATCH}.weight"][:, :16] += scale * torch.einsum("or,rithw->oithw", up[:, :, 0, 0, 0], down)
    return weights


def pairs_in(style: str) -> dict[str, torch.Tensor]:
    spell, down_end, up_end = STYLES[style]
    tensors = {}
    for layer, (down, up) in PAIRS.items():
        tensors[spell(layer) + down_end] = down
        tensors[spell(layer) + up_end] = up
    return tensors


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return merged(save(tmp_path_factory.mktemp("lora") / "r.safetensors", pairs_in("bare down/up")))


@pytest.mark.parametrize("style", STYLES)
def test_every_style_merges_to_identical_weights(style, tmp_path, reference):
    suffix = ".pt" if style == "DiffSynth" else ".safetensors"
    found = merged(save(tmp_path / f"l{suffix}", pairs_in(style)))
    assert_close(found, expected())
    for key, value in reference.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("style", STYLES)
def test_alpha_and_strength(style, tmp_path):
    spell = STYLES[style][0]
    tensors = pairs_in(style) | {f"{spell(layer)}.alpha": torch.tensor(3.0) for layer in PAIRS}
    assert_close(merged(save(tmp_path / "l.safetensors", tensors), strength=0.5), expected(0.5 * 3.0 / RANK))


def test_without_alpha_the_scale_is_the_strength(tmp_path):
    path = save(tmp_path / "l.safetensors", pairs_in("peft"))
    assert_close(merged(path, strength=-0.25), expected(-0.25))


def test_configured_alpha_and_rank(tmp_path):
    path = save(tmp_path / "l.safetensors", pairs_in("default adapter"))
    assert_close(merged(path, rank=RANK, alpha=2.0), expected(2.0 / RANK))
    assert "rank 4, but lora_rank is 8" in failure(path, rank=8, alpha=2.0)


@pytest.mark.parametrize(
    ("spell", "modulation"),
    [
        (lambda n: f"diffusion_model.{n}", "diffusion_model.blocks.1.diff_m"),
        (lambda n: n, "blocks.1.diff_m"),
        (lambda n: f"lora_unet__{flat(n)}", "lora_unet__blocks_1.diff_m"),
        (lambda n: f"transformer.{diffusers_name(n)}", "transformer.blocks.1.scale_shift_table.diff"),
    ],
    ids=["comfy", "bare", "kohya", "diffusers"],
)
def test_whole_deltas(spell, modulation, tmp_path):
    """diff changes a weight, diff_b a bias, diff_m a modulation; alpha does not scale them."""
    wanted = {key: value.clone() for key, value in BASE.items()}
    tensors = {modulation: randn(5, 1, 6, 32)}
    wanted["blocks.1.modulation"] += 0.5 * tensors[modulation]
    for number, (layer, role) in enumerate(
        [(norm, "diff") for norm in NORMS]
        + [(layer, "diff_b") for layer in (*LAYERS, "blocks.2.norm3", PATCH)]
        + [("head.head", "diff")]
    ):
        target = f"{layer}.{'bias' if role == 'diff_b' else 'weight'}"
        delta = randn(3000 + number, *SHAPES[target])
        tensors[f"{spell(layer)}.{role}"] = delta
        wanted[target] += 0.5 * delta
    tensors[f"{spell(PATCH)}.diff"] = randn(6, 32, 16, 1, 2, 2)
    wanted["patch_embedding.weight"][:, :16] += 0.5 * tensors[f"{spell(PATCH)}.diff"]
    assert_close(merged(save(tmp_path / "l.safetensors", tensors), strength=0.5), wanted)


def test_head_modulation(tmp_path):
    for key in ("diffusion_model.head.diff_m", "transformer.scale_shift_table.diff"):
        delta = randn(7, 1, 2, 32)
        found = merged(save(tmp_path / "l.safetensors", {key: delta}))
        assert torch.equal(found["head.modulation"], BASE["head.modulation"] + delta)


def test_patch_embedding_of_33_channels_is_covered_whole(tmp_path):
    down, up = randn(1, RANK, 33, 1, 2, 2), randn(2, 32, RANK, 1, 1, 1)
    path = save(tmp_path / "l.safetensors", {f"{PATCH}.lora_A.weight": down, f"{PATCH}.lora_B.weight": up})
    delta = torch.einsum("or,rithw->oithw", up[:, :, 0, 0, 0], down)
    torch.testing.assert_close(merged(path)["patch_embedding.weight"], BASE["patch_embedding.weight"] + delta)


def test_patch_embedding_of_an_image_model_is_an_error(tmp_path):
    path = save(tmp_path / "l.safetensors", {f"diffusion_model.{PATCH}.diff": randn(1, 32, 36, 1, 2, 2)})
    assert "diffusion_model.patch_embedding.diff" in failure(path)


def test_convolution_with_a_middle(tmp_path):
    down, mid, up = randn(1, RANK, 16, 1, 1, 1), randn(2, RANK, RANK, 1, 2, 2), randn(3, 32, RANK, 1, 1, 1)
    name = f"lycoris_{PATCH}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    delta = torch.einsum("op,pqthw,qi->oithw", up.flatten(1), mid, down.flatten(1))
    found = merged(save(tmp_path / "l.safetensors", tensors))["patch_embedding.weight"]
    torch.testing.assert_close(found[:, :16], BASE["patch_embedding.weight"][:, :16] + delta)
    assert torch.equal(found[:, 16:], BASE["patch_embedding.weight"][:, 16:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_merged_in_float32(dtype, tmp_path):
    tensors = {key: value.to(dtype) for key, value in pairs_in("bare A/B").items()}
    widened = {key: value.float() for key, value in tensors.items()}
    low = merged(save(tmp_path / "low.safetensors", tensors))
    for key, value in merged(save(tmp_path / "wide.safetensors", widened)).items():
        assert torch.equal(low[key], value) and low[key].dtype == torch.float32


def test_unknown_keys_are_listed(tmp_path):
    tensors = pairs_in("bare A/B") | {
        "blocks.99.self_attn.q.lora_A.weight": randn(1, RANK, 32),
        "blocks.0.self_attn.q.dora_scale": randn(1, 32),
        "blocks.0.ffn.1.lora_down.weight": randn(1, RANK, 32),
        "lora_te_text_model_q.lora_down.weight": randn(1, RANK, 32),
        "blocks.0.self_attn.q.lora_B.bias": randn(1, 32),
    }
    message = failure(save(tmp_path / "l.safetensors", tensors))
    assert "5 keys match no layer" in message
    for key in tensors.keys() - pairs_in("bare A/B").keys():
        assert key in message


def test_whole_weights_only_from_the_adapter(tmp_path):
    path = save(tmp_path / "l.safetensors", {"base_model.model.audio_proj.proj.bias": torch.zeros(32)})
    assert "audio_proj.proj.bias" in failure(path)
    with TensorFiles(path) as files:
        plan = plan_lora(files, SHAPES, allow_whole=True)
    assert plan.replacements == {"audio_proj.proj.bias": "base_model.model.audio_proj.proj.bias"}


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight",
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff",
        "diffusion_model.img_emb.proj.1.diff_b",
        "lora_unet__blocks_0_cross_attn_v_img.lora_down.weight",
        "transformer.blocks.0.attn2.add_k_proj.lora_A.weight",
    ],
)
def test_image_layers_are_an_error_with_the_reason(key, tmp_path):
    tensors = pairs_in("comfy A/B") | {key: torch.ones(RANK, 32)}
    message = failure(save(tmp_path / "l.safetensors", tensors))
    assert "I2V" in message and key in message


def test_image_layer_deltas_of_exactly_zero_are_nothing(tmp_path, reference):
    tensors = pairs_in("comfy A/B") | {"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.zeros(32)}
    found = merged(save(tmp_path / "l.safetensors", tensors))
    assert all(torch.equal(found[key], value) for key, value in reference.items())


@pytest.mark.parametrize("half", ["down", "up"])
def test_missing_half(half, tmp_path):
    tensors = pairs_in("comfy down/up")
    del tensors[f"diffusion_model.blocks.0.ffn.0.lora_{half}.weight"]
    message = failure(save(tmp_path / "l.safetensors", tensors))
    assert "diffusion_model.blocks.0.ffn.0" in message and f"no {half}" in message


def test_lonely_alpha(tmp_path):
    path = save(tmp_path / "l.safetensors", {"blocks.0.ffn.0.alpha": torch.tensor(1.0)})
    assert "blocks.0.ffn.0.alpha" in failure(path)


@pytest.mark.parametrize(
    ("down", "up"),
    [((RANK, 33), (32, RANK)), ((RANK, 32), (31, RANK)), ((RANK, 32), (32, RANK + 1)), ((4,), (4,))],
)
def test_wrong_shapes_name_the_key(down, up, tmp_path):
    name = "blocks.0.self_attn.q"
    path = save(
        tmp_path / "l.safetensors",
        {f"{name}.lora_A.weight": randn(1, *down), f"{name}.lora_B.weight": randn(2, *up)},
    )
    assert f"{name}.lora_" in failure(path)


def test_delta_without_a_place(tmp_path):
    for key in ("blocks.0.self_attn.norm_q.diff_b", "blocks.0.self_attn.q.diff_m", "blocks.0.diff"):
        assert key in failure(save(tmp_path / "l.safetensors", {key: randn(1, 32)}))


def test_two_spellings_of_one_weight(tmp_path):
    tensors = pairs_in("bare A/B") | {
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": PAIRS["blocks.0.ffn.0"][0]
    }
    assert "both mean the same weight" in failure(save(tmp_path / "l.safetensors", tensors))


def test_two_adapters_in_one_file(tmp_path):
    name, (down, up) = "blocks.0.ffn.0", PAIRS["blocks.0.ffn.0"]
    tensors = {f"{name}.lora_A.{a}.weight": down.clone() for a in "xy"} | {
        f"{name}.lora_B.{a}.weight": up.clone() for a in "xy"
    }
    assert "both mean the same weight" in failure(save(tmp_path / "l.safetensors", tensors))


def test_peft_folder_declares_alpha(tmp_path):
    save(tmp_path / "adapter_model.safetensors", pairs_in("peft"))
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({"r": RANK, "lora_alpha": 12}))
    assert_close(merged(tmp_path), expected(12 / RANK))
    settings.write_text(json.dumps({"r": RANK, "lora_alpha": 12, "use_rslora": True}))
    assert "use_rslora" in failure(tmp_path)
    settings.write_text("{")
    assert "adapter_config.json" in failure(tmp_path)


def test_diffusers_header_declares_alpha(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 1})}
    save_file(pairs_in("diffusers"), tmp_path / "pytorch_lora_weights.safetensors", metadata=metadata)
    assert_close(merged(tmp_path), expected(1 / RANK))


@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=3),
    layer=st.sampled_from(sorted({re.sub(r"\.(weight|bias)$", "", key) for key in SHAPES})),
    diffusers=st.booleans(),
    end=st.sampled_from(
        [".lora_A.weight", ".lora_down.weight", ".lora_A.x1.weight", ".lora.down.weight", "_lora.down.weight"]
    ),
)
def test_any_prefixes_find_the_layer(prefixes, layer, diffusers, end):
    name = diffusers_name(layer) if diffusers else layer
    parsed = LayerNames(SHAPES).parse("".join(prefixes) + name + end)
    assert parsed is not None and parsed.layer == layer and parsed.role == "down"


@given(st.text(alphabet="abcdklmo_.0123 ", max_size=30))
def test_stripping_ends(name):
    assert strip_prefixes("base_model.model." + name) == strip_prefixes(name)


def test_names_of_diffusers_are_those_of_its_model():
    """The diffusers name of every plain layer is a module of diffusers' Wan transformer."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=32, text_dim=24, freq_dim=16, ffn_dim=48, num_layers=4
        )
    theirs = set(model.state_dict())
    for key in SHAPES:
        if "audio" not in key:
            layer, _, leaf = key.rpartition(".")
            name = diffusers_name(key) if leaf == "modulation" else f"{diffusers_name(layer)}.{leaf}"
            assert name in theirs
            theirs.discard(name)
    assert not theirs


@pytest.mark.parametrize(
    "table",
    [
        '{"lora_alpha": "8"}',
        '{"lora_alpha": [8]}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 1e999}',
        '{"lora_alpha": 1, "lora_alpha": 2}',
        '{"lora_alpha": ' + "[" * 5000,
        "[]",
        "{",
    ],
)
def test_declared_alpha_that_is_no_number(tmp_path, table):
    path = save(tmp_path / "adapter_model.safetensors", pairs_in("peft"))
    (tmp_path / "adapter_config.json").write_text(table)
    assert "adapter_config.json" in failure(path)
    save_file(load_file(path), tmp_path / "l.safetensors", {"lora_adapter_metadata": table})
    assert "l.safetensors" in failure(tmp_path / "l.safetensors")
