import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.sampling.guidance import guidance_branches

scales = st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 2))


def total(branches, values):
    return sum(b.weight * values[b.text, b.audio] for b in branches)


@given(scales, st.none() | scales, st.tuples(*[st.floats(-1, 1) for _ in range(3)]))
def test_equals_the_reference_formulas(g, a, outputs):
    values = dict(
        zip([("positive", "speech"), ("positive", "silence"), ("negative", "silence")], outputs, strict=True)
    )
    c, a0, t0 = outputs
    branches = guidance_branches(g, a, has_audio=True)
    a = g if a is None else a
    expected = t0 + g * (c - t0) if a == g else t0 + g * (a0 - t0) + a * (c - a0)
    assert total(branches, values) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("g", "a", "names"),
    [
        (4.5, None, ["positive+speech", "negative+silence"]),
        (4.5, 4.5, ["positive+speech", "negative+silence"]),
        (4.5, 3.0, ["positive+speech", "positive+silence", "negative+silence"]),
        (1.0, None, ["positive+speech"]),
        (1.0, 2.0, ["positive+speech", "positive+silence"]),
        (3.0, 0.0, ["positive+silence", "negative+silence"]),
    ],
)
def test_only_needed_branches_run(g, a, names):
    assert [b.name for b in guidance_branches(g, a, has_audio=True)] == names


def test_text_scale_one_keeps_audio_guidance():
    """Fault of the original: guidance scale 1 silently drops audio guidance."""
    branches = guidance_branches(1.0, 3.0, has_audio=True)
    assert {b.name: b.weight for b in branches} == {"positive+speech": 3.0, "positive+silence": -2.0}


@given(scales, st.none() | scales)
def test_silent_video_guides_by_text_alone(g, a):
    branches = guidance_branches(g, a, has_audio=False)
    assert {b.audio for b in branches} <= {"silence"}
    assert {b.name: b.weight for b in branches}.get("positive+silence", 0) == pytest.approx(g)
