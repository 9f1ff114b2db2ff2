from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest

from raredistill.errors import ConfigError, DataError
from raredistill.phantom import CONTRASTS, HDF5_FOLDER, MARKER, grades, load_atlas, make_patient, smooth_noise, write_phantom

SIZE = (48, 48, 31)
DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def atlas():
    return load_atlas(SIZE)


@pytest.fixture(scope="module")
def patients(atlas):
    return [make_patient(atlas, seed=0, index=index, grade="HGG" if index < 20 else "LGG", size=SIZE) for index in range(40)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "set", patients=4, layout="both", size=SIZE, workers=1)


def test_grades_have_the_share_of_brats_2020():
    every = grades(369, 76 / 369)
    assert (every.count("HGG"), every.count("LGG")) == (293, 76)
    assert set(grades(12, 0.25)[:6]) == {"HGG", "LGG"}


def test_a_patient_depends_on_seed_and_number_only(atlas, patients):
    again = make_patient(atlas, seed=0, index=7, grade="HGG", size=SIZE)
    other = make_patient(atlas, seed=1, index=7, grade="HGG", size=SIZE)
    for name in CONTRASTS:
        np.testing.assert_array_equal(again.images[name], patients[7].images[name])
        assert (other.images[name] != patients[7].images[name]).any()


def test_volumes_are_int16_brains_on_a_zero_background_with_the_labels_of_brats(patients):
    for patient in patients:
        brain = np.stack([volume > 0 for volume in patient.images.values()])
        assert all(volume.dtype == np.int16 and volume.min() == 0 for volume in patient.images.values())
        assert (brain == brain[0]).all()
        assert not patient.mask[~brain[0]].any()
        assert set(np.unique(patient.mask)) <= {0, 1, 2, 4}
        litres = brain[0].sum() * np.prod(np.array([240, 240, 155]) / SIZE) / 1e6
        assert 0.9 < litres < 1.9  # adult brains with fluid


def test_shares_of_empty_and_tumour_slices_are_those_of_brats(patients):
    """BraTS2020: 6,296 of 57,195 slices are empty (11 %), 24,325 (43 %) hold tumour."""
    empty = np.mean([~(patient.images["t1"] > 0).any((0, 1)) for patient in patients])
    tumour = np.mean([(patient.mask > 0).any((0, 1)) for patient in patients])
    assert 0.06 < empty < 0.16
    assert 0.33 < tumour < 0.53


def median_in(patient, contrast, where):
    return np.median(patient.images[contrast][where])


def test_each_contrast_orders_tissue_as_a_scanner_does(patients):
    """White matter is brighter than grey in T1 and darker in T2; oedema is bright in flair; told by the brightness of T1 itself."""
    for patient in patients:
        healthy = (patient.mask == 0) & (patient.images["t1"] > 0)
        low, high = np.percentile(patient.images["t1"][healthy], [15, 85])
        fluid, white = healthy & (patient.images["t1"] < low), healthy & (patient.images["t1"] > high)
        assert median_in(patient, "t2", white) < median_in(patient, "t2", fluid)
        assert median_in(patient, "flair", patient.mask == 2) > 1.3 * median_in(patient, "flair", healthy)


def enhancement(patient):
    """Contrast uptake of the tumour: 98th percentile of t1ce in it over the median of white matter in t1ce."""
    white = (patient.mask == 0) & (patient.images["t1"] > np.percentile(patient.images["t1"][patient.images["t1"] > 0], 75))
    return np.percentile(patient.images["t1ce"][patient.mask > 0], 98) / median_in(patient, "t1ce", white)


def test_enhancement_tells_the_grades_apart_but_not_perfectly(patients):
    high, low = (np.array([enhancement(patient) for patient in patients if patient.grade == grade]) for grade in ("HGG", "LGG"))
    auroc = (high[:, None] > low[None]).mean()
    assert 0.7 < auroc < 0.97


def test_high_grades_have_a_rim_around_necrosis_and_most_low_grades_no_rim(patients):
    with_rim = {grade: np.mean([(patient.mask == 4).any() for patient in patients if patient.grade == grade]) for grade in ("HGG", "LGG")}
    assert with_rim["HGG"] == 1
    assert 0.05 < with_rim["LGG"] < 0.5


def test_noise_has_about_unit_variance_at_its_knots():
    rng = np.random.default_rng(0)
    knots = np.stack([smooth_noise(rng, (5, 5, 5), 5) for _ in range(50)])
    assert abs(knots.mean()) < 0.05
    assert abs(knots.std() - 1) < 0.05


def test_nifti_files_carry_names_spacing_and_tables_of_brats(written):
    case = written / "BraTS20_Training_002"
    assert sorted(file.name for file in case.iterdir()) == sorted(f"{case.name}_{name}.nii.gz" for name in (*CONTRASTS, "seg"))
    image = nibabel.load(case / f"{case.name}_flair.nii.gz")
    assert image.shape == SIZE
    assert image.get_data_dtype() == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_allclose(image.header.get_zooms(), np.array([240, 240, 155]) / SIZE, rtol=1e-5)
    mapping = pd.read_csv(written / "name_mapping.csv")
    assert mapping["Grade"].tolist() == grades(4, 76 / 369)
    assert mapping["BraTS_2020_subject_ID"].tolist() == [f"BraTS20_Training_{number:03d}" for number in range(1, 5)]
    assert "generated" in (written / MARKER).read_text().lower()


@pytest.mark.skipif(not DATA.exists(), reason="the shared data folder is absent")
def test_tables_have_the_real_columns(written):
    survival = pd.read_csv(DATA / "brats-tables" / "BraTS2020_survival_info.csv")
    mapping = pd.read_csv(DATA / "brats-tables" / "BraTS2019_name_mapping.csv")
    assert list(pd.read_csv(written / "survival_info.csv")) == list(survival)
    assert list(pd.read_csv(written / "name_mapping.csv")) == [*mapping, "BraTS_2020_subject_ID"]


def test_hdf5_slices_are_an_increasing_affine_copy_of_the_same_patients(written):
    folder = written / HDF5_FOLDER
    table = pd.read_csv(folder / "meta_data.csv")
    assert len(table) == len(list(folder.glob("*.h5"))) == 4 * SIZE[2]
    case = written / "BraTS20_Training_003"
    volumes = np.stack([np.asarray(nibabel.load(case / f"{case.name}_{name}.nii.gz").dataobj) for name in CONTRASTS], axis=-1)
    mask = np.asarray(nibabel.load(case / f"{case.name}_seg.nii.gz").dataobj)
    slices, masks = [], []
    for depth in range(SIZE[2]):
        with h5py.File(folder / f"volume_3_slice_{depth}.h5") as archive:
            slices.append(archive["image"][:])
            masks.append(archive["mask"][:])
    copy = np.stack(slices, axis=2)
    assert copy.dtype == np.float64
    for channel in range(4):
        slope, offset = np.polyfit(volumes[..., channel].ravel(), copy[..., channel].ravel(), 1)
        assert slope > 0
        np.testing.assert_allclose(volumes[..., channel] * slope + offset, copy[..., channel], atol=1e-9)
    np.testing.assert_array_equal(np.stack(masks, axis=2) @ np.array([1, 2, 4], np.uint8), mask)
    target = table[table["volume"] == 3].sort_values("slice")["target"]
    assert target.tolist() == mask.any((0, 1)).astype(int).tolist()


def test_writing_again_is_identical_in_any_number_of_processes_and_leaves_no_stale_patient(tmp_path, written):
    seen = []
    (tmp_path / "set" / "BraTS20_Training_009").mkdir(parents=True)
    (tmp_path / "set" / MARKER).touch()
    write_phantom(tmp_path / "set", patients=4, size=SIZE, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(list((tmp_path / "set").glob("BraTS20_Training_*"))) == 4
    for file in sorted((tmp_path / "set").glob("BraTS20*/*")):
        assert file.read_bytes() == (written / file.relative_to(tmp_path / "set")).read_bytes()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="something else"):
        write_phantom(tmp_path, patients=1, size=SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("options", [{"layout": "dicom"}, {"patients": 0}, {"size": (8, 8, 8)}, {"rare_share": 1.5}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(ConfigError):
        write_phantom(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()
