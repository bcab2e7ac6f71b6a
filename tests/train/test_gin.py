from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping

import hypothesis
import pytest
from hypothesis import strategies as st

from mamba_jax.mixers import MIXER_CONFIGS, Mamba1Config
from mamba_jax.models.language_model import LanguageModelConfig
from train import gin, settings
from train.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    Experiment,
    MeshConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.errors import UsageError

# Of the layers, gin and JSON keep those in the pattern.
DEFAULTS = Experiment(model=settings.without_unused_layers(LanguageModelConfig()))

positive = st.floats(min_value=1e-12, max_value=1e12)
mamba1 = st.builds(
    Mamba1Config,
    state_size=st.integers(1, 512),
    delta_rank=st.none() | st.integers(1, 64),
    delta_min=st.floats(1e-6, 1e-2),
    conv_bias=st.booleans(),
    implementation=st.sampled_from([None, "xla", "reference"]),
)


@st.composite
def language_models(draw):
    letters = draw(st.lists(st.sampled_from("MLab*0-é"), min_size=1, max_size=4, unique=True))
    return LanguageModelConfig(
        width=draw(st.integers(1, 4096)),
        pattern="".join(letters + draw(st.lists(st.sampled_from(letters), max_size=4))),
        layers={letter: draw(mamba1) for letter in letters},
        norm_epsilon=draw(positive),
        tie_embeddings=draw(st.booleans()),
        remat=draw(st.sampled_from(["none", "dots", "full"])),
    )


experiments = st.builds(
    Experiment,
    train=st.builds(
        TrainConfig,
        steps=st.integers(1000, 10**12),
        seed=st.integers(0, 2**32 - 1),
        z_loss=st.floats(0, 1),
        ema_decay=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
        eval_batches=st.none() | st.integers(1, 10),
    ),
    model=language_models(),
    data=st.builds(DataConfig, source=st.text(min_size=1), global_batch_size=st.integers(1, 10**6)),
    optimizer=st.builds(
        OptimizerConfig,
        learning_rate=positive | st.just(float("inf")),
        schedule=st.sampled_from(["cosine", "wsd", "constant"]),
        clip_norm=st.none() | positive,
    ),
    checkpoint=st.builds(CheckpointConfig, keep_best=st.integers(0, 5)),
    metrics=st.builds(MetricsConfig, tensorboard=st.booleans(), wandb_project=st.none() | st.text()),
)


def refusal(bindings=(), gin_files=()) -> str:
    """The one-line message with which these settings are refused."""
    with pytest.raises(ConfigError) as caught:
        gin.load(gin_files, bindings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


@hypothesis.given(experiments)
@hypothesis.settings(max_examples=50)
def test_gin_text_reads_back_to_an_equal_experiment(tmp_path_factory, experiment):
    path = tmp_path_factory.mktemp("gin") / "config.gin"
    path.write_text(gin.to_gin(experiment), encoding="utf-8")
    assert gin.load([str(path)], []) == experiment


@hypothesis.given(experiments)
@hypothesis.settings(max_examples=50)
def test_json_reads_back_to_an_equal_experiment(experiment):
    assert settings.from_json(json.loads(json.dumps(settings.to_json(experiment)))) == experiment


def test_nothing_given_means_all_defaults():
    assert gin.load([], []) == DEFAULTS


def test_later_bindings_win(write):
    first = write("first.gin", "Train.steps = 500\nTrain.seed = 1\n")
    second = write("second.gin", "Train.steps = 600\n")
    assert gin.load([first, second], ["Train.seed=3"]).train == TrainConfig(steps=600, seed=3)


def test_nothing_stays_bound_between_loads():
    gin.load([], ["Train.steps=500", "width=32", "LanguageModel.width=%width"])
    with pytest.raises(ConfigError):
        gin.load([], ["Train.steps=600", "Train.seed=-1"])
    assert gin.load([], []) == DEFAULTS


@pytest.mark.parametrize(
    ("binding", "read", "value"),
    [
        ("Optimizer.learning_rate=1", lambda e: e.optimizer.learning_rate, 1.0),
        ("Optimizer.clip_norm=None", lambda e: e.optimizer.clip_norm, None),
        ("Data.source=/some folder/tokens", lambda e: e.data.source, "/some folder/tokens"),
        ("Data.source='stdlib'", lambda e: e.data.source, "stdlib"),
        ("Optimizer.schedule=wsd", lambda e: e.optimizer.schedule, "wsd"),
        ("LanguageModel.pattern=3", lambda e: e.model.pattern, "3"),
        ("LanguageModel.pattern='2'", lambda e: e.model.pattern, "2"),
        ("LanguageModel.tie_embeddings=False", lambda e: e.model.tie_embeddings, False),
        ("Mamba1.state_size=64", lambda e: e.model.layers["M"].state_size, 64),
    ],
)
def test_a_binding_sets_a_value_of_the_fields_type(binding, read, value):
    found = read(gin.load([], [binding]))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("value", "hint", "converted"),
    [
        ([0, 1], tuple[float, float], (0.0, 1.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ((), tuple[int, ...], ()),
        ({"a": [1]}, Mapping[str, tuple[float, ...]], {"a": (1.0,)}),
        (1, int | float, 1),
        (1.5, int | float | None, 1.5),
    ],
)
def test_values_become_what_the_annotation_means(value, hint, converted):
    found = settings.convert("Some.setting", value, hint)
    assert found == converted
    assert repr(found) == repr(converted)  # 1 == 1.0, but is not the same


@pytest.mark.parametrize(
    ("value", "hint", "accepted"),
    [
        ([0, 1, 2], tuple[float, float], "tuple[float, float]"),
        ([1, "2"], tuple[int, ...], "tuple[int, ...]"),
        (True, int | None, "int | None"),
        ({1: 2}, Mapping[str, int], "{str: int}"),
    ],
)
def test_values_of_another_type_are_refused_with_what_is_accepted(value, hint, accepted):
    with pytest.raises(ConfigError) as caught:
        settings.convert("Some.setting", value, hint)
    assert str(caught.value).endswith(f"cannot be used: it takes {accepted}.")


def test_scopes_tell_layers_of_one_kind_apart():
    model = gin.load(
        [],
        [
            "LanguageModel.pattern=MML",
            "LanguageModel.layers={'M': @Mamba1(), 'L': @long/Mamba1()}",
            "Mamba1.expand=3",
            "long/Mamba1.state_size=64",
        ],
    ).model
    assert model.layers == {"M": Mamba1Config(expand=3), "L": Mamba1Config(expand=3, state_size=64)}


def test_macros_stand_for_values_and_for_layers():
    model = gin.load(
        [], ["size=32", "layer=@Mamba1()", "Mamba1.state_size=%size", "LanguageModel.layers={'M': %layer}"]
    )
    assert model.model.layers == {"M": Mamba1Config(state_size=32)}
    assert "a macro refers to itself" in refusal(["a=%b", "b=%a", "Train.steps=%a"])


def test_a_preset_takes_any_number_of_steps():
    """A few steps are the first thing anybody tries."""
    assert gin.load(["configs/quickstart.gin"], ["Train.steps=1"]).train.steps == 1


def test_layers_that_the_pattern_does_not_use_are_dropped():
    layers = "LanguageModel.layers={'M': @Mamba1(), 'L': @long/Mamba1()}"
    assert gin.load([], [layers]).model.layers == {"M": Mamba1Config()}
    unused = LanguageModelConfig(layers={"M": Mamba1Config(), "L": Mamba1Config(state_size=64)})
    assert "L/Mamba1" not in gin.to_gin(Experiment(model=unused))


def test_includes_are_found_beside_the_including_file_then_from_the_working_directory(write, tmp_path, monkeypatch):
    write("there/models/small.gin", "LanguageModel.width = 32\n")
    run = write("there/run.gin", "include 'models/small.gin'\nTrain.steps = 200\n")
    elsewhere = write("elsewhere/run.gin", "include 'there/models/small.gin'\n")
    assert gin.load([run], []).model.width == 32
    monkeypatch.chdir(tmp_path)
    assert gin.load([elsewhere], []).model.width == 32


def test_installed_configs_are_found_from_anywhere(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("installed/configs/__init__.py", "")
    write("installed/configs/models/small.gin", "LanguageModel.width = 48\n")
    monkeypatch.setattr(gin.importlib.resources, "files", lambda package: tmp_path / "installed" / package)
    run = write("run.gin", "include 'configs/models/small.gin'")
    assert gin.load([run], []).model.width == 48
    assert "Did you mean configs/models/small.gin?" in refusal(gin_files=["configs/models/smal.gin"])


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        (["Train.stps=3"], "--gin.Train.stps: there is no setting Train.stps. Did you mean Train.steps?"),
        (["Trian.steps=3"], "Did you mean Train.steps?"),
        (["Train.learning_rate=3"], "Did you mean Optimizer.learning_rate?"),
        (["learning_rate=3"], "Did you mean Optimizer.learning_rate?"),
        (["Train.steps=many"], "Train.steps = 'many' (a str) cannot be used: it takes int."),
        (["Train.steps=1e3"], "Train.steps = 1000.0 (a float) cannot be used: it takes int."),
        (["Train.steps=True"], "Train.steps = True (a bool) cannot be used: it takes int."),
        (["Train.steps=None"], "Train.steps = None cannot be used: it takes int."),
        (["Train.ema_decay='0.9'"], "it takes float | None."),
        (["Train.steps=0"], "--gin.Train.steps: Train.steps = 0 cannot be used: at least 1 step."),
        (["Optimizer.schedule=cosin"], "it takes 'cosine' | 'wsd' | 'constant'. Did you mean cosine?"),
        (["Mamba1.state_size=0"], "--gin.Mamba1.state_size: Mamba1.state_size = 0 cannot be used"),
        (
            ["long/Mamba1.state_size=64"],
            "nothing uses it: no letter of LanguageModel.pattern stands for @long/Mamba1()",
        ),
        (["a/Train.steps=3"], "nothing uses it: Train has no scopes, write Train.steps"),
        (["LanguageModel.layers={'M': @Mmba1()}"], "@Mmba1 is none of @Mamba1"),
        (["LanguageModel.layers={'M': @Mamba1}"], "@Mamba1 needs parentheses"),
        (["LanguageModel.layers={'M': 3}"], "LanguageModel.layers = {'M': 3} (a dict) cannot be used"),
        (["LanguageModel.pattern=Q"], "--gin.LanguageModel.pattern: LanguageModel.pattern = 'Q' cannot be used"),
        (["Train.steps=%lots"], "%lots is not set anywhere"),
        (["Train.steps=[1"], "--gin.Train.steps: cannot read"),
        (["Train.steps"], "--gin.Train.steps has no value: write --gin.NAME=VALUE."),
        (["Data.global_batch_size=5", "Mesh.data=2"], "--gin.Data.global_batch_size: Data.global_batch_size = 5"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_way_out(bindings, expected):
    assert expected in refusal(bindings)


def test_errors_in_a_file_name_the_file_and_line(write):
    good = "# settings\nTrain.steps = 20\n"
    path = write("run.gin", good + "Optimizer.schedule = 'linear'\n")
    assert refusal(gin_files=[path]).startswith(f"{path}:3: Optimizer.schedule = 'linear' (a str) cannot be used")
    path = write("run.gin", good + "Optimizer.schedule = cosine\n")
    assert refusal(gin_files=[path]).startswith(f"{path}:3: cannot read 'Optimizer.schedule = cosine'")
    path = write("run.gin", good + "Train:\n  seed = 1\n  stps = 5\n")
    assert refusal(gin_files=[path]).startswith(f"{path}:5: there is no setting Train.stps")
    path = write("run.gin", good + "import os\n")
    assert refusal(gin_files=[path]).startswith(f"{path}:3: gin files hold settings and includes only")
    path = write("run.gin", good + "include 'missing.gin'\n")
    assert "there is no gin file missing.gin" in refusal(gin_files=[path])


def test_files_that_cannot_be_read_are_refused(write, tmp_path):
    assert "there is no gin file" in refusal(gin_files=[str(tmp_path / "missing.gin")])
    (tmp_path / "binary.gin").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the gin file" in refusal(gin_files=[str(tmp_path / "binary.gin")])
    circle = write("circle.gin", "include 'circle.gin'\n")
    assert "includes itself" in refusal(gin_files=[circle])


def test_a_refusal_is_an_error_of_usage():
    assert issubclass(ConfigError, UsageError)
    assert ConfigError.exit_code == 2


def test_json_of_an_older_version_takes_defaults_for_what_it_lacks():
    plain = settings.to_json(Experiment(train=TrainConfig(steps=500, seed=3)))
    del plain["Train"]["seed"], plain["LanguageModel"]["layers"]["M"]["Mamba1"]["expand"], plain["Metrics"]
    assert settings.from_json(plain) == dataclasses.replace(DEFAULTS, train=TrainConfig(steps=500))


def test_json_of_a_newer_version_is_refused_with_the_names_of_what_is_unknown():
    plain = settings.to_json(Experiment())
    plain["Train"]["magic"] = plain["LanguageModel"]["layers"]["M"]["Mamba1"]["more"] = 1
    with pytest.raises(ConfigError, match=r"Train\.magic"):
        settings.from_json(plain)
    del plain["Train"]["magic"]
    with pytest.raises(ConfigError, match=r"Mamba1\.more"):
        settings.from_json(plain)
    with pytest.raises(ConfigError, match="Future"):
        settings.from_json({"Future": {}})


def test_differences_name_every_setting_that_changed():
    old = Experiment()
    new = Experiment(
        train=TrainConfig(seed=1),
        model=LanguageModelConfig(pattern="ML", layers={"M": Mamba1Config(expand=3), "L": Mamba1Config()}),
        mesh=MeshConfig(tensor=2),
    )
    assert settings.differences(old, old, old_place="runs/x") == []
    found = settings.differences(old, new, old_place="runs/x", ignore=["Mesh"])
    assert found[:2] == ["Train.seed: 0 in runs/x, 1 now", "LanguageModel.pattern: 'M' in runs/x, 'ML' now"]
    assert "LanguageModel.layers['M'].expand: 2 in runs/x, 3 now" in found
    assert "LanguageModel.layers['L']: not set in runs/x, @Mamba1() now" in found
    assert not any("Mesh" in line for line in found)


def test_every_setting_is_described():
    described = {setting.name: setting for setting in settings.describe()}
    assert described["Optimizer.schedule"] == settings.Setting(
        name="Optimizer.schedule",
        type="'cosine' | 'wsd' | 'constant'",
        default="'cosine'",
        doc="After the warm-up: 'cosine' to the final rate, 'wsd' (stable, then a linear decay at the end), "
        "or 'constant'.",
    )
    assert all(setting.doc.endswith(".") for setting in described.values())
    fields = sum(len(dataclasses.fields(part)) for part in typing.get_type_hints(Experiment).values())
    fields += sum(len(dataclasses.fields(mixer)) for mixer in MIXER_CONFIGS.values())
    assert len(described) == fields
