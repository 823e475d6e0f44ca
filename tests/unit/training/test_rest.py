import pytest
import torch
from training.rest import breathing, resting


def test_what_moves_and_what_is_near_it_does_not_rest():
    frames = torch.full((1, 5, 3, 48, 48), 100, dtype=torch.uint8)
    frames[0, 3, 1, 20, 20] = 103
    frames[0, 3, 1, 40, 40] = 102
    rest = resting(frames)[0]
    moving = (rest == 0).nonzero().tolist()
    assert moving == [[2, 2], [2, 3], [3, 2], [3, 3]], "four pixels around (20, 20); two levels are none"
    frames[0, :, 1, 20, 20] = 100
    frames[0, 1, 0, 2, 18] = 99
    frames[0, 2, 0, 2, 18] = 106
    assert (resting(frames)[0] == 0).nonzero().tolist() == [[0, 1], [0, 2]]


def test_only_the_common_error_of_resting_places_breathes():
    weight = torch.ones(1, 1, 2, 4, 4)
    rest = torch.zeros(1, 4, 4)
    rest[:, :2] = 1
    error = torch.zeros(1, 3, 2, 4, 4)
    error[..., :2, :] = 0.5
    assert breathing(error, rest, weight) == pytest.approx(0.25)
    board = error * (1 - 2 * (torch.arange(4) % 2))
    assert breathing(board, rest, weight) == pytest.approx(0)
    assert breathing(error, 1 - rest, weight) == pytest.approx(0)
    weight[:, :, 0] = 0
    assert breathing(error, rest, weight) == pytest.approx(0.125), "given latents do not count"
    assert breathing(error, torch.zeros_like(rest), weight) == 0
