"""A canary for leaks: where labels are shuffled by patient there is nothing to learn, so the pipeline must score at chance."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from conftest import tiny_rows
from raredistill import predictions
from raredistill.batches import Batches
from raredistill.cohort.store import save
from raredistill.evaluation.levels import by_patient, evaluate
from raredistill.runs.predict import prediction_table
from raredistill.splits import make_splits

SHUFFLES = 12


def shuffled_cohort(root, seed):
    """40 patients whose slices look like each other (a texture a patient) and whose grades say nothing about it."""
    generator = np.random.default_rng(seed)
    rows = tiny_rows({"HGG": 28, "LGG": 12}, 2)
    rows = rows[rows["label"] != "healthy"].reset_index(drop=True)
    names = sorted(set(rows["patient"]))
    textures = {name: generator.integers(0, 256, (8, 8)) for name in generator.permutation(names)}
    noise = generator.integers(-20, 20, (len(rows), 8, 8))
    pixels = np.clip(np.stack([textures[name] for name in rows["patient"]]) + noise, 0, 255).astype(np.uint8)
    return save(root, rows, {"flair": [pixels]}, classes=("HGG", "LGG"), size=(8, 8), provenance={"kind": "test"})


def pixels_of(cohort, rows):
    batches = Batches(cohort, rows, channels=("flair",), batch_size=64, device=torch.device("cpu"), shuffle=False)
    return np.concatenate([batch.images.flatten(1).numpy() for batch in batches.epoch(0)])


def nearest_neighbour(cohort, train, test):
    """Logits of the test rows by the most alike training slice: the learner that gains most from a leak."""
    learner = KNeighborsClassifier(1).fit(pixels_of(cohort, train), cohort.labels[train])
    return np.where(learner.predict(pixels_of(cohort, test))[:, None] == np.arange(2), 3.0, 0.0)


def through_the_pipeline(cohort, folds, path):
    tables = [
        prediction_table(cohort, test, nearest_neighbour(cohort, train, test), run="r", split="test", checkpoint="best", where=(0, fold, 0))
        for fold, (train, test) in enumerate(folds)
    ]
    predictions.write(path, pd.concat(tables, ignore_index=True), cohort.classes, None)
    return predictions.read(path)


def test_shuffled_labels_score_at_chance_and_a_split_by_slice_is_caught(tmp_path):
    honest, leaky, by_person = [], [], []
    for seed in range(SHUFFLES):
        cohort = shuffled_cohort(tmp_path / f"c{seed}", seed)
        splits = make_splits(cohort, protocol="outer", folds=4, seed=seed)
        table = through_the_pipeline(cohort, [(split.train, split.test) for split in splits], tmp_path / f"{seed}.parquet")
        honest.append(evaluate(table)["slice"]["metrics"]["balanced_accuracy"])
        patients = by_patient(table)
        by_person.append(roc_auc_score(patients.labels() == 1, patients.probabilities()[:, 1]))
        order = np.random.default_rng(seed).permutation(len(cohort.samples))
        folds = [(np.sort(np.setdiff1d(order, test)), np.sort(test)) for test in np.array_split(order, 4)]
        careless = through_the_pipeline(cohort, folds, tmp_path / f"leaky{seed}.parquet")
        leaky.append(evaluate(careless)["slice"]["metrics"]["balanced_accuracy"])
    # Chance within three standard errors of the mean over shuffles.
    assert np.mean(honest) == pytest.approx(0.5, abs=3 * np.std(honest, ddof=1) / np.sqrt(SHUFFLES))
    assert np.mean(by_person) == pytest.approx(0.5, abs=3 * np.std(by_person, ddof=1) / np.sqrt(SHUFFLES))
    assert np.mean(leaky) > 0.8
