"""Metadata for ComfyUI's registry, and the example workflows."""

from __future__ import annotations

import json
import tomllib

import pytest
import workflows
from comfy_tools import PACKAGE
from PIL import Image

PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())


def test_the_registry_finds_what_it_asks_for():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert project["name"] == "comfyui-omniavatar" and project["version"].count(".") == 2
    assert (PACKAGE / project["license"]["file"]).is_file() and (PACKAGE / project["readme"]).is_file()
    assert project["dependencies"] == [], "the engine's packages must not meet ComfyUI's"
    assert "Environment :: GPU :: NVIDIA CUDA" in project["classifiers"]
    assert comfy["DisplayName"] == "OmniAvatar" and comfy["requires-comfyui"].startswith(">=")
    assert {"PublisherId", "Icon", "Models"} <= set(comfy) and "Repository" in project["urls"]


@pytest.mark.parametrize("name", workflows.WORKFLOWS)
def test_a_workflow_is_that_of_todays_nodes_and_has_a_picture(name):
    written = json.loads((PACKAGE / "example_workflows" / f"{name}.json").read_text())
    assert written == workflows.document(name), "run `python workflows.py`"
    with Image.open(PACKAGE / "example_workflows" / f"{name}.jpg") as picture:
        assert picture.size == workflows.picture(name).size
    assert len(list((PACKAGE / "example_workflows").iterdir())) == 2 * len(workflows.WORKFLOWS)


@pytest.mark.parametrize("name", workflows.WORKFLOWS)
def test_links_join_outputs_to_inputs_of_their_type(name):
    document = workflows.document(name)
    nodes = {node["id"]: node for node in document["nodes"]}
    for number, source, output, target, slot, kind in document["links"]:
        begin, end = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in begin["links"] and end["link"] == number
        assert begin["type"] == kind and end["type"] in (kind, "*")
    for node in nodes.values():
        shown = {name: options for name, _, options in workflows.inputs_of(node["type"])}
        unlinked = [socket["name"] for socket in node["inputs"] if socket["link"] is None]
        assert all(name in ("audio",) for name in unlinked), (node["type"], unlinked)
        if node["type"].startswith("OmniAvatar"):
            widgets = sum(1 for _, kind, _ in workflows.inputs_of(node["type"]) if kind in workflows.WIDGETS)
            seeds = sum(1 for options in shown.values() if options.get("control_after_generate"))
            assert len(node["widgets_values"]) == widgets + seeds
