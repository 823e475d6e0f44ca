"""What a worker would refuse is refused at the request, with its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import CheckpointError
from omniavatar.serve.api.models import Catalogue
from serve_api import FILES, Serve, Server, portrait

PORTRAIT_ONLY = {"input_reference": ("a.png", portrait())}
HEADS = ("flashhead", "leaptalk")


def config_of(**values: Any) -> PipelineConfig:
    return load_config(None, {"weights": "random", "scale": "nano", "device": "cpu", **values}).config


def server_of(serve: Serve, config: PipelineConfig) -> Server:
    return serve(models=Catalogue({"pocket": config}, 100))


def refused(server: Server, param: str, *words: str, path: str = "/v1/videos", **request: Any) -> None:
    """Check that the request is refused at `param`, and leaves nothing."""
    jobs, folders = server.store.unfinished(), len(server.folders)
    reply = server.client.post(path, **request)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param, error
    assert error["message"].startswith(f"{param}: ") and all(word in error["message"] for word in words), (
        error
    )
    assert (server.store.unfinished(), len(server.folders)) == (jobs, folders)


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/estimate", "/v1/videos/sync"])
@pytest.mark.parametrize("family", HEADS)
def test_a_head_without_a_voice_is_refused(serve: Serve, family: str, path: str) -> None:
    server = server_of(serve, config_of(family=family))
    request = {"data": {"prompt": "x"}, "files": PORTRAIT_ONLY}
    refused(server, "audio_reference", "is missing", family, "add one", path=path, **request)
    assert server.create().status_code == 200


def test_other_models_make_silent_videos(serve: Serve) -> None:
    server = server_of(serve, config_of())
    reply = server.client.post("/v1/videos", data={"prompt": "x"}, files=PORTRAIT_ONLY)
    assert reply.status_code == 200 and server.store.get(reply.json()["id"]).spec.audio is None


def test_a_model_without_audio_layers_takes_no_voice(serve: Serve, tmp_path: Path) -> None:
    config = config_of(weights="files", use_audio=False, dit_path=str(tmp_path / "absent.safetensors"))
    request = {"data": {"prompt": "x"}, "files": FILES}
    refused(server_of(serve, config), "audio_reference", "no audio layers", "leave it out", **request)


@pytest.mark.parametrize(
    ("family", "field", "value", "words"),
    [
        ("flashhead", "guidance_scale", "3", "set it to 1"),
        ("leaptalk", "guidance_scale", "3", "set it to 1"),
        ("flashhead", "audio_scale", 3.0, "leave it out"),
        ("flashhead", "sampler", "euler", "renoise"),
        ("leaptalk", "sampler", "renoise", "bridge"),
        ("omniavatar", "sampler", "bridge", "set sampler to that"),
        ("leaptalk", "guidance_interval", [0.1, 0.5], "leave it out"),
        ("flashhead", "step_cache", "magcache", "leave it out"),
        ("omniavatar", "step_cache", "magcache", "use none"),
    ],
)
def test_a_setting_that_the_model_refuses_is_named(
    serve: Serve, family: str, field: str, value: Any, words: str
) -> None:
    server = server_of(serve, config_of(family=family))
    direct = field == "guidance_scale"
    fields = {field: value} if direct else {"extra_params": json.dumps({field: value})}
    param = field if direct else f"extra_params.{field}"
    refused(server, param, words, data={"prompt": "x", **fields}, files=FILES)


def test_the_packaged_model_has_no_published_step_cache(serve: Serve) -> None:
    extra = '{"step_cache": "magcache"}'
    request = {"data": {"prompt": "x", "extra_params": extra}, "files": FILES}
    refused(serve(), "extra_params.step_cache", "use none", **request)


def test_a_fault_of_the_configuration_is_not_the_client_s(serve: Serve) -> None:
    server = server_of(serve, config_of(step_cache="magcache"))
    assert server.create(seed="3").status_code == 200, "its worker says what is wrong with the configuration"


def test_fewer_steps_than_stay_dense_are_refused(serve: Serve) -> None:
    config = config_of(sparse_attention="window", sparse_density=0.5, sparse_block_size=4)
    request = {"data": {"prompt": "x", "num_inference_steps": "1"}, "files": FILES}
    refused(server_of(serve, config), "num_inference_steps", "nothing is sparse", **request)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"family": "flashhead"}, "8 s before"),
        ({"sampler": "causal", "guidance_scale": 1}, "block-causal"),
        ({"overlap_frame": 45}, "20 frames, fewer than the 45"),
    ],
)
def test_a_video_that_its_model_cannot_continue_is_refused(
    serve: Serve, values: dict[str, Any], words: str
) -> None:
    server = server_of(serve, config_of(**values))
    id = server.create().json()["id"]
    server.finish()
    request = {"files": {"audio_reference": FILES["audio_reference"]}}
    refused(server, "video_id", words, "whole sound", path=f"/v1/videos/{id}/extensions", **request)


def test_a_video_of_a_size_or_model_that_is_gone_cannot_be_continued(serve: Serve) -> None:
    server = serve()
    id = server.create().json()["id"]
    server.finish()
    request = {"files": {"audio_reference": FILES["audio_reference"]}}
    path = f"/v1/videos/{id}/extensions"
    config = load_config("pocket").config
    other = serve(models=Catalogue({"pocket": changed(config, video={"image_sizes_720": ((64, 64),)})}, 100))
    refused(other, "video_id", "no longer makes", path=path, **request)
    gone = serve(models=Catalogue({"other": config}, 100)).client.post(path, **request)
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("key", "heads"), [("audio_proj.proj1.weight", True), ("patch_embedding.weight", False)]
)
def test_the_family_is_that_of_the_weights(tmp_path: Path, key: str, heads: bool) -> None:
    path = tmp_path / "dit.safetensors"
    save_file({key: torch.zeros(2, 2)}, path)
    (config,) = Catalogue({"own": config_of(weights="files", dit_path=str(path))}, 100).configs.values()
    assert (config.family.chunk is not None) is heads


def test_weights_that_cannot_be_read_are_named_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"dit\.safetensors"):
        Catalogue({"own": config_of(weights="files", dit_path=str(path))}, 100)
