"""Every distiller against its formula in float64 numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from raredistill import distill
from raredistill.distill.consistent import PCKD
from raredistill.distill.contract import Facts, Shape
from raredistill.distill.imbalance import groups_by_count, shrunk_recall
from raredistill.distill.registry import METHODS, make_method
from raredistill.errors import ConfigError
from raredistill.outputs import Outputs

COUNTS = torch.tensor([100.0, 30.0, 4.0])
T = 2.5


@pytest.fixture
def logits():
    generator = np.random.default_rng(0)
    return generator.normal(size=(10, 3)) * 3, generator.normal(size=(10, 3)) * 3, generator.integers(0, 3, 10)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl_rows(q, p):
    return (q * np.log(q / p)).sum(axis=1)


def kl(q, p):
    return kl_rows(q, p).mean()


def normal(q):
    return q / q.sum(axis=1, keepdims=True)


def dkd_oracle(s, t, y):
    p, q, rows = softmax(s / T), softmax(t / T), np.arange(len(y))
    pair = [np.stack([side[rows, y], 1 - side[rows, y]], axis=1) for side in (q, p)]
    rest = [normal(np.array([np.delete(row, label) for row, label in zip(side, y, strict=True)])) for side in (q, p)]
    return (1.5 * kl(*pair) + 4 * kl(*rest)) * T**2


def dist_oracle(s, t, _):
    p, q = softmax(s / T), softmax(t / T)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return (2 * rows + 3 * columns) * T**2


def standardised_oracle(s, t, _):
    s, t = ((z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True, ddof=1) for z in (s, t))
    return kl(softmax(t / T), softmax(s / T)) * T**2


GROUPS = [[0], [1, 2]]


def ltkd_oracle(s, t, _):
    p, q = softmax(s / T), softmax(t / T)
    groups = [np.stack([side[:, group].sum(axis=1) for group in GROUPS], axis=1) for side in (q, p)]
    balanced = normal(groups[0] / groups[0].mean(axis=0))
    return (1.5 * kl(balanced, groups[1]) + 2 * kl(normal(q[:, 1:]), normal(p[:, 1:]))) * T**2


WEIGHTS = np.array([0.2, 0.8, 2.0])
ORACLES = {
    "kd": (lambda s, t, y: distill.kd(s, t, temperature=T), lambda s, t, y: kl(softmax(t / T), softmax(s / T)) * T**2),
    "standardised_kd": (lambda s, t, y: distill.standardised_kd(s, t, temperature=T), standardised_oracle),
    "dkd": (lambda s, t, y: distill.dkd(s, t, y, alpha=1.5, beta=4.0, temperature=T), dkd_oracle),
    "bkd": (
        lambda s, t, y: distill.bkd(s, t, class_weights=torch.tensor(WEIGHTS), temperature=T),
        lambda s, t, y: kl(normal(softmax(t / T) * WEIGHTS), softmax(s / T)) * T**2,
    ),
    "dive": (
        lambda s, t, y: distill.dive(s, t, power=0.5, temperature=T),
        lambda s, t, y: kl(normal(softmax(t / T) ** 0.5), softmax(s / T)) * T**2,
    ),
    "dist": (lambda s, t, y: distill.dist(s, t, beta=2.0, gamma=3.0, temperature=T), dist_oracle),
    "ltkd": (
        lambda s, t, y: distill.ltkd(s, t, groups=[torch.tensor(g) for g in GROUPS], alpha=1.5, beta=2.0, temperature=T),
        ltkd_oracle,
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_distillers_equal_their_formula(name, logits):
    ours, oracle = ORACLES[name]
    student, teacher, target = logits
    assert float(ours(torch.tensor(student), torch.tensor(teacher), torch.tensor(target))) == pytest.approx(oracle(*logits), abs=1e-5)


def test_weighting_log_probabilities_instead_of_probabilities_is_another_loss(logits):
    # The trap: w * log q, normalised, is q to a power a class, not q weighted by class.
    student, teacher, _ = logits
    trap = np.exp(WEIGHTS * np.log(softmax(teacher / T)))
    wrong = kl(normal(trap), softmax(student / T)) * T**2
    found = float(distill.bkd(torch.tensor(student), torch.tensor(teacher), class_weights=torch.tensor(WEIGHTS), temperature=T))
    assert abs(found - wrong) > 0.1
    # What the right one does: a class of twice the weight gets twice the odds.
    even = distill.bkd(torch.zeros(1, 2), torch.zeros(1, 2), class_weights=torch.tensor([1.0, 2.0]), temperature=1)
    assert float(even) == pytest.approx(np.log(2) + np.log(1 / 3) / 3 + 2 * np.log(2 / 3) / 3, abs=1e-5)


def test_dkd_stays_finite_where_the_target_has_all_the_probability():
    # Published code takes log(1 - p) there, which is -inf.
    sure = torch.tensor([[80.0, 0.0, -80.0]])
    student = torch.tensor([[-80.0, 80.0, 0.0]], requires_grad=True)
    value = distill.dkd(student, sure, torch.tensor([0]), alpha=1, beta=8, temperature=1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_xerm_weighs_the_two_risks_sample_by_sample(logits):
    student, teacher, target = logits
    prior = np.array([0.7, 0.2, 0.1])
    rows = np.arange(len(target))
    balanced = softmax(teacher - np.log(prior))
    risks = [(-np.log(side[rows, target])) ** 1.5 for side in (balanced, softmax(teacher))]
    weight = risks[0] / (risks[0] + risks[1])
    log = np.log(softmax(student))
    found = distill.xerm(*map(torch.tensor, logits), log_prior=torch.tensor(np.log(prior)), gamma=1.5)
    assert float(found["ce"]) == pytest.approx(((1 - weight) * -log[rows, target]).mean(), abs=1e-5)
    assert float(found["xerm"]) == pytest.approx((weight * -(balanced * log).sum(axis=1)).mean(), abs=1e-5)


@pytest.mark.parametrize("keep", ["soft", "hard"])
def test_of_two_heads_on_the_same_features_one_learns_labels_and_the_other_the_teacher(keep, logits):
    student, teacher, target = logits
    features = np.random.default_rng(4).normal(size=(10, 5))
    method = make_method("ssd", Facts(COUNTS, student_shape=Shape(5)), keep=keep, temperature=T)
    weight = np.random.default_rng(5).normal(size=(3, 5))
    with torch.no_grad():
        method.head.weight.copy_(torch.tensor(weight))
        method.head.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    beside = features @ weight.T + [0.5, 0.0, -0.5]
    hard, soft = (beside, student) if keep == "soft" else (student, beside)
    outputs = Outputs(torch.tensor(student), torch.tensor(features))
    found = method.terms(SimpleNamespace(labels=torch.tensor(target)), outputs, Outputs(torch.tensor(teacher)))
    assert float(found["ce"].detach()) == pytest.approx(-np.log(softmax(hard))[np.arange(10), target].mean(), abs=1e-5)
    assert float(found["ssd"].detach()) == pytest.approx(kl(softmax(teacher / T), softmax(soft / T)) * T**2, abs=1e-5)


def test_labels_reach_a_student_that_keeps_its_soft_head_only_through_the_features(logits):
    student, teacher, target = (torch.tensor(each) for each in logits)
    student.requires_grad_()
    features = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    method = make_method("ssd", Facts(COUNTS, student_shape=Shape(5)))
    torch.nn.init.normal_(method.head.weight)
    found = method.terms(SimpleNamespace(labels=target), Outputs(student, features), Outputs(teacher))
    for term, reached, spared in (("ce", features, student), ("ssd", student, features)):
        there, not_there = torch.autograd.grad(found[term], (reached, spared), allow_unused=True, retain_graph=True)
        assert there.abs().max() > 0
        assert not_there is None


def test_reliable_distillation_weighs_each_sample_by_its_class(logits):
    student, teacher, target = logits
    recalls = np.array([0.9, 0.5, 0.1])
    method = make_method("reliable_kd", Facts(COUNTS, reliability=torch.tensor(recalls)), temperature=T)
    found = method.terms(SimpleNamespace(labels=torch.tensor(target)), Outputs(torch.tensor(student)), Outputs(torch.tensor(teacher)))
    expected = (recalls[target] * kl_rows(softmax(teacher / T), softmax(student / T))).mean() * T**2
    assert float(found["reliable_kd"]) == pytest.approx(expected, abs=1e-5)


def test_recalls_are_drawn_to_their_mean_by_so_many_samples():
    target = torch.tensor([0] * 10 + [1] * 2)
    predicted = torch.tensor([0] * 8 + [1] * 2 + [1, 0])
    mean = (0.8 + 0.5) / 2
    found = shrunk_recall(predicted, target, classes=3, strength=10)
    np.testing.assert_allclose(found.numpy(), [(8 + 10 * mean) / 20, (1 + 10 * mean) / 12, mean])


@pytest.fixture
def maps():
    generator = np.random.default_rng(1)
    return generator.normal(size=(4, 6, 8, 8)), generator.normal(size=(4, 3, 4, 4))


def test_hints_are_the_mean_squared_error_at_the_smaller_size(maps):
    large = maps[0][:, :3]
    shrunk = large.reshape(4, 3, 4, 2, 4, 2).mean(axis=(3, 5))
    assert float(distill.hint(torch.tensor(large), torch.tensor(maps[1]))) == pytest.approx(((shrunk - maps[1]) ** 2).mean(), abs=1e-5)


def test_attention_is_the_normalised_energy_of_a_map(maps):
    def attention(stage):
        energy = (stage**2).mean(axis=1)
        if energy.shape[1] == 8:
            energy = energy.reshape(4, 4, 2, 4, 2).mean(axis=(2, 4))
        flat = energy.reshape(4, -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    expected = ((attention(maps[0]) - attention(maps[1])) ** 2).mean()
    # The deepest stages are compared; the student's first has no partner.
    found = distill.attention_transfer((torch.zeros(4, 2, 9, 9), torch.tensor(maps[0])), (torch.tensor(maps[1]),))
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_relations_are_distances_and_angles_in_the_batch():
    generator = np.random.default_rng(2)
    student, teacher = generator.normal(size=(5, 4)), generator.normal(size=(5, 7))

    def huber(a, b):
        gap = np.abs(a - b)
        return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()

    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def angles(x):
        def unit(v):
            return v / max(np.linalg.norm(v), 1e-12)

        return np.array([[[unit(i - j) @ unit(k - j) for k in x] for i in x] for j in x])

    expected = 2 * huber(distances(student), distances(teacher)) + 3 * huber(angles(student), angles(teacher))
    assert float(distill.relational(torch.tensor(student), torch.tensor(teacher), distance=2, angle=3)) == pytest.approx(expected, abs=1e-5)


def test_class_balanced_distillation_and_contrast_equal_their_formulas():
    generator = np.random.default_rng(3)
    student, teacher = generator.normal(size=(6, 4)), generator.normal(size=(6, 4))
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (student, teacher)]
    assert float(distill.cosine_distance(torch.tensor(student), torch.tensor(teacher))) == pytest.approx(
        (1 - (unit[0] * unit[1]).sum(axis=1)).mean(), abs=1e-5
    )
    target = np.array([0, 1, 1, 2, 0, 1])
    cosines = unit[0] @ unit[1].T / 0.2
    # Of the others in the batch, those of the same class are no negatives.
    rivals = [[j for j in range(6) if j == i or target[j] != target[i]] for i in range(6)]
    ways = [[-side[i, i] + np.log(np.exp(side[i, rivals[i]]).sum()) for i in range(6)] for side in (cosines, cosines.T)]
    found = distill.contrastive(torch.tensor(student), torch.tensor(teacher), torch.tensor(target), temperature=0.2)
    assert float(found) == pytest.approx(np.mean(ways), abs=1e-5)


# Three values of x, three classes: p(x | y), and what follows under two priors.
LIKELIHOOD = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])
TRAINING = COUNTS.double().numpy() / 134


def posterior(prior):
    return normal(LIKELIHOOD * prior)


@pytest.mark.parametrize("target", [0.0, 0.5])
@pytest.mark.parametrize("carried", [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.5, 0.3)])
def test_both_terms_of_pckd_are_minimised_by_the_posterior_under_the_target_prior(target, carried):
    # The teacher is Bayes-optimal under whatever prior it carries, the samples come with the training prior.
    teacher = Outputs(torch.tensor(np.log(posterior(np.array(carried)))), log_prior=torch.tensor(carried).double().log())
    facts = Facts(COUNTS, reliability=torch.tensor([0.9, 0.6, 0.2]), prior=torch.tensor(carried))
    method = make_method("pckd", facts, alpha=0.8, eta=1.0, target=target, temperature=T)
    wanted = posterior(TRAINING**target / (TRAINING**target).sum())
    # As many copies of each (x, y) as the joint distribution says, so that a mean over the batch is the expectation.
    times = torch.tensor((LIKELIHOOD * 10 * COUNTS.numpy()).round()).long().ravel()
    x, y = (torch.tensor(each).repeat_interleave(times) for each in (np.repeat(range(3), 3), np.tile(range(3), 3)))

    def expected(flat, term):
        logits = torch.tensor(flat.reshape(3, 3), requires_grad=True)
        value = method.terms(
            SimpleNamespace(labels=y), Outputs(logits.double()[x]), Outputs(teacher.logits[x], log_prior=teacher.log_prior)
        )
        value[term].backward()
        return float(value[term].detach()), logits.grad.numpy().ravel()

    for term in ("ce", "pckd"):
        best = minimize(expected, np.zeros(9), args=(term,), method="BFGS", jac=True).x.reshape(3, 3)
        np.testing.assert_allclose(softmax(best), wanted, atol=2e-3)
        assert expected(np.log(wanted).ravel(), term)[0] == pytest.approx(expected(best.ravel(), term)[0], abs=1e-6)


def test_without_its_switches_pckd_is_balanced_softmax_and_distillation(logits):
    student, teacher, target = logits
    batch = SimpleNamespace(labels=torch.tensor(target))
    method = make_method("pckd", Facts(COUNTS), correct=False, reliable=False, eta=0.0, alpha=0.3, temperature=T)
    found = method.terms(batch, Outputs(torch.tensor(student)), Outputs(torch.tensor(teacher)))
    shifted = np.log(softmax(student + np.log(TRAINING)))
    assert float(found["ce"]) == pytest.approx(0.7 * -shifted[np.arange(10), target].mean(), abs=1e-5)
    assert float(found["pckd"]) == pytest.approx(0.3 * kl(softmax(teacher / T), softmax(student / T)) * T**2, abs=1e-5)


def test_a_consistent_student_says_its_prior_and_others_do_not():
    assert PCKD.carries(COUNTS, {}) == pytest.approx((1 / 3,) * 3)
    assert PCKD.carries(COUNTS, {"target": 1.0}) == pytest.approx(tuple(TRAINING))
    for method, options, corrected in ((METHODS["kd"], {}, 0), (PCKD, {"tau": 0.5}, 0.5), (PCKD, {"correct": False}, 0)):
        assert method.carries(COUNTS, options) is None
        assert method.corrects(options) == corrected
    assert PCKD.wants({"correct": False, "reliable": False}) == ("logits", "labels")


def test_groups_are_thirds_by_count_and_for_three_classes_the_background_against_the_rest():
    assert groups_by_count(torch.tensor([4.0, 100.0, 30.0])) == [[1], [2, 0]]
    assert groups_by_count(torch.tensor([4.0, 100.0, 30.0]), background=2) == [[2], [1, 0]]
    assert groups_by_count(torch.tensor([1.0, 9.0, 5.0, 7.0, 3.0, 8.0])) == [[1, 5], [3, 2], [4, 0]]


@pytest.mark.parametrize("groups", [[["a"], ["b"]], [["a"], ["b"], ["c"]], [["a", "b", "c"]], "abc", [["a", "a"], ["b", "c"]]])
def test_groups_that_miss_classes_or_carry_no_signal_are_refused(groups):
    with pytest.raises(ConfigError, match="method ltkd: groups must"):
        make_method("ltkd", Facts(COUNTS, classes=("a", "b", "c")), groups=groups)
    made = make_method("ltkd", Facts(COUNTS, classes=("a", "b", "c")), groups=[["b"], ["c", "a"]])
    assert made.groups == ((1,), (2, 0))


def test_a_teacher_that_cannot_give_what_a_method_needs_is_refused_with_both_named():
    shapes = {"student_shape": Shape(4, (2, 4)), "teacher_shape": Shape(8)}
    with pytest.raises(ConfigError, match="method at: it compares maps, but vit has none"):
        make_method("at", Facts(COUNTS, teacher="vit", **shapes))
    with pytest.raises(ConfigError, match=r"method rkd: it compares features, but a [+] b has none"):
        make_method("rkd", Facts(COUNTS, teacher="a + b", student_shape=Shape(4)))
    with pytest.raises(ConfigError, match="student has none"):
        make_method("fitnet", Facts(COUNTS, student_shape=Shape(4), teacher_shape=Shape(4, (2,))))
    with pytest.raises(ConfigError, match="stage must be"):
        make_method("fitnet", Facts(COUNTS, student_shape=Shape(4, (2,)), teacher_shape=Shape(4, (2,))), stage=2)
    with pytest.raises(ConfigError, match=r"method pckd: .*removes the carried class prior of ldam, which is unknown"):
        make_method("pckd", Facts(COUNTS, teacher="ldam"))
    with pytest.raises(ConfigError, match="recall of big on unseen patients"):
        make_method("reliable_kd", Facts(COUNTS, teacher="big"))


def test_a_second_correction_of_a_corrected_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"method bkd: .*training prior \[0.746, 0.224, 0.03\], but big carries \[0.333, 0.333, 0.333\]"):
        make_method("bkd", Facts(COUNTS, teacher="big", prior=torch.full((3,), 1 / 3)))
    near = torch.tensor([0.74, 0.225, 0.035])  # of a teacher that saw nine tenths of the patients
    assert make_method("bkd", Facts(COUNTS, prior=near)).name == "bkd"


def test_unknown_names_and_values_are_refused_with_the_nearest():
    facts = Facts(COUNTS, prior=COUNTS / COUNTS.sum(), reliability=torch.ones(3))
    with pytest.raises(ConfigError, match="did you mean dive"):
        make_method("dve", facts)
    with pytest.raises(ConfigError, match="did you mean temperature"):
        make_method("kd", facts, temprature=3)
    with pytest.raises(ConfigError, match="temperature must be a number above 0"):
        make_method("kd", facts, temperature=0)
    with pytest.raises(ConfigError, match="power must be a number above 0 and at most 1"):
        make_method("dive", facts, power=1.5)
    with pytest.raises(ConfigError, match="beta must be a number at least 0"):
        make_method("dkd", facts, beta=float("nan"))
    with pytest.raises(ConfigError, match=r"alpha must be a number at least 0 and at most 0\.999"):
        make_method("pckd", facts, alpha=1)
    with pytest.raises(ConfigError, match="correct must be one of True, False"):
        make_method("pckd", facts, correct="yes")
    for name in ("bkd", "pckd"):
        with pytest.raises(ConfigError, match="training samples"):
            make_method(name, Facts(torch.tensor([3, 0]), prior=torch.ones(2), reliability=torch.ones(2)))
