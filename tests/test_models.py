import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.interpolate
import timm
import timm.layers.interpolate
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raredistill.checkpoint import Promise, save
from raredistill.errors import CheckpointError, ConfigError
from raredistill.models import ALIASES, Network, create, facts, latency, list_models, resolve, restore, unfold_batch_norm

MOBILENET = Path(__file__).parents[2] / "shared" / "data" / "weights" / "mobilenetv2_100_imagenet_fp16.safetensors"
SMALL = "test_resnet.r160_in1k"  # timm's own network for tests: 0.47 million weights

# torchvision's documentation, ImageNet classifiers: parameters and multiply-adds (Inception without its auxiliary branch).
PUBLISHED = {
    "resnet18": (11_689_512, 1.81e9),
    "densenet121": (7_978_856, 2.83e9),
    "mobilenet_v2": (3_504_872, 0.30e9),
    "vit_b_16": (86_567_656, 17.56e9),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(network: Network, count: int = 2) -> torch.Tensor:
    return torch.rand(count, network.channels, network.image_size, network.image_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_are_the_published_ones(name: str) -> None:
    found = facts(name, channels=3, classes=1000, image_size=224)
    parameters, multiply_adds = PUBLISHED[name]
    assert found.parameters == parameters
    assert found.bytes == 4 * parameters
    assert found.flops == pytest.approx(2 * multiply_adds, rel=0.01)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_sizes_of_the_paper(depth: int, millions: float) -> None:
    # He et al. 2016, table 6.
    found = facts(f"cifar_resnet{depth}", channels=3, classes=10, image_size=32)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.03 if depth == 110 else 0.006)


def test_cifar_resnet_operations_by_hand() -> None:
    # Depth 8: the stem, then a block a stage; a multiply-add counts as two.
    stem = 32 * 32 * 16 * 3 * 9
    stages = 32 * 32 * 2 * 16 * 16 * 9 + 16 * 16 * (16 + 32) * 32 * 9 + 8 * 8 * (32 + 64) * 64 * 9
    assert facts("cifar_resnet8", channels=3, classes=10, image_size=32).flops == 2 * (stem + stages + 64 * 10)


def test_option_a_shortcut_strides_and_pads_zeros() -> None:
    block = create("cifar_resnet8", channels=1, classes=2, image_size=32).body.get_submodule("stages.1.0").eval()
    nn.init.zeros_(block.get_parameter("conv2.weight"))
    given = torch.rand(1, 16, 8, 8)
    found = block(given)
    torch.testing.assert_close(found[:, 8:24], given[:, :, ::2, ::2])
    assert not found[:, :8].any()
    assert not found[:, 24:].any()


@pytest.mark.parametrize("name", ["small_cnn", "cifar_resnet8", "mobilenet_v2", SMALL])
@pytest.mark.parametrize("channels", [1, 4])
def test_logits_are_the_head_of_the_features(name: str, channels: int) -> None:
    network = create(name, channels=channels, classes=3, image_size=48).eval()
    features = network.features(images(network))
    assert features.ndim == 2
    torch.testing.assert_close(network(images(network)).shape, torch.Size([2, 3]))
    given = images(network)
    torch.testing.assert_close(network(given), network.head(network.features(given)))


def test_a_network_normalises_its_own_images() -> None:
    network = create(SMALL, channels=2, classes=3, image_size=48, normalisation=([0.2, 0.4], [0.1, 0.3])).eval()
    given = images(network)
    by_hand = (given - torch.tensor([0.2, 0.4]).reshape(2, 1, 1)) / torch.tensor([0.1, 0.3]).reshape(2, 1, 1)
    torch.testing.assert_close(network.features(given), network.body(by_hand))
    assert (network.mean, network.std) == ([0.2, 0.4], [0.1, 0.3])
    assert not [name for name in network.state_dict() if not name.startswith(("body.", "head."))]


def test_the_thesis_head_has_two_layers_and_dropout() -> None:
    network = create("small_cnn", channels=1, classes=3, image_size=32, head="thesis", dropout=0.4)
    kinds = [type(layer).__name__ for layer in network.head.children()]
    assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.p for layer in network.head.modules() if isinstance(layer, nn.Dropout)] == [0.4, 0.4]
    extra = facts("small_cnn", channels=1, classes=3, image_size=32, head="thesis").parameters
    assert extra - facts("small_cnn", channels=1, classes=3, image_size=32).parameters == 256 * 256 + 256


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_lead_to_weights_that_timm_publishes(alias: str) -> None:
    assert timm.get_pretrained_cfg(resolve(alias)).has_weights
    assert alias in list_models()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mobilnet_v2", "did you mean mobilenet_v2"),
        ("cifar_resnet18", "did you mean cifar_resnet"),
        ("resnet18.a1", "has no weights .*or resnet18.a1_in1k"),
        ("hf-hub:someone/something", "unknown model"),
        ("local-dir:/tmp", "code of your own: import local-dir before"),
        ("", "unknown model"),
    ],
)
def test_unknown_names_are_refused_with_what_is_near(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        create(name, channels=1, classes=2, image_size=32)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown head 'cosin'; there are linear, thesis"):
        create("small_cnn", channels=1, classes=2, image_size=32, head="cosin")
    with pytest.raises(ConfigError, match=r"dropout 1\.5"):
        create("small_cnn", channels=1, classes=2, image_size=32, dropout=1.5)
    with pytest.raises(ConfigError, match="must be positive"):
        create("small_cnn", channels=0, classes=2, image_size=32)
    with pytest.raises(ConfigError, match="no published weights"):
        create("small_cnn", channels=1, classes=2, image_size=32, pretrained=True)
    with pytest.raises(ConfigError, match="std"):
        create("small_cnn", channels=1, classes=2, image_size=32, normalisation=([0.5], [0.0]))


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("test_vit", 50, "not a multiple of its 16-pixel patches.*supports 32, 64, 96"),
        ("small_cnn", 15, "does not support images of 15 x 15.*supports 28, 32"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_sizes_that_do(name: str, size: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        create(name, channels=1, classes=2, image_size=size)


def test_a_transformer_is_built_for_the_size_asked_for() -> None:
    network = create("test_vit", channels=1, classes=2, image_size=96)
    assert network(images(network)).shape == (2, 2)


def save_body(path: Path, name: str, *, dtype: torch.dtype = torch.float32, **options: int) -> nn.Module:
    source = timm.create_model(name, **options)
    save_file({key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in source.state_dict().items()}, path)
    return source.eval()


def test_local_weights_give_timms_own_features(tmp_path: Path) -> None:
    source = save_body(tmp_path / "w.safetensors", SMALL)
    network = create(SMALL, channels=3, classes=2, image_size=64, pretrained=tmp_path / "w.safetensors").eval()
    config = timm.get_pretrained_cfg(SMALL)
    assert network.mean == list(config.mean)
    assert network.std == list(config.std)
    given = images(network)
    normalised = (given - torch.tensor(config.mean).reshape(3, 1, 1)) / torch.tensor(config.std).reshape(3, 1, 1)
    torch.testing.assert_close(network.features(given), source.forward_head(source.forward_features(normalised), pre_logits=True))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_pretrained_stem_is_converted_to_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    source = save_body(tmp_path / "w.safetensors", SMALL)
    network = create(SMALL, channels=channels, classes=2, image_size=64, pretrained=tmp_path / "w.safetensors")
    grey = torch.rand(2, 1, 64, 64)
    stem = timm.get_pretrained_cfg(SMALL).first_conv
    found, original = network.body.get_submodule(stem).eval(), source.get_submodule(stem)
    if channels == 2:  # timm repeats the colours and rescales, so red and green stand for all three
        torch.testing.assert_close(found.weight, original.weight[:, :2] * 3 / 2)
    elif channels == 4:
        torch.testing.assert_close(found.weight, torch.cat([original.weight, original.weight[:, :1]], 1) * 3 / 4)
    else:
        torch.testing.assert_close(found(grey), original(grey.expand(-1, 3, -1, -1)))
    assert network.mean == pytest.approx([sum(timm.get_pretrained_cfg(SMALL).mean) / 3] * channels)


def test_position_tables_are_resized_to_the_image(tmp_path: Path) -> None:
    save_body(tmp_path / "w.safetensors", "test_vit")
    network = create("test_vit", channels=1, classes=2, image_size=64, pretrained=tmp_path / "w.safetensors")
    assert network(images(network)).shape == (2, 2)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:torch.searchsorted")
def test_timms_interpolation_of_window_tables_is_scipys() -> None:
    # It indexes by a list, which torch announced to read otherwise one day: then this fails.
    axis, table = torch.linspace(-6, 6, 13), torch.rand(13, 13)
    grid = [part.reshape(-1) for part in torch.meshgrid(torch.linspace(-5.5, 5.5, 7), torch.linspace(-6, 6, 7), indexing="ij")]
    found = timm.layers.interpolate.RegularGridInterpolator([axis, axis], table)(grid)
    expected = scipy.interpolate.RegularGridInterpolator([axis.numpy()] * 2, table.numpy())(torch.stack(grid, 1).numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected).float())


def test_window_tables_are_resized_without_a_warning(tmp_path: Path) -> None:
    save_body(tmp_path / "w.safetensors", resolve("swin_t"))
    network = create("swin_t", channels=1, classes=2, image_size=64, pretrained=tmp_path / "w.safetensors")
    assert network(images(network)).shape == (2, 2)


def test_half_precision_weights_become_single(tmp_path: Path) -> None:
    save_body(tmp_path / "w.safetensors", SMALL, dtype=torch.float16)
    network = create(SMALL, channels=1, classes=2, image_size=64, pretrained=tmp_path / "w.safetensors")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_file_may_tell_its_normalisation(tmp_path: Path) -> None:
    state = timm.create_model(SMALL).state_dict()
    save_file(state, tmp_path / "w.safetensors", metadata={"mean": "[0.1, 0.2, 0.3]", "std": "0.5"})
    network = create(SMALL, channels=1, classes=2, image_size=64, pretrained=tmp_path / "w.safetensors")
    assert network.mean == pytest.approx([0.2])
    assert network.std == [0.5]
    save_file(state, tmp_path / "w.safetensors", metadata={"mean": "half", "std": "0.5"})
    with pytest.raises(CheckpointError, match="must be JSON numbers"):
        create(SMALL, channels=1, classes=2, image_size=64, pretrained=tmp_path / "w.safetensors")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = dict(timm.create_model(SMALL).state_dict())
    gone = next(iter(state))
    save_file({name: tensor for name, tensor in state.items() if name != gone}, path)
    with pytest.raises(CheckpointError, match=f"lacks 1 of .* such as {gone}; name the model"):
        create(SMALL, channels=1, classes=2, image_size=64, pretrained=path)
    save_file({**state, "layer9.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds 1 weights that the network does not have, such as layer9"):
        create(SMALL, channels=1, classes=2, image_size=64, pretrained=path)
    norm = next(name for name in state if name.endswith("running_mean"))
    save_file({**state, norm: torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        create(SMALL, channels=1, classes=2, image_size=64, pretrained=path)
    with pytest.raises(CheckpointError, match="pickle"):
        create(SMALL, channels=1, classes=2, image_size=64, pretrained=tmp_path / "w.pth")


def test_weights_of_the_hub_that_cannot_be_had_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, *, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise FileNotFoundError("no connection")
        return real(name, **options)

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(CheckpointError, match=r"no connection.*safetensors"):
        create(SMALL, channels=1, classes=2, image_size=64, pretrained=True)


def promise_of(network: Network) -> Promise:
    return Promise(
        model=network.name,
        head="thesis",
        dropout=0.2,
        classes=("a", "b", "c"),
        channels=("flair", "t1ce"),
        image_size=network.image_size,
        mean=tuple(network.mean),
        std=tuple(network.std),
        prior=None,
        training_patients=("p",),
        external=False,
        split_hash="",
    )


@pytest.mark.parametrize("name", ["cifar_resnet8", SMALL])
def test_a_checkpoint_is_rebuilt_to_the_same_logits(tmp_path: Path, name: str) -> None:
    network = create(name, channels=2, classes=3, image_size=48, head="thesis", normalisation=([0.3, 0.4], [0.2, 0.1])).eval()
    save(tmp_path / "a.safetensors", network.state_dict(), promise_of(network))
    again, promise = restore(tmp_path / "a.safetensors")
    given = images(network)
    assert torch.equal(again.eval()(given), network(given))
    assert promise == promise_of(network)


def test_a_checkpoint_serves_as_pretrained_weights_with_a_new_head(tmp_path: Path) -> None:
    network = create("cifar_resnet8", channels=2, classes=3, image_size=32, head="thesis", normalisation=([0.3, 0.4], [0.2, 0.1])).eval()
    save(tmp_path / "a.safetensors", network.state_dict(), promise_of(network))
    other = create("cifar_resnet8", channels=2, classes=7, image_size=32, pretrained=tmp_path / "a.safetensors").eval()
    given = images(network)
    assert torch.equal(other.features(given), network.features(given))
    assert other(given).shape == (2, 7)
    grey = create("cifar_resnet8", channels=1, classes=7, image_size=32, pretrained=tmp_path / "a.safetensors")
    torch.testing.assert_close(grey.body.get_parameter("stem.weight"), network.body.get_parameter("stem.weight").sum(1, keepdim=True))
    with pytest.raises(CheckpointError, match="lacks 20 of the network's 24 weights"):
        create("small_cnn", channels=2, classes=3, image_size=32, pretrained=tmp_path / "a.safetensors")


def test_a_checkpoint_that_lies_about_its_network_is_refused(tmp_path: Path) -> None:
    network = create("cifar_resnet14", channels=2, classes=3, image_size=32, head="thesis")
    lie = promise_of(create("cifar_resnet8", channels=2, classes=3, image_size=32))
    save(tmp_path / "a.safetensors", network.state_dict(), lie)
    with pytest.raises(CheckpointError, match="cannot be rebuilt as cifar_resnet8"):
        restore(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", [SMALL, "test_vit"])
def test_a_finished_classifier_from_elsewhere_is_used_as_it_is(tmp_path: Path, name: str) -> None:
    size = timm.get_pretrained_cfg(name).input_size[-1]
    source = save_body(tmp_path / "w.safetensors", name, num_classes=3, in_chans=1)
    network = create(
        name,
        channels=1,
        classes=3,
        image_size=size,
        pretrained=tmp_path / "w.safetensors",
        normalisation=([0.0], [1.0]),
        keep_classifier=True,
    ).eval()
    given = images(network)
    torch.testing.assert_close(network(given), source(given))
    with pytest.raises(CheckpointError, match=r"has a classifier \(3, .* where \(4, "):
        create(name, channels=1, classes=4, image_size=size, pretrained=tmp_path / "w.safetensors", keep_classifier=True)


def test_a_classifier_that_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    save_body(tmp_path / "w.safetensors", SMALL, num_classes=0)
    with pytest.raises(CheckpointError, match="holds no classifier"):
        create(SMALL, channels=1, classes=3, image_size=64, pretrained=tmp_path / "w.safetensors", keep_classifier=True)
    with pytest.raises(ConfigError, match="the path of a file, and the linear head"):
        create(SMALL, channels=1, classes=3, image_size=64, keep_classifier=True)


@pytest.mark.skipif(not MOBILENET.exists(), reason="shared/data/weights is not here")
def test_real_imagenet_weights_become_a_grey_student() -> None:
    network = create("mobilenet_v2", channels=1, classes=3, image_size=96, pretrained=MOBILENET).eval()
    assert (network.mean, network.std) == ([0.5], [0.5])
    colour = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    weights = {name: tensor.float() for name, tensor in load_file(MOBILENET).items() if not name.startswith("classifier")}
    colour.load_state_dict(weights)
    given = images(network)
    torch.testing.assert_close(network.features(given), colour(((given - 0.5) / 0.5).expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)
    with pytest.raises(CheckpointError, match="lacks 96 of the network's 120 weights, such as conv1"):
        create("resnet18", channels=1, classes=3, image_size=96, pretrained=MOBILENET)


@pytest.mark.parametrize("name", ["small_cnn", "cifar_resnet8", "resnet10t", "test_vit"])
def test_a_network_shows_what_its_logits_came_from_and_leaves_no_hook(name):
    network = create(name, channels=1, classes=3, image_size=32).eval()
    images = torch.rand(2, 1, 32, 32)
    seen = network.see(images, maps=True)
    torch.testing.assert_close(seen.logits, network(images))
    torch.testing.assert_close(seen.features, network.features(images))
    assert network.widths() == (seen.features.shape[1], tuple(each.shape[1] for each in seen.maps))
    assert bool(seen.maps) == (name != "test_vit")
    assert not any(module._forward_hooks for module in network.modules())
    assert network.see(images).maps == ()


def test_a_cosine_head_gives_scaled_cosines_and_depends_on_directions_only():
    network = create("small_cnn", channels=1, classes=3, image_size=16, head="cosine").eval()
    images = torch.rand(4, 1, 16, 16)
    features, weight = network.features(images).detach().numpy(), network.head.weight.detach().numpy()
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (features, weight)]
    np.testing.assert_allclose(network(images).detach().numpy(), 30 * unit[0] @ unit[1].T, atol=1e-3)


def norms_of(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]


def trained_body():
    """Two convolutions with batch norms that have seen data."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4))
    for norm in norms_of(body):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.3, 2)
    return body


@torch.no_grad()
def folded(network):
    """Fold batch norms into the convolutions before them, as deployed weights have them."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    for convolution, norm in zip(convolutions, norms_of(network), strict=True):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        convolution.weight.mul_(scale[:, None, None, None])
        norm.bias.sub_(norm.running_mean * scale)
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.weight.fill_(1)
    return network


def test_folded_batch_norms_are_measured_anew_and_compute_the_same():
    body, images = trained_body(), torch.rand(8, 2, 12, 12)
    original = body.eval()(images)
    assert not unfold_batch_norm(body, images)
    network = folded(body)
    torch.testing.assert_close(network(images), original, atol=1e-3, rtol=1e-3)
    assert (copy.deepcopy(network).train()(images) - original).abs().max() > 0.1  # what training as it is would begin with
    assert unfold_batch_norm(network.train(), images)
    assert network.training
    torch.testing.assert_close(copy.deepcopy(network)(images), original, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(network.eval()(images), original, atol=1e-3, rtol=1e-3)
    assert not unfold_batch_norm(network, images)


def test_a_new_network_has_nothing_to_unfold():
    assert not unfold_batch_norm(create("cifar_resnet8", channels=1, classes=3, image_size=16), torch.rand(2, 1, 16, 16))


class Clocked(nn.Module):
    """A body whose passes last what a script says, on a clock of its own."""

    def __init__(self, script):
        super().__init__()
        self.script, self.now, self.calls = iter(script), 0.0, 0

    def forward(self, images):
        assert not self.training
        assert images.shape == (1, 1, 8, 8)
        self.now += next(self.script)
        self.calls += 1
        return images.flatten(1)


@pytest.mark.parametrize(
    ("passes", "milliseconds", "calls"),
    [
        ([9.0, 5.0, 0.001, 0.04, *[0.002] * 18, 0.001, 7.0], 2.0, 23),  # warm-up and an outlier do not count
        ([9.0, 5.0, 2.0, 4.0, 3.0, 7.0], 3000.0, 5),  # a slow network gets three
    ],
)
def test_latency_is_the_median_of_single_passes_after_warm_up(monkeypatch, passes, milliseconds, calls):
    body = Clocked(passes)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: body.now)
    network = Network(body, nn.Linear(64, 3), name="x", channels=1, classes=3, image_size=8, mean=[0.5], std=[0.25]).train()
    found = latency.measure_latency(network)
    assert found.milliseconds == pytest.approx(milliseconds)
    assert (found.device, body.calls, network.training) == ("cpu, 1 thread", calls, True)
