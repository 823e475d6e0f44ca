"""Faces of portraits, the square around a head, and what a user reads about a portrait."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from engine import head_pipeline, make_pipeline, request
from omniavatar.assets import PORTRAIT
from omniavatar.assets.pocket import PORTRAIT as POCKET_PORTRAIT
from omniavatar.encoders.face_crop import Face, crop_to_head, find_faces, head_square, portrait_notes
from omniavatar.engine.events import Message
from omniavatar.engine.prepare import read_inputs
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import InputError, ResourceError

GREY = np.full((300, 400, 3), 128, np.uint8)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def scene(scale: float = 0.5, left: int = 260) -> np.ndarray:
    """The packaged portrait, made smaller, in a wide picture."""
    side = round(512 * scale)
    picture = Image.new("RGB", (1024, 512), (90, 120, 90))
    picture.paste(Image.open(PORTRAIT).convert("RGB").resize((side, side)), (left, 200))
    return np.asarray(picture)


def test_boxes_are_those_of_mediapipe() -> None:
    """Recorded with mediapipe 0.10.21, model_selection=1: left, top, width, height, score."""
    for path, expected in (
        (POCKET_PORTRAIT, (41.4, 51.2, 118.1, 118.1, 0.916)),
        (PORTRAIT, (144.5, 179.7, 220.6, 220.7, 0.892)),
    ):
        (face,) = find_faces(pixels(path))
        found = (face.left, face.top, face.width, face.height)
        assert np.abs(np.subtract(found, expected[:4])).max() < 0.015 * expected[2]
        assert abs(face.score - expected[4]) < 0.01


def test_a_face_is_found_where_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    """In each third of a wide picture; LiteRT prints nothing."""
    (whole,) = find_faces(pixels(PORTRAIT))
    for left in (0, 384, 768):
        (face,) = find_faces(scene(left=left))
        assert abs(face.left - (left + whole.left / 2)) < 12 and abs(face.top - (200 + whole.top / 2)) < 12
        assert abs(face.width - whole.width / 2) < 12
    assert capfd.readouterr() == ("", "")
    assert find_faces(GREY) == []


@pytest.mark.parametrize(
    ("face", "square"),
    [
        (Face(100, 100, 40, 40, 0.9), (76, 156, 80, 160)),
        (Face(100, 100, 40, 50, 0.9), (81, 161, 80, 160)),
        (Face(5, 5, 40, 40, 0.9), (0, 61, 0, 65)),
        (Face(270, 180, 40, 40, 0.9), (156, 200, 250, 300)),
    ],
)
def test_the_square_lies_around_the_head_and_inside_the_picture(face, square) -> None:
    assert head_square(face, 200, 300) == square


def test_a_portrait_is_cut_to_its_head() -> None:
    cropped, notes = crop_to_head(scene())
    assert notes == [] and abs(cropped.shape[0] - cropped.shape[1]) <= 1
    (face,) = find_faces(cropped)
    assert abs(face.width / cropped.shape[1] - 0.5) < 0.06
    with pytest.raises(InputError, match="face_crop found no face"):
        crop_to_head(GREY)


def test_of_two_faces_the_clearest_is_taken_and_named() -> None:
    both = np.concatenate([pixels(PORTRAIT), pixels(PORTRAIT)[:, ::-1]], axis=1)
    cropped, notes = crop_to_head(both)
    assert len(notes) == 1 and "has 2 faces" in notes[0] and cropped.shape[1] < 512


def test_what_a_portrait_needs_is_said_in_one_line() -> None:
    size = (512, 512)
    assert portrait_notes(pixels(PORTRAIT), size) == []
    for picture, text in (
        (GREY, "no face was found"),
        (scene(left=0), "outside the middle"),
        (scene(0.4, left=410), "% of the picture's width"),
    ):
        (note,) = portrait_notes(picture, size)
        assert text in note and "\n" not in note


def test_the_engine_crops_and_notes(heads_checkpoint, tmp_path) -> None:
    told: list[str] = []

    def listener(event: object) -> None:
        if isinstance(event, Message):
            told.append(event.text)

    def image_of(asked, **changes) -> np.ndarray:
        told.clear()
        made = head_pipeline(heads_checkpoint, tmp_path, RunRecorder([listener]), **changes)
        return read_inputs(made.models, asked).image

    asked = request(0.5, prompt="", image=scene(0.4, left=410))
    assert image_of(asked).shape == (512, 1024, 3)
    assert any("set face_crop to true" in text for text in told)
    assert image_of(asked, face_crop=True).shape[1] < 300
    assert not any("face" in text for text in told)
    with pytest.raises(InputError, match="found no face"):
        image_of(request(0.5, prompt="", image=GREY), face_crop=True)


def test_without_the_package(heads_checkpoint, nano_checkpoint, tmp_path, monkeypatch) -> None:
    """The crop is refused with the remedy; nothing else needs it."""
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, None)
    made = head_pipeline(heads_checkpoint, tmp_path)
    assert read_inputs(made.models, request(0.5, prompt="", image=GREY)).image.shape == GREY.shape
    made = make_pipeline(nano_checkpoint, tmp_path, face_crop=True)
    with pytest.raises(ResourceError, match=r"ai-edge-litert is missing; pip install 'omniavatar\[face\]'"):
        read_inputs(made.models, request(0.5, image=GREY))
