import gzip
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from raredistill import phantom
from raredistill.cohort import labels, volumes
from raredistill.cohort.labels import LabelRule, compare_rules, label_slices
from raredistill.cohort.sources import brats
from raredistill.cohort.sources.nifti import decode
from raredistill.cohort.sources.registry import open_source
from raredistill.errors import ConfigError, DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
CHANNELS = ("flair", "t1", "t1ce", "t2")
SHAPE = (26, 22, 14)
"""First, second and third axis of the made cases."""
AS_BRATS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Axes to the left, the back and the head."""


def make_case(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A ball of brain with a smaller ball of tumour; slices at both ends are empty."""
    generator = np.random.default_rng(seed)
    grid = np.indices(SHAPE) - (np.array(SHAPE) / 2).reshape(3, 1, 1, 1)
    brain = (grid**2 / (np.array([11, 9, 6]) ** 2).reshape(3, 1, 1, 1)).sum(0) < 1
    images = {channel: (brain * generator.integers(50, 900, SHAPE)).astype(np.int16) for channel in CHANNELS}
    distance = np.sqrt(((grid - np.array([2, 1, 1]).reshape(3, 1, 1, 1)) ** 2).sum(0))
    mask = np.select([distance < 1.5, distance < 2.5, distance < 4], [1, 4, 2], 0).astype(np.uint8)
    return images, mask


def write_nifti(root: Path, name: str, seed: int, *, newer: bool = False, ending: str = ".nii.gz", segmentation: str | None = "") -> Path:
    images, mask = make_case(seed)
    folder = root / name
    folder.mkdir(parents=True)
    newer_names = dict(zip(CHANNELS, ("-t2f", "-t1n", "-t1c", "-t2w"), strict=True))
    for channel, volume in images.items():
        nibabel.save(
            nibabel.Nifti1Image(volume, AS_BRATS),
            folder / f"{name}{newer_names[channel] if newer else '_' + channel}{ending}",
        )
    if segmentation is not None:
        mask = np.where(mask == 4, 3, mask).astype(np.uint8) if newer else mask
        path = folder / (segmentation or f"{name}{'-' if newer else '_'}seg{ending}")
        nibabel.save(nibabel.Nifti1Image(mask, AS_BRATS), path)
    return folder


def write_hdf5(root: Path, number: int, seed: int, *, scale=lambda volume, z: volume * 0.0137 - 0.83, order=CHANNELS) -> None:
    images, mask = make_case(seed)
    root.mkdir(parents=True, exist_ok=True)
    for z in range(SHAPE[2]):
        with h5py.File(root / f"volume_{number}_slice_{z}.h5", "w") as handle:
            handle["image"] = np.stack([scale(images[channel].astype(float), z)[..., z] for channel in order], axis=-1)
            handle["mask"] = np.stack([mask[..., z] == label for label in (1, 2, 4)], axis=-1).astype(np.uint8)


def write_grades(root: Path, rows: dict[str, str], header: str = "Grade,BraTS_2020_subject_ID", swap: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = [f"{grade},{name}" if swap else f"{name},{grade}" for name, grade in rows.items()]
    (root / "name_mapping.csv").write_text("\n".join([header, *lines]) + "\n")
    return root / "name_mapping.csv"


def independent_labels(images, mask, rule, min_voxels=50, share=0.1):
    """The rules once more, slice by slice, on arrays with the slices last."""
    brain = np.max([(volume > 0).sum((0, 1)) for volume in images.values()], axis=0)
    outcomes = []
    for z in range(mask.shape[2]):
        plane = mask[..., z]
        if not any(volume[..., z].any() for volume in images.values()):
            outcomes.append(labels.EMPTY)
        elif rule == "thesis":
            outcomes.append(labels.TUMOUR if np.isin(plane, [2, 3, 4]).any() else labels.HEALTHY)
        elif brain[z] < share * brain.max():
            outcomes.append(labels.LITTLE_BRAIN)
        else:
            count = int((plane > 0).sum())
            outcomes.append(labels.TUMOUR if count >= min_voxels else labels.GREY_ZONE if count else labels.HEALTHY)
    return outcomes


@pytest.mark.parametrize("rule", ["default", "thesis"])
def test_slices_are_called_what_the_rule_written_out_calls_them(rule):
    images, mask = make_case(0)
    native = {channel: volume.T for channel, volume in images.items()}
    windows = [volumes.window(volume) for volume in native.values()]
    brain = np.max([window.brain for window in windows], axis=0)
    present = np.any([window.present for window in windows], axis=0)
    chosen = LabelRule(rule, min_tumour_voxels=20)
    found = label_slices(mask.T, brain, present, rule=chosen)
    assert found.tolist() == independent_labels(images, mask, rule, min_voxels=20)
    outcomes, pairs = compare_rules(mask.T, brain, present, rule=chosen)
    assert outcomes.tolist() == found.tolist()
    thesis = independent_labels(images, mask, "thesis")
    default = independent_labels(images, mask, "default", min_voxels=20)
    expected = [f"thesis {a} / default {b}" for a, b in zip(thesis, default, strict=True)]
    assert pairs == {pair: expected.count(pair) for pair in set(expected)}


def test_necrosis_alone_is_healthy_to_the_thesis_and_tumour_by_default():
    mask = np.zeros((2, 10, 10), np.uint8)
    mask[0, :8] = 1
    brain, present = np.full(2, 100), np.full(2, True)
    assert label_slices(mask, brain, present, rule=LabelRule("thesis")).tolist() == ["healthy", "healthy"]
    assert label_slices(mask, brain, present, rule=LabelRule("default")).tolist() == ["tumour", "healthy"]


def test_labels_4_and_3_mean_the_same_and_others_are_refused():
    mask = make_case(0)[1].T
    brain, present = np.full(len(mask), 100), np.full(len(mask), True)
    for rule in (LabelRule("thesis"), LabelRule()):
        old = label_slices(mask, brain, present, rule=rule)
        new = label_slices(np.where(mask == 4, 3, mask), brain, present, rule=rule, convention=labels.CONVENTIONS["brats2023"])
        assert old.tolist() == new.tolist()
    with pytest.raises(DataError, match=r"label\(s\) \[1, 4, 7\]"):
        label_slices(np.where(mask == 2, 7, mask), brain, present, rule=LabelRule())


@pytest.mark.parametrize("options", [{"name": "thesiss"}, {"min_tumour_voxels": 0}, {"min_brain_share": 1.5}])
def test_impossible_rules_are_refused(options):
    with pytest.raises(ConfigError):
        LabelRule(**options)


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<f4", "<f8", "<i4"])
@pytest.mark.parametrize("zipped", [False, True])
def test_decoding_equals_nibabel(dtype, zipped):
    data = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    header = nibabel.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    raw = nibabel.Nifti1Image(data, np.eye(4), header).to_bytes()
    found, affine = decode(gzip.compress(raw) if zipped else raw, Path("x.nii"))
    np.testing.assert_array_equal(found, nibabel.Nifti1Image.from_bytes(raw).get_fdata().T)
    np.testing.assert_array_equal(affine, nibabel.Nifti1Image.from_bytes(raw).affine)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")


def test_decoding_applies_the_slope_and_reads_nifti_2():
    image = nibabel.Nifti2Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    raw = image.to_bytes()
    np.testing.assert_allclose(decode(raw, Path("x"))[0], nibabel.Nifti2Image.from_bytes(raw).get_fdata().T)


def _raw() -> bytes:
    return nibabel.Nifti1Image(make_case(0)[0]["t1"], np.eye(4)).to_bytes()


def _flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too early"),
        (b"not a scan" * 100, "no NIfTI"),
        (_raw()[:5000], "too early"),
        (gzip.compress(_raw())[:3000], "too early|cut short"),
        (gzip.compress(_raw())[:-4], "cut short"),
        (_flipped(gzip.compress(_raw()), -6), "damaged gzip"),
        (_raw()[:40] + b"\xff\x7f" * 8 + _raw()[56:], "header|shape"),
        (nibabel.Nifti1Image(np.zeros((3, 3, 3, 2), np.int16), np.eye(4)).to_bytes(), "three axes"),
        (nibabel.Nifti1Image(np.zeros((3, 3, 3), np.complex64), np.eye(4)).to_bytes(), "plain NIfTI"),
    ],
)
def test_damaged_files_are_named(raw, message):
    with pytest.raises(DataError, match=rf"scan\.nii.*({message})"):
        decode(raw, Path("scan.nii"))


def test_pixels_are_percentiles_of_the_brain_resized_as_pillow_does():
    volume = make_case(3)[0]["t2"].T
    limits = volumes.window(volume)
    inside = np.sort(volume[volume > 0])
    low, high = inside[int(0.01 * (inside.size - 1))], inside[int(np.ceil(0.99 * (inside.size - 1)))]
    assert (limits.low, limits.high) == (low, high)
    expected = np.floor(np.clip((volume.astype(float) - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)
    keep = np.arange(2, 12)
    rendered = volumes.Renderer()
    rendered.add("t2", volume)
    np.testing.assert_array_equal(rendered.resized(keep, volume.shape[1:])["t2"], expected[keep])
    small = rendered.resized(keep, (9, 11))["t2"]
    oracle = np.stack([np.asarray(Image.fromarray(plane).resize((11, 9), Image.Resampling.BILINEAR)) for plane in expected[keep]])
    assert np.abs(small.astype(int) - oracle).max() <= 1


@pytest.mark.parametrize("size", [(224, 224), (128, 96), (240, 155), (101, 90), (300, 480)])
def test_only_the_brain_is_resized_to_the_same_bytes_as_the_whole(size):
    rng = np.random.default_rng(size[0])
    for top, bottom, left, right in ((0, 240, 0, 240), (45, 216, 46, 191), (1, 239, 100, 101), (238, 240, 0, 3)):
        volume = np.zeros((6, 240, 240), np.int16)
        volume[1:5, top:bottom, left:right] = rng.integers(1, 3000, (4, bottom - top, right - left))
        rendered = volumes.Renderer()
        rendered.add("t1", volume)
        whole = torch.from_numpy(rendered.resized(np.arange(6), (240, 240))["t1"])[:, None].expand(-1, 4, -1, -1)
        interleaved = whole.contiguous(memory_format=torch.channels_last)
        expected = torch.nn.functional.interpolate(interleaved, size, mode="bilinear", antialias=True)[:, 0]
        np.testing.assert_array_equal(rendered.resized(np.arange(6), size)["t1"], expected.numpy())


def test_a_volume_without_contrast_or_brain():
    volume = np.zeros((3, 4, 4), np.int16)
    with pytest.raises(DataError, match="nothing above its background"):
        volumes.window(volume)
    volume[1, 1, 1] = 7
    keep = np.arange(3)
    rendered = volumes.Renderer()
    rendered.add("t1", volume)
    np.testing.assert_array_equal(rendered.resized(keep, (4, 4))["t1"], np.where(volume == 7, 255, 0))
    with pytest.raises(DataError, match="not finite"):
        volumes.window(np.where(volume == 7, np.nan, 0.0))


def test_a_stray_voxel_beyond_single_precision_is_white_and_the_rest_as_without_it():
    volume = np.zeros((2, 30, 30), np.float32)
    volume[:, 5:25, 5:25] = np.random.default_rng(0).uniform(1e-6, 2e-6, (2, 20, 20))
    limits = volumes.window(volume)
    plain = volumes.to_bytes(volume, limits.low, limits.high)
    volume[0, 7, 7] = 3e38
    stray = volumes.to_bytes(volume, limits.low, limits.high)
    assert stray[0, 7, 7] == 255
    plain[0, 7, 7] = 255
    np.testing.assert_array_equal(stray, plain)


def test_the_commonest_value_need_not_be_the_corner():
    volume = np.full((3, 5, 5), 4.0)
    volume[:, 0, 0] = 2
    volume[1, 2:] = [[5], [6], [7]]
    assert volumes.commonest(volume) == 4
    limits = volumes.window(volume)
    assert limits.brain.tolist() == [0, 15, 0]
    assert limits.present.tolist() == [True, True, True]


@pytest.mark.parametrize("rule", ["default", "thesis"])
def test_nifti_and_hdf5_give_the_same_labels_and_pixels_within_one(tmp_path, rule):
    options = {"rule": rule, "min_tumour_voxels": 20}
    order = ("t1", "flair", "t2", "t1ce")
    for number, grade in ((1, "HGG"), (2, "LGG")):
        write_nifti(tmp_path / "nifti", f"BraTS20_Training_{number:03d}", number)
        write_hdf5(tmp_path / "hdf5" / "content" / "data", number, number, order=order)
        grades = {f"BraTS20_Training_{n:03d}": g for n, g in ((1, "HGG"), (2, grade))}
    write_grades(tmp_path / "nifti", grades)
    write_grades(tmp_path / "hdf5" / "content" / "data", grades)
    nifti = open_source("brats_nifti", tmp_path / "nifti", **options)
    hdf5 = open_source("brats_hdf5", tmp_path / "hdf5", channel_order=order, **options)
    assert nifti.problems() == hdf5.problems() == []
    for left, right in zip(nifti.units(), hdf5.units(), strict=True):
        assert (left.patient, left.label) == (right.patient, right.label)
        a, b = nifti.read(left, (17, 15)), hdf5.read(right, (17, 15))
        assert a.rows == b.rows
        assert a.tally == b.tally
        assert b.problems == ()
        for channel in CHANNELS:
            assert np.abs(a.pixels[channel].astype(int) - b.pixels[channel]).max() <= 1
            assert a.pixels[channel].std() > 20


@pytest.mark.parametrize("newer", [False, True])
def test_the_mask_is_a_channel_where_it_is_asked_for_with_its_nearest_labels(tmp_path, newer):
    name, size = "BraTS20_Training_001", (17, 30)
    write_nifti(tmp_path / "nifti", name, 1, newer=newer)
    write_hdf5(tmp_path / "hdf5", 1, 1)
    for root in ("nifti", "hdf5"):
        write_grades(tmp_path / root, {name: "HGG"})
    greys = np.zeros(5, np.uint8)
    greys[[1, 2, 3, 4]] = 85, 170, 255, 255
    _, labels_of = make_case(1)
    rows, columns = (np.floor((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, SHAPE[1::-1], strict=True))
    for kind, root in (("brats_nifti", "nifti"), ("brats_hdf5", "hdf5")):
        source = open_source(kind, tmp_path / root, channels="flair,t2", mask=True, min_tumour_voxels=5)
        assert source.channels == ("flair", "t2", "mask")
        found = source.read(source.units()[0], size)
        expected = greys[labels_of].T[[row["slice"] for row in found.rows]][:, rows][:, :, columns]
        assert np.array_equal(found.pixels["mask"], expected)
        assert set(np.unique(found.pixels["mask"])) == {0, 85, 170, 255}
        plain = open_source(kind, tmp_path / root, channels="flair,t2", min_tumour_voxels=5)
        assert plain.channels == tuple(plain.read(plain.units()[0], size).pixels) == ("flair", "t2")


@pytest.mark.parametrize("what", ["z-score", "top"])
def test_a_scaling_per_slice_is_told_and_not_held_against_a_scaling_per_volume(tmp_path, what):
    def by_slice(volume, z):
        plane = volume[..., z]
        spread = plane.std() if what == "z-score" else plane.max()
        return (volume - (plane.mean() if what == "z-score" else 0)) / (spread or 1)

    write_hdf5(tmp_path, 1, 0, scale=by_slice)
    write_grades(tmp_path, {"BraTS20_Training_001": "LGG"})
    source = open_source("brats_hdf5", tmp_path, min_tumour_voxels=20)
    slices = source.read(source.units()[0], (8, 8))
    assert ["scaled by itself" in problem.what and problem.level == "warning" for problem in slices.problems] == [True]
    expected = independent_labels(*make_case(0), "default", min_voxels=20)
    assert [row["slice"] for row in slices.rows] == [z for z, name in enumerate(expected) if name in ("tumour", "healthy")]


def test_both_naming_schemes_uncompressed_files_and_subsets_read_the_same(tmp_path):
    write_nifti(tmp_path, "a", 5)
    write_nifti(tmp_path, "b", 5, newer=True, ending=".nii")
    write_grades(tmp_path, {"a": "HGG", "b": "lgg"}, header="patient,grade", swap=False)
    source = open_source("brats_nifti", tmp_path, min_tumour_voxels=20)
    first, second = (source.read(unit, (16, 16)) for unit in source.units())
    assert [row["slice"] for row in first.rows] == [row["slice"] for row in second.rows]
    assert {row["label"] for row in second.rows} == {"healthy", "LGG"}
    alone = open_source("brats_nifti", tmp_path, channels=["t1ce"])
    only = alone.read(alone.units()[0], (16, 16)).pixels
    assert list(only) == ["t1ce"]
    for channel in CHANNELS:
        np.testing.assert_array_equal(first.pixels[channel], second.pixels[channel])


@pytest.mark.parametrize("header", ["Grade,BraTS_2019_subject_ID", "Grade,BraTS_2020_subject_ID"])
def test_grades_come_from_any_years_column(tmp_path, header):
    write_nifti(tmp_path, "case", 0)
    write_grades(tmp_path, {"case": "LGG"}, header)
    assert [unit.label for unit in open_source("brats_nifti", tmp_path).units()] == ["LGG"]


@pytest.mark.skipif(not (REAL / "brats-tables").is_dir(), reason="../shared/data/brats-tables is absent")
def test_the_real_table_of_2019_names_259_high_and_76_low_grades(tmp_path):
    from raredistill.cohort.sources.grades import read_grades

    grades = read_grades(tmp_path, REAL / "brats-tables" / "BraTS2019_name_mapping.csv")
    listed = {name: next(iter(grade)) for name, grade in grades.values.items() if name.startswith("BraTS19")}
    assert sorted(listed.values()).count("HGG") == 259
    assert sorted(listed.values()).count("LGG") == 76
    assert all(len(found) == 1 for found in grades.values.values())


def test_the_misnamed_segmentation_of_case_355_is_found_and_told(tmp_path):
    write_nifti(tmp_path, "BraTS20_Training_355", 0, segmentation="W39_1998.09.19_Segm.nii")
    write_grades(tmp_path, {"BraTS20_Training_355": "HGG"})
    source = open_source("brats_nifti", tmp_path)
    assert [(problem.level, problem.what) for problem in source.problems()] == [("note", "misnamed segmentation, taken as the case's own")]
    assert source.units()[0].files[-1].name == "W39_1998.09.19_Segm.nii"


def test_every_problem_of_a_nifti_folder_is_told_at_once(tmp_path):
    for name in ("good", "bare", "gradeless", "odd", "twice", "holed"):
        write_nifti(tmp_path, name, 0, segmentation=None if name == "bare" else "")
    (tmp_path / "holed" / "holed_t2.nii.gz").unlink()
    write_grades(tmp_path, {"good": "HGG", "odd": "X", "holed": "LGG", "twice": "HGG"})
    with (tmp_path / "name_mapping.csv").open("a") as handle:
        handle.write("LGG,twice\n")
    source = open_source("brats_nifti", tmp_path)
    told = {(problem.level, problem.patient, problem.what) for problem in source.problems()}
    assert told == {
        ("note", "bare", "no segmentation"),
        ("error", "gradeless", "the table has no row for the patient"),
        ("error", "odd", "unknown grade 'X'"),
        ("error", "twice", "the table gives two grades (HGG and LGG)"),
        ("error", "holed", "no t2 file"),
    }
    assert [unit.patient for unit in source.units()] == ["good"]


def test_modalities_that_disagree_in_shape_are_named(tmp_path):
    folder = write_nifti(tmp_path, "case", 0)
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 6, 7), np.int16), AS_BRATS), folder / "case_t1.nii.gz")
    write_grades(tmp_path, {"case": "HGG"})
    source = open_source("brats_nifti", tmp_path)
    with pytest.raises(DataError, match=r"case: modalities disagree in shape .*case_t1\.nii\.gz \(5, 6, 7\)"):
        source.read(source.units()[0], (8, 8))


def test_a_gap_in_the_slices_is_a_warning_and_an_empty_folder_an_error(tmp_path):
    write_hdf5(tmp_path / "a", 4, 0)
    write_grades(tmp_path / "a", {"BraTS20_Training_004": "HGG"})
    (tmp_path / "a" / "volume_4_slice_6.h5").unlink()
    source = open_source("brats_hdf5", tmp_path / "a")
    assert [(problem.level, problem.what) for problem in source.problems()] == [("warning", "1 of 14 slices are missing (6)")]
    rows = source.read(source.units()[0], (8, 8)).rows
    expected = independent_labels(*make_case(0), "default")
    assert [row["slice"] for row in rows] == [z for z, name in enumerate(expected) if name in ("tumour", "healthy") and z != 6]
    (tmp_path / "b").mkdir()
    for kind in ("brats_hdf5", "brats_nifti"):
        assert [problem.level for problem in open_source(kind, tmp_path / "b").problems()] == ["error"]


def test_links_out_of_an_hdf5_file_are_refused(tmp_path):
    write_hdf5(tmp_path, 1, 0)
    write_grades(tmp_path, {"BraTS20_Training_001": "HGG"})
    (tmp_path / "volume_1_slice_2.h5").write_bytes(b"rubbish")
    with h5py.File(tmp_path / "volume_1_slice_3.h5", "w") as handle:
        handle["image"] = h5py.ExternalLink("volume_1_slice_4.h5", "/image")
        handle["mask"] = np.zeros((*SHAPE[:2], 3), np.uint8)
    source = open_source("brats_hdf5", tmp_path)
    with pytest.raises(DataError, match=r"slice_2\.h5: cannot be decoded.*slice_3\.h5: has no dataset 'image' of its own"):
        source.read(source.units()[0], (8, 8))


def test_the_registry_knows_names_and_suggests(tmp_path):
    with pytest.raises(ConfigError, match="did you mean brats_nifti"):
        open_source("brats_nift", tmp_path)
    with pytest.raises(ConfigError, match="did you mean min_tumour_voxels"):
        open_source("brats_nifti", tmp_path, min_tumor_voxels=3)
    with pytest.raises(ConfigError, match="min_tumour_voxels='many' does not fit"):
        open_source("brats_nifti", tmp_path, min_tumour_voxels="many")
    assert open_source("brats_nifti", tmp_path, channels="flair, t2", min_tumour_voxels="7").settings()["channels"] == ["flair", "t2"]
    with pytest.raises(DataError, match="no such file or folder"):
        open_source("brats_nifti", tmp_path / "absent")
    with pytest.raises(ConfigError, match="unknown channel"):
        open_source("brats_nifti", tmp_path, channels=["t3"])
    with pytest.raises(ConfigError, match="channel_order"):
        open_source("brats_hdf5", tmp_path, channel_order=["flair"])
    (tmp_path / "name_mapping.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="has the columns a, b; needed are patient,grade"):
        open_source("brats_nifti", tmp_path)


def test_generated_data_says_so(tmp_path):
    write_hdf5(tmp_path / "a" / "b", 1, 0)
    write_nifti(tmp_path, "case", 0)
    sources = [open_source("brats_hdf5", tmp_path / "a" / "b"), open_source("brats_nifti", tmp_path)]
    assert ["generated" in source.settings() for source in sources] == [False, False]
    assert brats.PHANTOM == phantom.MARKER
    (tmp_path / phantom.MARKER).write_text("made")
    assert [source.settings()["generated"] for source in sources] == [True, True]
