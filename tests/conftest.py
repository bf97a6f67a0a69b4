"""Fixtures, and the hooks that run each test once on every leg: NumPy, torch, the kernels (see `support/legs.py`)."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# The helpers and `ptxlab` are imported as top-level modules. Processes that tests spawn get the same path.
_TESTS = Path(__file__).parent
sys.path[:0] = [str(_TESTS / "support"), str(_TESTS)]
pytest.register_assert_rewrite("oracle", "gradients")

import legs  # noqa: E402 - found by the path above
from legs import Leg  # noqa: E402
from processes import Pool  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    names = ("gpu", "native", "numpy", "torch", "interpreter", "ptx")
    parser.addoption("--leg", choices=names, help="run the tests of this leg only")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "legs(*names): run the test on these legs only, as far as they are available")
    config.pluginmanager.register(legs.worker_plugin(config) or legs.Relay(config), "legs")


def pytest_report_header() -> str:
    return f"legs: {', '.join(leg.name for leg in legs.AVAILABLE)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = {name for mark in metafunc.definition.iter_markers("parametrize") for name in legs.names_of(mark)}
    if "leg" in metafunc.fixturenames and "leg" not in marked:
        wanted = metafunc.definition.get_closest_marker("legs")
        metafunc.parametrize("leg", legs.parameters(*(wanted.args if wanted else ())), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of legs that are not available or not asked for."""
    wanted = config.getoption("--leg")
    items[:] = [item for item in items if not legs.has_no_leg(item)]
    if wanted is not None:
        items[:] = [item for item in items if (leg := legs.leg_of(item)) and leg.name == wanted]
    for item in items:
        leg = legs.leg_of(item)
        if leg is not None and leg.obstacle:
            item.add_marker(pytest.mark.skip(reason=leg.obstacle))


@pytest.fixture
def leg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leg]:
    """The leg that the test runs on, with its backend forced."""
    monkeypatch.setenv("FASTCLIP_BACKEND", request.param.backend)
    yield request.param
    request.param.check()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A random generator for this test alone, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def _pool(size: int) -> Iterator[Pool]:
    pool = Pool(size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    """Two processes in a process group; the first test that runs something there starts them."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    """Four processes."""
    yield from _pool(4)


@pytest.fixture
def four_anew() -> Iterator[Pool]:
    """Four processes for one test that ends their process group: torch's cache of meshes outlives the group."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def eight() -> Iterator[Pool]:
    """Eight processes."""
    yield from _pool(8)
