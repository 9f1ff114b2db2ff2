from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax

from raredistill.errors import DataError
from raredistill.predictions import COLUMNS, Predictions, read, write

CLASSES = ("healthy", "HGG", "LGG")


def table(rows: int = 12) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    patients = np.arange(rows) // 3
    grades = np.where(patients % 2 == 0, "HGG", "LGG")
    return pd.DataFrame(
        {
            "run": "run-1",
            "sample": [f"00{row}" for row in range(rows)],
            "patient": [f"00{patient}" for patient in patients],
            "patient_label": grades,
            "split": "test",
            "repeat": 0,
            "fold": 1,
            "seed": 2,
            "checkpoint": "best",
            "label": np.where(np.arange(rows) % 3 == 0, "healthy", grades),
            "logits": list(generator.normal(size=(rows, 3)).astype(np.float32)),
        }
    )


def foreign() -> pd.DataFrame:
    probabilities = softmax(np.stack(table()["logits"]).astype(float), axis=1)
    return table()[["patient", "label"]].assign(**{f"p_{name}": probabilities[:, k] for k, name in enumerate(CLASSES)})


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "new" / "p.parquet", table().assign(spare=1), CLASSES, "healthy")
    found = read(tmp_path / "new" / "p.parquet")
    assert tuple(found.table.columns) == COLUMNS
    assert (found.classes, found.background) == (CLASSES, "healthy")
    pd.testing.assert_frame_equal(found.table.drop(columns="logits"), table().drop(columns="logits"))
    np.testing.assert_array_equal(found.logits(), np.stack(table()["logits"]))


def test_probabilities_are_scipys_softmax_also_for_large_logits() -> None:
    logits = np.array([[1000.0, 999.0, 0.0], [-5.0, 0.0, 5.0]])
    predictions = Predictions(table(2).assign(logits=list(logits)), CLASSES)
    np.testing.assert_allclose(predictions.probabilities(), softmax(logits, axis=1))


def test_labels_are_positions_in_the_classes() -> None:
    found = Predictions(table(), CLASSES).labels()
    assert found.dtype == np.int64
    assert [CLASSES[index] for index in found] == list(table()["label"])


def test_a_part_keeps_the_rows_asked_for_and_misses_are_named() -> None:
    both = Predictions(pd.concat([table(), table().assign(checkpoint="last", split="validation")], ignore_index=True), CLASSES, "healthy")
    found = both.part("validation", "last")
    assert len(found.table) == 12
    assert found.background == "healthy"
    assert list(both.part("test").table["checkpoint"].unique()) == ["best"]
    with pytest.raises(
        DataError, match="no predictions of the test part by the checkpoint 'last'; the table has test of best, validation of last"
    ):
        both.part("test", "last")


def test_any_reader_of_parquet_reads_the_logits(tmp_path: Path) -> None:
    write(tmp_path / "p.parquet", table(), CLASSES)
    assert str(pq.read_schema(tmp_path / "p.parquet").field("logits").type).startswith("list<")
    np.testing.assert_array_equal(np.stack(pd.read_parquet(tmp_path / "p.parquet")["logits"]), np.stack(table()["logits"]))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_probabilities_made_elsewhere_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"theirs.{suffix}"
    foreign().to_csv(path, index=False) if suffix == "csv" else foreign().to_parquet(path, index=False)
    found = read(path, background="healthy")
    assert found.classes == CLASSES
    assert list(found.table["patient"]) == list(table()["patient"])
    assert list(found.table["patient_label"]) == list(table()["patient_label"])
    assert set(found.table["run"]) == {"theirs"}
    np.testing.assert_allclose(found.probabilities(), foreign()[[f"p_{name}" for name in CLASSES]], rtol=1e-5)


def test_a_certain_probability_of_zero_is_read(tmp_path: Path) -> None:
    foreign().assign(p_healthy=0.0, p_HGG=1.0, p_LGG=0.0).to_csv(tmp_path / "p.csv", index=False)
    found = read(tmp_path / "p.csv", background="healthy")
    np.testing.assert_allclose(found.probabilities()[0], [0, 1, 0], atol=1e-30)


def test_logit_columns_are_taken_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = np.stack(table()["logits"])
    theirs = foreign().assign(**{f"logit_{name}": rows[:, k] for k, name in enumerate(CLASSES)})
    theirs.to_csv(tmp_path / "p.csv", index=False)
    found = read(tmp_path / "p.csv", classes=("LGG", "healthy", "HGG"), background="healthy")
    np.testing.assert_allclose(found.logits(), rows[:, [2, 0, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ["GBM"] + ["healthy"] * 11}, "label contains 'GBM', which is not one of the classes"),
        ({"patient_label": ["LGG", *table()["patient_label"][1:]]}, "patient 000 has two patient labels"),
        ({"sample": ["000", "000", *table()["sample"][2:]]}, "sample 000 of patient 000 has two labels"),
        ({"sample": ["000", "001", "001", *table()["sample"][3:]]}, "sample 001 of patient 000 occurs twice"),
        ({"logits": [[0.0, np.nan, 1.0]] * 12}, "logits of sample 000 are not finite"),
        ({"logits": [[0.0, np.inf, 1.0]] * 12}, "not finite"),
        ({"logits": [[0.0, 1.0]] * 12}, "every row needs 3 logits"),
        ({"logits": [[0.0, 1.0], *[[0.0, 1.0, 2.0]] * 11]}, "every row needs 3 logits"),
        ({"logits": [["a", "b", "c"]] * 12}, "every row needs 3 logits"),
        ({"patient": [None, *table()["patient"][1:]]}, "column patient has gaps"),
        ({"fold": "first"}, "repeat, fold, seed must be whole numbers"),
    ],
)
def test_a_table_that_cannot_be_true_is_neither_written_nor_read(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "p.parquet", table().assign(**change), CLASSES, "healthy")
    assert not list(tmp_path.iterdir())


def test_missing_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks the columns patient, logits; it has run, sample"):
        write(tmp_path / "p.parquet", table().drop(columns=["patient", "logits"]), CLASSES)
    foreign().drop(columns="patient").to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="lacks the columns patient"):
        read(tmp_path / "p.csv")
    foreign().drop(columns="p_LGG").to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="lacks the columns p_LGG"):
        read(tmp_path / "p.csv", classes=CLASSES)
    table()[["label", "patient"]].to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="no column p_<class> or logit_<class>"):
        read(tmp_path / "p.csv")


def test_foreign_numbers_that_are_no_probabilities_are_refused(tmp_path: Path) -> None:
    foreign().assign(p_HGG=5.0).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="row 0 has negative probabilities, or they do not add up to 1"):
        read(tmp_path / "p.csv")
    foreign().assign(p_HGG="high").to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="not numbers with decimal points"):
        read(tmp_path / "p.csv")
    foreign().assign(p_HGG="").to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match=r"p\.csv"):
        read(tmp_path / "p.csv")


def test_a_patient_of_only_background_carries_no_class(tmp_path: Path) -> None:
    foreign().assign(label=["healthy", "healthy", "healthy", *table()["label"][3:]]).to_csv(tmp_path / "p.csv", index=False)
    assert list(read(tmp_path / "p.csv", background="healthy").table["patient_label"][:4]) == ["", "", "", "LGG"]
    write(tmp_path / "p.parquet", table().assign(patient_label=""), CLASSES, "healthy")
    assert set(read(tmp_path / "p.parquet").table["patient_label"]) == {""}


def test_a_patient_with_several_labels_and_no_patient_label_is_refused(tmp_path: Path) -> None:
    foreign().to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="patient 000 has several labels; give a column patient_label, or name the background class"):
        read(tmp_path / "p.csv")


def test_classes_and_background_must_make_sense(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="background 'normal' is not one of the classes"):
        write(tmp_path / "p.parquet", table(), CLASSES, "normal")
    with pytest.raises(DataError, match="two different classes"):
        write(tmp_path / "p.parquet", table(), ("HGG", "HGG"))


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write(path, table(), CLASSES, "healthy")
    whole = path.read_bytes()
    for position in range(0, len(whole), 61):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            found = read(path, background="healthy")
        except DataError:
            continue
        # Statistics and library names in the footer say nothing about the rows.
        np.testing.assert_array_equal(found.logits(), np.stack(table()["logits"]))
        assert list(found.table["label"]) == list(table()["label"])
    for share in (0, 0.3, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=r"p\.parquet: cannot be read as Parquet"):
            read(path)


def test_an_edited_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write(path, table(), CLASSES, "healthy")
    arrow = pq.read_table(path)
    rows = arrow.to_pylist()
    rows[0]["logits"] = [9.0, 0.0, 0.0]
    pq.write_table(arrow.from_pylist(rows, schema=arrow.schema), path)
    with pytest.raises(DataError, match="does not match its hash"):
        read(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("gone.parquet", "gone.csv"):
        with pytest.raises(DataError, match=f"{name}: no such file"):
            read(tmp_path / name)


def test_classes_written_otherwise_meet_or_are_refused(tmp_path):
    frame = pd.DataFrame({"patient": ["a", "b"], "label": ["HGG ", "lgg"], " p_HGG": [0.9, 0.2], "p_LGG": [0.1, 0.8]})
    frame.to_csv(tmp_path / "a.CSV", index=False, sep=";", encoding="utf-8-sig")
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    for name in ("a.CSV", "a.csv.gz", "a.tsv"):
        assert read(tmp_path / name).table["label"].tolist() == ["HGG", "LGG"]
    pd.DataFrame({"patient": ["a", "b"], "label": ["HGG", "LGG"], "predicted": [1, 0]}).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(DataError, match="write the same classes alike"):
        read(tmp_path / "b.csv")
