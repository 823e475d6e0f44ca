"""Settings that exclude each other, or have no effect together.

The functions take the values of a section by field, and raise FieldError.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from omniavatar.config.backends import alternatives, registry
from omniavatar.config.values import CAUSAL_FIELDS, WINDOW_FIELDS, FieldError
from omniavatar.errors import ConfigError


def check_sampling(sampling: Mapping[str, Any], defaults: Mapping[str, Any], cache_policy: str) -> None:
    """Check the step cache, the fields of `sampler: causal`, and those that it cannot follow.

    - defaults: of `CAUSAL_FIELDS`.
    - cache_policy: the step cache in force.
    """
    sampler = sampling["sampler"]
    if sampling["step_cache"] == "teacache" and sampling["tea_cache_l1_thresh"] == 0:
        raise FieldError(
            "teacache skips no step with threshold 0; set tea_cache_l1_thresh, such as 0.14",
            "step_cache",
            "tea_cache_l1_thresh",
        )
    if not registry("sampling.sampler").get(sampler).causal:
        for name in CAUSAL_FIELDS:
            if sampling[name] != defaults[name]:
                text = f"has no effect with sampler: {sampler}; leave it out or set sampler to causal"
                raise FieldError(text, name, "sampler")
        return
    from omniavatar.sampling.causal import CausalWindow

    try:
        CausalWindow(sampling["causal_block"], sampling["causal_window"], sampling["causal_sink"])
    except ConfigError as error:
        name, _, text = str(error).partition("=")
        raise FieldError(text.partition(": ")[2], name) from error
    if sampling["noise_white"] and sampling["noise_span"] == 1:
        raise FieldError("has no effect with noise_span: 1; leave it out", "noise_white")
    what = "sampler: causal runs one pass a step, without guidance"
    if sampling["guidance_scale"] != 1:
        raise FieldError(f"{what}; set guidance_scale to 1", "guidance_scale", "sampler")
    if sampling["audio_scale"] not in (None, 1):
        raise FieldError(f"{what}; leave audio_scale out", "audio_scale", "sampler")
    if sampling["guidance_interval"] != (0.0, 1.0):
        raise FieldError(f"{what}; leave guidance_interval out", "guidance_interval", "sampler")
    if cache_policy != "none":
        name = "tea_cache_l1_thresh" if sampling["step_cache"] is None else "step_cache"
        raise FieldError(f"sampler: causal computes every step; leave {name} out", name, "sampler")


def check_causal(
    given: Collection[str],
    video: Mapping[str, Any],
    hand_over: str,
    runtime: Mapping[str, Any],
    sparse_attention: str = "dense",
) -> None:
    """Check what `sampler: causal` cannot follow.

    - given: the fields of the video section that the user set.
    """
    if video["color_match"]:
        raise FieldError(
            "sampler: causal hands no pixels over, so matched colours would change nothing but the file; set "
            "color_match to 0",
            "video.color_match",
            "sampling.sampler",
        )
    if video["anchor_every"]:
        raise FieldError(
            "sampler: causal makes no windows; every block sees those of the video's start (causal_sink); "
            "leave anchor_every out",
            "video.anchor_every",
            "sampling.sampler",
        )
    if video["blend_frames"]:
        raise FieldError(
            "sampler: causal makes no windows, so nothing jumps at their start; leave blend_frames out",
            "video.blend_frames",
            "sampling.sampler",
        )
    if hand_over != "pixels":
        raise FieldError(
            "sampler: causal hands every block over as it is, through its cache; leave hand_over out",
            "sampling.hand_over",
            "sampling.sampler",
        )
    if sparse_attention != "dense":
        raise FieldError(
            "sampler: causal attends to a cache of earlier blocks, which no plan covers; leave "
            "sparse_attention out",
            "sparsity.sparse_attention",
            "sampling.sampler",
        )
    for name in WINDOW_FIELDS:
        if name in given:
            raise FieldError(
                f"sampler: causal makes blocks of causal_block latents, not windows; leave {name} out",
                f"video.{name}",
                "sampling.sampler",
            )
    shared = {
        "sp_size": runtime["sp_size"] != 1,
        "exchange": runtime["exchange"] == "direct",
        "cfg_parallel": runtime["cfg_parallel"] != 1,
        "use_fsdp": runtime["use_fsdp"],
    }
    for name, refused in shared.items():
        if refused:
            raise FieldError(
                f"sampler: causal makes a video on one GPU; leave {name} out, or make several videos with "
                "`omniavatar batch`",
                f"runtime.{name}",
                "sampling.sampler",
            )


def check_windows(
    runtime: Mapping[str, Any],
    hand_over: str,
    hand_overs: Collection[str],
    overlap: int | None,
    latent_encoder: str,
) -> None:
    """Check what only `sampler: causal` can follow, and what a window hands over.

    - hand_overs: those of the family.
    - overlap: frames that windows share; None for chunks.
    """
    if hand_over == "clean" and overlap == 1:
        raise FieldError(
            "a single frame is handed over, which is encoded again, so no latent would be clean; set "
            "overlap_frame to 5 or more, or hand_over to pixels",
            "sampling.hand_over",
            "video.overlap_frame",
        )
    if hand_over == "clean" and latent_encoder == "taehv":
        raise FieldError(
            "taehv codes no frame alone, so there is nothing to encode again; set hand_over to "
            f"{alternatives(name for name in hand_overs if name != 'clean')}",
            "sampling.hand_over",
            "model.latent_encoder",
        )
    if runtime["vae_device"] is not None:
        shared = "" if overlap is None else ", or share the video with sp_size"
        raise FieldError(
            "has no use here: each window needs the pixels of the one before it; leave vae_device out"
            f"{shared}",
            "runtime.vae_device",
            "sampling.sampler",
        )


def check_vae(vae: str, decoder: str) -> None:
    """Check that the VAE's implementation can run the decoder."""
    runners = registry("runtime.vae")
    taken = runners.get(vae).decoders if vae in runners.names else ()
    if taken and decoder not in taken:
        raise FieldError(
            f"{vae} runs with decoder: {alternatives(taken)}, not {decoder}; set vae to fast or decoder to "
            f"{alternatives(taken)}",
            "runtime.vae",
            "model.decoder",
        )


def check_runtime(runtime: Mapping[str, Any]) -> None:
    """Check limits of memory, and how several GPUs share a video."""
    limited = runtime["num_persistent_param_in_dit"] is not None
    if runtime["memory"] != "auto" and limited:
        raise FieldError(
            "memory and num_persistent_param_in_dit both limit the weights on the device; set only one",
            "memory",
            "num_persistent_param_in_dit",
        )
    shared = runtime["use_fsdp"]
    if shared and runtime["sp_size"] == 1:
        raise FieldError(
            "distributes the weights over sp_size GPUs; set sp_size to 2 or more",
            "use_fsdp",
            "sp_size",
        )
    if runtime["exchange"] == "direct" and runtime["sp_size"] * runtime["cfg_parallel"] == 1:
        raise FieldError(
            "one GPU makes the video, so nothing is exchanged; set sp_size or cfg_parallel to 2 or more",
            "exchange",
            "sp_size",
        )
    if shared and runtime["cuda_graphs"]:
        raise FieldError(
            "CUDA graphs need weights at a fixed address, which use_fsdp does not give; set only one",
            "cuda_graphs",
            "use_fsdp",
        )
    if shared and limited:
        raise FieldError(
            "use_fsdp and num_persistent_param_in_dit both place the weights; set only one",
            "use_fsdp",
            "num_persistent_param_in_dit",
        )
