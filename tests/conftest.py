"""Fixtures, and the hooks that run each test once on every leg: on NumPy, on torch, and on the kernels (see `legs`)."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# The helpers and `ptxlab` are top-level modules; the processes that tests spawn take this path over.
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
    config.addinivalue_line("markers", "legs(*names): run the test on these legs only, of those that there are")
    config.pluginmanager.register(legs.worker_plugin(config) or legs.Relay(config), "legs")


def pytest_report_header() -> str:
    return f"legs: {', '.join(leg.name for leg in legs.AVAILABLE)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = {name for mark in metafunc.definition.iter_markers("parametrize") for name in legs.names_of(mark)}
    if "leg" in metafunc.fixturenames and "leg" not in marked:
        wanted = metafunc.definition.get_closest_marker("legs")
        metafunc.parametrize("leg", legs.parameters(*(wanted.args if wanted else ())), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of legs that are not there, or are not asked for, is no test."""
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
    """The leg that the test runs on; its backend is forced."""
    monkeypatch.setenv("FASTCLIP_BACKEND", request.param.backend)
    yield request.param
    request.param.check()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that are the test's own, and the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def _pool(size: int) -> Iterator[Pool]:
    pool = Pool(size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    """Two processes in a process group; started by the first test that runs something there."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    """Four processes."""
    yield from _pool(4)


@pytest.fixture
def four_anew() -> Iterator[Pool]:
    """Four processes for one test, which ends their process group: torch remembers its meshes by what they equal."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def eight() -> Iterator[Pool]:
    """Eight processes."""
    yield from _pool(8)
