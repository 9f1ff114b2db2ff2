"""The examples in the docstrings of public functions give the values that they state."""

import doctest
import importlib
import pkgutil

import pytest

import raredistill.distill
import raredistill.evaluation

PACKAGES = (raredistill.distill, raredistill.evaluation)
MODULES = [
    "raredistill.losses",
    "raredistill.metrics",
    *(module.name for package in PACKAGES for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")),
]


def examples(module):
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", [module for module in MODULES if examples(module)])
def test_examples_give_the_values_that_they_state(module):
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    report: list[str] = []
    for test in examples(module):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_most_public_functions_have_examples():
    counts = {
        name: sum(len(examples(module)) for module in MODULES if name in module) for name in ("losses", "metrics", "distill", "evaluation")
    }
    assert all(count >= 7 for count in counts.values()), counts
