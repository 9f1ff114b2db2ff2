import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.arrays import Arrays
from raredistill.cohort.sources.image_folder import ImageFolder
from raredistill.cohort.sources.images import Decoder
from raredistill.cohort.sources.table import Table
from raredistill.errors import DataError, RareDistillError
from raredistill.files import sha256

DATA = Path(__file__).parents[2] / "shared" / "data"


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(seed, *shape, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(["cat/p1/a.png", "cat/p1/b.png", "cat/p2/a.png", "ant/p3/a.png", "ant/p4/a.png"]):
        save(tmp_path / "set" / name, noise(index, 6, 8))
    return tmp_path / "set"


def rows_of(source, size=(6, 8)):
    return [row for unit in source.units() for row in source.read(unit, size).rows]


def test_grey_eight_bit_pixels_of_the_wanted_size_come_through_untouched(folder):
    source = ImageFolder(folder)
    slices = source.read(source.units()[0], (6, 8))
    assert source.channels == ("grey",)
    np.testing.assert_array_equal(slices.pixels["grey"][0], np.asarray(Image.open(folder / slices.rows[0]["sample"])))


def test_the_folder_inside_the_class_is_the_patient(folder):
    source = ImageFolder(folder, patient="folder")
    assert [(unit.patient, unit.label, len(unit.files)) for unit in source.units()] == [
        ("p1", "cat", 2),
        ("p2", "cat", 1),
        ("p3", "ant", 1),
        ("p4", "ant", 1),
    ]
    assert source.classes() == ("ant", "cat")
    assert source.problems() == []


@pytest.mark.parametrize("pattern", [r"p(\d)/", r"(?:cat|ant)/p(?P<patient>\d)"])
def test_a_regular_expression_on_the_relative_path_names_the_patient(folder, pattern):
    assert [unit.patient for unit in ImageFolder(folder, patient=pattern).units()] == ["1", "2", "3", "4"]


def test_without_a_patient_each_image_is_its_own_unit_and_provenance_says_so(folder):
    source = ImageFolder(folder)
    assert len(source.units()) == 5
    assert {row["patient"] for row in rows_of(source)} == {row["sample"] for row in rows_of(source)}
    assert "own unit" in source.settings()["patient"]


def test_a_path_without_a_patient_is_a_problem_and_not_a_sample(folder):
    source = ImageFolder(folder, patient="p([12])")
    assert sorted(Path(problem.file).parent.name for problem in source.problems()) == ["p3", "p4"]
    assert [unit.patient for unit in source.units()] == ["1", "2"]


def test_a_patient_in_two_classes_stays_one_patient_and_is_told(folder):
    save(folder / "ant/p1/z.png", noise(9, 6, 8))
    source = ImageFolder(folder, patient="folder")
    assert [problem.level for problem in source.problems()] == ["warning"]
    assert {unit.patient: unit.label for unit in source.units()}["p1"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patient": "("}, "not a regular expression"),
        ({"patient": "p1"}, "no group"),
        ({"mode": "color"}, "grey or rgb"),
        ({"window": [5, 5]}, "rising"),
        ({"classes": ["cat"]}, "name each class once"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(RareDistillError, match=message):
        ImageFolder(folder, **options)


def test_a_folder_without_class_folders_is_refused(tmp_path):
    with pytest.raises(DataError, match="one folder per class"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        ImageFolder(tmp_path / "nothing")


def test_the_given_order_of_classes_is_kept_and_sources_travel_to_workers(folder):
    source = pickle.loads(pickle.dumps(ImageFolder(folder, classes=["cat", "ant"])))
    assert source.classes() == ("cat", "ant")
    assert len(rows_of(source)) == 5


def test_missing_and_damaged_images_are_all_listed_and_reading_names_the_file(folder):
    source = ImageFolder(folder, patient="folder")
    (folder / "cat/p2/a.png").unlink()
    (folder / "ant/p3/a.png").write_bytes(b"no image")
    assert {problem.patient for problem in source.problems() if problem.level == "error"} == {"p2", "p3"}
    for unit in source.units()[1:3]:
        with pytest.raises(DataError, match=rf"{unit.patient}.a\.png"):
            source.read(unit, (6, 8))


def test_a_truncated_image_is_refused_with_its_name(folder):
    file = folder / "cat/p2/a.png"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        Decoder("grey").read(file, (6, 8))


def test_a_decompression_bomb_is_refused(folder, monkeypatch):
    for limit in (30, 10):  # a warning of Pillow's above the limit, an error above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="too many pixels"):
            Decoder("grey").read(folder / "cat/p2/a.png", (6, 8))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_scales_from_its_full_range_or_a_window(tmp_path, suffix):
    pixels = noise(0, 6, 8, dtype=np.uint16)
    file = save(tmp_path / f"a.{suffix}", pixels)
    full = Decoder("grey").read(file, (6, 8))[0]
    window = Decoder("rgb", (1000, 5000)).read(file, (6, 8))
    np.testing.assert_array_equal(full, np.rint(pixels.astype(np.float64) / 65535 * 255))
    expected = np.rint(np.clip((pixels.astype(np.float64) - 1000) / 4000, 0, 1) * 255)
    np.testing.assert_allclose(window, np.stack([expected] * 3), atol=1)


def test_float_tiff_needs_a_window(tmp_path):
    file = save(tmp_path / "a.tif", np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8))
    with pytest.raises(DataError, match="set window"):
        Decoder("grey").read(file, (6, 8))
    np.testing.assert_allclose(Decoder("grey", (0, 1)).read(file, (6, 8)).ravel(), np.linspace(0, 255, 48), atol=0.51)


def test_a_tiff_of_several_pages_is_refused(tmp_path):
    file = save(tmp_path / "a.tif", noise(0, 6, 8), save_all=True, append_images=[Image.fromarray(noise(1, 6, 8))])
    with pytest.raises(DataError, match="2 pages"):
        Decoder("grey").read(file, (6, 8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "LA", "1"])
def test_any_mode_becomes_what_pillow_calls_rgb_and_luma(tmp_path, mode):
    image = Image.fromarray(noise(0, 6, 8, 3)).convert(mode)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(file)
    np.testing.assert_array_equal(Decoder("rgb").read(file, (6, 8)), np.moveaxis(np.asarray(image.convert("RGB")), -1, 0))
    luma = np.asarray(image.convert("RGB")) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(Decoder("grey").read(file, (6, 8))[0], luma, atol=1)


def test_jpeg_is_read_as_stored(tmp_path):
    file = save(tmp_path / "a.jpg", noise(0, 16, 16), quality=95)
    np.testing.assert_array_equal(Decoder("grey").read(file, (16, 16))[0], np.asarray(Image.open(file)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_halving_averages_instead_of_dropping_pixels(tmp_path, dtype):
    """Antialiased bilinear at one half is the triangle filter 1 3 3 1 along each axis, not every second pixel."""
    pixels = noise(0, 16, 16, dtype=dtype)
    ours = Decoder("grey").read(save(tmp_path / "a.png", pixels), (8, 8))[0]
    scaled = pixels / np.iinfo(dtype).max * 255
    kernel = np.array([1, 3, 3, 1]) / 8
    weights = np.zeros((6, 16))
    for row in range(6):
        weights[row, 2 * row + 1 : 2 * row + 5] = kernel
    np.testing.assert_allclose(ours[1:7, 1:7], weights @ scaled @ weights.T, atol=1)


def test_auto_takes_rgb_as_soon_as_a_file_is_in_colour(folder):
    save(folder / "ant/p4/colour.png", noise(5, 6, 8, 3))
    source = ImageFolder(folder)
    assert source.channels == ("red", "green", "blue")
    assert ImageFolder(folder, mode="grey").channels == ("grey",)
    grey = source.read(source.units()[0], (6, 8)).pixels
    np.testing.assert_array_equal(grey["red"], grey["blue"])


@pytest.fixture
def table(folder):
    rows = pd.DataFrame({"image": [f"set/{file.relative_to(folder)}" for file in sorted(folder.rglob("*.png"))]})
    rows["label"] = rows["image"].str.split("/").str[1]
    rows["patient"] = rows["image"].str.split("/").str[2]
    rows["split"] = ["train", "val", "test", "test", "Training"]
    path = folder.parent / "labels.csv"
    rows.to_csv(path, index=False)
    return path


def test_a_table_gives_labels_patients_and_split_parts(table):
    source = Table(table)
    assert [(row["patient"], row["label"], row["split"]) for row in rows_of(source)] == [
        ("p1", "cat", "test"),
        ("p1", "cat", "test"),
        ("p2", "cat", "train"),
        ("p3", "ant", "train"),
        ("p4", "ant", "validation"),
    ]
    assert source.problems() == []
    assert source.settings()["patient"] == "column 'patient'"


def test_column_names_are_settable_and_a_missing_one_is_named(table):
    renamed = pd.read_csv(table).rename(columns={"image": "file", "label": "kind", "patient": "who"})
    renamed.to_csv(table, index=False)
    source = Table(table, image_column="file", label_column="kind", patient="who")
    assert len(source.units()) == 4
    assert len(Table(table, image_column="file", label_column="kind").units()) == 5
    with pytest.raises(DataError, match="no column 'image' among file, kind, who, split"):
        Table(table)


def test_every_faulty_row_is_listed_with_its_line(table):
    rows = pd.read_csv(table, dtype=str)
    rows.loc[0, "image"] = "set/nothing.png"
    rows.loc[1, "label"] = None
    rows.loc[2, "split"] = "exam"
    rows.loc[4, "image"] = rows.loc[3, "image"]
    rows.to_csv(table, index=False)
    problems = Table(table).problems()
    told = [(Path(problem.file).name, problem.what) for problem in problems]
    assert told[0] == ("labels.csv:3", "has no label")
    assert told[1][0] == "labels.csv:4"
    assert "exam" in told[1][1]
    assert told[2][0] == "labels.csv:6"
    assert told[3] == ("nothing.png", "no such file")


def test_a_patient_on_two_sides_of_the_given_split_is_told(table):
    pd.read_csv(table).assign(split=["train", "train", "train", "test", "test"], patient=["a", "b", "c", "c", "d"]).to_csv(
        table, index=False
    )
    assert ["several classes" not in problem.what and problem.patient for problem in Table(table).problems()][-1] == "c"


def test_an_unreadable_table_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Table(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        Table(tmp_path / "bad.csv")


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_arrays_in_the_medmnist_layout_keep_pixels_labels_and_parts(tmp_path, save_npz, monkeypatch):
    monkeypatch.setattr("raredistill.cohort.sources.arrays._CHUNK_SAMPLES", 4)
    images = {part: noise(index, 10, 6, 8) for index, part in enumerate(("train", "val", "test"))}
    labels = {part: np.arange(10).reshape(-1, 1) % 3 for part in images}
    save_npz(
        tmp_path / "a.npz", **{f"{part}_images": images[part] for part in images}, **{f"{part}_labels": labels[part] for part in images}
    )
    source = Arrays(tmp_path / "a.npz")
    assert len(source.units()) == 9
    pixels = np.concatenate([source.read(unit, (6, 8)).pixels["grey"] for unit in source.units()])
    np.testing.assert_array_equal(pixels, np.concatenate(list(images.values())))
    rows = pd.DataFrame(rows_of(source))
    assert rows["label"].astype(int).tolist() == np.concatenate(list(labels.values())).ravel().tolist()
    assert rows["split"].value_counts().to_dict() == {"train": 10, "validation": 10, "test": 10}
    assert rows["patient"].is_unique
    assert (rows["patient_label"] == rows["label"]).all()


def test_an_archive_of_many_blocks_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("raredistill.cohort.sources.arrays._CHUNK_SAMPLES", 4)
    hashed = []
    monkeypatch.setattr("raredistill.cohort.sources.arrays.sha256", lambda path: hashed.append(path) or sha256(path))
    np.savez(tmp_path / "a.npz", x_train=noise(0, 10, 6, 8), y_train=np.arange(10) % 2)
    told = prepare(Arrays(tmp_path / "a.npz"), tmp_path / "out", size=(8, 8), workers=1).provenance["hashes"]
    digest = hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    assert told == {f"train/{start:07d}": {"a.npz": digest} for start in (0, 4, 8)}
    assert hashed == [tmp_path / "a.npz"]


def test_blocks_in_order_are_decompressed_once_and_any_order_gives_the_same_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("raredistill.cohort.sources.arrays._CHUNK_SAMPLES", 4)
    images, opened = noise(0, 14, 6, 8), []
    np.savez_compressed(tmp_path / "a.npz", x_train=images, y_train=np.arange(14) % 2)
    source = Arrays(tmp_path / "a.npz")
    original = zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, name, *rest: opened.append(name) or original(self, name, *rest))
    units = source.units()

    def pixels(of, order):
        return {number: of.read(units[number], (6, 8)).pixels["grey"] for number in order}

    for order, opens in (((0, 1, 2, 3), 1), ((1, 3), 1), ((3, 2, 0), 3), ((0, 0), 2)):
        opened.clear()
        for number, found in pixels(source, order).items():
            np.testing.assert_array_equal(found, images[4 * number : 4 * number + 4])
        assert opened == ["x_train.npy"] * opens
    # A worker's copy of a source that has read half-way.
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(source)), (1,))[1], images[4:8])


def test_arrays_in_the_keras_layout_take_names_from_the_file_and_any_memory_order(tmp_path):
    images = noise(0, 5, 6, 8, 3)
    np.savez(
        tmp_path / "a.npz",
        x_train=np.asfortranarray(images),
        y_train=np.array([0, 1, 1, 0, 2]),
        x_test=images[:2],
        y_test=np.array([2, 1]),
        classes=np.array(["c", "b", "a"]),
    )
    source = Arrays(tmp_path / "a.npz")
    assert source.classes() == ("c", "b", "a")
    slices = source.read(source.units()[0], (6, 8))
    np.testing.assert_array_equal(np.stack([slices.pixels[name] for name in ("red", "green", "blue")], -1), images)
    assert [row["label"] for row in slices.rows] == ["c", "b", "b", "c", "a"]


def test_pickled_members_are_refused_and_never_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.array([{}, {}], dtype=object), train_labels=np.array([0, 1]))
    with pytest.raises(DataError, match="pickled"):
        Arrays(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"pictures": noise(0, 2, 4, 4)}, "train_images and train_labels"),
        ({"x_train": noise(0, 2, 4, 4)}, "not y_train"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.array([0, 1, 1])}, "2 samples but 3 labels"),
        ({"x_train": noise(0, 2, 3, 4, 4), "y_train": np.array([0, 1])}, "must be"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.ones((2, 2))}, "one class index"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.array([0, 5]), "classes": np.array(["a", "b"])}, "2 class names"),
    ],
)
def test_other_layouts_are_refused(tmp_path, members, message):
    np.savez(tmp_path / "a.npz", **members)
    with pytest.raises(DataError, match=message):
        Arrays(tmp_path / "a.npz")


def test_damage_in_the_file_is_told_with_its_member(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, noise(0, 20, 8, 8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x_train.npy", buffer.getvalue()[:-600])
        labels = io.BytesIO()
        np.save(labels, np.arange(20) % 2)
        archive.writestr("y_train.npy", labels.getvalue())
    source = Arrays(tmp_path / "a.npz")
    with pytest.raises(DataError, match="x_train"):
        source.read(source.units()[0], (8, 8))
    (tmp_path / "b.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"b\.npz"):
        Arrays(tmp_path / "b.npz")


@pytest.mark.skipif(not DATA.exists(), reason="the shared data folder is absent")
def test_the_real_sets_have_the_counts_that_their_makers_publish():
    table = Table(DATA / "figshare-brain-tumour-128" / "labels.csv")
    counts = pd.Series([sample.label for samples in table._patients.values() for sample in samples]).value_counts()
    assert counts.to_dict() == {"glioma": 1426, "pituitary": 930, "meningioma": 708}
    arrays = Arrays(DATA / "pneumonia-28" / "pneumonia_28.npz", classes=["normal", "pneumonia"])
    train = pd.Series(arrays._parts["train"].labels).value_counts()
    assert train.to_dict() == {"normal": 1214, "pneumonia": 3494}


def test_every_format_is_taken_and_taken_and_skipped_are_what_is_on_disk(tmp_path):
    for index, ending in enumerate(("png", "bmp", "webp", "gif", "pgm", "jp2", "jfif", "")):
        (tmp_path / "b").mkdir(exist_ok=True)
        form = {"jfif": "JPEG", "": "PNG"}.get(ending)
        Image.fromarray(noise(index, 8, 8)).save(tmp_path / "b" / f"n{index}{'.' if ending else ''}{ending}", form)
    save(tmp_path / "a/x.png", noise(20, 8, 8))
    for name in ("a/.ipynb_checkpoints/x-checkpoint.png", "a/@eaDir/x.png/T.jpg", "__MACOSX/b/y.png", "a/x_mask.png", "b/masks/n0.png"):
        save(tmp_path / name, noise(30, 8, 8))
    for name in ("a/Thumbs.db", "b/notes.txt"):
        (tmp_path / name).write_text("x")
    source = ImageFolder(tmp_path)
    taken = sum(len(unit.files) for unit in source.units())
    assert taken == 9
    assert taken + sum(skip.count for skip in source.skipped()) == sum(path.is_file() for path in tmp_path.rglob("*"))
    assert len(rows_of(source)) == 9


def test_train_val_test_folders_are_the_given_split_and_a_wrapper_is_named(tmp_path):
    for index, name in enumerate(("Training/a/1.png", "Training/b/2.png", "Testing/a/3.png", "Testing/b/4.png", "unlabelled/5.png")):
        save(tmp_path / "set" / name, noise(index, 8, 8))
    rows = pd.DataFrame(rows_of(ImageFolder(tmp_path / "set")))
    assert rows.groupby(["split", "label"]).size().to_dict() == {
        ("", ""): 1, ("test", "a"): 1, ("test", "b"): 1, ("train", "a"): 1, ("train", "b"): 1,
    }  # fmt: skip
    with pytest.raises(DataError, match="single class, 'set'"):
        ImageFolder(tmp_path)
    save(tmp_path / "set/extra/6.png", noise(9, 8, 8))
    with pytest.raises(DataError, match="exclude=extra"):
        ImageFolder(tmp_path / "set")


@pytest.mark.parametrize("header", ["patient_id", "PatientID", "lesion_id", "Subject", "case", "mrn", "Person"])
def test_a_column_that_looks_like_the_patient_is_asked_about(table, header):
    pd.read_csv(table).rename(columns={"patient": header}).to_csv(table, index=False)
    with pytest.raises(DataError, match=f"patient={header}.*patient=none"):
        Table(table)
    assert (len(Table(table, patient=header).units()), len(Table(table, patient="none").units())) == (4, 5)
    assert (Table(table, patient=header).counted, Table(table, patient="none").counted) == ("patients", "images")


@pytest.mark.parametrize("header", [" patient", "Patient ", "PATIENT"])
def test_blanks_and_case_of_a_header_do_not_matter(table, header):
    pd.read_csv(table).rename(columns={"patient": header, "label": " Label"}).to_csv(table, index=False)
    assert len(Table(table).units()) == 4


def test_ids_that_a_spreadsheet_changed_and_classes_in_two_spellings_are_refused(table):
    whole = pd.read_csv(table)
    whole.assign(patient=["7", "007", "7.0", "8", "9"]).to_csv(table, index=False)
    with pytest.raises(DataError, match="differ only by leading zeros"):
        Table(table)
    whole.assign(label=["1", "1.0", "0", "1", "0"]).to_csv(table, index=False)
    with pytest.raises(DataError, match="differ only in how they are written"):
        Table(table)


def test_one_hot_labels_backslashes_and_missing_endings_are_read(table):
    whole = pd.read_csv(table)
    names = whole["image"].str.replace("/", "\\").str.removesuffix(".png")
    flags = {"CAT": (whole["label"] == "cat").astype(float), "ANT": (whole["label"] == "ant").astype(float)}
    pd.DataFrame({"image": names, **flags, "patient": whole["patient"]}).to_csv(table, index=False)
    source = Table(table)
    assert source.problems() == []
    assert [row["label"] for row in rows_of(source)] == ["CAT", "CAT", "CAT", "ANT", "ANT"]


def test_twelve_bit_values_in_sixteen_bit_files_fill_the_range_with_a_note(tmp_path):
    for index, name in enumerate(("a/1.png", "b/2.png")):
        save(tmp_path / name, (noise(index, 8, 8, dtype=np.uint16) >> 4).astype(np.uint16))
    source = ImageFolder(tmp_path)
    pixels = source.read(source.units()[0], (8, 8)).pixels["grey"][0]
    np.testing.assert_allclose(pixels, (noise(0, 8, 8, dtype=np.uint16) >> 4) / 4095 * 255, atol=0.51)
    assert [problem.level for problem in source.problems() if "16 bits" in problem.what] == ["note"]


@pytest.mark.parametrize(
    ("scale", "window"), [(lambda x: x.astype(np.uint16), [0, 255]), (lambda x: x * np.uint16(16), [0, 4095]), (lambda x: x / 255, [0, 1])]
)
def test_arrays_are_scaled_by_the_smallest_range_that_holds_them(tmp_path, scale, window):
    pixels = noise(0, 6, 8, 8)
    pixels[0, 0, :2] = 0, 255
    np.savez(tmp_path / "a.npz", images=scale(pixels), labels=np.array([1, 2, 1, 2, 1, 2]))
    source = Arrays(tmp_path / "a.npz")
    assert (source.settings()["window"], source.classes()) == (window, ("1", "2"))
    np.testing.assert_allclose(source.read(source.units()[0], (8, 8)).pixels["grey"], pixels, atol=1)
