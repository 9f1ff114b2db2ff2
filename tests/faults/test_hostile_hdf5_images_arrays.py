"""Damaged and hostile HDF5 slices, images, tables and arrays."""

import io
import shutil
import struct
import tracemalloc
import zipfile
import zlib

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.verify import verify
from raredistill.errors import DataError

SIDE, DEPTH = 12, 3
SECRET = np.full((SIDE, SIDE, 4), 77.0)


def errors(source):
    return [problem for problem in verify(source, workers=1) if problem.level == "error"]


# HDF5


@pytest.fixture
def archive(tmp_path):
    root = tmp_path / "archive"
    root.mkdir()
    for volume in (1, 2):
        rng = np.random.default_rng(volume)
        for depth in range(DEPTH):
            image = np.zeros((SIDE, SIDE, 4))
            image[2:10, 2:10] = rng.uniform(1, 9, (8, 8, 4))
            mask = np.zeros((SIDE, SIDE, 3), np.uint8)
            mask[4:7, 4:7, depth] = 1
            with h5py.File(root / f"volume_{volume}_slice_{depth}.h5", "w") as file:
                file["image"], file["mask"] = image, mask
    (root / "name_mapping.csv").write_text("Grade,BraTS_2020_subject_ID\nHGG,BraTS20_Training_001\nLGG,BraTS20_Training_002\n")
    return root


def brats(root):
    return open_source("brats_hdf5", root, min_tumour_voxels=2)


def external_link(root, file):
    with h5py.File(root.parent / "secret.h5", "w") as other:
        other["image"] = SECRET
    del file["image"]
    file["image"] = h5py.ExternalLink(str(root.parent / "secret.h5"), "image")


def external_storage(root, file):
    (root.parent / "secret.bin").write_bytes(SECRET.tobytes())
    del file["image"]
    file.create_dataset("image", SECRET.shape, "f8", external=[(str(root.parent / "secret.bin"), 0, SECRET.nbytes)])


def virtual(root, file):
    with h5py.File(root.parent / "secret.h5", "w") as other:
        other["image"] = SECRET
    layout = h5py.VirtualLayout(SECRET.shape, "f8")
    layout[...] = h5py.VirtualSource(str(root.parent / "secret.h5"), "image", SECRET.shape)
    del file["image"]
    file.create_virtual_dataset("image", layout)


def soft_link(root, file):
    file["elsewhere"] = file["image"][()]
    del file["image"]
    file["image"] = h5py.SoftLink("/elsewhere")


def group(root, file):
    del file["image"]
    file.create_group("image")


def text(root, file):
    del file["image"]
    file["image"] = np.full((SIDE, SIDE, 4), "x", h5py.string_dtype())


def huge(root, file):
    del file["image"]
    file.create_dataset("image", (30000, 30000, 4), "f8", chunks=(100, 100, 4), compression="gzip")


def huge_chunk(root, file):
    del file["image"]
    file.create_dataset("image", (SIDE, SIDE, 4), "u1", maxshape=(None, None, 4), chunks=(20000, 20000, 4), compression="gzip")


def missing(root, file):
    del file["mask"]


HDF5_CHANGES = {
    "external link": (external_link, "no dataset 'image' of its own"),
    "external storage": (external_storage, "no plain dataset"),
    "virtual data set": (virtual, "no plain dataset"),
    "soft link": (soft_link, "no dataset 'image' of its own"),
    "group in place of a data set": (group, "no plain dataset"),
    "text": (text, "needed are numbers"),
    "30,000 x 30,000": (huge, "needed are numbers of shape"),
    "a chunk larger than any slice": (huge_chunk, "chunks of"),
    "no mask": (missing, "no dataset 'mask'"),
}


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file):
    file.write_bytes(np.random.default_rng(0).bytes(4000))


def garbage_inside(file):
    raw = bytearray(file.read_bytes())
    raw[96:1200] = np.random.default_rng(0).bytes(1104)
    file.write_bytes(raw)


def linked(file):
    shutil.move(file, file.parents[1] / "outside.h5")
    file.symlink_to(file.parents[1] / "outside.h5")


def doubled(file):
    (file.parent / "copy").mkdir()
    shutil.copy(file, file.parent / "copy" / file.name)


FILE_CHANGES = {
    "truncated": (truncated, "cannot be decoded as HDF5"),
    "garbage": (garbage, "cannot be decoded as HDF5"),
    "garbage behind the signature": (garbage_inside, "cannot be decoded as HDF5|has no dataset"),
    "link out of the source": (linked, "outside the source"),
    "a slice twice": (doubled, "is the same slice as"),
    "web page": (lambda file: file.write_text("<!DOCTYPE html><title>Sign in</title>"), "web page"),
}


def change_inside(change):
    def damage(root):
        with h5py.File(root / "volume_2_slice_1.h5", "a") as file:
            change(root, file)

    return damage


def change_file(change):
    return lambda root: change(root / "volume_2_slice_1.h5")


HDF5 = {name: (change_inside(change), said) for name, (change, said) in HDF5_CHANGES.items()}
HDF5 |= {name: (change_file(change), said) for name, (change, said) in FILE_CHANGES.items()}


@pytest.mark.parametrize(("damage", "said"), HDF5.values(), ids=HDF5)
def test_a_damaged_hdf5_patient_is_told_refused_and_left_out_by_name(archive, tmp_path, damage, said):
    damage(archive)
    assert {problem.patient for problem in errors(brats(archive))} == {"BraTS20_Training_002"}
    with pytest.raises(DataError, match=said):
        prepare(brats(archive), tmp_path / "strict", size=(8, 8), workers=1)
    cohort = prepare(brats(archive), tmp_path / "cohort", size=(8, 8), workers=1, leave_out_bad=True)
    assert set(cohort.samples["patient"]) == {"BraTS20_Training_001"}
    assert {problem["patient"] for problem in cohort.provenance["left_out"]} == {"BraTS20_Training_002"}


# Images


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for patient in ("p1", "p2"):
            folder = root / label / f"{label}{patient}"
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)).save(folder / "1.png")
    return root


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG of a few bytes that claims ``side`` x ``side`` pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def flipped(raw):
    return raw[:60] + bytes([raw[60] ^ 255]) + raw[61:]


def pages():
    handle = io.BytesIO()
    first = Image.new("L", (SIDE, SIDE))
    first.save(handle, "TIFF", save_all=True, append_images=[first])
    return handle.getvalue()


IMAGE_FAULTS = {
    "empty": lambda raw: b"",
    "cut in half": lambda raw: raw[: len(raw) // 2],
    "flipped byte": flipped,
    "bomb of 30,000 x 30,000": lambda raw: bomb(30_000),
    "bomb of 12,000 x 12,000": lambda raw: bomb(12_000),
    "several pages": lambda raw: pages(),
    "another format under the name": lambda raw: b"%PDF-1.4 no picture",
    "web page": lambda raw: b"<html>no</html>",
    "SVG": lambda raw: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("change", IMAGE_FAULTS.values(), ids=IMAGE_FAULTS)
def test_a_damaged_image_is_told_and_its_patient_left_out(images, tmp_path, change):
    victim = images / "b" / "bp2" / "1.png"
    victim.write_bytes(change(victim.read_bytes()))
    tracemalloc.start()
    found = errors(open_source("image_folder", images, patient="folder"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {problem.patient for problem in found} == {"bp2"}
    assert any(str(victim) in (problem.file + problem.what) for problem in found)
    assert peak < 2**25
    cohort = prepare(open_source("image_folder", images, patient="folder"), tmp_path / "c", size=(8, 8), workers=1, leave_out_bad=True)
    assert "bp2" not in set(cohort.samples["patient"])
    assert {problem["patient"] for problem in cohort.provenance["left_out"]} == {"bp2"}


@pytest.mark.parametrize("mode", ["P", "CMYK", "LA", "RGBA", "1", "I;16"])
def test_palettes_cmyk_and_other_modes_are_read_as_pillow_converts_them(images, tmp_path, mode):
    file = images / "b" / "bp2" / ("1.png" if mode != "CMYK" else "1.tif")
    original = Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    else:
        picture = original.convert("L").convert(mode) if mode in ("LA", "1") else original.convert(mode)
    (images / "b" / "bp2" / "1.png").unlink()
    picture.save(file)
    cohort = prepare(open_source("image_folder", images, patient="folder", mode="grey"), tmp_path / "c", size=(8, 8), workers=1)
    row = cohort.samples.index[cohort.samples["patient"] == "bp2"][0]
    expected = np.rint(np.asarray(picture) * (255 / 65535)) if mode == "I;16" else np.asarray(picture.convert("RGB").convert("L"))
    np.testing.assert_allclose(cohort.pixels("grey")[row].astype(float), expected, atol=1)


def test_a_link_out_of_the_folder_is_told_and_not_read(images, tmp_path):
    Image.new("L", (SIDE, SIDE), 200).save(tmp_path / "secret.png")
    (images / "b" / "bp2" / "2.png").symlink_to(tmp_path / "secret.png")
    source = open_source("image_folder", images, patient="folder")
    assert [(problem.patient, problem.file) for problem in source.problems()] == [("bp2", str(images / "b" / "bp2" / "2.png"))]
    with pytest.raises(DataError, match="lies outside"):
        source.read(next(unit for unit in source.units() if unit.patient == "bp2"), (8, 8))


# Tables


@pytest.mark.parametrize("path", ["../secret.png", "{outside}", "a/../../secret.png", "link.png"])
def test_a_table_that_names_files_outside_its_folder_is_told_and_not_read(images, tmp_path, path):
    Image.new("L", (SIDE, SIDE), 200).save(tmp_path / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [("a/ap1/1.png", "a", "p"), ("b/bp1/1.png", "b", "q"), (path.format(outside=tmp_path / "secret.png"), "b", "r")]
    pd.DataFrame(rows, columns=["image", "label", "patient"]).to_csv(images / "t.csv", index=False)
    source = open_source("table", images / "t.csv")
    assert {(problem.patient, "lies outside" in problem.what) for problem in errors(source)} >= {("r", True)}
    cohort = prepare(source, tmp_path / "c", size=(8, 8), workers=1, leave_out_bad=True)
    assert set(cohort.samples["patient"]) == {"p", "q"}


def test_a_table_elsewhere_names_the_folder_of_its_images(images, tmp_path):
    rows = [("ap1/1.png", "a", "p"), ("ap2/1.png", "b", "q")]
    pd.DataFrame(rows, columns=["image", "label", "patient"]).to_csv(tmp_path / "t.csv", index=False)
    assert errors(open_source("table", tmp_path / "t.csv", folder=images / "a")) == []
    assert len(errors(open_source("table", tmp_path / "t.csv"))) > 0


TABLES = {
    "empty": b"",
    "binary": bytes(range(256)) * 20,
    "header only": b"image,label,patient\n",
    "web page": b"<!DOCTYPE html>\n<html><head><title>a, b</title></head></html>\n",
    "latin 1": "image,label\nä.png,Größe\n".encode("latin-1"),
    "an open quote": b'image,label\n"a.png,x\nb.png,y\n',
    "ragged rows": b"image,label\na,b\na,b,c,d\n",
    "zero bytes": b"image,label\na\0.png,x\n",
}


@pytest.mark.parametrize("raw", TABLES.values(), ids=TABLES)
def test_a_file_that_is_no_table_is_one_message(tmp_path, raw):
    (tmp_path / "t.csv").write_bytes(raw)
    with pytest.raises(DataError, match=r"t\.csv"):
        open_source("table", tmp_path / "t.csv")


# Arrays


def npy(shape, dtype="u1", body=b""):
    handle = io.BytesIO()
    np.lib.format.write_array_header_1_0(handle, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return handle.getvalue() + body


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(f"{name}.npy", raw)


LABELS = npy((2,), "i8", bytes(16))
ARRAYS = {
    "30,000 x 30,000": ({"x_train": npy((2, 30000, 30000)), "y_train": LABELS}, "needed are"),
    "labels by the billion": ({"x_train": npy((2, 4, 4), body=bytes(32)), "y_train": npy((10**10,), "i8")}, "claims more than"),
    "classes by the billion": (
        {"x_train": npy((1, 4, 4), body=bytes(16)), "y_train": npy((1,), "i8", struct.pack("<q", 10**10))},
        "a label is",
    ),
    "no sample": ({"x_train": npy((0, 4, 4)), "y_train": npy((0,), "i8")}, "no sample has a label"),
    "fewer bytes than promised": ({"x_train": npy((2, 4, 4), body=bytes(20)), "y_train": LABELS}, "cannot be read"),
    "text for pixels": ({"x_train": npy((2, 4, 4), "U3", bytes(400)), "y_train": LABELS}, "needed are"),
}


@pytest.mark.parametrize(("members", "said"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_lie_are_refused_without_the_memory_they_ask_for(tmp_path, members, said):
    npz(tmp_path / "a.npz", **members)
    tracemalloc.start()
    with pytest.raises(DataError, match=said):
        prepare(open_source("arrays", tmp_path / "a.npz"), tmp_path / "c", size=(8, 8), workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["x_train", "y_train", "classes"])
def test_object_arrays_are_refused_wherever_they_stand_and_never_loaded(tmp_path, name):
    members = {"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.zeros(2, np.int64), "classes": np.array(["a"])}
    np.savez(tmp_path / "a.npz", **{**members, name: np.array([Trap(), Trap()], dtype=object)})
    with pytest.raises(DataError, match=r"pickled|cannot be read"):
        open_source("arrays", tmp_path / "a.npz")


@pytest.mark.parametrize("raw", [b"", b"PK", b"\x80\x04\x95pickle", b"<html>" * 50, bytes(range(256)) * 9])
def test_a_file_that_is_no_archive_is_one_message(tmp_path, raw):
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.npz"):
        open_source("arrays", tmp_path / "a.npz")
