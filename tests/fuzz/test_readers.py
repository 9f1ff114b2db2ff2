"""Every reader on damaged inputs: each outcome is a result or a typed error, never a traceback, a hang, or much memory.

A failing input is found again by its number: mutations are a function of (reader, number).
"""

import contextlib
import faulthandler
import gzip
import io
import os
import resource
import signal
import zipfile
import zlib
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import yaml
from PIL import Image

from raredistill.cohort.sources import brats_hdf5
from raredistill.cohort.sources.grades import read_grades
from raredistill.cohort.sources.images import Decoder
from raredistill.cohort.sources.registry import open_source
from raredistill.config import load_config
from raredistill.errors import DataError, RareDistillError

FAST = 250
MANY = int(os.environ.get("FUZZ_INPUTS", "20000"))
SECONDS = 20
MEMORY = 3 * 2**30
"""Address space that one input may take on top of what the process has; a decompression bomb asks for more."""
ROLES = ("flair", "t1", "t1ce", "t2", "seg")
EXTREMES = (
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    bytes(4),
    b"\0\0\0\x80",
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\1\0\0\0",
)


# Damage


def mutate(raw, rng):
    """One to four random changes of some bytes."""
    for _ in range(rng.integers(1, 5)):
        raw = CHANGES[rng.integers(len(CHANGES))](raw, rng) or b"\0"
    return raw


def place(raw, rng):
    # Half of the changes hit the first kilobyte, where formats keep their headers.
    return int(rng.integers(0, min(len(raw), 1024) if rng.random() < 0.5 else len(raw)))


def flip(raw, rng):
    at = place(raw, rng)
    return raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1 :]


def extreme(raw, rng):
    at, value = place(raw, rng), EXTREMES[rng.integers(len(EXTREMES))]
    return raw[:at] + value + raw[at + len(value) :]


def cut(raw, rng):
    return raw[: place(raw, rng)]


def drop(raw, rng):
    at = place(raw, rng)
    return raw[:at] + raw[at + int(rng.integers(1, 64)) :]


def insert(raw, rng):
    at = place(raw, rng)
    return raw[:at] + rng.bytes(int(rng.integers(1, 32))) + raw[at:]


def repeat(raw, rng):
    at, length = place(raw, rng), int(rng.integers(1, 64))
    return raw[:at] + raw[at : at + length] * int(rng.integers(2, 20)) + raw[at + length :]


def swap(raw, rng):
    first, second = sorted((place(raw, rng), place(raw, rng)))
    return raw[second:] + raw[first:second] + raw[:first]


CHANGES = (flip, flip, flip, extreme, extreme, cut, drop, insert, repeat, swap)


def splice(text, rng):
    """Damage text by its own words, so that it stays readable for longer."""
    words = text.decode("utf-8").replace("\n", " \n ").split(" ")
    for _ in range(rng.integers(1, 6)):
        at, other = rng.integers(len(words), size=2)
        words[at] = str(rng.choice([words[other], *ODD]))
    return " ".join(words).encode("utf-8", "replace")


ODD = (
    "",
    "-1",
    "1e999",
    ".nan",
    "[",
    "{",
    "&a",
    "*a",
    "!!python/object:os.system",
    "null",
    "'",
    '"',
    ",",
    ",,",
    "\t",
    "é\u202e",
    "9" * 400,
    "true",
    "- -",
    "=1+1",
    "<b>",
)


# Readers: each is a function of (folder, seeds) that gives a function of bytes


def nifti_seeds(real):
    rng = np.random.default_rng(0)
    volume, mask = np.zeros((12, 10, 5), np.int16), np.zeros((12, 10, 5), np.uint8)
    volume[2:10, 2:8], mask[4:7, 3:6, 1:4] = rng.integers(10, 900, (8, 6, 5)), 4
    volumes = [
        nibabel.Nifti1Image(volume, np.eye(4)),
        nibabel.Nifti1Image(volume.astype(">f4"), np.eye(4)),
        nibabel.Nifti2Image(mask, np.eye(4)),
    ]
    if real:
        scan = nibabel.load(real / "real-glioma-nifti" / "TCGA-DU-7294" / "TCGA-DU-7294_flair.nii.gz")
        volumes.append(scan.slicer[100:112, 100:110, 70:75])
    return [image.to_bytes() for image in volumes]


def nifti_inputs(raw, rng):
    way = rng.integers(3)
    return mutate(raw, rng) if way == 0 else gzip.compress(mutate(raw, rng), 1) if way == 1 else mutate(gzip.compress(raw, 1), rng)


def nifti_reader(folder):
    case = folder / "case"
    case.mkdir()
    (folder / "name_mapping.csv").write_text("patient,grade\ncase,HGG\n")
    plain = nifti_seeds(None)
    for number, role in enumerate(ROLES):
        volume = np.random.default_rng(number).integers(10, 900, (12, 10, 5)).astype(np.int16)
        volume[:2], volume[:, 8:] = 0, 0
        image = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
        (case / f"case_{role}.nii").write_bytes(plain[2] if role == "seg" else image)
    source = open_source("brats_nifti", folder, min_tumour_voxels=2)
    [unit] = source.units()

    def read(raw, number):
        file = unit.files[number % len(unit.files)]
        kept = file.read_bytes()
        file.write_bytes(raw)
        try:
            source.read(unit, (8, 8))
        finally:
            file.write_bytes(kept)

    return read


def dicom_seeds(real):
    handle = io.BytesIO()
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = pydicom.uid.ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    head = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    head.SOPClassUID, head.SOPInstanceUID, head.PatientID = meta.MediaStorageSOPClassUID, "1.2.3.4", "p"
    head.StudyInstanceUID, head.SeriesInstanceUID, head.SeriesDescription = "1.2", "1.2.3", "flair"
    head.Rows, head.Columns, head.SamplesPerPixel, head.PhotometricInterpretation = 8, 6, 1, "MONOCHROME2"
    head.BitsAllocated, head.BitsStored, head.HighBit, head.PixelRepresentation = 16, 12, 11, 0
    head.ImagePositionPatient, head.ImageOrientationPatient, head.PixelSpacing = [0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1]
    head.RescaleSlope, head.RescaleIntercept, head.WindowCenter, head.WindowWidth = 2, -5, 100, 50
    head.PixelData = np.random.default_rng(0).integers(0, 900, (8, 6)).astype(np.uint16).tobytes()
    head.save_as(handle, enforce_file_format=True)
    return [handle.getvalue()]


def dicom_reader(folder):
    def read(raw, number):
        (folder / "a.dcm").write_bytes(raw)
        source = open_source("dicom", folder, patient=r"^[^/]+", unlabelled=True, window="dicom" if number % 2 else "robust")
        if any(problem.level == "error" for problem in source.problems()):
            raise DataError("refused")
        for unit in source.units():
            source.read(unit, (8, 8))

    return read


def hdf5_seeds(real):
    seeds = []
    for options in ({}, {"compression": "gzip", "chunks": (4, 4, 1)}, {"chunks": (8, 8, 2), "shuffle": True, "fletcher32": True}):
        handle = io.BytesIO()
        with h5py.File(handle, "w", libver="latest" if options else None) as file:
            file.create_dataset("image", data=np.random.default_rng(0).normal(size=(8, 8, 4)), **options)
            file.create_dataset("mask", data=np.eye(8, dtype=np.uint8)[..., None].repeat(3, 2))
        seeds.append(handle.getvalue())
    return seeds


def hdf5_reader(folder):
    return lambda raw, number: brats_hdf5.decode(raw, Path("volume_1_slice_0.h5"))


def image_seeds(real):
    rng, seeds = np.random.default_rng(0), []
    grey = Image.fromarray(rng.integers(0, 255, (16, 12), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65535, (16, 12), dtype=np.uint16))
    for picture, kind, options in (
        (grey, "PNG", {}), (deep, "PNG", {}), (grey.convert("P"), "PNG", {}), (grey.convert("RGB"), "JPEG", {}), (grey, "JPEG", {}),
        (grey.convert("CMYK"), "TIFF", {}), (deep, "TIFF", {"compression": "tiff_lzw"}),
        (grey.convert("RGB"), "TIFF", {"compression": "tiff_deflate"}), (grey, "BMP", {}), (grey.convert("RGB"), "WEBP", {}),
        (grey, "GIF", {}), (grey, "PPM", {}), (grey, "JPEG2000", {}),
    ):  # fmt: skip
        handle = io.BytesIO()
        picture.save(handle, kind, **options)
        seeds.append(handle.getvalue())
    return seeds + ([(real / "figshare-brain-tumour-128" / "glioma" / "1841.png").read_bytes()] if real else [])


def image_inputs(raw, rng):
    changed = mutate(raw, rng)
    return repaired_png(changed) if raw.startswith(b"\x89PNG") and rng.random() < 0.5 else changed


def repaired_png(raw):
    """Mend the check sums, so that damage reaches what they guard."""
    fixed, at = bytearray(raw), 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        if at + 12 + length > len(raw):
            break
        fixed[at + 8 + length : at + 12 + length] = zlib.crc32(raw[at + 4 : at + 8 + length]).to_bytes(4, "big")
        at += 12 + length
    return bytes(fixed)


def image_reader(folder):
    decoders = (Decoder("grey"), Decoder("rgb"), Decoder("grey", (0.0, 100.0)))

    def read(raw, number):
        (folder / "a.png").write_bytes(raw)
        decoders[number % 3].read(folder / "a.png", (8, 8))

    return read


def npz_seeds(real):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 5), dtype=np.uint8)
    layouts = (
        {
            "train_images": pixels,
            "train_labels": np.arange(4)[:, None] % 2,
            "test_images": pixels,
            "test_labels": np.arange(4)[:, None] % 2,
        },
        {"x_train": np.asfortranarray(pixels), "y_train": np.arange(4) % 2, "classes": np.array(["a", "b"])},
        {"x_train": pixels.astype(np.uint16), "y_train": np.array(["a", "b", "a", "c"])},
        {
            "images": np.stack([pixels, pixels], -1),
            "labels": np.eye(2)[np.arange(4) % 2],
            "channels": np.array(["t1", "t2"]),
            "patients": np.array(["p", "p", "q", "r"]),
            "slices": np.arange(4),
            "splits": np.array(["train", "train", "test", "val"]),
        },
    )
    seeds = []
    for save, members in zip((np.savez, np.savez_compressed, np.savez, np.savez), layouts, strict=True):
        handle = io.BytesIO()
        save(handle, **members)
        seeds.append(handle.getvalue())
    return seeds


def npz_inputs(raw, rng):
    if rng.random() < 0.5:
        return mutate(raw, rng)
    # Damage inside a member under right check sums.
    handle = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(handle, "w") as new:
        names = old.namelist()
        chosen = names[rng.integers(len(names))]
        for name in names:
            new.writestr(name, mutate(old.read(name), rng) if name == chosen else old.read(name))
    return handle.getvalue()


def npz_reader(folder):
    def read(raw, number):
        (folder / "a.npz").write_bytes(raw)
        source = open_source("arrays", folder / "a.npz")
        for unit in source.units():
            source.read(unit, (8, 8))

    return read


def csv_seeds(real):
    table = b'image,label,patient,split\na.png,x,p1,train\nb.png,y,p2,val\n"c,1.png",x,p3,test\n'
    grades = b"Grade,BraTS_2017_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID\nHGG,NA,NA,BraTS20_Training_001\nLGG,a,b,c\n"
    return [table, grades, *([(real / "brats-tables" / "BraTS2019_name_mapping.csv").read_bytes()[:2000]] if real else [])]


def text_inputs(raw, rng):
    return mutate(raw, rng) if rng.random() < 0.4 else splice(raw, rng)


def csv_reader(folder):
    for name in ("a", "b"):
        Image.new("L", (4, 4)).save(folder / f"{name}.png")

    def read(raw, number):
        (folder / "t.csv").write_bytes(raw)
        # No table of images is one of grades, so an input counts as refused when it is neither.
        refusals = []
        for attempt in (lambda: open_source("table", folder / "t.csv").problems(), lambda: read_grades(folder, folder / "t.csv")):
            try:
                attempt()
            except RareDistillError as error:
                refusals.append(error)
        if len(refusals) == 2:
            raise refusals[0]

    return read


def yaml_seeds(real):
    study = {
        "name": "s", "cohort": {"source": "table", "path": "x.csv", "size": 64},
        "splits": {"protocol": "outer", "folds": 3, "repeats": 1, "rarefy": {"a": 0.1}},
        "seeds": [0, 1], "training": {"epochs": 3, "loss": "focal", "loss_options": {"gamma": 2.0}},
        "runs": [{"name": "a", "model": "small_cnn"}, {"name": "b", "model": "small_cnn", "teacher": "a", "kd_weight": 0.5}],
    }  # fmt: skip
    return [yaml.safe_dump(study).encode(), *(path.read_bytes() for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")))]


def yaml_reader(folder):
    def read(raw, number):
        (folder / "s.yaml").write_bytes(raw)
        load_config(folder / "s.yaml")

    return read


READERS = {
    "nifti": (nifti_seeds, nifti_inputs, nifti_reader),
    "dicom": (dicom_seeds, mutate, dicom_reader),
    "hdf5": (hdf5_seeds, mutate, hdf5_reader),
    "image": (image_seeds, image_inputs, image_reader),
    "npz": (npz_seeds, npz_inputs, npz_reader),
    "csv": (csv_seeds, text_inputs, csv_reader),
    "yaml": (yaml_seeds, text_inputs, yaml_reader),
}


# The trial


@contextlib.contextmanager
def limits():
    """An input that takes too long or too much memory is an exception like any other; a hang inside a library ends the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    old = signal.signal(signal.SIGALRM, _too_long)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number, frame):
    raise TimeoutError(f"took more than {SECONDS} s")


def trial(name, folder, count, real, first=0):
    """Inputs that ended otherwise than they may, and how many were read and refused."""
    seeds_of, inputs, reader = READERS[name]
    seeds, read = seeds_of(real), reader(folder)
    outcomes, wrong = {"read": 0, "refused": 0}, []
    for number in range(first, first + count):
        rng = np.random.default_rng([sum(name.encode()), number])
        raw = inputs(seeds[rng.integers(len(seeds))], rng)
        signal.alarm(SECONDS)
        try:
            read(raw, number)
            outcomes["read"] += 1
        except RareDistillError:
            outcomes["refused"] += 1
        except BaseException as error:
            wrong.append(f"input {number}: {type(error).__name__}: {error}"[:300])
    return wrong, outcomes


def real_data():
    folder = Path(__file__).parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(autouse=True)
def bounded():
    with limits():
        yield


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded by Linux' means")
@pytest.mark.parametrize("name", READERS)
def test_a_few_hundred_damaged_inputs_are_read_or_refused(name, tmp_path):
    wrong, outcomes = trial(name, tmp_path, FAST, None)
    assert wrong == []
    assert sum(outcomes.values()) == FAST
    assert outcomes["refused"] > FAST // 20  # the damage is felt


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_inputs_are_read_or_refused(name, tmp_path):
    faulthandler.dump_traceback_later(3600 * 6, exit=True)
    wrong, outcomes = trial(name, tmp_path, MANY, real_data())
    faulthandler.cancel_dump_traceback_later()
    print(f"{name}: {outcomes}")
    assert wrong == []
