"""Doubles resemble their people, and become them within a window."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from training.drive import draw_drive
from training.handover import FACE, doubles, film_doubles, returning, soften
from training.head import Head
from training.looks import draw_looks
from training.motion import Manner, perform
from training.phones import Phone
from training.render import gather
from training.scale import WINDOW
from training.stage_dit import draw_starts
from training.studio import Studio
from training.takes import Take

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


def test_shares_of_a_double_are_per_frame(head):
    people = draw_looks(head, 2, 7, 16)
    made = doubles(people, head, 7)
    mixed = returning(made, people, torch.tensor([1.0, 0.5, 0.0]).expand(2, -1))
    assert len(mixed) == 6
    torch.testing.assert_close(mixed.skin[[0, 3]], made.skin)
    torch.testing.assert_close(mixed.skin[[2, 5]], people.skin)
    torch.testing.assert_close(mixed.identity[4], (made.identity[1] + people.identity[1]) / 2)
    assert torch.equal(mixed.background[3], people.background[1])


@pytest.mark.slow
def test_a_double_becomes_the_person(head):
    length = WINDOW + 4
    manner = Manner("neutral", "lively", "")
    rng = np.random.default_rng(3)
    drive = draw_drive(rng, length)
    tracks = perform(head.names, WORD, length, manner, rng, drive)
    take = Take(np.zeros(0), np.zeros(length), np.zeros((length, 1)), manner, tracks, drive)
    studio = Studio(iter(()), 0, torch.device("cpu"))
    looks = studio.people(1, 11)
    frames, places = film_doubles(studio, [take], looks, 11, torch.tensor([4]))
    assert frames.shape == (1, WINDOW, 3, 192, 192) and frames.dtype == torch.uint8
    own = gather([{name: track[4:] for name, track in tracks.items()}], head.device)
    film, where = studio.renderer.frames(looks, own)
    assert torch.equal(frames[:, -1], film[:, -1])
    apart = (frames.float() - film.float()).square().mean((0, 2, 3, 4))
    assert 0 < apart[20] < apart[0] < (film[:, 0].float() - 128).square().mean()
    assert apart.diff().max() < 0.1 * apart[0], "it goes gradually"
    torch.testing.assert_close(places, where, atol=2.0, rtol=0)


def test_windows_begin_inside_the_story():
    starts = draw_starts(200, 3, 73, torch.Generator().manual_seed(0))
    assert (starts[:, 0] == 0).all() and starts[:, 1:].min() == 4 and starts.max() == 73 - WINDOW
    assert (starts % 4 == 0).all()
