"""The first line of a fault is the true one: no remedy leads to a setting that is refused next."""

from __future__ import annotations

from typing import Any

import pytest

from omniavatar.config.families import FAMILIES
from omniavatar.config.load import load_config
from omniavatar.config.schema import SamplingConfig
from omniavatar.config.sparsity import SparsityConfig
from omniavatar.errors import ConfigError

HEADS = tuple(family.name for family in FAMILIES if family.chunk is not None)
ONE_GPU = "is made on one GPU"


def says(**values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, values)
    return str(error.value)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("use_fsdp", True, ONE_GPU),
        ("exchange", "direct", ONE_GPU),
        ("max_tokens", 1000, "a chunk has 33 frames"),
        ("max_tokens", "many", "a chunk has 33 frames"),
        ("overlap_frame", 6, "a chunk starts from 5 frames"),
        ("step_cache", "teacache", "every one of its few steps is computed"),
        ("sampler", "causal", "its weights follow"),
        ("guidance_scale", "strong", "there is no text"),
        ("causal_block", 4, "reads no causal_block"),
        ("noise_span", 2, "reads no noise_span"),
        ("sparse_density", 0.3, "separate audio tokens"),
    ],
)
def test_a_family_refuses_before_any_other_check(family: str, name: str, value: Any, words: str) -> None:
    text = says(family=family, **{name: value})
    assert f"{name}: {family}: " in text and words in text


@pytest.mark.parametrize(
    "values",
    [
        {"use_fsdp": False, "exchange": "collective", "sp_size": 1},
        {"sparse_block_size": 128, "sparse_attention": "dense"},
        {"causal_block": 3, "step_cache": "none", "guidance_scale": 1},
    ],
)
@pytest.mark.parametrize("family", HEADS)
def test_settings_at_their_defaults_are_no_fault(family: str, values: dict[str, Any]) -> None:
    assert load_config(None, {"family": family, **values}).config.family.name == family


@pytest.mark.parametrize("name", ["use_fsdp", "exchange"])
def test_a_block_causal_model_refuses_several_gpus_first(name: str) -> None:
    value = {"use_fsdp": True, "exchange": "direct"}[name]
    text = says(sampler="causal", guidance_scale=1, **{name: value})
    assert f"{name}: sampler: causal makes a video on one GPU; leave {name} out" in text


@pytest.mark.parametrize("name", ["use_fsdp", "exchange"])
def test_other_models_are_told_how_many_gpus_it_needs(name: str) -> None:
    text = says(**{name: {"use_fsdp": True, "exchange": "direct"}[name]})
    assert text.startswith(f"overrides: {name}: ") and "to 2 or more" in text


def test_a_fault_that_no_family_refuses_keeps_its_line() -> None:
    assert "greater than or equal to 1" in says(family="flashhead", num_steps=0)
    assert "lighttae" in says(family="flashhead", decoder="none such")


@pytest.mark.parametrize(("family", "others"), [("flashhead", "pixels"), ("leaptalk", "pixels or latents")])
def test_the_remedy_for_taehv_is_one_that_the_family_has(family: str, others: str) -> None:
    text = says(family=family, decoder="taehv", latent_encoder="taehv", hand_over="clean")
    assert f"set hand_over to {others}" in text


def test_vae_device_is_not_sent_to_several_gpus_for_heads() -> None:
    assert "sp_size" not in says(family="flashhead", vae_device="cpu")
    assert "sp_size" in says(vae_device="cpu")


@pytest.mark.parametrize("family", HEADS)
def test_all_settings_of_sparse_attention_are_refused(family: str) -> None:
    refused = next(each for each in FAMILIES if each.name == family).refused
    assert {f"sparsity.{name}" for name in SparsityConfig.model_fields} <= set(refused)


def test_requests_are_refused_in_the_same_order() -> None:
    from omniavatar.config.change import effective_sampling
    from omniavatar.config.families import family_of
    from omniavatar.types import SamplingParams

    asked = SamplingParams(step_cache="teacache")
    heads = SamplingConfig(sampler="renoise", guidance_scale=1)
    with pytest.raises(ConfigError, match="request: step_cache: flashhead: every one of its few steps"):
        effective_sampling(heads, asked, family_of("flashhead"))
    with pytest.raises(ConfigError, match=r"request: .*set tea_cache_l1_thresh"):
        effective_sampling(SamplingConfig(), asked)
