"""The house rules: layers, import circles, names, sizes, what an import loads, what tests may patch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import grimp
import pytest

from command_line import REPOSITORY
from longest_first import LONGEST_FIRST, UNIT

SOURCE = REPOSITORY / "src"
PACKAGE = SOURCE / "omniavatar"
TESTS = REPOSITORY / "tests"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

MOST_ENTRIES = 20
"""In src/omniavatar, with `py.typed` not counted."""
MOST_LINES = 400
MOST_LOADED = 80
"""Modules of ours that `import omniavatar.engine.pipeline` loads, packages included."""

NOT_MODULES = {"omniavatar.family", "omniavatar.form", "omniavatar.num_heads", "omniavatar.sources"}
"""Keys in the headers of weight files."""


def test_the_longest_test_files_exist() -> None:
    assert [name for name in LONGEST_FIRST if not (UNIT / name).is_file()] == []


# Imports: those inside functions count; those for type checkers only are looked at separately


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("omniavatar", exclude_type_checking_imports=True, cache_dir=None)


def test_no_import_circle(graph: grimp.ImportGraph) -> None:
    assert circles(edges(graph)) == []


def test_no_import_circle_of_types_either() -> None:
    """The package's own __init__ names its exports for type checkers, and modules ask it for the version."""
    imports = edges(grimp.build_graph("omniavatar", exclude_type_checking_imports=False, cache_dir=None))
    del imports["omniavatar"]
    assert circles(imports) == []


def test_a_package_that_is_entered_by_one_of_its_modules_is_not_in_a_circle(graph: grimp.ImportGraph) -> None:
    """Importing `a.b` runs `a/__init__` first, so what that imports must not need `a` by another way."""
    imports = edges(graph)
    for module in graph.modules:
        package = module.rpartition(".")[0]
        shared = (
            {other for other in imports[package] if other.startswith(f"{package}.")} if package else set()
        )
        imports[module] |= {package} - {"", "omniavatar"} if module not in closure(imports, shared) else set()
    assert circles(imports) == []


def edges(graph: grimp.ImportGraph) -> dict[str, set[str]]:
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def closure(imports: Mapping[str, set[str]], start: Iterable[str]) -> set[str]:
    found, left = set(), list(start)
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += imports.get(module, set())
    return found


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reached = {module: closure(imports, imports[module]) for module in imports}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached.get(other, ())))
        for module in imports
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


def test_circles_are_found() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d2"}, "d2": {"a"}}
    assert circles(imports) == [["b", "c"]]


def layers() -> list[set[str]]:
    """Rooms of each layer of the contract, the highest first."""
    (contract,) = PROJECT["tool"]["importlinter"]["contracts"]
    names = [layer.replace("(", " ").replace(")", " ").split("|") for layer in contract["layers"]]
    return [{name.strip().removeprefix("omniavatar.") for name in layer} for layer in names]


def test_every_room_is_in_the_layer_contract() -> None:
    rooms = {path.stem for path in entries()} - {"__init__"}
    named = set().union(*layers())
    assert rooms <= named
    assert named <= rooms
    assert len(layers()) <= 9


def test_rooms_import_lower_layers_only_inside_functions_too(graph: grimp.ImportGraph) -> None:
    level = {room: number for number, layer in enumerate(layers()) for room in layer}
    wrong = []
    for importer, imported in sorted((a, b) for a, found in edges(graph).items() for b in found):
        if imported == "omniavatar":  # asks for the version
            continue
        if importer == "omniavatar":
            wrong.append(f"{importer} -> {imported}")
            continue
        room, other = importer.split(".")[1], imported.split(".")[1]
        if room != other and level[room] >= level[other]:
            wrong.append(f"{importer} -> {imported}")
    assert wrong == []


@pytest.mark.slow
def test_what_importing_the_pipeline_loads() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import omniavatar.engine.pipeline"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stderr
    loaded = sorted(set(re.findall(r"\| +(omniavatar[\w.]*)$", told, re.MULTILINE)))
    assert "omniavatar.engine.pipeline" in loaded
    assert len(loaded) <= MOST_LOADED, "\n".join(loaded)


# Files and names


def entries() -> list[Path]:
    """Files and folders of the package's own folder, but `py.typed` and what runs left behind."""
    return [path for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))]


def python_files(*folders: str) -> list[Path]:
    paths = (path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))
    return sorted(path for path in paths if "build" not in path.relative_to(REPOSITORY).parts)


def test_the_package_has_few_entries() -> None:
    found = {path.name for path in entries()}
    assert len(found) <= MOST_ENTRIES, sorted(found)


def test_files_are_short() -> None:
    lengths = {
        path: len(path.read_text().splitlines()) for path in python_files("src", "benchmarks", "training")
    }
    assert {str(path): length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_class_names_are_unique() -> None:
    homes = defaultdict(set)
    for path in python_files("src"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(str(path.relative_to(SOURCE)))
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert twice == {}


def test_dotted_names_of_ours_exist_in_strings_too() -> None:
    """Programs that tests start, paths that are patched, `python -m ...`: what a rename tool misses."""
    wrong = []
    files = {*python_files("src", "tests", "benchmarks", "training", "scripts", "examples")}
    for path in sorted(files - {Path(__file__)} | {REPOSITORY / "pyproject.toml"}):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for name in re.findall(r"(?<![\w/.-])omniavatar(?:\.[A-Za-z_]\w*)+", line):
                if name not in NOT_MODULES and not exists(name):
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{number}: {name}")
    assert wrong == []


def exists(name: str) -> bool:
    """Whether the dotted name is a module of ours or stands in one."""
    path, parts = SOURCE, name.split(".")
    while parts and ((path / parts[0]).is_dir() or (path / f"{parts[0]}.py").is_file()):
        path /= parts.pop(0)
    module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return not parts or (module.is_file() and re.search(rf"\b{parts[0]}\b", module.read_text()) is not None)


def test_names_that_do_not_exist_are_noticed() -> None:
    assert exists("omniavatar.serve.batch.group.GroupWorker") and exists("omniavatar.engine.pipeline")
    assert not exists("omniavatar.parallel.batch.group") and not exists("omniavatar.engine.pipeline.Nothing9")


# What tests may patch


def patched_private_names(tree: ast.AST) -> Iterator[str]:
    """Names with a leading underscore that a test replaces, by `setattr`, `mock.patch` or assignment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("setattr", "delattr", "patch", "object"):
                for argument in node.args[:2]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield from (part for part in argument.value.split(".") if is_private(part))
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Attribute) and is_private(target.attr) and not is_own(target.value):
                    yield target.attr


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(value: ast.expr) -> bool:
    """`self._x = ...` of a class of the tests."""
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def test_no_test_patches_a_private_name() -> None:
    found = {
        f"{path.relative_to(TESTS)}: {name}"
        for path in python_files("tests")
        for name in patched_private_names(ast.parse(path.read_text()))
    }
    assert not found, "make a seam: a parameter, or a function that is handed over"


@pytest.mark.parametrize(
    "text",
    [
        'monkeypatch.setattr(module, "_name", 1)',
        'monkeypatch.setattr("omniavatar.engine.pipeline._name", 1)',
        'setattr(thing, "_name", 1)',
        'mock.patch("omniavatar.engine.pipeline._name")',
        'mock.patch.object(thing, "_name")',
        "thing.part._name = 1",
    ],
)
def test_patches_of_private_names_are_noticed(text: str) -> None:
    assert list(patched_private_names(ast.parse(text))) == ["_name"]


def test_who_sends_an_interrupt_starts_its_child_to_hear_it() -> None:
    """A child of a suite that was started with SIGINT ignored would ignore it (`processes.start`)."""
    senders = {path.name for path in python_files("tests/unit", "tests/gpu") if "SIGINT" in path.read_text()}
    heard = {path.name for path in python_files("tests") if "processes.start(" in path.read_text()}
    assert senders - {Path(__file__).name} == heard - {Path(__file__).name} != set()


def test_a_test_without_the_mark_slow_cannot_start_a_python_process() -> None:
    with pytest.raises(AssertionError, match="mark it slow"):
        subprocess.run([sys.executable, "-c", ""], check=True)


def test_what_uses_the_pipeline_or_processes_by_a_fixture_is_slow(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        if {"nano_checkpoint", "pools"} & set(getattr(item, "fixturenames", ())):
            assert item.get_closest_marker("slow"), item.nodeid


def test_tests_have_names_of_their_own() -> None:
    """Two tests of one name in a file would be one."""
    for path in python_files("tests"):
        names = Counter(n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef))
        assert [name for name, count in names.items() if count > 1] == [], path
