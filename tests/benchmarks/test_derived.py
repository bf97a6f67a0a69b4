"""The derived tables in the documentation are up to date."""

import importlib
from types import ModuleType

import paths
import pytest


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paths.ROOT)
    return importlib.import_module("benchmarks.derived")


def test_document_is_up_to_date(derived: ModuleType) -> None:
    """If this fails: `python -m benchmarks.derived`."""
    document = derived.DOCUMENT.read_text()
    assert derived.renewed(document) == document


def test_floors(derived: ModuleType) -> None:
    """Compared with arithmetic by hand: 3.07 GB at 3.35 TB/s, read once, and read twice and written once."""
    one = next(workload for workload in derived.published() if workload.name == "6000261x256 bf16")
    times = {peer.name: peer.gpu_ms(one, "H100") for peer in derived.PEERS}
    assert times["fastclip, nothing to clip"] == pytest.approx(0.917, rel=0.01)
    assert times["fastclip, clipping"] == pytest.approx(2.75, rel=0.01)
    assert times["torch foreach, CUDA 12"] == pytest.approx(2.75 + 156 * 0.002, rel=0.01)
