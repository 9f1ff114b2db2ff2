"""What everything that is built in promises: the suite that ships, run over the whole registry."""

import pytest

from raredistill import testing
from raredistill.distill.registry import METHODS, make_method, methods_table
from raredistill.errors import ConfigError
from raredistill.losses import LOSSES


@pytest.mark.parametrize("check", testing.DISTILLER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_distillers(name, check):
    assert check(name) == ""


@pytest.mark.parametrize("check", testing.LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, check):
    assert check(name) == ""


@pytest.mark.parametrize("check", testing.NETWORK_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["small_cnn", "cifar_resnet8", "resnet10t", "mobilenetv3_small_050"])
def test_networks(name, check):
    assert check(name) == ""


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.within_batch or name in ("dist", "ltkd")])
def test_a_batch_that_is_repeated_changes_nothing(name):
    classes = max(3, METHODS[name].min_classes)
    student, teacher, labels = testing.problem(classes)
    rows = [*range(len(labels))] * 3
    once = testing.total(testing.make(name, classes), labels, student, teacher)
    thrice = testing.total(testing.make(name, classes), labels[rows], testing.chosen(student, rows), testing.chosen(teacher, rows))
    assert float(thrice.detach()) == pytest.approx(float(once.detach()), rel=1e-4)


@pytest.mark.parametrize(("name", "classes"), [(name, k) for name, m in METHODS.items() for k in testing.SIZES if k < m.min_classes])
def test_too_few_classes_for_a_sound_signal_are_refused(name, classes):
    with pytest.raises(ConfigError, match=f"method {name} carries no sound signal for {classes} classes"):
        make_method(name, testing.facts_of(classes))


def test_the_table_lists_every_method_with_what_it_needs():
    table = {row["name"]: row for row in methods_table()}
    assert set(table) == set(METHODS)
    assert table["pckd"]["needs"] == "logits, labels, prior, reliability"
    assert table["dkd"]["classes"] == ">= 3"
    assert "temperature=4" in table["kd"]["defaults"]
