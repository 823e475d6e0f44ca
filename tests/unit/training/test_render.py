"""The training renderer: the rasteriser against analytic triangles, and faces against their parameters."""

from dataclasses import replace

import pytest
import torch
from training.head import Head, Pose
from training.looks import draw_looks
from training.raster import interpolate, rasterise
from training.render import Performance, Renderer

BOTH = torch.tensor([True])
ONE_SIDE = torch.tensor([False])
TRIANGLE = torch.tensor([[0, 1, 2]])


def scene(*points):
    return torch.tensor([points], dtype=torch.float32)


def test_a_triangle_covers_exactly_the_pixel_centres_inside():
    hits = rasterise(scene((0, 0, 1), (8, 0, 1), (0, 8, 1)), TRIANGLE, BOTH, (10, 10))
    covered = {(int(p) % 10, int(p) // 10) for p in hits.pixel}
    assert covered == {(x, y) for x in range(10) for y in range(10) if x + 0.5 + y + 0.5 <= 8}


def test_weights_give_back_affine_attributes():
    points = scene((1, 2, 3), (9, 1, 4), (4, 9, 5))
    hits = rasterise(points, TRIANGLE, BOTH, (12, 12))
    centres = torch.stack([hits.pixel % 12 + 0.5, hits.pixel // 12 + 0.5], 1)
    assert len(hits.pixel) > 20
    torch.testing.assert_close(interpolate(hits, TRIANGLE, points[0, :, :2]), centres)
    torch.testing.assert_close(interpolate(hits, TRIANGLE, points[:, :, :2]), centres)


def test_the_nearer_triangle_wins_whatever_the_order():
    near, far = [(0, 0, 1), (8, 0, 1), (0, 8, 1)], [(0, 0, 2), (8, 0, 2), (0, 8, 2)]
    faces = torch.tensor([[0, 1, 2], [3, 4, 5]])
    both = torch.tensor([True, True])
    for points, winner in ((near + far, 0), (far + near, 1)):
        hits = rasterise(scene(*points), faces, both, (8, 8))
        assert (hits.triangle == winner).all()


def test_crossing_triangles_are_split_where_their_depths_cross():
    flat = [(0, 0, 2), (16, 0, 2), (0, 16, 2)]
    tilted = [(0, 0, 1), (16, 0, 3), (0, 16, 1)]
    hits = rasterise(scene(*flat, *tilted), torch.tensor([[0, 1, 2], [3, 4, 5]]), BOTH.repeat(2), (16, 16))
    x = hits.pixel % 16 + 0.5
    assert torch.equal(hits.triangle == 1, x < 8)


def test_back_faces_are_dropped_unless_two_sided():
    points = scene((0, 0, 1), (8, 0, 1), (0, 8, 1))
    away, toward = TRIANGLE, TRIANGLE.flip(1)
    assert len(rasterise(points, toward, ONE_SIDE, (8, 8)).pixel) == 28 + 8
    assert len(rasterise(points, away, ONE_SIDE, (8, 8)).pixel) == 0
    assert len(rasterise(points, away, BOTH, (8, 8)).pixel) == 28 + 8


def test_frames_are_independent_and_clipped_to_the_screen():
    points = torch.cat([scene((-5, -5, 1), (40, 0, 1), (0, 40, 1)), scene((0, 0, 1), (2, 0, 1), (0, 2, 1))])
    hits = rasterise(points, TRIANGLE, BOTH, (6, 6))
    assert (hits.frame == 0).sum() == 36
    assert hits.pixel[hits.frame == 1].tolist() == [36, 37, 42]


@pytest.fixture(scope="module")
def head():
    return Head("cpu")


def perform(head, **shapes):
    coefficients = torch.zeros(1, 1, 52)
    for name, value in shapes.items():
        coefficients[0, 0, head.names.index(name)] = value
    still = torch.zeros(1, 1, 2)
    return Performance(coefficients, torch.zeros(1, 1, 3), still, still)


def test_opening_jaw_opens_the_mouth_and_nothing_else_far_away(head):
    looks = draw_looks(head, 1, 4)
    renderer = Renderer(head)
    shut, place = renderer.frames(looks, perform(head))
    wide, _ = renderer.frames(looks, perform(head, jawOpen=0.6))
    changed = (shut.int() - wide.int()).abs().amax((0, 1, 2))
    x, y = place[0, 0, 0].int().tolist()
    assert changed[y - 2 : y + 14, x - 6 : x + 6].float().mean() > 25
    assert changed[:40].max() == 0


def test_blinking_changes_the_eyes(head):
    looks = replace(draw_looks(head, 1, 4), camera=torch.tensor([[1.0, 0.0, 0.0, 10.0]]))
    renderer = Renderer(head)
    awake, _ = renderer.frames(looks, perform(head))
    blink, _ = renderer.frames(looks, perform(head, eyeBlinkLeft=1.0, eyeBlinkRight=1.0))
    difference = (awake.int() - blink.int()).abs().float().mean((0, 1, 2))
    assert difference[80:110].mean() > 5 * difference[150:].mean()


def test_the_truth_about_the_mouth(head):
    shape = head.shape(torch.zeros(3, 40))
    coefficients = torch.zeros(3, 52)
    coefficients[1:, head.names.index("jawOpen")] = 0.5
    coefficients[2, head.names.index("mouthClose")] = 0.5
    rest, wide, pressed = head.mouth_opening(shape, coefficients).tolist()
    assert rest == 0
    assert wide > 0.2
    assert pressed < 0.1 * wide


def test_looks_and_frames_depend_on_the_seed_alone(head):
    renderer = Renderer(head, 64)
    first, second, other = (
        renderer.frames(draw_looks(head, 1, seed, 64), perform(head))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_turning_the_head_leaves_the_shoulders(head):
    shape = head.shape(torch.zeros(2, 40))
    still = torch.zeros(2, 2)
    pose = Pose(torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.1, 0.0]]), still, still)
    thickness, swell = torch.zeros(2, len(head.scalp)), torch.zeros(2, head.mesh_vertices)
    vertices, normals = head.deform(shape, torch.zeros(2, 52), pose, thickness, swell)
    moved = (vertices[1] - vertices[0]).norm(dim=-1)
    low = head.rest[:, 1] < -2.2
    assert moved[low].max() == 0
    assert moved[head.left_eye].min() > 0.05
    assert normals.norm(dim=-1).median() == pytest.approx(1, abs=1e-4)
