import json

import pytest

from omniavatar.sampling.schedule import make_schedule


def test_sigmas_and_timesteps(golden):
    recorded = json.loads(golden.path("schedule.json").read_text())
    assert recorded
    for steps, levels in recorded.items():
        schedule = make_schedule(int(steps), shift=5.0)
        assert schedule.sigmas == pytest.approx(levels["sigmas"], rel=1e-6)
        assert schedule.timesteps == pytest.approx(levels["timesteps"], rel=1e-6)
