"""Write a generated data set in BraTS2020's layouts, for the demo, tests and benchmarks: template anatomy with painted tumours."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import nibabel
import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

from raredistill import files
from raredistill.errors import ConfigError
from raredistill.processes import end_with_parent

Layout = Literal["nifti", "hdf5", "both"]

MARKER = "PHANTOM.md"
HDF5_FOLDER = Path("BraTS2020_training_data", "content", "data")
CONTRASTS = ("flair", "t1", "t1ce", "t2")

_FIELD_OF_VIEW = np.array([240.0, 240.0, 155.0])  # mm, as BraTS
_BRAIN_SCALE = 0.88  # the template's brain is larger than the mean brain; at this scale, about 11 % of the slices are empty, as in BraTS
_HALF_BRAIN = _BRAIN_SCALE * np.array([74.0, 92.0, 78.0])  # mm
# Mean signal of grey matter, white matter and fluid; and of core (1: necrosis), oedema (2) and enhancing tumour (4), contrast agent apart.
_SIGNAL = {
    "flair": ((0.62, 0.52, 0.18), (0.70, 0.95, 0.82)),
    "t1": ((0.60, 0.84, 0.26), (0.42, 0.56, 0.58)),
    "t1ce": ((0.60, 0.84, 0.26), (0.42, 0.56, 0.62)),
    "t2": ((0.60, 0.44, 1.00), (0.90, 0.84, 0.72)),
}
_SOLID_CORE = {"flair": 0.86, "t1": 0.46, "t1ce": 0.46, "t2": 0.92}  # in low grades, the core is cells, not necrosis
_LABELS = (1, 2, 4)
_NOTICE = """# Generated data: not patients

This data set was written by `raredistill phantom`. The anatomy is the MNI152 template that nilearn ships, deformed at random;
tumours are painted shapes. It has BraTS2020's layout so that software can be tried, tested and timed. It is for demos, tests
and benchmarks only: scores on it say nothing about medicine.

{settings}
"""


@dataclass(frozen=True)
class Patient:
    """One generated patient.

    Attributes:
        name: folder name, such as ``BraTS20_Training_001``.
        grade: ``HGG`` or ``LGG``.
        images: contrast -> ``(h, w, d)`` int16, zero outside the brain.
        mask: ``(h, w, d)`` uint8 of labels 0, 1, 2, 4.
    """

    name: str
    grade: str
    images: dict[str, np.ndarray]
    mask: np.ndarray


def write_phantom(
    out: Path,
    *,
    patients: int = 24,
    layout: Layout = "nifti",
    size: tuple[int, int, int] = (120, 120, 78),
    rare_share: float = 76 / 369,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a generated data set, in which each patient depends only on the seed and the patient's number.

    Args:
        out: folder to write, new, empty, or written by this function before (then it is replaced).
        patients: number of patients.
        layout: ``nifti`` (one folder per patient in ``out``), ``hdf5`` (Kaggle's archive, in ``out/BraTS2020_training_data``) or ``both``.
        size: voxels along the three axes; (240, 240, 155) is the real size.
        rare_share: share of LGG patients; BraTS2020 has 76 of 369.
        seed: of everything that is random.
        workers: processes; all cores by default.
        progress: called with the number of finished patients and the total.

    Returns:
        ``out``.

    Raises:
        ConfigError: a number is out of range or the layout is unknown.
        DataError: ``out`` contains something else.
    """
    _check(patients, layout, size, rare_share)
    _clear(out)
    settings = f"patients {patients}, layout {layout}, size {tuple(size)}, share of LGG {rare_share:.4f}, seed {seed}"
    files.write_text(out / MARKER, _NOTICE.format(settings=settings))
    with _atlas_file(size) as atlas:
        jobs = [(atlas, out, layout, seed, index, grade, size) for index, grade in enumerate(grades(patients, rare_share))]
        written = sorted(_run(jobs, workers or os.cpu_count() or 1, progress), key=lambda record: record["number"])
    if layout != "nifti":
        slices = pd.DataFrame([row for record in written for row in record["slices"]])
        _write_tables(out / HDF5_FOLDER, written, seed)
        _write_csv(out / HDF5_FOLDER / "meta_data.csv", slices)
    if layout != "hdf5":
        _write_tables(out, written, seed)  # last: a folder that has its name mapping is complete
    return out


def _check(patients: int, layout: str, size: tuple[int, int, int], rare_share: float) -> None:
    if layout not in ("nifti", "hdf5", "both"):
        raise ConfigError(f"layout={layout!r} is unknown; choose nifti, hdf5 or both")
    if patients < 1:
        raise ConfigError(f"patients={patients}; set at least one")
    if len(size) != 3 or min(size) < 16:
        raise ConfigError(f"size={tuple(size)}; give three numbers of at least 16 voxels")
    if not 0 <= rare_share <= 1:
        raise ConfigError(f"rare_share={rare_share}; it is a share from 0 to 1")


def _clear(out: Path) -> None:
    """Create ``out``, or empty it of an earlier call's files: cases that the new tables do not list would be errors."""
    files.claim_folder(out, MARKER)
    for name in ("name_mapping.csv", "survival_info.csv"):
        (out / name).unlink(missing_ok=True)
    for folder in (*out.glob("BraTS20_Training_*"), out / HDF5_FOLDER.parts[0]):
        shutil.rmtree(folder, ignore_errors=True)


def grades(patients: int, rare_share: float) -> list[str]:
    """Grade of each patient: LGG in the given share, evenly spread over the numbers."""
    rare = [int((index + 1) * rare_share + 0.5) > int(index * rare_share + 0.5) for index in range(patients)]
    return ["LGG" if is_rare else "HGG" for is_rare in rare]


def _run(jobs: list[tuple[Any, ...]], workers: int, progress: Callable[[int, int], None] | None) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = []
    for record in _results(jobs, min(workers, len(jobs))):
        done.append(record)
        if progress:
            progress(len(done), len(jobs))
    return done


def _results(jobs: list[tuple[Any, ...]], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from (_write_patient(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"), initializer=_start_worker) as pool:
        futures = [pool.submit(_write_patient, *job) for job in jobs]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interruptions and cancels waiting jobs
    end_with_parent()


# The atlas


def load_atlas(size: tuple[int, int, int]) -> np.ndarray:
    """MNI152 tissue shares around the brain, in 1 mm, smoothed to the voxels of a volume of ``size``: ``(3, x, y, z)`` uint8.

    The first axis is grey matter, white matter and fluid (the brain that is neither); 255 is a voxel full of it.
    """
    from nilearn import datasets  # heavy, and only the first process needs it

    loaders = (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template, datasets.load_mni152_brain_mask)
    grey, white, brain = (np.asarray(load(resolution=1).dataobj, dtype=np.float32) for load in loaders)
    tissue = np.stack([grey * brain, white * brain, brain * np.clip(1 - grey - white, 0, 1)])
    box = tuple(slice(max(0, low - 2), high + 3) for low, high in _bounds(brain > 0))
    blur = np.maximum(0.0, _FIELD_OF_VIEW / size - 1) * 0.4
    smooth = [ndimage.gaussian_filter(np.pad(share[box], 3), blur, truncate=2.5) for share in tissue]
    return np.asarray(np.rint(np.clip(np.stack(smooth), 0, 1) * 255), dtype=np.uint8)


def _bounds(mask: np.ndarray) -> list[tuple[int, int]]:
    inside = np.argwhere(mask)
    return list(zip(inside.min(0).tolist(), inside.max(0).tolist(), strict=True))


@contextmanager
def _atlas_file(size: tuple[int, int, int]) -> Iterator[Path]:
    """Write the atlas to a file that all workers map, so that it is computed and held in memory only once."""
    with tempfile.TemporaryDirectory(prefix="raredistill-phantom-") as folder:
        path = Path(folder) / "atlas.npy"
        np.save(path, load_atlas(size))
        yield path


# One patient


def make_patient(atlas: np.ndarray, *, seed: int, index: int, grade: str, size: tuple[int, int, int]) -> Patient:
    """Generate one patient.

    Args:
        atlas: of ``load_atlas`` for the same size.
        seed: of the data set.
        index: number of the patient, from 0.
        grade: ``HGG`` (mostly a necrotic core in an enhancing rim and oedema) or ``LGG`` (mostly a bright flair without enhancement).
        size: ``(h, w, d)`` voxels over 240 x 240 x 155 mm, axes to the left, to the back and to the head, as BraTS.
    """
    rng = np.random.default_rng([seed, index])
    box = _brain_box(size)
    place = _millimetres(box, size)
    tissue = _anatomy(atlas, place, rng)
    brain = tissue.sum(0) > 0.5
    labels, enhancement = _tumour(tissue, brain, place, grade, rng)
    images = {name: np.zeros(size, np.int16) for name in CONTRASTS}
    shares = _tumour_shares(labels, size)
    lesions = _white_matter_lesions(tissue, rng)
    for name in CONTRASTS:
        images[name][box] = _image(name, grade, tissue, brain, shares, enhancement, lesions, rng)
    mask = np.zeros(size, np.uint8)
    mask[box] = labels
    return Patient(f"BraTS20_Training_{index + 1:03d}", grade, images, mask)


def _brain_box(size: tuple[int, int, int]) -> tuple[slice, ...]:
    """Part of the volume in which a brain can lie: nothing is computed outside."""
    half = 1.18 * _HALF_BRAIN / _FIELD_OF_VIEW
    return tuple(slice(max(0, int((0.5 - h) * n)), min(n, int((0.5 + h) * n) + 1)) for h, n in zip(half, size, strict=True))


def _millimetres(box: tuple[slice, ...], size: tuple[int, int, int]) -> np.ndarray:
    """Position of each voxel of the box from the centre of the volume, ``(3, *box)`` float32 in mm."""
    axes = [(np.arange(part.start, part.stop) + 0.5) / n - 0.5 for part, n in zip(box, size, strict=True)]
    grid = np.meshgrid(*(axis * length for axis, length in zip(axes, _FIELD_OF_VIEW, strict=True)), indexing="ij")
    return np.stack(grid).astype(np.float32)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> np.ndarray:
    """Smooth random field of mean about 0 and standard deviation about 1 at its knots: cubic splines over ``cells`` knots per axis."""
    field = rng.standard_normal((cells,) * 3, dtype=np.float32)
    spline = CubicSpline(np.arange(cells), np.eye(cells))
    for length in shape:
        basis = spline(np.linspace(0, cells - 1, length)).astype(np.float32)
        # The processed axis moves last, so three rounds restore the order. Not tensordot: BLAS threads would compete with other workers.
        field = np.einsum("ijk,xi->jkx", field, basis)
    return field


def _anatomy(atlas: np.ndarray, place: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tissue shares of a randomly rotated, scaled, shifted and deformed brain: ``(3, *box)`` float32."""
    shape = place.shape[1:]
    scale = rng.normal(1.0, 0.03, 3) / _BRAIN_SCALE
    turn = Rotation.from_euler("xyz", rng.normal(0, [4, 2, 3]), degrees=True).as_matrix()
    mirror = np.diag([-1.0, -1.0, 1.0])  # the template's axes point right, forward and up; BraTS' first two point the other way
    linear = (scale[:, None] * turn) @ mirror
    position = np.einsum("st,txyz->sxyz", linear.astype(np.float32), place - rng.normal(0, 2, (3, 1, 1, 1)).astype(np.float32))
    bend = np.stack([smooth_noise(rng, shape, 6) for _ in range(3)]) * 3.0
    centre = (np.array(atlas.shape[1:]) - 1) / 2
    position = position + bend + centre[:, None, None, None]
    sampled = [ndimage.map_coordinates(share, position, output=np.float32, order=1) for share in atlas]
    return np.stack(sampled) / np.float32(255)


@dataclass(frozen=True)
class _Shape:
    """Appearance of one tumour: drawn once, by grade, with overlap between the grades."""

    core: float
    rim: float
    patch: float
    strength: float


def _draw_shape(grade: str, rng: np.random.Generator) -> _Shape:
    """Radii of core, inner border of the rim and enhancing patch (in units of the tumour's radius), and strength of enhancement."""
    untypical = rng.random() < 0.2
    if grade == "HGG":
        # One fifth has a small, weak rim and looks like a low grade.
        strength = rng.uniform(0.05, 0.25) if untypical else rng.uniform(0.35, 0.95)
        core = rng.uniform(0.35, 0.5) if untypical else rng.uniform(0.45, 0.75)
        return _Shape(core, core * rng.uniform(0.55, 0.88), 0.0, strength)
    # One fifth of the low grades has an enhancing patch.
    return _Shape(rng.uniform(0.4, 0.85), 1.0, rng.uniform(0.25, 0.45) if untypical else 0.0, rng.uniform(0.2, 0.7))


def _tumour(
    tissue: np.ndarray, brain: np.ndarray, place: np.ndarray, grade: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``(*box)`` uint8, and the strength of contrast enhancement in each voxel ``(*box)`` float32."""
    shape, box = _draw_shape(grade, rng), brain.shape
    radius = np.clip(rng.normal(33 if grade == "HGG" else 31, 7), 15, 48)
    distance, centre = _distance(tissue, place, radius, rng)
    whole = brain & (distance < np.where(tissue[1] > tissue[0], 1.0, 0.82)) & ((tissue[2] < 0.55) | (distance < shape.core))
    inner = distance * np.exp(0.12 * smooth_noise(rng, box, 14))
    core = whole & (inner < shape.core)
    labels = np.where(whole, 2, 0).astype(np.uint8)
    if grade == "HGG":
        labels[core] = 4
        labels[whole & (inner < shape.rim)] = 1
    else:
        labels[core] = 1
        offset = centre + radius * 0.3 * rng.standard_normal(3)
        patch = np.sqrt(((place - offset[:, None, None, None]) ** 2).sum(0)) / radius * np.exp(0.3 * smooth_noise(rng, box, 14))
        labels[core & (patch < shape.patch)] = 4
    broken = np.clip(1 + 0.35 * smooth_noise(rng, box, 12), 0.2, 1.6)  # rims are rarely closed
    return labels, np.asarray(shape.strength * broken, dtype=np.float32)


def _distance(tissue: np.ndarray, place: np.ndarray, radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Distance from a random centre in white matter, in units of the border of a wavy ellipsoid; and the centre in mm."""
    inside = np.abs(place) < 0.72 * _HALF_BRAIN[:, None, None, None]
    candidates = np.flatnonzero((tissue[1] > 0.5) & inside.all(0))
    centre = place.reshape(3, -1)[:, rng.choice(candidates)]
    axes = radius * rng.uniform(0.75, 1.25, 3)
    turn = Rotation.from_euler("xyz", rng.uniform(0, 180, 3), degrees=True).as_matrix()
    turned = np.einsum("st,txyz->sxyz", (turn / axes[:, None]).astype(np.float32), place - centre[:, None, None, None])
    waves = 0.16 * smooth_noise(rng, place.shape[1:], 8) + 0.10 * smooth_noise(rng, place.shape[1:], 16)
    return np.asarray(np.sqrt((turned**2).sum(0)) * np.exp(waves)), centre


def _tumour_shares(labels: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """Each label's share of a voxel with soft borders, about 1 mm wide: ``(3, *box)`` float32."""
    blur = 1.0 * np.array(size) / _FIELD_OF_VIEW
    return np.stack([ndimage.gaussian_filter((labels == label).astype(np.float32), blur) for label in _LABELS])


def _white_matter_lesions(tissue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small bright age-related spots in white matter, which are not tumour: ``(*box)`` float32 from 0 to 1."""
    spots = smooth_noise(rng, tissue.shape[1:], 28) - rng.uniform(1.7, 3.0)
    return np.asarray(np.clip(spots * 2, 0, 1) * tissue[1])


def _image(
    name: str,
    grade: str,
    tissue: np.ndarray,
    brain: np.ndarray,
    shares: np.ndarray,
    enhancement: np.ndarray,
    lesions: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """One contrast as a scanner would show it: tissue, tumour, texture, bias field, noise and an arbitrary gain; ``(*box)`` int16."""
    normal, ill = (np.array(values) for values in _SIGNAL[name])
    signal = np.einsum("t,txyz->xyz", (normal * rng.normal(1, 0.05, 3)).astype(np.float32), tissue)
    signal += lesions * {"flair": 0.3, "t2": 0.25, "t1": -0.15, "t1ce": -0.15}[name]
    ill[0] = _SOLID_CORE[name] if grade == "LGG" else ill[0]
    ill = ill * rng.normal(1, [0.14, 0.08, 0.08])
    tumour = np.einsum("t,txyz->xyz", ill.astype(np.float32), shares)
    if name == "t1ce":
        tumour += shares[2] * enhancement
    # Tumour replaces most, but not all, of the tissue it grows into.
    signal = signal * (1 - 0.85 * shares.sum(0)) + 0.85 * tumour + 0.15 * shares.sum(0) * normal[0]
    signal *= np.exp(0.10 * smooth_noise(rng, brain.shape, 3) + 0.04 * smooth_noise(rng, brain.shape, 20))
    signal += rng.uniform(0.02, 0.045) * rng.standard_normal(brain.shape, dtype=np.float32)
    counts = np.rint(signal * rng.uniform(300, 900))
    return np.where(brain, np.clip(counts, 1, 32767), 0).astype(np.int16)


# Writing


def _write_patient(atlas: Path, out: Path, layout: Layout, seed: int, index: int, grade: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Generate and write one patient; returns its entries for the tables."""
    patient = make_patient(np.load(atlas, mmap_mode="r"), seed=seed, index=index, grade=grade, size=size)
    if layout != "hdf5":
        _write_nifti(out / patient.name, patient)
    slices = _write_hdf5(out / HDF5_FOLDER, patient, index, seed) if layout != "nifti" else []
    return {"number": index + 1, "name": patient.name, "grade": grade, "slices": slices}


def _write_nifti(folder: Path, patient: Patient) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spacing = _FIELD_OF_VIEW / patient.mask.shape
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[1, 3] = _FIELD_OF_VIEW[1] - spacing[1]
    for name, volume in {**patient.images, "seg": patient.mask}.items():
        image = nibabel.Nifti1Image(volume, affine)  # type: ignore[no-untyped-call]
        nibabel.save(image, folder / f"{patient.name}_{name}.nii.gz")


def _write_hdf5(folder: Path, patient: Patient, index: int, seed: int) -> list[dict[str, Any]]:
    """Write the Kaggle archive's slices: each contrast an increasing affine copy of its volume, background not 0."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, index, 1])
    gain, offset = rng.uniform(0.001, 0.01, len(CONTRASTS)), rng.uniform(-1, 0, len(CONTRASTS))
    volumes = np.stack([patient.images[name] for name in CONTRASTS], axis=-1)
    masks = np.stack([patient.mask == label for label in _LABELS], axis=-1).astype(np.uint8)
    rows = []
    for depth in range(volumes.shape[2]):
        name = f"volume_{index + 1}_slice_{depth}.h5"
        with h5py.File(folder / name, "w") as archive:
            archive.create_dataset("image", data=volumes[:, :, depth] * gain + offset, compression="gzip", compression_opts=1)
            archive.create_dataset("mask", data=masks[:, :, depth], compression="gzip", compression_opts=1)
        target = int(masks[:, :, depth].any())
        rows.append({"slice_path": f"/generated/{name}", "target": target, "volume": index + 1, "slice": depth})
    return rows


def _write_tables(folder: Path, written: list[dict[str, Any]], seed: int) -> None:
    """Survival and grades, with BraTS2020's own column names; the name mapping is written last."""
    high = [record for record in written if record["grade"] == "HGG"]
    _write_csv(folder / "survival_info.csv", pd.DataFrame(_survival(high, seed)))
    older = ("BraTS_2017_subject_ID", "BraTS_2018_subject_ID", "TCGA_TCIA_subject_ID", "BraTS_2019_subject_ID")
    rows = [{"Grade": record["grade"], **dict.fromkeys(older, "NA"), "BraTS_2020_subject_ID": record["name"]} for record in written]
    _write_csv(folder / "name_mapping.csv", pd.DataFrame(rows))


def _survival(records: Iterable[dict[str, Any]], seed: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"Brats20ID": [], "Age": [], "Survival_days": [], "Extent_of_Resection": []}
    for record in records:
        rng = np.random.default_rng([seed, record["number"], 2])
        columns["Brats20ID"].append(record["name"])
        columns["Age"].append(round(float(np.clip(rng.normal(61, 12), 19, 87)), 3))
        columns["Survival_days"].append(int(np.clip(rng.lognormal(5.9, 0.75), 5, 1800)))
        columns["Extent_of_Resection"].append(str(rng.choice(["GTR", "STR", "NA"], p=[0.5, 0.05, 0.45])))
    return columns


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    files.write_text(path, table.to_csv(index=False))
