"""Several models on one device: which stay loaded."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from engine import overrides, portrait
from omniavatar import AvatarRequest
from omniavatar.config.load import load_config
from omniavatar.engine.window_loop import never
from omniavatar.errors import ConfigError, InputError
from omniavatar.plan.sizes import GB
from omniavatar.serve.batch.items import Seat
from omniavatar.serve.jobs.engines import JobEngines, Shelf
from omniavatar.serve.jobs.worker import sampling_of


class FakeModel:
    def __init__(self, name: str, size: int, log: list[str]) -> None:
        self.name, self.size, self.log = name, size, log
        log.append(f"open {name}")

    def needs(self) -> int:
        return self.size

    def close(self) -> None:
        self.log.append(f"close {self.name}")


@pytest.mark.parametrize(
    ("limit", "wanted", "closed", "left"),
    [
        (None, "abcab", [], ["c", "a", "b"]),
        (60, "abcab", [], ["c", "a", "b"]),
        (50, "abc", ["a"], ["b", "c"]),
        (50, "abac", ["b"], ["a", "c"]),  # the one used longest ago
        (30, "abc", ["a", "b"], ["c"]),
        (10, "aba", ["a", "b"], ["a"]),  # each alone, though it does not fit: its own plan says so
    ],
)
def test_models_stay_as_long_as_their_plans_fit_together(
    limit: int | None, wanted: str, closed: list[str], left: list[str]
) -> None:
    sizes, log = {"a": 10, "b": 20, "c": 30}, []
    shelf = Shelf(lambda name: FakeModel(name, sizes[name], log), lambda: limit)
    for name in wanted:
        assert shelf.get(name).name == name
    assert [line.split()[1] for line in log if line.startswith("close")] == closed
    assert list(shelf.names) == left
    assert shelf.beside(left[-1]) == sum(sizes[name] for name in left[:-1])
    shelf.close()
    assert shelf.names == ()


def test_two_real_models_take_turns_on_a_device_that_holds_one(nano_checkpoint: Path, tmp_path: Path) -> None:
    """The limit is `memory`, which holds one and a half of these models."""
    PIL.Image.fromarray(portrait()).save(tmp_path / "face.png")
    values = overrides(nano_checkpoint, tmp_path / "cache", threads=1, seq_len=13, num_steps=1)
    free = JobEngines({"one": load_config(None, values).config})(Seat(("cpu",)))
    values["memory"] = 1.5 * free.shelf.get("one").needs() / GB
    free.shelf.close()
    config = load_config(None, values).config
    configs = {"one": config, "two": config}
    engine = JobEngines(configs)(Seat(("cpu",)))
    request = AvatarRequest("a person", tmp_path / "face.png")
    for name in configs:
        made = engine.run(name, request, tmp_path / f"{name}.mp4", lambda event: None, never)
        assert made.frames == 13
        assert engine.shelf.names == (name,)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    with pytest.raises(ConfigError, match="model three: is not configured; choose from one, two"):
        engine.run("three", request, tmp_path / "x.mp4", lambda event: None, never)
    assert list(JobEngines(configs).only("two").configs) == ["two"]
    engine.shelf.close()


def test_a_request_sets_sampling_values_only() -> None:
    sampling = sampling_of({"seed": 3, "guidance_interval": [0.1, 0.9], "sampler": "euler"})
    assert (sampling.seed, sampling.guidance_interval, sampling.sampler) == (3, (0.1, 0.9), "euler")
    with pytest.raises(InputError, match="dit_path: a request cannot set it; it can set seed"):
        sampling_of({"seed": 3, "dit_path": "/etc/passwd"})
