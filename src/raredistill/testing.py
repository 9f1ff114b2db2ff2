"""The conformance suite: checks of the promises of every distiller, loss, network and source, built-in or plug-in.

``raredistill check FILE_OR_MODULE`` runs it over a plug-in; ``tests/test_conformance.py`` runs it over everything that is built in.
Each check returns a message on what is wrong, or an empty string.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raredistill.batches import Batch
from raredistill.checkpoint import Promise
from raredistill.cohort.sources import Source
from raredistill.distill.contract import Facts, Method, Shape
from raredistill.distill.registry import METHODS, make_method
from raredistill.errors import RareDistillError
from raredistill.losses import carried_prior, make_loss
from raredistill.models import create
from raredistill.outputs import Outputs
from raredistill.plugins import Plugin
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Distilled
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

SIZES = (2, 3, 100)
"""Numbers of classes used in all checks."""
WIDTHS = (4, 6)
FEATURES = 8
CLOSE = 1e-4
TINY = (32, 64, 96, 224)
"""Image sizes to try with a network; the first supported one is used."""


@dataclass(frozen=True)
class Failure:
    """One broken promise.

    Attributes:
        subject: such as ``distiller mine``.
        check: the promise.
        problem: the observed behaviour.
    """

    subject: str
    check: str
    problem: str


def facts_of(classes: int, order: Tensor | None = None) -> Facts:
    """Facts of a long-tailed problem; its classes are reordered if an order is given."""
    counts, recalls = torch.arange(1.0, classes + 1) ** 2, torch.linspace(0.9, 0.3, classes)
    if order is not None:
        counts, recalls = counts[order], recalls[order]
    shape = Shape(FEATURES, WIDTHS)
    return Facts(counts, prior=counts / counts.sum(), reliability=recalls, student_shape=shape, teacher_shape=shape)


def make(name: str, classes: int, order: Tensor | None = None) -> Method:
    """A distiller with its defaults; its own layers have the same initial weights each time."""
    torch.manual_seed(0)
    return make_method(name, facts_of(classes, order))


def outputs(logits: Tensor, seed: int) -> Outputs:
    """Outputs with features and maps of the logits' type; the logits carry the training prior."""
    generator, samples = torch.Generator().manual_seed(seed), len(logits)
    features = torch.randn(samples, FEATURES, generator=generator).to(logits.dtype)
    maps = tuple(torch.randn(samples, width, 4, 4, generator=generator).to(logits.dtype) for width in WIDTHS)
    prior = facts_of(logits.shape[1]).prior
    return Outputs(logits, features, maps, None if prior is None else prior.log())


def problem(classes: int, samples: int = 6) -> tuple[Outputs, Outputs, Tensor]:
    """A student's and a teacher's outputs for a few samples, and their labels."""
    generator = np.random.default_rng(classes)
    student, teacher = (torch.tensor(generator.normal(size=(samples, classes)) * 3, dtype=torch.float32) for _ in range(2))
    return outputs(student, 1), outputs(teacher, 2), torch.tensor(generator.integers(0, classes, samples))


def total(method: Method, labels: Tensor, student: Outputs, teacher: Outputs) -> Tensor:
    """The sum of a method's terms."""
    return torch.stack(list(method.terms(SimpleNamespace(labels=labels), student, teacher).values())).sum()


def _number(value: Tensor) -> float:
    return float(value.detach())


def leaves(side: Outputs) -> list[Tensor]:
    """The tensors of one side that gradients may reach."""
    return [side.logits, *([] if side.features is None else [side.features]), *side.maps]


def chosen(side: Outputs, rows: Any) -> Outputs:
    """The outputs for some of the samples, in any order."""
    features = None if side.features is None else side.features[rows]
    return Outputs(side.logits[rows], features, tuple(each[rows] for each in side.maps), side.log_prior)


def _sound(name: str) -> list[int]:
    return [classes for classes in SIZES if classes >= METHODS[name].min_classes]


def confident_mistakes_stay_finite(name: str) -> str:
    """Confident mistakes in a batch that lacks classes stay finite, in single and half precision, and no gradient reaches the teacher."""
    for classes in _sound(name):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.zeros(2, classes)
            logits[0, 0] = logits[1, 1] = 50
            logits[0, 1] = logits[1, 0] = -50
            student, teacher = outputs(logits.to(dtype), 1), outputs((-logits).to(dtype), 2)
            for leaf in (*leaves(student), *leaves(teacher)):
                leaf.requires_grad_()
            value = total(make(name, classes), torch.tensor([1, 1]), student, teacher)
            value.backward()  # type: ignore[no-untyped-call]
            reached = [leaf.grad for leaf in leaves(student) if leaf.grad is not None]
            if not (torch.isfinite(value) and all(torch.isfinite(each).all() for each in reached)):
                return f"the value or a gradient is not finite ({classes} classes, {dtype})"
            if value.dtype != torch.float32:
                return f"the terms are {value.dtype} for {dtype} outputs; compute them in float32 (logits.float())"
            if not reached:
                return "no gradient reaches the student"
            if any(leaf.grad is not None for leaf in leaves(teacher)):
                return "a gradient reaches the teacher; use .detach() on what comes from it"
    return ""


def flat_outputs_stay_finite(name: str) -> str:
    """One sample, and outputs without any variance, stay finite."""
    classes = max(3, METHODS[name].min_classes)
    for samples in (1, 4):
        maps = tuple(torch.zeros(samples, width, 4, 4) for width in WIDTHS)
        prior = facts_of(classes).prior
        flat = Outputs(torch.zeros(samples, classes), torch.zeros(samples, FEATURES), maps, None if prior is None else prior.log())
        student = Outputs(torch.zeros(samples, classes), torch.zeros(samples, FEATURES), tuple(each.clone() for each in maps))
        for leaf in leaves(student):
            leaf.requires_grad_()
        total(make(name, classes), torch.arange(samples) % classes, student, flat).backward()  # type: ignore[no-untyped-call]
        if not all(torch.isfinite(leaf.grad).all() for leaf in leaves(student) if leaf.grad is not None):
            return f"a gradient is not finite for {samples} samples without variance"
    return ""


def a_step_lowers_the_terms(name: str) -> str:
    """A small step against the gradient lowers the terms: the gradient is theirs."""
    classes = max(3, METHODS[name].min_classes)
    student, teacher, labels = problem(classes)
    for leaf in leaves(student):
        leaf.requires_grad_()
    method = make(name, classes)
    value = total(method, labels, student, teacher)
    value.backward()  # type: ignore[no-untyped-call]
    length = 1e-3 / max(float(leaf.grad.norm()) for leaf in leaves(student) if leaf.grad is not None)
    moved = [leaf.detach() - (0 if leaf.grad is None else length * leaf.grad) for leaf in leaves(student)]
    after = total(method, labels, Outputs(moved[0], moved[1], tuple(moved[2:])), teacher)
    return "" if after < value else f"the terms go from {float(value):.6g} to {float(after):.6g}"


def an_equal_student_learns_nothing(name: str) -> str:
    """A student that equals its teacher has nothing to learn, where the method declares ``zero_at_equal``."""
    for classes in _sound(name) if METHODS[name].zero_at_equal else []:
        _, teacher, labels = problem(classes)
        # Attention and cosines are weighted by up to 1000 against nats.
        if abs(value := _number(total(make(name, classes), labels, teacher, teacher))) > CLOSE:
            return f"the terms are {value:.4g} with {classes} classes; they should be 0, or zero_at_equal False"
    return ""


def means_over_the_batch(name: str) -> str:
    """The value of a batch is the mean of its parts', weighted by their sizes, unless the method declares ``within_batch``."""
    for classes in _sound(name):
        student, teacher, labels = problem(classes)
        method = make(name, classes)
        whole = _number(total(method, labels, student, teacher))
        parts = [_number(total(method, labels[cut], chosen(student, cut), chosen(teacher, cut))) for cut in (slice(0, 4), slice(4, 6))]
        same = abs((4 * parts[0] + 2 * parts[1]) / 6 - whole) <= CLOSE * max(abs(whole), 1e-6)
        if same is METHODS[name].within_batch:
            declared = (
                "it declares within_batch, but is a mean" if same else "it is not a mean over the batch: divide by N, or set within_batch"
            )
            return f"{declared} ({classes} classes: {whole:.6g} against {(4 * parts[0] + 2 * parts[1]) / 6:.6g})"
    return ""


def class_order_does_not_matter(name: str) -> str:
    """Permuting the classes changes nothing."""
    for classes in _sound(name):
        student, teacher, labels = problem(classes)
        order = torch.tensor(np.random.default_rng(5).permutation(classes))

        def permuted(side: Outputs, order: Tensor = order) -> Outputs:
            return Outputs(side.logits[:, order], side.features, side.maps, None if side.log_prior is None else side.log_prior[order])

        once = _number(total(make(name, classes), labels, student, teacher))
        again = _number(total(make(name, classes, order), torch.argsort(order)[labels], permuted(student), permuted(teacher)))
        if abs(again - once) > CLOSE * max(abs(once), 1e-6):
            return f"{once:.6g} becomes {again:.6g} with {classes} classes in another order"
    return ""


def training_spares_the_teacher(name: str) -> str:
    """Steps of real training do not change the teacher, leave no hooks, and train the method's own layers."""
    fabric, counts = make_fabric("cpu", "32-true"), torch.tensor([50.0, 30.0, 10.0])
    network, student = (create("cifar_resnet8", channels=1, classes=3, image_size=16) for _ in range(2))
    teacher = Teacher(network, _promise(counts), fabric, maps="maps" in METHODS[name].needs)
    known = Facts(
        counts, prior=counts / counts.sum(), reliability=torch.ones(3) / 2, student_shape=Shape(*student.widths()),
        teacher_shape=Shape(*teacher.widths()),
    )  # fmt: skip
    method = make_method(name, known)
    objective = Distilled(make_loss("cross_entropy", counts=counts), method, teacher, ce_weight=1, kd_weight=1)
    trainer = Trainer(student, objective, Settings(epochs=1, learning_rate=0.01), ("x",), ("a", "b", "c"), fabric)
    before = _fingerprint(network)
    beside = [] if method.trainable is None else [each.detach().clone() for each in method.trainable.parameters()]
    network.train()
    for batch in _batches():
        trainer.step(batch)
    if _fingerprint(network) != before or any(parameter.grad is not None for parameter in network.parameters()):
        return "the teacher is changed"
    if any(module._forward_hooks for module in (*network.modules(), *student.modules())):
        return "a hook stays in a network"
    after = [] if method.trainable is None else list(method.trainable.parameters())
    return "a layer of the method is not trained" if any(torch.equal(*pair) for pair in zip(beside, after, strict=True)) else ""


def _promise(counts: Tensor) -> Promise:
    return Promise(
        model="cifar_resnet8", head="linear", dropout=0.0, classes=("a", "b", "c"), channels=("x",), image_size=16, mean=(0.5,),
        std=(0.25,), prior=tuple((counts / counts.sum()).tolist()), training_patients=None, external=True, split_hash="",
    )  # fmt: skip


def _batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for start in (0, 16, 32):
        rows = torch.arange(start, start + 16)
        yield Batch(rows, torch.rand(16, 1, 16, 16, generator=generator), rows % 3, ("x",), 0)


def _fingerprint(network: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values())).hexdigest()


DISTILLER_CHECKS: tuple[Callable[[str], str], ...] = (
    confident_mistakes_stay_finite, flat_outputs_stay_finite, a_step_lowers_the_terms, an_equal_student_learns_nothing,
    means_over_the_batch, class_order_does_not_matter, training_spares_the_teacher,
)  # fmt: skip


def losses_stay_finite(name: str) -> str:
    """Confident mistakes stay finite and have a gradient, in single and half precision."""
    for classes in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            logits = (60 * torch.eye(classes)[:2] - 30).to(dtype).requires_grad_()
            value = make_loss(name, counts=facts_of(classes).counts)(logits, torch.tensor([1, 1]))
            value.backward()  # type: ignore[no-untyped-call]
            if value.ndim or not torch.isfinite(value) or logits.grad is None or not torch.isfinite(logits.grad).all():
                return f"the value or its gradient is not finite, or the value is not a scalar ({classes} classes, {dtype})"
    return ""


def losses_reduce_to_means(name: str) -> str:
    """``reduction="none"`` gives one value per sample, and ``mean`` their mean."""
    for classes in SIZES:
        student, _, labels = problem(classes)
        loss = make_loss(name, counts=facts_of(classes).counts)
        rows, mean = loss(student.logits, labels, reduction="none"), loss(student.logits, labels)
        if rows.shape != labels.shape:
            return f'reduction="none" gives {tuple(rows.shape)} for {len(labels)} samples'
        if not torch.allclose(rows.mean(), mean, rtol=CLOSE):
            return f"the mean of its rows is {float(rows.mean()):.6g}, its own mean {float(mean):.6g}; divide by N, also with class weights"
    return ""


def losses_carry_a_prior(name: str) -> str:
    """The class prior that it declares to carry is one."""
    carried = carried_prior(name, counts=facts_of(3).counts, sampler="natural")
    if carried is None:
        return ""
    return "" if min(carried) > 0 and abs(sum(carried) - 1) < CLOSE else f"it carries {carried}, which are not shares"


LOSS_CHECKS: tuple[Callable[[str], str], ...] = (losses_stay_finite, losses_reduce_to_means, losses_carry_a_prior)


def networks_give_features(name: str) -> str:
    """It takes 1, 3 and 4 channels and gives ``(N, F)`` features from which a head makes finite logits, with a gradient everywhere."""
    for channels in (1, 3, 4):
        network = _any_size(name, channels)
        if isinstance(network, str):
            return network
        side = network.image_size
        logits = network(torch.rand(2, channels, side, side))
        logits.sum().backward()
        if logits.shape != (2, 3) or not torch.isfinite(logits).all():
            return f"logits of two images are {tuple(logits.shape)} or not finite ({channels} channels)"
        if idle := [key for key, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]:
            return f"no gradient reaches {', '.join(idle[:3])}"
    return ""


def networks_repeat_themselves(name: str) -> str:
    """In evaluation mode an image has the same logits twice and in any batch, and weights can be saved and loaded."""
    network = _any_size(name, 1)
    if isinstance(network, str):
        return network
    side, network = network.image_size, network.eval()
    images = torch.rand(4, 1, side, side)
    with torch.no_grad():
        whole, alone = network(images), network(images[:1])
        other = create(name, channels=1, classes=3, image_size=side).eval()
        other.load_state_dict(network.state_dict())
        loaded = other(images)
    if not torch.allclose(whole[:1], alone, atol=1e-4):
        return "an image's logits depend on the other images of its batch, in evaluation mode"
    return "" if torch.allclose(whole, loaded, atol=1e-5) else "loaded weights give other logits"


def _any_size(name: str, channels: int) -> Any:
    problems = []
    for side in TINY:
        try:
            return create(name, channels=channels, classes=3, image_size=side)
        except RareDistillError as error:
            problems.append(str(error))
    return problems[0]


NETWORK_CHECKS: tuple[Callable[[str], str], ...] = (networks_give_features, networks_repeat_themselves)


def check_source(source: Source, size: tuple[int, int] = (16, 16)) -> Iterator[tuple[str, str]]:
    """Check a source's promises on the data it was opened with: pairs of a promise and a message, empty if it is kept."""
    units, classes, channels = source.units(), source.classes(), source.channels
    yield "units are listed in the same order each time", "" if units == source.units() and units else "they are not, or there are none"
    yield (
        "classes and channels are named once",
        "" if len({*classes}) == len(classes) and len({*channels}) == len(channels) else "they are not",
    )
    yield "it can be pickled, so that workers can read", _pickles(source)
    for unit in units[:3]:
        slices = source.read(unit, size)
        shapes = {name: pixels.shape for name, pixels in slices.pixels.items()}
        wanted = (len(slices.rows), *size)
        fits = set(shapes) == set(channels) and all(shape == wanted for shape in shapes.values())
        yield (
            "pixels are (n, height, width) for every channel",
            "" if fits else f"{unit.patient}: {shapes}, not {wanted} for {list(channels)}",
        )
        typed = all(pixels.dtype == np.uint8 for pixels in slices.pixels.values())
        yield "pixels are uint8", "" if typed else f"{unit.patient}: they are not"
        lacking = [key for key in ("sample", "label", "slice", "source", "split") if any(key not in row for row in slices.rows)]
        yield "rows say sample, label, slice, source and split", f"{unit.patient}: {', '.join(lacking)} missing" if lacking else ""
        strange = sorted({str(row.get("label")) for row in slices.rows} - {*classes})
        yield "labels are among the classes", f"{unit.patient}: {', '.join(strange)}" if strange else ""


def _pickles(source: Source) -> str:
    try:
        again = pickle.loads(pickle.dumps(source))
    except Exception as error:
        return f"it cannot: {error}"
    return "" if again.units() == source.units() else "a copy lists other units"


def check_plugin(plugin: Plugin, data: Path | None = None) -> list[Failure]:
    """Run the checks of a plug-in's kind; ``data`` is the data for a source.

    Returns:
        The broken promises.
    """
    subject = f"{plugin.kind} {plugin.name}"
    checks: Sequence[Callable[[str], str]] = {
        "distiller": DISTILLER_CHECKS, "loss": LOSS_CHECKS, "network": NETWORK_CHECKS
    }.get(plugin.kind, ())  # fmt: skip
    found = [Failure(subject, _promise_of(check), _outcome(check, plugin.name)) for check in checks]
    if plugin.kind == "source" and data is not None:
        from raredistill.cohort.sources.registry import open_source

        found += [Failure(subject, *pair) for pair in check_source(open_source(plugin.name, data))]
    if plugin.kind == "augmentation":
        found.append(Failure(subject, _promise_of(augmentations_keep_images), _outcome(augmentations_keep_images, plugin.name)))
    return [each for each in found if each.problem]


def augmentations_keep_images(name: str) -> str:
    """It keeps shape and type, stays within [0, 1], and gives the same image for the same random numbers in any batch."""
    from raredistill.augment import STEPS

    step, images = STEPS[name], torch.rand(4, 2, 16, 16)
    draws = torch.rand(4, step.draws)
    whole, alone = step.function(images.clone(), draws), step.function(images[:1].clone(), draws[:1])
    if whole.shape != images.shape or whole.dtype != images.dtype or whole.min() < 0 or whole.max() > 1:
        return f"it gives {tuple(whole.shape)} {whole.dtype} between {float(whole.min()):.3g} and {float(whole.max()):.3g}"
    return "" if torch.allclose(whole[:1], alone, atol=1e-6) else "a view depends on the other images of its batch"


def _promise_of(check: Callable[[str], str]) -> str:
    return (check.__doc__ or check.__name__).strip()


def _outcome(check: Callable[[str], str], name: str) -> str:
    try:
        return check(name)
    except Exception as error:  # any error in foreign code is the result of the check
        return f"it raises {type(error).__name__}: {error}"
