"""The YAML of a study: overrides, defaults, and every mistake at once with its cure."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies

from raredistill.config import entries_of, load_config, make_study
from raredistill.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(tmp_path, **changes):
    raw = {"name": "s", "cohort": "c", "splits": {"folds": 2, "repeats": 1}, "runs": [{"name": "a", "model": "small_cnn"}]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return path


def test_overrides_reach_into_the_file(tmp_path):
    config = load_config(write(tmp_path), ["training.epochs=7", "runs.0.model=resnet18", "seeds=[3, 4]"])
    assert config.training["epochs"] == 7
    assert config.runs[0]["model"] == "resnet18"
    assert config.seeds == (3, 4)


def test_all_mistakes_are_told_at_once_with_the_nearest_key(tmp_path):
    path = write(tmp_path, training={"epoch": 3, "batch_size": 0}, splits={"fold": 3})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "training.epoch: unknown key; did you mean epochs?" in message
    assert "training.batch_size: " in message
    assert "splits.fold: unknown key; did you mean folds?" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"loss": "balanced_softmx"}}, "balanced_softmax"),
        ({"runs": [{"name": "a", "model": "small_cn"}]}, "small_cnn"),
        ({"runs": [{"name": "a", "model": "small_cnn"}, {"name": "b", "model": "small_cnn", "teacher": "a", "method": "kdd"}]}, "kd"),
        ({"channels": ["t7"]}, "no channel t7"),
        ({"training": {"schedule": "plateau", "select": "last"}}, "plateau monitors validation"),
    ],
)
def test_unknown_names_are_refused_before_training(tmp_path, tiny_cohort, change, said):
    with pytest.raises(ConfigError, match=said):
        make_study(load_config(write(tmp_path, **change)), tiny_cohort, "")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="key=value"):
        load_config(write(tmp_path), ["epochs"])


@pytest.mark.parametrize("override", ["runs.0.model=[a", "name.x=a", "runs.x.model=a", "runs.7.model=a", "runs.a=b"])
def test_an_override_without_a_place_or_a_value_is_named(tmp_path, override):
    with pytest.raises(ConfigError, match=re.escape(override)):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cohort": 3}, ["cohort: input is not a valid path"]),
        ({"cohort": {"sourc": "table", "path": "x"}}, ["cohort.source: field required", "cohort.sourc: unknown key; did you mean source?"]),
        ({"training": 5}, ["training: input should be a valid dictionary"]),
        ({"runs": [{"name": "a", "model": "m", "modle": "n"}]}, ["runs.0.modle: unknown key; did you mean model?"]),
        ({"runs": [{"name": "a", "model": "m", "teacher": False}]}, ["runs.0.teacher: input should be a valid string"]),
        ({"runs": [{"name": "a", "model": "m", "teacher": {"weight": "x"}}]}, ["weights: field required", "did you mean weights?"]),
        ({"splits": {"zzz": 3}}, ["splits.zzz: unknown key; the keys are protocol, folds,"]),
        ({"runs": []}, ["runs: tuple should have at least 1 item"]),
    ],
)
def test_a_mistake_is_one_line_without_the_words_of_the_checker(tmp_path, change, said):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, **change))
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(said)
    assert all(any(part in line for line in lines) for part in said)
    assert "lax-or-strict" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["a: &a [x, *a]", "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])]
)
def test_aliases_without_end_are_refused_at_once(tmp_path, text):
    path = tmp_path / "laughs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="aliases"):
        load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_says_how_to_run_it(path):
    config = load_config(path)
    head = path.read_text().split("name:")[0].lower()
    assert config.runs
    assert all(word in head for word in ("raredistill", "run time", "expected"))


def test_the_thesis_grid_has_its_published_hyper_parameters():
    config = load_config(Path(__file__).parents[1] / "configs" / "thesis-flair.yaml")
    entries = entries_of(config)
    pairs = {(entry.teacher, entry.model) for entry in entries if entry.teacher}
    assert len(config.runs) == 10
    assert pairs == {
        ("efficientnet_v2_s", "densenet121"), ("efficientnet_v2_s", "mobilenet_v2"), ("mobilenet_v2", "efficientnet_v2_s"),
        ("efficientnet_v2_s", "efficientnet_v2_s"), ("mobilenet_v2", "mobilenet_v2"),
    }  # fmt: skip
    assert all(entry.ce_weight == 0.9 and entry.kd_weight == pytest.approx(0.1 / 9) for entry in entries if entry.teacher)
    assert (config.training["weight_decay"], config.training["bias_weight_decay"], config.training["select"]) == (3e-4, 1e-4, "last")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"loss": "ldam"}}, "needs cosines, but head is not cosine"),
        ({"training": {"loss": "weighted_cross_entropy", "deferred": "effective"}}, "already does"),
        (
            {"teacher": "a", "method": "pckd", "training": {"loss": "balanced_softmax"}},
            "brings its own loss on labels, but",
        ),
        ({"teacher": "a", "method": "dkd", "training": {"mixing": "remix"}}, "uses labels, but mixing: remix"),
        ({"teacher": "a", "cross_fit": 2, "training": {"mixing": "mixup"}}, "mixes patients"),
        ({"teacher": ["a", "b"], "cross_fit": 2}, "cross_fit needs one teacher"),
        ({"head": "cosine", "training": {"stage": "crt"}}, "changes a linear classifier, but head is cosine"),
        (
            {"training": {"stage": "logit_adjustment", "loss": "balanced_softmax"}},
            "loss balanced_softmax with sampler natural already does so",
        ),
        ({"training": {"stage": "logit_adjustment", "sampler": "balanced"}}, "cross_entropy with sampler balanced already does so"),
        ({"teacher": "a", "method": "pckd", "training": {"stage": "logit_adjustment"}}, "method pckd already does so"),
        (
            {"teacher": "a", "online": "mutual", "method": "at"},
            "online: mutual compares logits of networks in training, but method at needs",
        ),
        ({"online": "one_way"}, "online: one_way trains entries of this study"),
        ({"cross_fit": 2}, "cross_fit makes copies of a teacher, but it has none"),
        ({"teacher": ["a", "b"], "method": "rkd"}, "compares features"),
        ({"teacher": "a", "training": {"teacher_cache": "views=2", "mixing": "mixup"}}, "mixing: mixup combines two samples into one"),
        ({"teacher": "a", "method": "at", "training": {"teacher_cache": "views=2"}}, "method at compares feature maps; leave"),
        ({"training": {"compile": "default", "devices": 2}}, "is for one device, but devices: 2"),
        (
            {"teacher": "a", "method": "at", "training": {"compile": "default"}},
            "compiles whole bodies, but method at needs their inner feature maps",
        ),
        (
            {"teacher": "a", "online": "mutual", "training": {"teacher_cache": "views=2"}},
            "online: mutual trains it together with the student",
        ),
        ({"teacher": "v", "method": "at"}, "method at: it compares maps, but v has none"),
        ({"teacher": "a", "method": "fitnet", "method_options": {"stage": 9}}, "stage must be a whole number from 1"),
        ({"teacher": "a", "method": "ltkd", "method_options": {"groups": [["healthy"], ["HGG", "LGGG"]]}}, "groups must name each"),
        ({"training": {"loss": "weighted_cross_entropy", "loss_options": {"weights": "invers"}}}, "weights must be one of"),
    ],
)
def test_what_does_not_go_together_is_refused_with_both_sides_named(tmp_path, tiny_cohort, change, said):
    grid = [
        {"name": "a", "model": "small_cnn"}, {"name": "b", "model": "small_cnn"}, {"name": "v", "model": "test_vit"},
        {"name": "s", "model": "small_cnn", **change},
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        make_study(load_config(write(tmp_path, runs=grid)), tiny_cohort, "")


NUMBERS = {"epochs": strategies.integers(-2, 300), "batch_size": strategies.integers(-2, 300), "factor": strategies.floats(-0.5, 1.5)}
WORDS = {"schedule": ("constant", "step", "multistep", "cosine", "plateau"), "select": ("macro_f1", "loss", "last")}
TRAININGS = strategies.fixed_dictionaries({}, optional={**NUMBERS, **{key: strategies.sampled_from(each) for key, each in WORDS.items()}})
LIMITS = {"epochs": lambda value: value >= 1, "batch_size": lambda value: value >= 1, "factor": lambda value: 0 < value <= 1}


@given(training=TRAININGS, override=strategies.integers(1, 99))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_within_the_limits_comes_back_and_all_else_is_named(tmp_path, training, override):
    path = write(tmp_path, training=training)
    wrong = [key for key, fits in LIMITS.items() if key in training and not fits(training[key])]
    if wrong:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert [key for key in LIMITS if f"training.{key}: " in str(caught.value)] == wrong
    else:
        assert load_config(path).training == training
        assert load_config(path, [f"training.epochs={override}"]).training == {**training, "epochs": override}


@given(
    raw=strategies.recursive(
        strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(max_size=5),
        lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    key=strategies.sampled_from(("name", "cohort", "channels", "splits", "seeds", "training", "runs")),
)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_anywhere_is_a_study_or_one_message(tmp_path, raw, key):
    path = write(tmp_path, **{key: raw})
    with suppress(ConfigError):  # anything else is a traceback for the user
        assert load_config(path).runs
