"""Second stages: the last layer against scikit-learn, numpy and a search written out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score

from conftest import Silent, write_tiny
from raredistill import predictions
from raredistill.config import StudyConfig, make_study
from raredistill.errors import ConfigError
from raredistill.models import create
from raredistill.studies.study import run_study
from raredistill.training.stages import TAUS, Inputs, Linear, adjusted, best_tau, classifier_of, normalised, refine, rescaled, retrained

CENTRES = np.array([[2.0, 0.0], [0.0, 2.0], [-1.5, -1.5]])


def drawn(numbers, seed):
    labels = np.repeat(range(3), numbers)
    values = np.random.default_rng(seed).normal(size=(len(labels), 2)) * 1.3 + CENTRES[labels]
    return Inputs(torch.tensor(values, dtype=torch.float32), torch.tensor(labels))


@pytest.fixture
def train():
    return drawn([600, 120, 30], 0)


@pytest.fixture
def validation():
    return drawn([100, 40, 40], 1)


@pytest.fixture
def layer(train):
    model = LogisticRegression().fit(train.values.numpy(), train.labels.numpy())
    return Linear(torch.tensor(model.coef_, dtype=torch.float32), torch.tensor(model.intercept_, dtype=torch.float32))


def test_a_retrained_classifier_is_scikit_learns_with_balanced_classes(train, layer):
    found = retrained(layer, train, epochs=30, seed=0)
    balanced = LogisticRegression(class_weight="balanced", C=1.0).fit(train.values.numpy(), train.labels.numpy())
    fresh = drawn([300, 300, 300], 2)
    agreement = (found(fresh.values).argmax(1).numpy() == balanced.predict(fresh.values.numpy())).mean()
    assert agreement > 0.97
    assert torch.equal(retrained(layer, train, epochs=2, seed=3).weight, retrained(layer, train, epochs=2, seed=3).weight)


def test_learnt_scales_change_the_length_of_each_class_only_and_lower_the_balanced_loss(train, layer):
    found = rescaled(layer, train, epochs=10, seed=0)
    factors = (found.weight / layer.weight).numpy()
    np.testing.assert_allclose(factors[:, 0], factors[:, 1], rtol=1e-4)
    np.testing.assert_allclose((found.bias / layer.bias).numpy(), factors[:, 0], rtol=1e-4)
    weights = torch.tensor([1 / 600, 1 / 120, 1 / 30])

    def balanced_loss(each):
        return float(torch.nn.functional.cross_entropy(each(train.values), train.labels, weight=weights))

    assert balanced_loss(found) < balanced_loss(layer)


def test_normalised_and_adjusted_layers_equal_their_formulas(layer, validation):
    weight, bias, values = (each.numpy().astype(float) for each in (layer.weight, layer.bias, validation.values))
    expected = values @ (weight / np.linalg.norm(weight, axis=1, keepdims=True) ** 0.7).T
    np.testing.assert_allclose(normalised(layer, 0.7)(validation.values).numpy(), expected, atol=1e-5)
    prior = np.array([600, 120, 30]) / 750
    found = adjusted(layer, 1.3, torch.tensor([600.0, 120.0, 30.0]))(validation.values).numpy()
    np.testing.assert_allclose(found, values @ weight.T + bias - 1.3 * np.log(prior), atol=1e-5)


@pytest.mark.parametrize(
    ("metric", "score"),
    [("macro_f1", lambda y, p: f1_score(y, p, average="macro")), ("balanced_accuracy", balanced_accuracy_score)],
)
@pytest.mark.parametrize("stage", ["tau_norm", "logit_adjustment"])
def test_tau_is_the_best_of_the_grid_on_validation(stage, metric, score, layer, train, validation):
    def make(tau):
        return normalised(layer, tau) if stage == "tau_norm" else adjusted(layer, tau, torch.tensor([600.0, 120.0, 30.0]))

    scores = [score(validation.labels.numpy(), make(tau)(validation.values).argmax(1).numpy()) for tau in TAUS[stage]]
    _, tau = refine(stage, layer, train, validation, classes=3, metric=metric, epochs=1, seed=0)
    assert tau == TAUS[stage][int(np.argmax(scores))]
    assert best_tau(make, TAUS[stage], validation, metric="loss") >= 0


def test_without_validation_tau_is_not_chosen(layer, train):
    with pytest.raises(ConfigError, match="stage tau_norm chooses tau on validation"):
        refine("tau_norm", layer, train, None, classes=3, metric="macro_f1", epochs=1, seed=0)
    with pytest.raises(ConfigError, match="ends in CosineHead"):
        classifier_of(create("small_cnn", channels=1, classes=3, image_size=16, head="cosine"))


def test_a_study_changes_nothing_but_the_last_layer_and_moves_logits_by_the_prior(tmp_path):
    cohort = write_tiny(tmp_path / "c", patients={"HGG": 10, "LGG": 6})
    stages = ("none", "crt", "lws", "tau_norm", "logit_adjustment")
    runs = [{"name": stage, "model": "small_cnn", "head": "thesis", "training": {"stage": stage}} for stage in stages]
    raw = {
        "name": "s", "cohort": str(cohort.root), "channels": ["flair"], "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34},
        "training": {"epochs": 1, "batch_size": 16, "accelerator": "cpu"}, "runs": runs,
    }  # fmt: skip
    study = make_study(StudyConfig.model_validate(raw), cohort, "test")
    records = {record.name: record for record in run_study(study, tmp_path / "s", Silent()) if record.fold == 0}
    assert {record.status for record in records.values()} == {"done"}

    def logits_of(stage):
        return predictions.read(tmp_path / "s" / "runs" / records[stage].id / "predictions.parquet").part("test", "best").logits()

    logits = {stage: logits_of(stage) for stage in stages}
    split = next(split for split in study.splits if split.fold == 0)
    counts = np.bincount(cohort.labels[split.train], minlength=3)
    tau = records["logit_adjustment"].stage_tau["best"]
    np.testing.assert_allclose(logits["logit_adjustment"], logits["none"] - tau * np.log(counts / counts.sum()), atol=1e-4)
    assert all(not np.allclose(logits[stage], logits["none"]) for stage in ("crt", "lws", "tau_norm"))
