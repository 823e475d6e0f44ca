"""A finished video gets a signed manifest that says how it was made, also after an interruption."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import wave
from pathlib import Path
from typing import Any

import av
import PIL.Image
import pytest

from certificates import Identity, make_identity
from engine import make_pipeline, portrait, request, voice
from omniavatar import AvatarPipeline, AvatarRequest, __version__
from omniavatar.engine.memory_inputs import in_files
from omniavatar.engine.prepare import read_inputs
from omniavatar.engine.provenance import Signing
from omniavatar.engine.requests_file import RequestLine
from omniavatar.errors import ConfigError, InputError, ResourceError, StoppedError
from omniavatar.live.makers import maker_of
from omniavatar.media.provenance import Ingredient, Provenance, read_provenance
from omniavatar.serve.batch.pipelines import make_items

KEY = "a person speaks"
SECONDS = 0.5
Pipelines = dict[str, AvatarPipeline]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return make_identity(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def pipelines(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, identity: Identity):
    """Pipelines that differ in provenance only, with the same models."""
    folder = tmp_path_factory.mktemp("cache")
    old = make_identity(folder / "old", days=(-9, -1))
    other = make_identity(folder / "other", "ed25519")
    certified, always = identity.settings, {"provenance": True, **identity.settings}
    settings: dict[str, dict[str, Any]] = {
        "none": {},
        "asked": certified,
        "always": always,
        "contents": {**always, "provenance_inputs": "contents"},
        "stamped": {**always, "provenance_timestamp": "http://127.0.0.1:9/tsa"},
        "expired": {"provenance": True, **old.settings},
        "other": {"provenance": True, **other.settings},
    }
    made: Pipelines = {}
    for name, values in settings.items():
        made[name] = make_pipeline(nano_checkpoint, folder, num_steps=1, guidance_scale=1, **values)
        made[name].models = made["none"].models
    yield made
    made["none"].close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A portrait and a voice as files."""
    folder = tmp_path_factory.mktemp("inputs")
    PIL.Image.fromarray(portrait()).save(folder / "Anna private.png")
    sound = voice(SECONDS)
    with wave.open(str(folder / "secret.wav"), "wb") as out:
        out.setparams((1, 2, sound.sample_rate, 0, "NONE", "not compressed"))
        out.writeframes((sound.samples * 32767).astype("<i2").tobytes())
    return {"image": folder / "Anna private.png", "audio": folder / "secret.wav"}


def asked(files: dict[str, Path], **changes: Any) -> AvatarRequest:
    return request(None, **{**files, **changes})


@pytest.fixture(scope="module")
def plain(pipelines: Pipelines, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished video without a manifest."""
    return pipelines["none"].generate(asked(files), tmp_path_factory.mktemp("plain") / "v.mp4").output


@pytest.fixture
def finished(plain: Path, tmp_path: Path) -> Path:
    """A copy of it with its sidecar."""
    shutil.copy(plain.with_suffix(".json"), tmp_path)
    return Path(shutil.copy(plain, tmp_path))


@pytest.fixture
def signed(pipelines: Pipelines, files: dict[str, Path], finished: Path) -> Path:
    return pipelines["always"].generate(asked(files), finished).output


def sign(pipeline: AvatarPipeline, wanted: AvatarRequest, path: Path) -> Provenance:
    """Sign the file at `path` as the video of a request."""
    with in_files(wanted) as local:
        inputs = read_inputs(pipeline.models, local)
        Signing(pipeline.config.output, local).of(inputs, path)(path)
    return read_provenance(path)


def packets(path: Path) -> list[tuple[int, int | None, bytes]]:
    with av.open(str(path)) as container:
        return [(each.stream.index, each.pts, bytes(each)) for each in container.demux() if each.size]


def ingredient(found: Provenance, title: str) -> Ingredient:
    (one,) = [each for each in found.ingredients if each.title == title]
    return one


def name_of(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"ni:///sha-256;{digest}"


def record_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def test_the_manifest_says_what_made_the_video_from_what(
    signed: Path, plain: Path, identity: Identity, files: dict[str, Path]
) -> None:
    found = read_provenance(signed, anchors=identity.root)
    assert found.holds and found.trusted
    assert found.generator == f"omniavatar {__version__}"
    (action,) = found.actions
    assert (action.name, action.source) == ("c2pa.created", "trainedAlgorithmicMedia")
    assert action.agent == f"omniavatar {__version__}" and action.when
    assert [each.relationship for each in found.ingredients] == ["inputTo", "inputTo"]
    for title, path in (("portrait", files["image"]), ("voice", files["audio"])):
        each = ingredient(found, title)
        assert each.identity == name_of(path.read_bytes()) and not each.embedded
    assert packets(signed) == packets(plain), "signing changed the video"
    data = signed.read_bytes()
    for secret in (b"Anna", b"secret", KEY.encode(), files["image"].read_bytes()[100:200]):
        assert secret not in data
    record = record_of(signed)
    assert record["provenance"]["manifest"] == found.label and record["bytes"] == len(data)
    assert "provenance" not in record_of(plain)


@pytest.mark.parametrize(
    "kind, wish, expected",
    [("asked", True, True), ("asked", None, False), ("always", None, True), ("always", False, False)],
)
def test_a_request_may_ask_for_it_or_not(
    pipelines: Pipelines,
    files: dict[str, Path],
    finished: Path,
    kind: str,
    wish: bool | None,
    expected: bool,
) -> None:
    pipelines[kind].generate(asked(files, provenance=wish), finished)
    if expected:
        assert read_provenance(finished).holds
    else:
        with pytest.raises(InputError, match="has no C2PA manifest"):
            read_provenance(finished)


def test_a_finished_video_is_signed_once_for_each_certificate(
    pipelines: Pipelines, files: dict[str, Path], signed: Path, tmp_path: Path
) -> None:
    once = signed.read_bytes()
    for kind in ("always", "none"):
        assert pipelines[kind].generate(asked(files), signed).seconds == 0.0
        assert signed.read_bytes() == once
    pipelines["other"].generate(asked(files), signed)
    assert read_provenance(signed).algorithm == "Ed25519"


def test_contents_are_inside_only_when_asked(
    pipelines: Pipelines, files: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    pipelines["contents"].generate(asked(files), finished)
    found = read_provenance(finished)
    assert found.holds and all(each.embedded for each in found.ingredients)
    for path in files.values():
        assert path.read_bytes() in finished.read_bytes()
    with pytest.raises(InputError, match="portrait: provenance_inputs=contents needs it as a file"):
        pipelines["contents"].generate(request(0.5), tmp_path / "w.mp4")


def test_inputs_in_memory_are_named_by_their_pixels_and_samples(pipelines: Pipelines, finished: Path) -> None:
    found = sign(pipelines["always"], request(0.5), finished)
    face, sound = ingredient(found, "portrait"), ingredient(found, "voice")
    assert face.identity == name_of(portrait().tobytes()) and "RGB pixels" in face.description
    assert sound.identity == name_of(voice(0.5).samples.tobytes()) and "16000 Hz" in sound.description
    file = io.BytesIO()
    PIL.Image.fromarray(portrait()).save(file, "PNG")
    found = sign(pipelines["always"], request(None, image=file.getvalue()), finished)
    assert [each.title for each in found.ingredients] == ["portrait"]
    assert ingredient(found, "portrait").identity == name_of(file.getvalue())


@pytest.mark.parametrize("changed", [False, True])
def test_a_video_that_goes_on_names_its_parent(
    pipelines: Pipelines,
    signed: Path,
    plain: Path,
    files: dict[str, Path],
    identity: Identity,
    tmp_path: Path,
    changed: bool,
) -> None:
    data = bytearray(signed.read_bytes())
    data[-20] ^= changed
    signed.write_bytes(data)
    longer = request(audio=voice(0.4, seed=3), image=files["image"], continues=signed)
    made = Path(shutil.copy(plain, tmp_path / "longer.mp4"))
    sign(pipelines["always"], longer, made)
    found = read_provenance(made, anchors=identity.root)
    assert found.holds and found.trusted
    assert [each.name for each in found.actions] == ["c2pa.opened", "c2pa.edited"]
    assert found.actions[1].source == "trainedAlgorithmicMedia"
    parent = ingredient(found, "parent")
    assert (
        parent.relationship == "parentOf" and parent.manifest == record_of(signed)["provenance"]["manifest"]
    )
    assert parent.identity == name_of(bytes(data))
    assert any("bmffHash.mismatch" in problem for problem in parent.problems) == changed


def test_a_run_that_was_interrupted_or_could_not_sign_goes_on_to_the_same_video(
    pipelines: Pipelines, plain: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 4

    target = tmp_path / "v.mp4"
    with pytest.raises(StoppedError):
        pipelines["none"].generate(asked(files), target, should_stop=stop)
    with pytest.raises(ResourceError, match="the authority does not answer"):
        pipelines["stamped"].generate(asked(files), target)
    assert not target.exists() and (tmp_path / "v.mp4.job").is_dir()
    result = pipelines["always"].generate(asked(files), target)
    assert result.resumed_windows == result.windows and packets(target) == packets(plain)
    assert read_provenance(target).holds
    assert {path.name for path in tmp_path.iterdir()} == {"v.mp4", "v.json"}


@pytest.mark.parametrize(
    "kind, message", [("expired", "expired on"), ("none", "provenance_certificate: is not set")]
)
def test_wrong_credentials_end_the_run_before_any_work(
    pipelines: Pipelines, files: dict[str, Path], tmp_path: Path, kind: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipelines[kind].generate(asked(files, provenance=True), tmp_path / "v.mp4")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_finished_file_is_refused(pipelines: Pipelines, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"only a finished \.mp4 file can be signed"):
        next(pipelines["always"].stream(asked(files)))
    with pytest.raises(ConfigError, match="a live video cannot be signed"):
        maker_of(pipelines["always"], portrait(), KEY, None)


def test_a_batch_makes_an_unsigned_video_again(pipelines: Pipelines, files: dict[str, Path]) -> None:
    line = RequestLine(0, 1, KEY, files["image"], files["audio"])
    kinds = ("none", "asked", "always", "contents")
    found = {kind: make_items([line], pipelines[kind].config)[0].identity for kind in kinds}
    assert found["none"] == found["asked"] and len(set(found.values())) == 3
