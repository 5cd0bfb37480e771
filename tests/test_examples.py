"""The examples in the docstrings hold."""
import doctest
import importlib

import pytest
from conftest import ROOT
from test_house import ALGORITHMS

PLACES = [ROOT, ROOT / "common", ROOT / "common/tasks", ROOT / "common/verifiers", ROOT / "kernels"]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts)
           for place in PLACES for path in sorted(place.glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    if name == "kernels.rows_triton":
        pytest.importorskip("triton")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_method_file_is_among_them():
    assert {*ALGORITHMS, "common.policy", "kernels.reference"} <= {*MODULES}


@pytest.mark.parametrize("name", ["sdpo", "hsd", "sdzero"])
def test_every_divergence_has_an_example_in_the_papers_terms(name):
    module = importlib.import_module(name)
    test, = doctest.DocTestFinder().find(module.divergence, "divergence", module=module)
    assert len(test.examples) > 0


def test_an_example_that_is_wrong_is_found():
    import grpo

    test, = doctest.DocTestFinder().find(grpo.advantages, "advantages", module=grpo)
    test.examples[-1].want = "tensor(0.)\n"
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1
