"""Hyper-parameters are read from annotations, checked with their bounds named, and near names are suggested."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Interval, Lt
from torch import Tensor

from raredistill.errors import ConfigError
from raredistill.options import AboveZero, check_options, defaults_of, did_you_mean, options_of, show_defaults


class Words:
    """A check of its own."""

    def check(self, name: str, value: object) -> None:
        if value != "word":
            raise ValueError(f"{name} must be word")

    def __str__(self) -> str:
        return "a word"


def a_function(
    logits: Tensor, *, counts: Tensor | None = None, temperature: AboveZero = 4.0, share: Annotated[float, Ge(0), Lt(1)] = 0.5,
    steps: Annotated[int, Interval(ge=1, le=9)] = 3, side: Literal["left", "right"] = "left", on: bool = True, free: float = 0.25,
) -> None:  # fmt: skip
    """Options are the plain values with a default."""


@dataclass(frozen=True)
class AClass:
    weights: Tensor
    words: Annotated[Any, Words()]
    power: AboveZero = 2.0


@pytest.mark.parametrize(
    ("option", "good", "bad", "said"),
    [
        ("temperature", 0.1, 0, "temperature must be a number above 0, not 0"),
        ("temperature", 7, True, "temperature must be a number above 0, not True"),
        ("temperature", 7, "7", "temperature must be a number above 0, not '7'"),
        ("share", 0, 1, "share must be a number at least 0 and below 1, not 1"),
        ("steps", 9, 10, "steps must be a whole number at least 1 and at most 9, not 10"),
        ("steps", 1, 1.5, "steps must be a whole number at least 1"),
        ("side", "right", "up", "side must be one of left, right, not 'up'"),
        ("on", False, 0, "on must be one of True, False, not 0"),
        ("free", -3, float("inf"), "free must be a number, not inf"),
    ],
)
def test_a_value_outside_of_what_the_annotation_allows_is_refused_with_the_bounds(option, good, bad, said):
    known = options_of(a_function)
    check_options("loss mine", {option: good}, known)
    with pytest.raises(ConfigError) as refused:
        check_options("loss mine", {option: bad}, known)
    assert f"loss mine: {said}" in str(refused.value)


def test_tensors_and_what_has_no_default_are_no_options():
    assert list(options_of(a_function)) == ["temperature", "share", "steps", "side", "on", "free"]
    assert list(options_of(AClass)) == ["words", "power"]
    assert defaults_of(AClass) == {"power": 2.0}
    assert show_defaults(options_of(AClass)) == "words=a word, power=2"


def test_an_unknown_option_names_the_nearest_and_all_that_there_are():
    with pytest.raises(ConfigError, match=r"method it has no option powr; did you mean power\?; it has words, power"):
        check_options("method it", {"powr": 1.0}, options_of(AClass))
    with pytest.raises(ConfigError, match="has no option x; it has none"):
        check_options("loss", {"x": 1.0}, {})


def test_near_names_are_suggested_and_far_ones_are_not():
    assert did_you_mean("fokal", ["focal", "kd"]) == "; did you mean focal?"
    assert did_you_mean("resnet1", ["resnet18", "resnet10", "vgg"], most=2) == "; did you mean resnet18 or resnet10?"
    assert did_you_mean("zzz", ["focal"]) == ""


def test_an_annotation_that_cannot_be_resolved_is_refused_with_its_place():
    namespace: dict[str, Any] = {"__name__": "elsewhere"}
    exec("from __future__ import annotations\ndef f(x: Missing = 1): ...", namespace)
    with pytest.raises(ConfigError, match=r"elsewhere\.f: name 'Missing' is not defined"):
        options_of(namespace["f"])
