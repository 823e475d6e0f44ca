"""Doubles: handed frames resemble the film, and only given latents are replaced."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training.handover import FACE, GIVEN, GIVEN_FRAMES, doubles, film_doubles, soften
from training.head import Head
from training.looks import draw_looks
from training.motion import Manner, perform
from training.phones import Phone
from training.render import gather
from training.scale import LATENTS, WINDOW
from training.settings import read_settings
from training.stage_dit import dit_batch, draw_starts
from training.studio import Studio
from training.takes import Take

CHECK = Path(__file__).resolve().parents[3] / "training" / "configs" / "check.yaml"
WORD = [Phone("B", 0.1, 0.18), Phone("AA", 0.18, 0.4), Phone("UW", 0.4, 0.6)]


@pytest.fixture(scope="module")
def head():
    return Head("cpu")


def test_a_double_resembles_its_person_in_the_same_room(head):
    people = draw_looks(head, 4, 7, 16)
    made = doubles(people, head, 7)
    apart = torch.cdist(people.identity, people.identity)[~torch.eye(4, dtype=torch.bool)].mean()
    moved = (made.identity - people.identity).norm(dim=1)
    assert (moved > 0).all() and (moved < 0.6 * apart).all()
    assert (made.freckles <= people.freckles).all() and (made.beard[:, :2] <= people.beard[:, :2]).all()
    same = {field.name for field in fields(people)} - {*FACE, "freckles", "beard"}
    for name in same:
        assert torch.equal(getattr(made, name), getattr(people, name)), name
    again = doubles(people, head, 7)
    assert torch.equal(again.identity, made.identity)


def test_softening_removes_only_fine_structure():
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), (48, 48), mode="bicubic") * 200
    frames = (coarse[:, None] + 40 * torch.rand(2, 1, 3, 48, 48)).clamp(0, 255).to(torch.uint8)
    soft = soften(frames, torch.tensor([1.0, 2.0]))
    assert torch.equal(soft[0], frames[0])
    rough = [(part.float() - part.float().roll(1, -1)).square().mean() for part in (frames[1], soft[1])]
    assert rough[1] < 0.5 * rough[0]
    assert abs(soft[1].float().mean() - frames[1].float().mean()) < 2


def test_doubles_do_what_the_person_does_where_the_window_begins(head):
    length = GIVEN_FRAMES + 4
    manner = Manner("neutral", "lively", "")
    tracks = perform(head.names, WORD, length, manner, np.random.default_rng(3))
    take = Take(np.zeros(0), np.zeros(length), np.zeros((length, 1)), manner, tracks)
    studio = Studio(iter(()), 0, torch.device("cpu"))
    looks = studio.people(1, 11)
    handed = film_doubles(studio, [take], looks, 11, torch.tensor([[0, 4]]))
    assert handed.shape == (1, 1, GIVEN_FRAMES, 3, 192, 192) and handed.dtype == torch.uint8
    same_frame, other_frame = (
        studio.renderer.frames(looks, gather([{k: v[part] for k, v in tracks.items()}], head.device))[0]
        for part in (slice(length - 1, None), slice(0, 1))
    )
    last = handed[0, 0, -1].float()
    assert 0 < (last - same_frame[0, 0]).square().mean() < 0.7 * (last - other_frame[0, 0]).square().mean()


def test_only_given_latents_of_later_windows_are_a_double_s():
    settings = replace(read_settings(CHECK).dit, doubles=0.5, corrupt=0.0)
    count, cells = 64, 4
    ids = torch.ones(count, 160, dtype=torch.int64)
    stories = {
        "latents": torch.zeros(count, 3, 16, LATENTS, cells, cells).half(),
        "weight": torch.zeros(count, 3, LATENTS, cells, cells).half(),
        "starts": torch.tensor([[0, 9, 12]] * count),
        "handed": torch.tensor([2.0, 3.0]).view(1, 2, 1, 1, 1, 1).expand(count, -1, 16, GIVEN, 4, 4).half(),
        "audio": torch.zeros(count, 52, 64).half(),
        "ids": ids,
        "mask": ids,
    }
    batch = dit_batch(stories, settings, torch.Generator().manual_seed(0))
    known = (batch["y"][:, 16:] == 0).expand_as(batch["sample"])
    assert set(batch["sample"][known].tolist()) == {0.0, 2.0, 3.0}
    share = (batch["sample"][:, 0, 0, 0, 0].abs() >= 2).float().mean()
    assert 0.15 < share < 0.55
    rest = (batch["sample"] - batch["timestep"].view(-1, 1, 1, 1, 1) / 1000 * batch["target"])[~known]
    assert rest.abs().max() < 1e-5
    none = dit_batch(stories, replace(settings, doubles=0.0), torch.Generator().manual_seed(0))
    assert (none["sample"][(none["y"][:, 16:] == 0).expand_as(none["sample"])] == 0).all()


def test_windows_begin_inside_the_story():
    starts = draw_starts(200, 3, 73, torch.Generator().manual_seed(0))
    assert (starts[:, 0] == 0).all() and starts[:, 1:].min() == 1 and starts.max() == 73 - WINDOW
