"""Order, views and pixels of an epoch: functions of (seed, epoch, sample), against scipy and a plain loop."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from raredistill import memory
from raredistill.augment import MIXINGS, PRESETS, Augmentation, Mixing, Params, apply, make_params, mix_params, uniform
from raredistill.batches import Batches
from raredistill.cohort.store import Cohort, PixelReader
from raredistill.errors import ConfigError, DataError
from raredistill.sampling import epoch_order

CPU = torch.device("cpu")


def params(number, **changes):
    ones, zeros = torch.ones(number), torch.zeros(number)
    plain = {
        "angle": zeros,
        "zoom": ones,
        "hsign": ones,
        "vsign": ones,
        "brightness": ones,
        "contrast": ones,
        "right": zeros,
        "down": zeros,
    }
    return Params(**{**plain, **{name: torch.full((number,), float(value)) for name, value in changes.items()}})


@pytest.fixture
def images():
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((2, 1, 32, 24)), (0, 0, 3, 3))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return torch.from_numpy(smooth.astype(np.float32))


def test_natural_serves_each_sample_once_and_balanced_each_class_equally():
    labels = np.array([0] * 80 + [1] * 16 + [2] * 4)
    assert sorted(epoch_order(labels, sampler="natural", seed=0, epoch=0)) == list(range(100))
    balanced = epoch_order(labels, sampler="balanced", seed=0, epoch=0)
    assert sorted(np.bincount(labels[balanced])) == [33, 33, 34]
    rare = np.bincount(balanced, minlength=100)[96:]
    assert rare.max() - rare.min() <= 1
    root = np.bincount(labels[epoch_order(labels, sampler="sqrt", seed=0, epoch=0)])
    np.testing.assert_allclose(root / 100, np.sqrt([80, 16, 4]) / np.sqrt([80, 16, 4]).sum(), atol=0.01)


def test_progressive_sampling_goes_from_natural_to_balanced():
    labels = np.array([0] * 80 + [1] * 16 + [2] * 4)
    epochs = [epoch_order(labels, sampler="progressive", seed=0, epoch=epoch, epochs=11) for epoch in (0, 5, 10)]
    assert sorted(epochs[0]) == list(range(100))
    shares = [np.bincount(labels[order]) / 100 for order in epochs[1:]]
    np.testing.assert_allclose(shares[0], (np.array([0.8, 0.16, 0.04]) + 1 / 3) / 2, atol=0.01)
    np.testing.assert_allclose(shares[1], [1 / 3] * 3, atol=0.01)


def test_order_is_a_function_of_seed_and_epoch():
    labels = np.arange(50) % 3
    orders = [epoch_order(labels, sampler="natural", seed=seed, epoch=epoch).tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3]
    with pytest.raises(ConfigError, match="balanced"):
        epoch_order(labels, sampler="blanced", seed=0, epoch=0)


def test_views_do_not_depend_on_the_batch_and_are_uniform():
    whole = make_params(PRESETS["default"], seed=3, epoch=5, samples=np.arange(1000))
    part = make_params(PRESETS["default"], seed=3, epoch=5, samples=np.array([777, 3]))
    assert part.angle.tolist() == whole.angle[[777, 3]].tolist()
    drawn = uniform(0, 0, np.arange(20_000), 0)
    assert stats.kstest(drawn, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(drawn, uniform(0, 1, np.arange(20_000), 0))[0, 1]) < 0.03


def test_no_change_leaves_the_image(images):
    torch.testing.assert_close(apply(images, params(2)), images, atol=1e-5, rtol=0)


def test_flips_are_exact(images):
    torch.testing.assert_close(apply(images, params(2, hsign=-1)), images.flip(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(apply(images, params(2, vsign=-1)), images.flip(2), atol=1e-5, rtol=0)


def test_rotation_and_zoom_equal_scipys_affine(images):
    angle, zoom = 0.3, 1.1
    ours = apply(images, params(2, angle=angle, zoom=zoom))[0, 0].numpy()
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / zoom
    centre = (np.array(ours.shape) - 1) / 2
    expected = ndimage.affine_transform(images[0, 0].numpy(), matrix, centre - matrix @ centre, order=1)
    inside = (slice(8, 24), slice(6, 18))
    np.testing.assert_allclose(ours[inside], expected[inside], atol=1e-4)


def test_brightness_and_contrast_follow_their_formula(images):
    ours = apply(images, params(2, brightness=0.9, contrast=1.2))
    mean = images.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(ours, (0.9 * (mean + 1.2 * (images - mean))).clamp(0, 1), atol=1e-5, rtol=0)


def batches(cohort, residence="resident", **settings):
    known = {"channels": ("flair", "t1ce"), "batch_size": 16, "device": CPU, "augmentation": PRESETS["default"], "seed": 7}
    return Batches(cohort, np.arange(5, 95), residence=residence, **{**known, **settings})


def test_streamed_batches_equal_resident_ones_bit_for_bit(tiny_cohort):
    for one, other in zip(batches(tiny_cohort).epoch(2), batches(tiny_cohort, "streamed").epoch(2), strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_a_sample_has_one_view_an_epoch_whatever_the_batch_size(tiny_cohort):
    def views(size):
        return {
            int(row): image
            for batch in batches(tiny_cohort, batch_size=size).epoch(1)
            for row, image in zip(batch.rows, batch.images, strict=True)
        }

    one, other = views(16), views(7)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[row], other[row], atol=1e-6) for row in one)


def test_plain_batches_are_the_pixels_in_order(tiny_cohort):
    plain = list(batches(tiny_cohort, shuffle=False, augmentation=None).epoch(0))
    images = torch.cat([batch.images for batch in plain])
    np.testing.assert_allclose(images[:, 1].numpy() * 255, tiny_cohort.pixels("t1ce")[5:95], atol=1e-4)
    assert torch.cat([batch.labels for batch in plain]).tolist() == tiny_cohort.labels[5:95].tolist()
    assert len(batches(tiny_cohort)) == 6
    assert len(batches(tiny_cohort, drop_last=True)) == 5 == len(list(batches(tiny_cohort, drop_last=True).epoch(0)))


def test_teacher_and_student_see_the_same_view_in_their_own_channels(tiny_cohort):
    batch = next(batches(tiny_cohort).epoch(0))
    assert torch.equal(batch.select(("t1ce",))[:, 0], batch.images[:, 1])
    assert torch.equal(batch.select(("t1ce", "flair")), batch.images.flip(1))


def test_a_channels_view_does_not_depend_on_which_channels_are_read_with_it(tiny_cohort):
    both = next(batches(tiny_cohort).epoch(0))
    alone = batches(tiny_cohort, channels=("t1ce",))
    torch.testing.assert_close(next(alone.epoch(0)).images, both.select(("t1ce",)), atol=1e-6, rtol=0)


def test_epochs_cycle_through_the_views_but_not_through_the_orders(tiny_cohort):
    cycling = batches(tiny_cohort, views=2)
    orders = [torch.cat([batch.rows for batch in cycling.epoch(epoch)]) for epoch in range(3)]
    images = [torch.cat([batch.images for batch in cycling.epoch(epoch)])[order.argsort()] for epoch, order in enumerate(orders)]
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert [next(cycling.epoch(epoch)).view for epoch in range(4)] == [0, 1, 0, 1]


def test_rows_are_read_from_the_files_as_numpy_indexes_them(tiny_cohort, monkeypatch):
    rows = np.concatenate([np.arange(10, 40), [3, 99, 3], np.arange(60, 55, -1)])
    expected = np.stack([tiny_cohort.pixels(channel)[rows] for channel in ("t1ce", "flair")], axis=1)
    monkeypatch.setattr("raredistill.cohort.store.AT_ONCE", 7)  # so that runs of rows are cut, too
    with PixelReader(tiny_cohort, ("t1ce", "flair")) as reader:
        out = np.zeros_like(expected)
        reader.read(rows, out)
        reader.read(rows[:0], out[:0])
    np.testing.assert_array_equal(out, expected)


def test_a_file_that_is_cut_while_it_is_streamed_is_told(tiny_cohort, tmp_path):
    shutil.copytree(tiny_cohort.root, tmp_path / "copy")
    served = batches(Cohort.load(tmp_path / "copy"), "streamed")
    os.truncate(tmp_path / "copy" / "pixels" / "t1ce.u8", 1000)
    with pytest.raises(DataError, match=r"t1ce\.u8 was cut short"):
        list(served.epoch(0))


def test_pixels_that_exceed_the_memory_are_streamed_or_refused_before_training(tiny_cohort, monkeypatch):
    needed = 90 * 2 * tiny_cohort.size[0] * tiny_cohort.size[1]
    monkeypatch.setattr("raredistill.memory.available", lambda: needed - 1)
    with pytest.raises(ConfigError, match=r"residence: 90 samples of 2 channel.* set residence=auto or streamed, .*--size, or name fewer"):
        batches(tiny_cohort, "resident")
    assert len(list(batches(tiny_cohort, "auto").epoch(0))) == 6
    monkeypatch.setattr("raredistill.memory.available", lambda: needed)
    assert len(list(batches(tiny_cohort, "resident").epoch(0))) == 6


def test_resident_pixels_are_counted_for_each_process_that_holds_them(tiny_cohort, monkeypatch):
    needed = 90 * 2 * tiny_cohort.size[0] * tiny_cohort.size[1]
    monkeypatch.setattr("raredistill.memory.available", lambda: 2 * needed - 1)
    with pytest.raises(ConfigError, match="residence: 90 samples"):
        batches(tiny_cohort, "resident", share=(0, 2))
    assert len(batches(tiny_cohort, "resident")) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of other systems has no such switch")
def test_what_a_process_keeps_for_its_next_step_counts_as_free():
    def own():
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    memory.keep_freed(2**30)
    before = own()
    torch.ones(2**26)  # 256 MiB, freed at once
    assert own() > before + 2**27  # kept
    memory.available()
    assert own() < before + 2**27  # given back


def test_free_memory_is_the_least_of_the_machines_and_what_a_container_grants(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 700 kB\n")
    (tmp_path / "group").write_text("0::/outer/inner\n")
    inner = tmp_path / "groups" / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (inner.parent, "600000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("500000")
        (folder / "memory.stat").write_text("anon 300000\ninactive_file 200000\n")
    for name, value in (("MEMINFO", "meminfo"), ("GROUP", "group"), ("GROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / value)
    assert memory.available() == 600000 - 500000 + 200000
    (inner.parent / "memory.max").write_text("9000000")
    assert memory.available() == 700 * 1024
    (tmp_path / "group").unlink()
    assert memory.available() == 700 * 1024


def test_an_abandoned_stream_ends_its_reader(tiny_cohort):
    import threading
    import time

    before = threading.active_count()
    stream = batches(tiny_cohort, "streamed", batch_size=2).epoch(0)
    next(stream)
    stream.close()
    time.sleep(0.6)
    assert threading.active_count() == before


def test_unknown_residence_is_refused(tiny_cohort):
    with pytest.raises(ConfigError, match="streamed"):
        batches(tiny_cohort, "steamed")


def test_presets_say_what_they_do():
    assert PRESETS["none"] is None
    assert PRESETS["thesis"] == Augmentation(rotation=30, hflip=0.5, vflip=0.5, scale=(0.9, 1.1), brightness=0.2, contrast=0.2)


def test_crops_are_whole_pixels_of_the_padded_image(images):
    shifted = apply(images, params(2, right=3, down=-2))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    np.testing.assert_allclose(shifted.numpy(), padded[:, :, 2 : 2 + 32, 7 : 7 + 24], atol=1e-5)
    drawn = make_params(PRESETS["cifar"], seed=0, epoch=0, samples=np.arange(9000))
    assert stats.chisquare(np.bincount((drawn.right + 4).int().numpy(), minlength=9)).pvalue > 0.001
    assert set(drawn.down.tolist()) == set(range(-4, 5))


def test_partners_and_strengths_are_functions_of_the_sample():
    whole = mix_params(Mixing(alpha=0.4), seed=1, epoch=2, samples=np.arange(5000), population=50)
    part = mix_params(Mixing(alpha=0.4), seed=1, epoch=2, samples=np.array([70, 3]), population=50)
    assert part[0].tolist() == whole[0][[70, 3]].tolist()
    assert part[1].tolist() == whole[1][[70, 3]].tolist()
    assert stats.kstest(whole[1], stats.beta(0.4, 0.4).cdf).pvalue > 0.001
    assert stats.chisquare(np.bincount(whole[0], minlength=50)).pvalue > 0.001


@pytest.mark.parametrize("residence", ["resident", "streamed"])
def test_a_mixed_batch_is_its_samples_and_their_partners(tiny_cohort, residence):
    rows = np.arange(10, 90)
    known = {"channels": ("flair",), "batch_size": 32, "device": CPU, "seed": 7, "residence": residence}
    batch = next(Batches(tiny_cohort, rows, mixing=MIXINGS["mixup"], **known).epoch(3))
    partners, own = mix_params(Mixing(), seed=7, epoch=3, samples=batch.rows.numpy(), population=80)
    pixels = tiny_cohort.pixels("flair")
    expected = own[:, None, None] * (pixels[batch.rows.numpy()] / 255) + (1 - own[:, None, None]) * (pixels[rows[partners]] / 255)
    np.testing.assert_allclose(batch.images[:, 0].numpy(), expected, atol=1e-6)
    assert batch.labels.tolist() == tiny_cohort.labels[batch.rows.numpy()].tolist()
    assert batch.mixed.labels.tolist() == tiny_cohort.labels[rows[partners]].tolist()
    np.testing.assert_allclose(batch.mixed.share.numpy(), own, atol=1e-6)


def test_remix_gives_the_label_to_the_rarer_class_where_counts_differ_enough():
    counts = torch.tensor([90.0, 40.0, 30.0])
    own = torch.tensor([0.4, 0.6, 0.7, 0.4, 0.4])
    labels, partners = torch.tensor([0, 0, 2, 2, 0]), torch.tensor([2, 2, 0, 0, 1])
    # A small share of the commoner image: all the partner's; a large one: shared. A large share of the rarer image: all its own; a small
    # one: shared. Counts that differ too little: shared.
    assert MIXINGS["remix"].label_share(own, labels, partners, counts).tolist() == pytest.approx([0.0, 0.6, 1.0, 0.4, 0.4])


def test_part_of_a_batch_is_those_samples(tiny_cohort):
    batch = next(Batches(tiny_cohort, np.arange(40), channels=("flair", "t1ce"), batch_size=16, device=CPU).epoch(1))
    some = batch.at(torch.tensor([5, 2]))
    assert some.rows.tolist() == batch.rows[[5, 2]].tolist()
    assert torch.equal(some.select(("t1ce",)), batch.select(("t1ce",))[[5, 2]])
    assert (some.epoch, some.labels.tolist()) == (1, batch.labels[[5, 2]].tolist())
