"""The predictions table between training and evaluation: logits, one row per sample, checkpoint and part; other programs can write it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raredistill.errors import DataError
from raredistill.files import atomic
from raredistill.names import first_fault

COLUMNS = ("run", "sample", "patient", "patient_label", "split", "repeat", "fold", "seed", "checkpoint", "label", "logits")

MOST_ROWS = 5_000_000
"""Most rows in a table of predictions; in memory, each takes about a kilobyte."""

_NUMBERS = ("repeat", "fold", "seed")
_TEXTS = ("run", "sample", "patient", "patient_label", "split", "checkpoint", "label")
_CSV_TEXTS = (*_TEXTS, "predicted")
_METADATA = b"raredistill"
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Predictions:
    """Checked predictions of one or several runs.

    Attributes:
        table: the columns ``COLUMNS``; both labels are class names (a patient's is empty if it has no class), ``logits`` contains K
            numbers in the order of ``classes``.
        classes: K class names.
        background: the class that is not a patient's label, such as healthy slices beside a tumour; None if each class can be.
        hard: only the predicted class is known, so metrics that need probabilities are not available.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    background: str | None = None
    hard: bool = False

    def logits(self) -> NDArray[np.float64]:
        """Logits ``(N, K)``."""
        return self._logits

    @cached_property
    def _logits(self) -> NDArray[np.float64]:
        return _matrix(self.table["logits"], len(self.classes))

    def probabilities(self) -> NDArray[np.float64]:
        """Softmax of the logits ``(N, K)``; 1 for the predicted class where only hard labels are known."""
        return self._probabilities

    @cached_property
    def _probabilities(self) -> NDArray[np.float64]:
        exponentials = np.exp(self._logits - self._logits.max(axis=1, keepdims=True))
        return cast("NDArray[np.float64]", exponentials / exponentials.sum(axis=1, keepdims=True))

    def with_logits(self, logits: NDArray[np.float64]) -> Predictions:
        """The same rows with different logits ``(N, K)``."""
        other = replace(self, table=self.table.assign(logits=list(logits)))
        other.__dict__["_logits"] = logits
        return other

    def labels(self) -> NDArray[np.int64]:
        """Class indices ``(N,)``."""
        return self._labels

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        return pd.Index(self.classes).get_indexer(pd.Index(self.table["label"])).astype(np.int64)

    @cached_property
    def patients(self) -> tuple[NDArray[np.int64], list[str]]:
        """Index of each row's patient ``(N,)``, and the patients' names in order."""
        codes, names = pd.factorize(self.table["patient"], sort=True)
        return codes.astype(np.int64), [str(name) for name in names]

    def part(self, split: str, checkpoint: str = "best") -> Predictions:
        """Keep one part's rows of one checkpoint, such as the test part of the best.

        Raises:
            DataError: there are none.
        """
        kept = ((self.table["split"] == split) & (self.table["checkpoint"] == checkpoint)).to_numpy()
        if not kept.any():
            there = sorted({f"{part} of {which}" for part, which in zip(self.table["split"], self.table["checkpoint"], strict=True)})
            raise DataError(
                f"no predictions of the {split} part by the checkpoint {checkpoint!r}; the table has {', '.join(there) or 'no rows'}"
            )
        return self.rows(np.flatnonzero(kept))

    def checkpoint(self, name: str) -> Predictions:
        """Keep only the rows of one checkpoint, from all parts."""
        return self.rows(np.flatnonzero(self.table["checkpoint"] == name))

    def rows(self, places: NDArray[np.int64]) -> Predictions:
        """Keep the rows at these positions, in this order."""
        kept = replace(self, table=self.table.iloc[places].reset_index(drop=True))
        # Reuse the array of logits: gathering it again from a column of arrays is slow.
        kept.__dict__["_logits"] = self._logits[places]
        return kept


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate tables with the same classes."""
    whole = replace(parts[0], table=pd.concat([part.table for part in parts], ignore_index=True))
    whole.__dict__["_logits"] = np.concatenate([part.logits() for part in parts])
    return whole


def write(path: Path, table: pd.DataFrame, classes: Sequence[str], background: str | None = None) -> None:
    """Check a table and write it as Parquet, whole or not at all.

    Args:
        path: the file; its folder is created.
        table: has the columns ``COLUMNS``; others are left out.
        classes: class names in the order of the logits.
        background: the class that is not a patient's label, if there is one.

    Raises:
        DataError: as :func:`read`.
    """
    checked = _check(table, tuple(classes), background, str(path))
    record = {"classes": list(classes), "background": background, "sha256": _digest(checked, tuple(classes), background)}
    arrow = pa.Table.from_pandas(checked, schema=_SCHEMA, preserve_index=False).replace_schema_metadata(
        {_METADATA: json.dumps(record).encode()}
    )
    with atomic(path) as temporary:
        pq.write_table(arrow, temporary, compression="zstd", write_page_checksum=True)


def read(path: Path, *, classes: Sequence[str] | None = None, background: str | None = None) -> Predictions:
    """Read a table of :func:`write`, or one of another program (CSV or Parquet).

    A foreign table needs ``label``, ``patient`` and for each class a probability ``p_<class>`` or a logit ``logit_<class>``, or else the
    predicted class in ``predicted`` (hard labels: metrics that need probabilities are then missing). It may have the other columns of
    ``COLUMNS``; without them all rows are one run's test predictions of its best checkpoint, and ``patient_label`` is the patient's only
    label beside the background.

    Args:
        path: ``.csv`` or ``.parquet``.
        classes: the order of the classes in a foreign table; by default that of its columns.
        background: the class that is not a patient's label, in a foreign table.

    Raises:
        DataError: unreadable or altered, a column is missing, an unknown class, a sample with two labels, a patient with two patient
            labels, a repeated row, logits that are not finite, probabilities that do not add up to 1.
    """
    if is_text_table(path):
        return _foreign(read_text_table(path, texts=_CSV_TEXTS), path, classes, background)
    frame, record = _read_parquet(path)
    return _native(frame, record, path) if record else _foreign(frame, path, classes, background)


_SCHEMA = pa.schema(
    [
        *((column, pa.int64() if column in _NUMBERS else pa.string()) for column in COLUMNS[:-1]),
        ("logits", pa.list_(pa.float32())),
    ]
)


_TEXT_ENDINGS = (".csv", ".tsv", ".txt")
_PACKED = (".gz", ".bz2", ".xz", ".zip")


def is_text_table(path: Path) -> bool:
    """Whether a file's name is that of a table of text, packed or not: ``.csv``, ``.tsv``, ``.CSV``, ``.csv.gz``."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    return bool(endings) and (endings[-1] in _TEXT_ENDINGS or (endings[-1] in _PACKED and endings[0] in _TEXT_ENDINGS))


def read_text_table(path: Path, *, texts: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table of text with commas, semicolons or tabs between its columns; blanks around headers and ``texts`` go.

    Args:
        path: the file, packed or not.
        texts: columns that are names: ``001`` and ``NA`` are no numbers or gaps.

    Raises:
        DataError: it cannot be read.
    """
    options: dict[str, Any] = {"keep_default_na": False, "na_values": {}, "encoding": "utf-8-sig", "index_col": False}
    options["compression"] = _PACKERS.get(path.suffix.lower())
    try:
        head = [str(name) for name in pd.read_csv(path, header=None, nrows=1, sep="\x00", engine="python", dtype=str, **options).iloc[0]]
        separator = max(",;\t", key=head[0].count)
        names = [str(name) for name in pd.read_csv(path, nrows=0, sep=separator, **options).columns]
        table = pd.read_csv(path, sep=separator, dtype={name: str for name in names if name.strip() in texts}, **options)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from None
    table.columns = pd.Index([str(name).strip() for name in table.columns])
    stripped: pd.DataFrame = table.assign(**{name: table[name].str.strip() for name in texts if name in table})
    return stripped


_PACKERS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zip": "zip"}


def _read_parquet(path: Path) -> tuple[pd.DataFrame, bytes | None]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as handle:
            wanted = _plain_columns(handle, path)
            arrow = handle.read(columns=wanted)
        return arrow.to_pandas(), (arrow.schema.metadata or {}).get(_METADATA)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet ({error}); a table is read from .csv, .tsv or .parquet: name such a file, or write it again"
        ) from None


def _plain_columns(handle: pq.ParquetFile, path: Path) -> list[str]:
    """Select the known columns from the file's metadata alone: a small file may claim any number of rows.

    Raises:
        DataError: it has too many rows, or a required column is nested.
    """
    if (rows := handle.metadata.num_rows) > MOST_ROWS:
        raise DataError(f"{path}: has {rows} rows; at most {MOST_ROWS} are read: write fewer runs into one file")
    schema = handle.schema_arrow
    wanted = [field for field in schema if field.name in (*COLUMNS, "predicted") or field.name.startswith(("p_", "logit_"))]
    for field in wanted:
        plain = pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
        if pa.types.is_nested(field.type) and not (field.name == "logits" and plain):
            raise DataError(f"{path}: its column {field.name} contains {field.type!s:.60}; write one plain value in each cell")
    return [field.name for field in wanted]


def _native(frame: pd.DataFrame, record: bytes, path: Path) -> Predictions:
    try:
        told = json.loads(record)
        classes, background, digest = tuple(told["classes"]), told["background"], told["sha256"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: its record of classes is damaged; write it again with the command that made it") from None
    table = _check(frame, classes, background, str(path))
    if digest != _digest(table, classes, background):
        raise DataError(
            f"{path}: its content does not match its hash, so it was damaged or edited; write it again with the command that made it"
        )
    return Predictions(table, classes, background)


def _foreign(frame: pd.DataFrame, path: Path, classes: Sequence[str] | None, background: str | None) -> Predictions:
    _require(frame, ("label", "patient"), str(path))
    frame = frame.assign(**{name: frame[name].astype(str).str.strip() for name in ("label", "predicted", "patient_label") if name in frame})
    order, hard = tuple(classes) if classes else _classes_of(frame, path), _is_hard(frame)
    frame = frame.assign(**{name: _met(frame[name], order) for name in ("label", "predicted", "patient_label") if name in frame})
    table = frame.assign(logits=list((_hard_logits if hard else _foreign_logits)(frame, order, path).astype(np.float32)))
    defaults: dict[str, Any] = {"run": path.stem, "split": "test", **dict.fromkeys(_NUMBERS, 0), "checkpoint": "best"}
    table = table.assign(**{column: value for column, value in defaults.items() if column not in table})
    if "sample" not in table:
        table["sample"] = [str(row) for row in range(len(table))]
    if "patient_label" not in table:
        table["patient_label"] = _patient_labels(table, background, path)
    return Predictions(_check(table, order, background, str(path)), order, background, hard)


def _met(written: pd.Series[Any], classes: tuple[str, ...]) -> pd.Series[Any]:
    """Labels as the classes write them, where they differ in case, blanks or pandas' ``.0`` only."""
    keys = [_spelling(name) for name in classes]
    if len(set(keys)) < len(keys):
        return written
    known = dict(zip(keys, classes, strict=True))
    return written.map(lambda name: name if name in classes else known.get(_spelling(name), name))


def _spelling(name: str) -> str:
    return re.sub(r"\.0+$", "", name.strip()).casefold()


def _is_hard(frame: pd.DataFrame) -> bool:
    return "predicted" in frame and not any(str(column).startswith(("p_", "logit_")) for column in frame.columns)


def _hard_logits(frame: pd.DataFrame, classes: tuple[str, ...], path: Path) -> NDArray[np.float64]:
    predicted = frame["predicted"].astype(str)
    if unknown := sorted(set(predicted) - set(classes)):
        raise DataError(f"{path}: predicted contains {unknown[0]!r}, which is not one of the classes {list(classes)}")
    # Far enough apart that the softmax is exactly 0 or 1.
    return np.where(predicted.to_numpy()[:, None] == np.array(classes), 0.0, -1e6)


def _classes_of(frame: pd.DataFrame, path: Path) -> tuple[str, ...]:
    for prefix in ("logit_", "p_"):
        if found := tuple(column.removeprefix(prefix) for column in frame.columns if column.startswith(prefix)):
            return found
    if "predicted" in frame:
        actual, guessed = ({_spelling(name) for name in frame[column]} for column in ("label", "predicted"))
        if not actual & guessed:
            shown = f"label has {', '.join(sorted(actual)[:3])}, predicted has {', '.join(sorted(guessed)[:3])}"
            raise DataError(f"{path}: {shown}; write the same classes alike in both columns")
        spelled: dict[str, str] = {}
        for name in [*frame["label"], *frame["predicted"]]:
            spelled.setdefault(_spelling(name), name)
        return tuple(sorted(spelled.values()))
    raise DataError(f"{path}: has no column p_<class> or logit_<class>; give each class one, or a column predicted")


def _foreign_logits(frame: pd.DataFrame, classes: tuple[str, ...], path: Path) -> NDArray[np.float64]:
    if any(column.startswith("logit_") for column in frame.columns):
        return _numbers(frame, [f"logit_{name}" for name in classes], path)
    probabilities = _numbers(frame, [f"p_{name}" for name in classes], path)
    wrong = (probabilities < 0).any(axis=1) | ~(np.abs(probabilities.sum(axis=1) - 1) <= _TOLERANCE)
    if wrong.any():
        raise DataError(
            f"{path}: row {int(wrong.argmax())} has negative probabilities, or they do not add up to 1; give logit_<class> instead"
        )
    # A probability of exactly 0 would be a logit of minus infinity.
    return np.log(np.clip(probabilities, np.finfo(np.float32).tiny, None))


def _numbers(frame: pd.DataFrame, columns: list[str], path: Path) -> NDArray[np.float64]:
    _require(frame, columns, str(path))
    try:
        return frame[columns].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: the columns {', '.join(columns)} are not numbers with decimal points ({error})") from None


def _patient_labels(table: pd.DataFrame, background: str | None, path: Path) -> pd.Series[Any]:
    carried = table.loc[table["label"] != background].groupby("patient")["label"]
    if (several := carried.nunique() > 1).any():
        patient = several.index[several.to_numpy()][0]
        raise DataError(f"{path}: patient {patient} has several labels; give a column patient_label, or name the background class")
    return table["patient"].map(carried.first()).fillna("")


def _check(table: pd.DataFrame, classes: tuple[str, ...], background: str | None, where: str) -> pd.DataFrame:
    _require(table, COLUMNS, where)
    _check_classes(classes, background, where)
    checked = _typed(table[list(COLUMNS)].reset_index(drop=True), where)
    for column in _TEXTS:
        name, said = first_fault(checked[column])
        if said:
            raise DataError(f"{where}: the {column} {name!r:.80} {said}; rename it")
    for column, allowed in (("label", ()), ("patient_label", ("",))):
        if unknown := sorted(set(checked[column]) - {*classes, *allowed}):
            raise DataError(f"{where}: {column} contains {unknown[0]!r}, which is not one of the classes {list(classes)}")
    _check_units(checked, where)
    logits = _matrix(checked["logits"], len(classes), where)
    if not (finite := np.isfinite(logits).all(axis=1)).all():
        raise DataError(
            f"{where}: the logits of sample {checked['sample'][int(np.argmin(finite))]} are not finite; the run that wrote them diverged"
        )
    return checked


def _check_classes(classes: tuple[str, ...], background: str | None, where: str) -> None:
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"{where}: needs at least two different classes, not {list(classes)}")
    if background is not None and background not in classes:
        raise DataError(f"{where}: the background {background!r} is not one of the classes {list(classes)}")


def _check_units(table: pd.DataFrame, where: str) -> None:
    if (labels := table.groupby(["patient", "sample"])["label"].nunique() > 1).any():
        patient, sample = labels.index[labels.to_numpy()][0]
        raise DataError(f"{where}: sample {sample} of patient {patient} has two labels")
    if (labels := table.groupby("patient")["patient_label"].nunique() > 1).any():
        raise DataError(f"{where}: patient {labels.index[labels.to_numpy()][0]} has two patient labels")
    if (twice := table.duplicated([column for column in COLUMNS if column not in ("logits", "label", "patient_label")])).any():
        row = table[twice].iloc[0]
        raise DataError(
            f"{where}: sample {row['sample']} of patient {row['patient']} occurs twice in run {row['run']}, {row['split']} part"
        )


def _typed(table: pd.DataFrame, where: str) -> pd.DataFrame:
    if (gaps := table.isna().any()).any():
        raise DataError(f"{where}: the column {gaps.index[gaps.to_numpy()][0]} has gaps; fill them")
    try:
        return table.astype({**dict.fromkeys(_TEXTS, str), **dict.fromkeys(_NUMBERS, np.int64)})
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the columns {', '.join(_NUMBERS)} must be whole numbers ({error})") from None


def _require(table: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    if missing := [column for column in columns if column not in table.columns]:
        raise DataError(f"{where}: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def _matrix(logits: pd.Series[Any], classes: int, where: str = "predictions") -> NDArray[np.float64]:
    if not len(logits):
        return np.empty((0, classes))
    try:
        matrix = np.stack([np.asarray(row, dtype=np.float64) for row in logits])
    except (TypeError, ValueError):
        matrix = np.empty((0, 0))
    if matrix.shape != (len(logits), classes):
        raise DataError(f"{where}: every row needs {classes} logits, one per class")
    return matrix


def _digest(table: pd.DataFrame, classes: tuple[str, ...], background: str | None) -> str:
    digest = hashlib.sha256(json.dumps([classes, background]).encode())
    digest.update(pd.util.hash_pandas_object(table[list(COLUMNS[:-1])], index=False).to_numpy().tobytes())
    digest.update(_matrix(table["logits"], len(classes)).astype(np.float32).tobytes())
    return digest.hexdigest()
