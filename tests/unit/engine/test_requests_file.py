"""The input file: each line gives a request, or an error that names the line; the other lines still run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.engine.requests_file import BadLine, RequestLine, read_requests
from omniavatar.errors import InputError
from omniavatar.types import SamplingParams

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("face.png", "voice.wav", "two words.png"):
        (tmp_path / name).touch()
    return tmp_path


def read(folder: Path, text: str | bytes) -> list[RequestLine | BadLine]:
    path = folder / "in.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_requests(path)


def test_comments_blank_lines_and_byte_order_mark_are_skipped(folder: Path) -> None:
    lines = read(
        folder,
        "\ufeff# first\r\n\r\nA man@@face.png@@voice.wav\r\n  # second\n Ein Löwe @@ two words.png \n",
    )
    assert lines == [
        RequestLine(0, 3, "A man", folder / "face.png", folder / "voice.wav"),
        RequestLine(1, 5, "Ein Löwe", folder / "two words.png", None),
    ]


def test_trailing_separator_means_no_audio(folder: Path) -> None:
    assert read(folder, "p@@face.png@@")[0] == RequestLine(0, 1, "p", folder / "face.png", None)


def test_current_directory_has_priority_over_the_files_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder / "here"
    here.mkdir()
    (here / "face.png").touch()
    monkeypatch.chdir(here)
    first, second = read(folder, "p@@face.png\np@@two words.png")
    assert isinstance(first, RequestLine) and first.image == Path("face.png")
    assert isinstance(second, RequestLine) and second.image == folder / "two words.png"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("just a prompt", "no image; the model needs a portrait"),
        ("prompt@@", "no image"),
        ("@@face.png", "no prompt"),
        ("p@@none.png", "image not found: none.png or "),
        ("p@@face.png@@none.wav", "audio not found"),
        ("p@@face.png@@voice.wav@@x", "4 parts"),
        ("p@@" + "x" * 5000, "image not found"),
        ("p@@a\0b", "image holds a NUL character"),
    ],
)
def test_error_names_its_line_and_the_other_lines_run(folder: Path, line: str, message: str) -> None:
    bad, good = read(folder, f"{line}\nq@@face.png\n")
    assert isinstance(bad, BadLine) and isinstance(good, RequestLine)
    assert (bad.index, good.index) == (0, 1)
    assert str(bad.error).startswith(f"{folder / 'in.txt'}:1: ") and message in str(bad.error)
    assert "\n" not in str(bad.error)


@pytest.mark.parametrize(
    ("text", "message"), [(b"", "no request"), (b"# only\n\n", "no request"), (b"\xff\xfe", "not UTF-8")]
)
def test_unusable_files_are_errors(folder: Path, text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(folder, text)


def test_missing_file_and_folder_are_errors(folder: Path) -> None:
    with pytest.raises(InputError, match="no such input file"):
        read_requests(folder / "none.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_requests(folder)


PART = st.text(st.characters(codec="utf-8", exclude_characters="@\n\r#\x00"), min_size=1, max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PART.filter(lambda part: part.strip()), min_size=1, max_size=5))
def test_every_prompt_is_read_unchanged(folder: Path, prompts: list[str]) -> None:
    lines = read(folder, "\n".join(f"{prompt}@@face.png" for prompt in prompts))
    assert [line.prompt for line in lines if isinstance(line, RequestLine)] == [p.strip() for p in prompts]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=200))
def test_any_text_gives_lines_or_an_input_error(folder: Path, text: str) -> None:
    try:
        lines = read(folder, text.encode("utf-8", "replace"))
    except InputError:
        return
    assert [line.index for line in lines] == list(range(len(lines)))


def read_as(folder: Path, ending: str, text: str) -> list[RequestLine | BadLine]:
    path = folder / f"in{ending}"
    path.write_text(text, encoding="utf-8")
    return read_requests(path)


JSONL = """
{"prompt": "A man", "image": "face.png", "audio": "voice.wav", "seed": 7, "timesteps": [1000, 500]}
{"prompt": "Zwei\\nZeilen", "image": "face.png", "output": "two.mp4", "audio": null}
"""
CSV = (
    'prompt,image,audio,seed,timesteps,output\r\nA man,face.png,voice.wav,7,"[1000, 500]",\r\n'
    '"Zwei\nZeilen",face.png,,,,two.mp4\r\n\r\n'
)


@pytest.mark.parametrize(("ending", "text", "second"), [(".jsonl", JSONL, 3), (".CSV", CSV, 4)])
def test_tables_hold_the_same_requests(folder: Path, ending: str, text: str, second: int) -> None:
    first, other = read_as(folder, ending, text)
    sampling = SamplingParams(seed=7, timesteps=(1000.0, 500.0))
    voice = folder / "voice.wav"
    assert first == RequestLine(0, 2, "A man", folder / "face.png", voice, None, sampling)
    assert other == RequestLine(1, second, "Zwei\nZeilen", folder / "face.png", None, "two.mp4")
    assert isinstance(other, RequestLine) and isinstance(first, RequestLine)
    config = PipelineConfig()
    assert other.target(config) == config.output.output_dir / "two.mp4"
    assert first.target(config) == config.output.output_dir / "000_a-man.mp4"
    assert first.request().sampling == sampling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"sead": 1', "unknown key 'sead'; did you mean seed?"),
        ('"seed": -1', "seed: "),
        ('"num_steps": "many"', "num_steps: must be a whole number"),
        ('"output": "../x.mp4"', "without folders"),
        ('"output": "x.avi"', "ends in .mp4"),
        ('"audio": 3', "audio must be text"),
        ('"audio": "none.wav"', "audio not found"),
    ],
)
def test_bad_value_fails_only_its_line(folder: Path, fields: str, message: str) -> None:
    bad, good = read_as(
        folder,
        ".jsonl",
        f'{{"prompt": "p", "image": "face.png", {fields}}}\n{{"prompt": "q", "image": "face.png"}}',
    )
    assert isinstance(bad, BadLine) and isinstance(good, RequestLine)
    assert message in str(bad.error) and str(bad.error).startswith(f"{folder / 'in.jsonl'}:1: ")


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"prompt": "p"}', '{"image": "face.png"}'])
def test_broken_json_fails_only_its_line(folder: Path, line: str) -> None:
    bad, good = read_as(folder, ".jsonl", f'{line}\n{{"prompt": "q", "image": "face.png"}}')
    assert isinstance(bad, BadLine) and isinstance(good, RequestLine)


def test_csv_rows_that_do_not_fit_the_header_are_errors(folder: Path) -> None:
    bad, good = read_as(folder, ".csv", "prompt,image\nA man, walking,face.png\nq,face.png\n")
    assert isinstance(bad, BadLine) and "3 cells for 2 columns" in str(bad.error)
    assert isinstance(good, RequestLine)
    with pytest.raises(InputError, match="header must name prompt and image"):
        read_as(folder, ".csv", "A man,face.png\n")
    wrong = read_as(folder, ".csv", "prompt,image,sead\np,face.png,1\n")[0]
    assert isinstance(wrong, BadLine) and "did you mean seed" in str(wrong.error)


def test_two_lines_cannot_have_the_same_output(folder: Path) -> None:
    line = '{"prompt": "p", "image": "face.png", "output": "a.mp4"}'
    first, second = read_as(folder, ".jsonl", f"{line}\n{line}")
    assert isinstance(first, RequestLine) and isinstance(second, BadLine)
    assert "output a.mp4 is already used by line 1; give each line another name" in str(second.error)


def test_sampling_of_a_line_is_checked_with_the_configuration(folder: Path) -> None:
    path = folder / "in.jsonl"
    path.write_text('{"prompt": "p", "image": "face.png", "step_cache": "teacache"}')
    assert isinstance(read_requests(path)[0], BadLine)
    assert isinstance(read_requests(path, SamplingConfig(tea_cache_l1_thresh=0.1))[0], RequestLine)


def test_shipped_sample_works_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = read_requests(EXAMPLES / "infer_samples.txt")
    assert lines and all(isinstance(line, RequestLine) and line.audio for line in lines)


def test_packaged_demo_files_are_copies_of_the_examples() -> None:
    assets = EXAMPLES.parent / "src/omniavatar/assets"
    for name in ("portrait.png", "speech.flac"):
        assert (assets / name).read_bytes() == (EXAMPLES / name).read_bytes(), name
