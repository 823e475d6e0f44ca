"""Every command that README and the first pages show is run here, or is marked in the page's source.

A mark is a comment before the block, `<!-- needs: gpu, download -->`, and names what this machine may lack.
Unmarked commands of a page run in order, in a temporary folder that holds configs/, examples/ and scripts/. A
command that an earlier page shows too has run there.
So that they take seconds, the packaged model is made small: see `SETTINGS`, `CONFIG` and `inputs`. Nothing
else of a command is changed. A `text` block whose first line is `# NAME.txt` becomes that file.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from command_line import REPOSITORY
from omniavatar.cli import app, main
from omniavatar.config.load import load_config
from omniavatar.errors import ConfigError
from omniavatar.media.inspect import probe_video
from page_commands import NEEDS, Block, blocks, inline_commands, inline_settings
from small_pocket import write_config, write_voice

RUN = ("README.md", "docs/install.md", "docs/first_video.md", "docs/troubleshooting.md")
"""Pages whose every command is run or marked."""
OTHERS = ("which_gpu", "faster", "batches", "many_gpus", "measuring", "pocket", "python_api", "live", "web")
READ = (*RUN, *(f"docs/{page}.md" for page in OTHERS), "examples/README.md")
"""Pages whose every command must exist with its options and its files."""
SMALL = (
    "num_steps=1,image_sizes_720=[[64,64]],max_tokens=164,seq_len=20,preset=ultrafast,device=cpu,"
    "text_cache_dir=text_cache"
)
SMALL_BLOCKS = "image_sizes_720=[[64,64]],preset=ultrafast,device=cpu,text_cache_dir=text_cache"
SETTINGS = {"generate": SMALL, "demo": SMALL_BLOCKS}
"""Command -> what is put before the page's own `--hp`: 64x64 pixels and one step; the page's values win."""
CONFIG = ("pocket", "small.yaml")
"""What `--config` of a program of examples/ is replaced by: the same settings in a file."""
SHELL = ("source", "python3", "pip")
"""Programs that only marked blocks may use; their arguments are the reader's own."""


def page_blocks(pages: tuple[str, ...]) -> list[Block]:
    return [block for page in pages for block in blocks(REPOSITORY / page, REPOSITORY)]


@pytest.mark.parametrize("page", READ)
def test_blocks_say_their_language_and_marks_are_known(page: str) -> None:
    for block in page_blocks((page,)):
        assert block.language in ("sh", "yaml", "text", "json", "python"), block.name
        assert set(block.needs) <= set(NEEDS), block.name
        assert not block.needs or block.language == "sh", block.name
        for line in block.text.splitlines() if block.language != "sh" else ():
            assert not re.match(r"\s*\$?\s*(omniavatar|make|torchrun|python) ", line), f"{block.name}: {line}"


@pytest.mark.parametrize("page", READ)
def test_commands_have_the_options_and_files_they_show(page: str) -> None:
    shown = [words for block in page_blocks((page,)) if block.language == "sh" for words in block.commands()]
    for words in [*shown, *inline_commands(REPOSITORY / page)]:
        check_exists(words)


@pytest.mark.parametrize("page", READ)
def test_settings_have_the_keys_and_values_they_show(page: str) -> None:
    for setting in inline_settings(REPOSITORY / page):
        load_config(None, [setting])


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_unmarked_commands_run(
    page: str,
    inputs: Path,
    earlier: set[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs)
    for block in page_blocks((page,)):
        if block.needs:
            continue
        for words in block.commands() if block.language == "sh" else ():
            if without_output(words) in earlier:
                continue
            before = videos(Path())
            run(words, block)
            check_video(words, before, block)
        named = re.match(r"# (\w+\.txt)\n", block.text)
        if block.language == "text" and named:
            Path(named[1]).write_text(block.text, encoding="utf-8")
    unmarked = (block for block in page_blocks((page,)) if block.language == "sh" and not block.needs)
    earlier.update(without_output(words) for block in unmarked for words in block.commands())
    capsys.readouterr()


@pytest.fixture(scope="module")
def earlier() -> set[tuple[str, ...]]:
    """The commands that the pages before have run with the same inputs; another page need not."""
    return set()


def without_output(words: list[str]) -> tuple[str, ...]:
    """The command, but for the name of the file that it writes."""
    return tuple(word for before, word in zip(["", *words], words, strict=False) if before != "--output")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder as a clone of the repository looks, with the reader's own portrait, voice and list."""
    for name in ("configs", "examples", "scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    with Image.open(REPOSITORY / "examples" / "head.png") as head:
        head.convert("RGB").save(tmp_path / "face.jpg")
        head.save(tmp_path / "face2.png")
    write_config(tmp_path / CONFIG[1])
    for name in ("speech.mp3", "speech2.mp3"):
        write_voice(tmp_path / name)
    return tmp_path


def run(words: list[str], block: Block) -> None:
    """Run one command in this process; it must end with exit code 0."""
    if words[0] == "omniavatar":
        arguments = words[1:]
        name = arguments[0]
        settings = ["--hp", SETTINGS[name]] if name in SETTINGS else []
        with pytest.raises(SystemExit) as ended:
            main([name, *settings, *arguments[1:]])
        assert not ended.value.code, f"{block.name}: {' '.join(words)}"
    elif words[0] == "python" and words[1].startswith("examples/"):
        before = sys.argv
        sys.argv = [CONFIG[1] if word == CONFIG[0] else word for word in words[1:]]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = before
    else:
        pytest.fail(
            f"{block.name}: {' '.join(words)}: neither run by this test nor marked <!-- needs: ... -->"
        )


def videos(folder: Path) -> dict[Path, int]:
    """Every finished video below `folder`, with the time it was written."""
    found = (path for path in folder.rglob("*.mp4") if not path.name.endswith(".partial.mp4"))
    return {path: path.stat().st_mtime_ns for path in found if not path.is_symlink() and path.is_file()}


def check_video(words: list[str], before: dict[Path, int], block: Block) -> None:
    """A command that makes videos has written some, each with frames, at the place it names."""
    if words[:2] not in (["omniavatar", "generate"], ["omniavatar", "demo"]) and words[0] != "python":
        return
    after = videos(Path())
    written = [path for path, time in after.items() if before.get(path) != time]
    assert written and all(probe_video(path).frames > 0 for path in written), block.name
    for option in ("--output", "-o"):
        if option in words:
            assert Path(words[words.index(option) + 1]) in written, block.name


def check_exists(words: list[str]) -> None:
    """Fail where a shown command has an option, a target or a file that does not exist."""
    shown = " ".join(words)
    words = [word for word in words if word != "..."]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    files = [word for word in words if re.match(r"(scripts|examples|benchmarks|configs)/[\w./]+$", word)]
    for script in (file for file in files if "build" not in Path(file).parts):  # commands make build/
        assert (REPOSITORY / script).exists(), f"{shown}: no {script}"
    program = Path(words[0]).name
    if program == "omniavatar":
        check_options(words[1:], shown)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in words[1:] if "=" not in word]
        assert named and set(named) <= set(targets), f"{shown}: not a target of the Makefile"
    elif program in ("python", "torchrun"):
        scripts = {
            "inference.py": "generate",
            "parallel_inference.py": "batch",
            "profile_inference.py": "profile",
            "speed_benchmark.py": "benchmark",
        }
        for number, word in enumerate(words):
            if word.startswith("scripts/"):
                check_options([scripts[Path(word).name], *words[number + 1 :]], shown)
    else:
        assert program in SHELL, f"{shown}: what is {program}?"


def check_options(arguments: list[str], shown: str) -> None:
    """Fail where the command or one of its options does not exist, or a value of `--hp` cannot be read."""
    command: Any = typer.main.get_command(app)
    while arguments and not arguments[0].startswith("-") and hasattr(command, "commands"):
        known = command.commands
        assert arguments[0] in known, f"{shown}: no command {arguments[0]}"
        command, arguments = known[arguments[0]], arguments[1:]
    options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    options |= {"-h", "--help", "--version"}
    settings = []
    for number, word in enumerate(arguments):
        option, _, value = word.partition("=")
        if option.startswith("-"):
            assert option in options, f"{shown}: no option {option}"
            if option in ("--hp", "-hp", "--hparams"):
                settings.append(value or arguments[number + 1])
    load_config(None, settings)


@pytest.mark.parametrize(
    "shown",
    [
        "omniavatar generat --config pocket",
        "omniavatar generate --confg pocket",
        "omniavatar generate --config configs/none.yaml",
        "omniavatar generate --config pocket --hp num_stpes=2",
        "torchrun scripts/inference.py --input-fil examples/infer_samples.txt",
        "make demonstration",
        "curl somewhere",
    ],
)
def test_a_wrong_command_is_found(shown: str) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        check_exists(shown.split())


def test_an_unmarked_command_that_cannot_run_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "1. Do\n\n    ```sh\n    make \\\n      demo  # now\n    ```\n<!-- needs: gpu -->\n```sh\nx\n```\n"
    )
    unmarked, marked = blocks(page, tmp_path)
    assert unmarked.commands() == [["make", "demo"]] and not unmarked.needs
    assert marked.needs == ("gpu",) and marked.name == "page.md:8"
    with pytest.raises(pytest.fail.Exception, match="nor marked"):
        run(["make", "demo"], unmarked)


def test_quoted_errors_are_those_of_the_package() -> None:
    """What the table of errors quotes is text of the source, its pages, the Makefile, or the shell."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.split("## It fails")[1].split("\n### ")[0]
    programs = (REPOSITORY / folder for folder in ("src", "integrations"))
    sources = [path for folder in programs for kind in ("*.py", "*.js") for path in folder.rglob(kind)]
    sources.append(REPOSITORY / "Makefile")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 10
    assert [part for part in quoted if part not in text and "command not found" not in part] == []


def test_marked_blocks_are_needed() -> None:
    """A page is not marked from top to bottom: each has something that runs here."""
    for page in ("README.md", "docs/first_video.md", "docs/troubleshooting.md", "docs/install.md"):
        assert [b for b in page_blocks((page,)) if b.language == "sh" and not b.needs], page
