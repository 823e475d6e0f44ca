import pytest
import torch
from torch.nn import functional as F

from omniavatar.model.conv3d import conv3d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding"),
    [
        (8, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
        (3, (3, 1, 1), (2, 1, 1), (0, 0, 0)),
        (32, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ],
)
def test_equals_its_slow_twin(dtype, channels, kernel, stride, padding):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 5, 12, 10, generator=generator, dtype=dtype)
    weight = torch.randn(4, channels, *kernel, generator=generator, dtype=dtype)
    for bias in (None, torch.randn(4, generator=generator, dtype=dtype)):
        with torch.inference_mode():
            fast = conv3d(x, weight, bias, stride, padding)
            slow = F.conv3d(x, weight, bias, stride, padding)
        assert fast.shape == slow.shape
        assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max()
