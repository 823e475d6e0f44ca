"""`python -m benchmarks peers`: adapters, processes in turn, engines that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import peers
from benchmarks.engines import ours, process
from benchmarks.engines.adapter import PARTS, Sizes

from omniavatar.errors import ConfigError

SIZES = Sizes("nano", (2, 4, 4), "cpu", "fp32")
ADAPTER = """
from pathlib import Path
PACKAGES = ("torch", "no-such-package")

def build(sizes, option):
    if option == "bad":
        raise ValueError("bad is no option of this engine")
    log = Path(__file__).with_suffix(".log")
    def forward():
        with log.open("a") as file:
            shape = tuple(sizes.noise(2, 3).shape)
            file.write(f"{sizes.scale} {sizes.latent} {sizes.pixels} {shape} {option}\\n")
    return {"forward": forward}
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "other.py"
    path.write_text(ADAPTER)
    return path


def test_our_own_engine_has_every_part():
    parts = ours.build(SIZES, "plain")
    assert tuple(parts) == PARTS
    assert parts["forward"]().shape == (1, 16, 2, 4, 4)
    assert parts["decode"]()[-1].shape[-2:] == SIZES.pixels
    assert parts["encode"]().shape == (1, 16, 4, 4, 4)
    with pytest.raises(ValueError, match="'fast' is no option of ours; use plain or fp8"):
        ours.build(SIZES, "fast")


def test_an_adapter_is_a_file(adapter: Path):
    found = process.measure(str(adapter), "x", SIZES, ["forward", "decode"], 3)
    assert list(found["seconds"]) == ["forward"] and len(found["seconds"]["forward"]) == 3
    assert found["versions"]["no-such-package"] is None and found["versions"]["torch"]
    lines = adapter.with_suffix(".log").read_text().splitlines()
    assert lines == ["nano (2, 4, 4) (32, 32) (2, 3) x"] * 5, "two runs warm up"
    with pytest.raises(ImportError, match="nowhere"):
        process.load("nowhere")
    with pytest.raises(ImportError, match="no such file"):
        process.load("nowhere.py")


def test_processes_take_turns_and_missing_engines_are_named(monkeypatch, capsys):
    started: list[str] = []

    def run(engine: str, sizes: Sizes, parts: list[str], repeats: int) -> dict:
        started.append(engine)
        if engine == "absent":
            return {"reason": "No module named 'absent'"}
        seconds = 1.0 if engine == "ours" else 2.0 + len(started)
        return {"seconds": {"forward": [seconds] * repeats}, "peak_gpu_bytes": None, "versions": {}}

    monkeypatch.setattr(peers, "run_engine", run)
    peers.main(
        ["--engines", "ours,absent,other:fast", "--parts", "forward", "--rounds", "2", "--device", "cpu"]
    )
    assert started == ["ours", "absent", "other:fast", "ours", "other:fast"]
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert "1.000 (1.000..1.000), 1.00x" in rows[2] and "No module named 'absent'" in rows[3]
    assert "6.00x" in rows[4] and "(5.000..7.000)" in rows[4]
    result = json.loads(lines[-1])
    assert result["benchmark"] == "peers" and result["rows"][2]["seconds"]["forward"] == [5.0] * 5 + [7.0] * 5


@pytest.mark.parametrize(
    "arguments", [["--parts", "forwards"], ["--engines", ""], ["--rounds", "0"], ["--repeats", "0"]]
)
def test_options_without_sense(arguments):
    with pytest.raises(ConfigError, match="use parts of forward, decode, encode"):
        peers.main(arguments)


@pytest.mark.slow
def test_a_process_reports_its_seconds_or_its_reason(adapter: Path, tmp_path: Path):
    found = peers.run_engine(f"{adapter}:bad", SIZES, ["forward"], 1)
    assert found == {"reason": "bad is no option of this engine"}
    broken = tmp_path / "broken.py"
    broken.write_text("def build(sizes, option):\n    raise SystemExit(3)\n")
    with pytest.raises(peers.EngineError, match="its process ended with code 3"):
        peers.run_engine(str(broken), SIZES, ["forward"], 1)
