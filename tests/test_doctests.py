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


def test_losses_and_metrics_have_examples():
    assert {module: len(examples(f"raredistill.{module}")) >= 7 for module in ("losses", "metrics")} == {"losses": True, "metrics": True}
