import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raredistill.checkpoint import Promise, load, load_state, save, save_state
from raredistill.errors import CheckpointError

PROMISE = Promise(
    model="small_cnn",
    head="linear",
    dropout=0.1,
    classes=("gesund", "HGG", "LGG <b>"),
    channels=("flair", "t1ce"),
    image_size=64,
    mean=(0.5, 0.5),
    std=(0.25, 0.25),
    prior=(0.5, 0.3, 0.2),
    training_patients=("p1", "p 2", "ü"),
    external=False,
    split_hash="ab",
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 3, generator=generator),
        "half": torch.randn(2, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 2),
    }


def test_a_checkpoint_comes_back_bit_for_bit_with_its_promise(tmp_path: Path) -> None:
    save(tmp_path / "new" / "best.safetensors", tensors(), PROMISE)
    found, promise = load(tmp_path / "new" / "best.safetensors")
    assert promise == PROMISE
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors().items())


def test_an_unknown_prior_and_unknown_patients_stay_unknown(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", tensors(), replace(PROMISE, prior=None, training_patients=None))
    promise = load(tmp_path / "a.safetensors")[1]
    assert promise.prior is None
    assert promise.training_patients is None


def test_any_reader_of_safetensors_reads_the_weights(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", tensors(), PROMISE)
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors"), tensors())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as handle:
        assert json.loads(handle.metadata()["record"])["model"] == "small_cnn"


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    save_state(tmp_path / "a.safetensors", {"a": weight, "b": weight.T}, None)
    torch.testing.assert_close(load_state(tmp_path / "a.safetensors")[0]["b"], weight.T)


def test_a_state_keeps_its_json_and_its_tensors(tmp_path: Path) -> None:
    info = {"epoch": 3, "best": float("inf"), "groups": [{"lr": 1e-4}], "none": None}
    save_state(tmp_path / "a.safetensors", tensors(), info)
    found, again = load_state(tmp_path / "a.safetensors")
    assert again == info
    assert torch.equal(found["steps"], torch.tensor(7))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_noticed(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    save(path, tensors(), PROMISE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read"):
        load(path)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"weight": torch.arange(5.0)}, PROMISE)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        # Spaces that pad the header carry nothing.
        if position < header and whole[position : position + 1] == b" ":
            continue
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found = load(path)
        except CheckpointError:
            continue
        # A changed name of an entry that nobody reads ("format") changes nothing that is returned.
        assert found[1] == PROMISE
        assert torch.equal(found[0]["weight"], torch.arange(5.0))


def test_what_is_not_a_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="pickle can run code"):
        load(tmp_path / "model.pth")
    save_file(tensors(), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not a network checkpoint of raredistill, but plain weights"):
        load(tmp_path / "plain.safetensors")
    save_state(tmp_path / "state.safetensors", tensors(), {})
    with pytest.raises(CheckpointError, match="not a network checkpoint"):
        load(tmp_path / "state.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "folder.safetensors")


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, tensors(), PROMISE)
    with pytest.raises(TypeError):
        save_state(path, tensors(), {"no JSON": object()})
    assert load(path)[1] == PROMISE
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_promise_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(CheckpointError, match="prior has 2 values for 3 classes"):
        replace(PROMISE, prior=(0.5, 0.5))
    with pytest.raises(CheckpointError, match="mean and std have 1 and 2 values for 2 channels"):
        replace(PROMISE, mean=(0.5,))
