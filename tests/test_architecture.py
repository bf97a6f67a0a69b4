"""The house: imports go down through the packages, never up or round, and its picture is the present one."""

from __future__ import annotations

import importlib
from graphlib import TopologicalSorter
from types import ModuleType

import pytest
from paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the tests stand without the sources here")


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("architecture")


def test_imports_go_down(architecture: ModuleType) -> None:
    """Also those inside of functions, and those for types only."""
    rank = {layer: position for position, layer in enumerate(architecture.LAYERS)}
    upwards = [
        f"{module} imports {target}"
        for module, targets in architecture.graph().items()
        for target in targets
        if rank[architecture.layer_of(target)] < rank[architecture.layer_of(module)]
    ]
    assert upwards == []


def test_no_module_imports_itself_by_way_of_others(architecture: ModuleType) -> None:
    TopologicalSorter(architecture.graph()).prepare()


def test_all_imports_are_seen(architecture: ModuleType) -> None:
    """Those inside of functions, for types only, and of the extension, too."""
    edges = architecture.graph()
    assert "fastclip.switching.patching" in edges["fastclip.switching.at_import"]
    assert "fastclip.monitoring.monitor" in edges["fastclip.training.attach"]
    assert "fastclip.kernels.native" in edges["fastclip.core.collect"]


def test_every_folder_is_a_layer(architecture: ModuleType) -> None:
    folders = {path.name for path in (ROOT / "fastclip").iterdir() if (path / "__init__.py").exists()}
    assert folders | {"kernels"} == set(architecture.LAYERS) - {""}


def test_the_picture_is_the_present_one(architecture: ModuleType) -> None:
    """And no line of it is cut: a module says in one line what it is for."""
    drawn = architecture.draw()
    assert "…" not in drawn
    assert f"{architecture.BEGIN}{drawn}{architecture.END}" in architecture.DOCUMENT.read_text(encoding="utf-8")
