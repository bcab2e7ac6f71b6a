import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from mamba_jax import sharding
from mamba_jax.mixers import Mamba1Config
from mamba_jax.models.language_model import LanguageModelConfig
from tests.mamba_jax.meshes import on_current_mesh
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, TrainConfig
from train.mesh import make_mesh, shard_batch
from train.optimizer import decayed, learning_rate
from train.step import init_state, make_eval_step, make_train_step

EXPERIMENT = Experiment(
    model=LanguageModelConfig(
        vocab_size=40, width=16, repeats=2, layers={"M": Mamba1Config(state_size=4)}, compute_dtype="float32"
    ),
    data=DataConfig(global_batch_size=8, sequence_length=12),
    train=TrainConfig(steps=20, loss_chunk=16),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    shape = (8, 12)
    return {
        "tokens": rng.integers(0, 40, shape, np.int32),
        "targets": rng.integers(0, 40, shape, np.int32),
        "segment_ids": np.cumsum(rng.random(shape) < 0.1, axis=1, dtype=np.int32),
        "loss_weights": (rng.random(shape) < 0.8).astype(np.float32),
    }


def with_train(**changes) -> Experiment:
    return dataclasses.replace(EXPERIMENT, train=dataclasses.replace(EXPERIMENT.train, **changes))


def with_optimizer(**changes) -> Experiment:
    return dataclasses.replace(EXPERIMENT, optimizer=dataclasses.replace(EXPERIMENT.optimizer, **changes))


compiled_train_step = functools.cache(make_train_step)


def run(experiment=EXPERIMENT, steps=3, state=None, batches=None):
    state = init_state(experiment) if state is None else state
    train_step = compiled_train_step(experiment)
    metrics = []
    for step in range(steps):
        state, step_metrics = train_step(state, batches[step] if batches else make_batch(step))
        metrics.append(jax.device_get(step_metrics))
    return state, metrics


def assert_models_close(a, b, rtol=1e-4, atol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_the_first_update_is_adamw_on_the_mean_loss():
    state = init_state(EXPERIMENT)
    batch = jax.tree.map(jnp.asarray, make_batch())

    def mean_loss(model):
        logits, _ = model(batch["tokens"], segment_ids=batch["segment_ids"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["loss_weights"]) / batch["loss_weights"].sum()

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(state.model)
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients))))
    settings, rate = EXPERIMENT.optimizer, EXPERIMENT.optimizer.learning_rate / 2

    def adamw_from_rest(value, gradient, decay):
        # The bias corrections of a first step cancel its moments: m / sqrt(v) is g / |g|.
        clipped = np.asarray(gradient, np.float64) * min(1, settings.clip_norm / norm)
        direction = clipped / (np.abs(clipped) + settings.epsilon)
        return value - rate * (direction + decay * settings.weight_decay * np.asarray(value, np.float64))

    expected = jax.tree.map(adamw_from_rest, state.model, gradients, decayed(state.model))
    gradients = jax.device_get(gradients)
    new_state, metrics = compiled_train_step(EXPERIMENT)(init_state(EXPERIMENT), batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    for new, value, gradient in zip(*map(jax.tree.leaves, (new_state.model, expected, gradients)), strict=True):
        # Where a gradient is all rounding error, so is its sign.
        clear = np.abs(gradient) > 1e-6
        np.testing.assert_allclose(np.asarray(new)[clear], value[clear], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulating_gradients_equals_one_big_batch(parts):
    whole, whole_metrics = run()
    accumulated, metrics = run(with_train(gradient_accumulation=parts))
    np.testing.assert_allclose([m["loss"] for m in metrics], [m["loss"] for m in whole_metrics], rtol=1e-5)
    np.testing.assert_allclose(
        [m["gradient_norm"] for m in metrics], [m["gradient_norm"] for m in whole_metrics], rtol=1e-4
    )
    assert_models_close(accumulated.model, whole.model, rtol=1e-2, atol=2e-4)


def test_unrolled_layers_train_alike_and_are_what_none_means_on_a_gpu(monkeypatch):
    looped, looped_metrics = run()
    unrolled, metrics = run(with_train(unroll_layers=True))
    np.testing.assert_allclose([m["loss"] for m in metrics], [m["loss"] for m in looped_metrics], rtol=1e-5)
    assert_models_close(unrolled.model, looped.model, rtol=1e-2, atol=2e-4)

    def program(experiment):
        return str(
            make_train_step(experiment).trace(jax.eval_shape(lambda: init_state(experiment)), make_batch()).jaxpr
        )

    assert program(EXPERIMENT) == program(with_train(unroll_layers=False)) != program(with_train(unroll_layers=True))
    monkeypatch.setattr("train.step.backend", lambda: "gpu")
    assert program(EXPERIMENT) == program(with_train(unroll_layers=True))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(fsdp=4),
        MeshConfig(tensor=4),
        MeshConfig(sequence=4),
        MeshConfig(replica=2, fsdp=2, tensor=2),
        MeshConfig(data=2, tensor=2, sequence=2),
    ],
    ids=lambda mesh: "-".join(f"{name}{size}" for name, size in dataclasses.asdict(mesh).items() if size > 1),
)
def test_sharded_training_equals_unsharded(mesh):
    # The parts of a batch lie across the devices too: with both, each device must find its own rows.
    # Layers are unrolled on some meshes, as they are on GPUs, and looped over on others.
    experiment = with_train(gradient_accumulation=2 if mesh.replica > 1 else 1, unroll_layers=mesh.data == 1)
    initial = init_state(experiment)
    expected, expected_metrics = run()
    devices = jax.devices()[: np.prod(list(dataclasses.asdict(mesh).values()))]
    with jax.set_mesh(made := make_mesh(mesh, devices)):
        state = on_current_mesh(initial, lambda: init_state(experiment))
        for path, leaf in jax.tree.leaves_with_path(state.model):
            is_matrix = any(name in jax.tree_util.keystr(path) for name in ("embedding", "proj"))
            if is_matrix or mesh.fsdp == mesh.tensor == 1:
                assert leaf.sharding.is_fully_replicated == (mesh.fsdp == mesh.tensor == 1), path
        moments = [leaf.sharding for leaf in jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))]
        assert moments == [leaf.sharding for leaf in jax.tree.leaves(state.model)]
        state, metrics = run(
            experiment, state=state, batches=[shard_batch(made, make_batch(step)) for step in range(3)]
        )
    for actual, reference in zip(metrics, expected_metrics, strict=True):
        assert actual["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert actual["gradient_norm"] == pytest.approx(reference["gradient_norm"], rel=1e-4)
    assert_models_close(state.model, expected.model, rtol=1e-2, atol=2e-4)


def test_a_seed_decides_the_initial_model_on_any_mesh():
    single = init_state(EXPERIMENT)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4))):
        sharded = jax.jit(lambda: init_state(EXPERIMENT))()
        placed = on_current_mesh(single, lambda: init_state(EXPERIMENT))
    for a, b in zip(jax.tree.leaves(single.model), jax.tree.leaves(sharded.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(placed), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_loss_goes_down():
    _, metrics = run(steps=20, batches=[make_batch()] * 20)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]


def poisoned(state):
    leaves, structure = jax.tree.flatten(state.model)
    return dataclasses.replace(state, model=jax.tree.unflatten(structure, [leaves[0] * jnp.nan, *leaves[1:]]))


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    state = poisoned(init_state(EXPERIMENT))
    before = jax.device_get(state)
    after, metrics = run(state=state, steps=2)
    assert [m["skipped"] for m in metrics] == [m["skipped_in_row"] for m in metrics] == [1, 2]
    assert int(after.step) == 2
    for a, b in zip(jax.tree.leaves(before.model), jax.tree.leaves(after.model), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(before.optimizer), jax.tree.leaves(after.optimizer), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_spike_is_skipped_and_training_goes_on():
    experiment = with_optimizer(spike_factor=1.5, learning_rate=1e-4)
    calm = make_batch()
    # Few targets, all alike, make a large gradient.
    spike = {**calm, "targets": np.full_like(calm["targets"], 7), "loss_weights": np.zeros_like(calm["loss_weights"])}
    spike["loss_weights"][0, 0] = 1.0
    _, metrics = run(experiment, steps=4, batches=[calm, spike, calm, spike])
    assert metrics[1]["gradient_norm"] > 1.5 * metrics[0]["gradient_norm"]
    assert [m["skipped"] for m in metrics] == [0, 1, 1, 2]
    assert [m["skipped_in_row"] for m in metrics] == [0, 1, 0, 1]


def test_the_moving_average_follows_the_parameters_and_is_what_is_evaluated():
    experiment = with_train(ema_decay=0.75)
    states = [init_state(experiment)]
    for step in range(2):
        states.append(run(experiment, steps=1, state=jax.tree.map(jnp.copy, states[-1]), batches=[make_batch(step)])[0])
    average = states[0].model
    for state in states[1:]:
        average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, average, state.model)
    assert_models_close(states[-1].ema, average, rtol=1e-5, atol=1e-7)
    assert states[-1].evaluated_model is states[-1].ema
    assert init_state(EXPERIMENT).evaluated_model is not None


def test_evaluation_sums_the_loss_that_training_minimises():
    state = init_state(EXPERIMENT)
    sums = make_eval_step(EXPERIMENT)(state.model, make_batch())
    _, metrics = run(steps=1)
    assert float(sums.nll / sums.weight) == pytest.approx(float(metrics[0]["loss"]), rel=1e-6)


def test_weight_decay_spares_vectors_and_state_parameters():
    model = jax.eval_shape(lambda: EXPERIMENT.model.build(nnx.Rngs(0)))
    decays = {jax.tree_util.keystr(path): decay for path, decay in jax.tree.leaves_with_path(decayed(model))}
    spared = {path for path, decay in decays.items() if not decay}
    assert {path.split(".")[-2] for path in spared if "norm" not in path} == {"A_log", "D", "dt_bias", "conv_bias"}
    assert sum("norm" in path for path in spared) == 2
    assert {path.split(".")[-3] for path, decay in decays.items() if decay and path.endswith(".weight.value")} == {
        "embedding",
        "in_proj",
        "x_proj",
        "dt_proj",
        "out_proj",
    }


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_learning_rate_warms_up_and_ends_where_it_should(schedule):
    config = OptimizerConfig(schedule=schedule, learning_rate=1.0, warmup_steps=10, decay_fraction=0.3)
    rate = np.array([learning_rate(config, 100)(step) for step in range(101)])
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    expected = {
        "cosine": 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(91) / 90)),
        "wsd": np.interp(np.arange(10, 101), [10, 70, 100], [1, 1, 0.1]),
        "constant": np.ones(91),
    }[schedule]
    np.testing.assert_allclose(rate[10:], expected, rtol=1e-5)


def test_the_mesh_has_explicit_axes():
    mesh = make_mesh(MeshConfig(data=8))
    assert mesh.axis_names == sharding.AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
