"""The notebook, executed with the packaged model and a short sound."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from command_line import REPOSITORY
from omniavatar import video_to_frames

NOTEBOOK = REPOSITORY / "examples" / "talking_head.ipynb"


def cells() -> Any:
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def test_no_output_is_committed() -> None:
    for cell in cells().cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
def test_it_makes_shows_and_compares_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = cells()
    (parameters,) = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    settings = {
        "max_tokens": 432,
        "num_steps": 2,
        "silence_duration_s": 0,
        "preset": "ultrafast",
        "text_cache_dir": str(tmp_path),
    }
    parameters.source += (
        f"\nSECONDS, SETTINGS = 0.3, {settings!r}"
        f"\nFOLDER, EXAMPLES = Path({str(tmp_path / 'made')!r}), Path({str(NOTEBOOK.parent)!r})"
    )
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = [kind for output in shown for kind in output.get("data", {})]
    text = "".join(
        output.text for output in shown if output.output_type == "stream" and output.name == "stdout"
    )
    assert kinds.count("text/html") >= 2 and kinds.count("image/png") == 2
    assert "9 frames in 1 windows of 2 steps" in text and "window 0, step 1" in text
    assert "9 frames: PSNR" in text and "inf" not in text
    both = list(video_to_frames(tmp_path / "made" / "side_by_side.mp4"))
    assert len(both) == 9 and both[0].shape == (192, 384, 3)
