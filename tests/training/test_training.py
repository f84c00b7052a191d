"""The training step and its loop, on one device and on eight."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import examples, network, parsed, small_config

from diffpose_jax.data import pipeline
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.training import loop
from diffpose_jax.training.loop import NonFiniteLossError
from diffpose_jax.training.step import Batch, StepScalars, Trainer, train_step

KEY = jax.random.key(1)
STEPS, BATCH_SIZE = 3, 16


pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_trainer(model_changes=(), **changes):
    config = small_config(**changes)
    config.model.update(dict(model_changes))
    return Trainer(network(config), parsed(config).training)


def heatmap_batch(seed, number):
    data = examples(seed, number)
    return Batch(inputs=data.heatmaps(np.arange(number)), pose_mm=data.pose_mm)


def candidate_batch(seed, number):
    rng = np.random.default_rng(seed)
    candidates = Candidates(
        cells=rng.integers(0, 64 * 64, (number, 4, 16)).astype(np.uint16),
        likelihood=rng.uniform(0.2, 1.0, (number, 4, 16)).astype(np.float16),
    )
    pose_mm = rng.normal(size=(number, 17, 3)).astype(np.float32) * 300
    return Batch(inputs=candidates, pose_mm=pose_mm)


def jitted(trainer):
    """(state, key, batch) -> (state, loss), without pmap."""

    def step(*arguments):
        state, scalars = train_step(trainer, *arguments)
        return state, scalars.loss

    return jax.jit(step)


def leaves(tree):
    """{path: array on the host}."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def trainer():
    return make_trainer(draws_per_image=2, ema_decay=0.9, ema_every=2, learning_rate=2e-3)


@pytest.fixture(scope="module")
def step(trainer):
    return jitted(trainer)


@pytest.fixture(scope="module")
def batches():
    """One `Batch` a dispatch, leading axes (steps, B); NaN in the second step of the last."""
    batch = jax.tree.map(
        lambda x: x.reshape(3, STEPS, BATCH_SIZE, *x.shape[1:]),
        heatmap_batch(3, 3 * STEPS * BATCH_SIZE),
    )
    batch.pose_mm[2, 1, 7, 3, 1] = np.nan
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(3)]


def run(trainer, batches, devices):
    """[(state on the host, losses, shards of the state)] after each dispatch, and the error."""
    seen = []
    try:
        for state, scalars in loop.run(
            trainer, trainer.init(jax.random.key(0)), KEY, batches, devices
        ):
            shards = {
                jax.tree_util.keystr(path): [np.array(s.data) for s in leaf.addressable_shards]
                for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            }
            seen.append((leaves(state), scalars.loss, shards))
    except NonFiniteLossError as error:
        return seen, error
    return seen, None


@pytest.fixture(scope="module")
def eight_devices(trainer, batches):
    """Three dispatches of one shape, which may be traced once."""
    assert jax.local_device_count() == 8
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_dispatch", chex.assert_max_traces(loop._dispatch, n=1))
        return run(trainer, batches, None)


def assert_same_states(a, b):
    """Compares parameters, moving average and Adam's moments, to rounding."""
    assert set(a) == set(b)
    for name in a:
        x, y = a[name], b[name]
        if name.endswith("['qkv']['bias']") and not name.startswith(".opt_state"):
            # A key's bias does not change the attention: its gradient is nothing but rounding,
            # which Adam divides by its size.
            x, y = np.delete(x, 1, axis=0), np.delete(y, 1, axis=0)
        scale = np.abs(x).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * scale, err_msg=name)


def test_one_device_and_eight_give_the_same(trainer, batches, eight_devices):
    one, _ = run(trainer, batches[:2], jax.local_devices()[:1])
    eight, _ = eight_devices
    for (one_state, one_losses, _), (state, losses, _) in zip(one, eight, strict=True):
        assert_same_states(one_state, state)
        np.testing.assert_allclose(one_losses, losses, rtol=1e-5)


def test_state_is_the_same_on_all_devices(eight_devices):
    """pmap does not check that an output that is not mapped is the same everywhere."""
    for state, _, shards in eight_devices[0]:
        for name, copies in shards.items():
            assert len(copies) == 8
            assert copies[0].shape == state[name].shape
            assert {copy.tobytes() for copy in copies} == {state[name].tobytes()}, name


def test_loss_that_is_not_finite_stops_the_run(eight_devices):
    seen, error = eight_devices
    assert [int(state[".step"]) for state, _, _ in seen] == [STEPS, 2 * STEPS]
    assert all(np.isfinite(losses).all() for _, losses, _ in seen)
    assert "step 8 is nan" in str(error)
    assert "config.training.learning_rate" in str(error)


def test_a_step_lowers_the_loss_of_its_draw(trainer, step):
    state, batch = trainer.init(jax.random.key(0)), heatmap_batch(0, BATCH_SIZE)
    losses = []
    for _ in range(12):
        # Set back to step 0, every step draws the same dropout, times and noise.
        state, loss = step(state.replace(step=jnp.zeros((), jnp.int32)), KEY, batch)
        losses.append(float(loss))
    assert np.all(np.diff(losses) < 0)
    assert losses[-1] < 0.9 * losses[0]


def test_steps_and_seeds_draw_anew(trainer, step):
    state, batch = trainer.init(jax.random.key(0)), heatmap_batch(0, BATCH_SIZE)
    losses = {
        float(step(state.replace(step=jnp.int32(number)), jax.random.key(seed), batch)[1])
        for number in range(3)
        for seed in range(2)
    }
    assert len(losses) == 6


def test_ema(trainer, step):
    state, batch = trainer.init(jax.random.key(0)), heatmap_batch(7, BATCH_SIZE)
    expected = leaves(state.params)
    for name, value in leaves(state.ema).items():
        assert np.array_equal(value, expected[name])
    for number in (1, 2, 3, 4, 5, 200):  # at step 200 it has reached its decay
        state, _ = step(state.replace(step=jnp.int32(number - 1)), KEY, batch)
        if number % 2 == 0:
            num_updates = number // 2
            decay = min(0.9, (1 + num_updates) / (10 + num_updates))
            for name, value in leaves(state.params).items():
                expected[name] = decay * np.float64(expected[name]) + (1 - decay) * value
        for name, value in leaves(state.ema).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7)


def test_the_moments_of_the_data_are_not_trained():
    """Those of the poses that the state began with, to the bit, also in the moving average."""
    changes = {"target": "edm", "joint_dropout": 0.0, "encoder_layers": 0}
    trainer = make_trainer(changes, ema_decay=0.9, learning_rate=0.1)
    batch = candidate_batch(11, BATCH_SIZE)
    start = trainer.init(jax.random.key(0), batch.pose_mm)
    assert 2 < np.mean(start.params["moments"]["std"]) < 4  # of 300 mm, in decimetres
    state, step = start, jitted(trainer)
    for _ in range(2):
        state, _ = step(state, KEY, batch)
    for of in (state.params, state.ema):
        chex.assert_trees_all_equal(of["moments"], start.params["moments"])
    before, after = (of.params["denoiser"]["input"]["bias"] for of in (start, state))
    assert jnp.abs(after - before).max() > 0.1


@pytest.fixture(scope="module")
def half():
    """Without dropout or transformer, in float16 and in float32."""
    plain = {"joint_dropout": 0.0, "encoder_layers": 0}
    changes = {"learning_rate": 1e-2, "ema_decay": 0.9}
    return [make_trainer(plain | {"matmul_dtype": d}, **changes) for d in ("float16", "float32")]


@pytest.fixture(scope="module")
def half_steps(half):
    return [jitted(trainer) for trainer in half]


@pytest.fixture(scope="module")
def half_states(half):
    """Before the first step."""
    return [trainer.init(jax.random.key(0)) for trainer in half]


def with_scale(state, scale):
    return state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(scale)))


def without_scale(state):
    return state.replace(loss_scale=None)


def test_there_is_a_scale_with_float16_alone(half_states):
    float16, float32 = half_states
    assert float32.loss_scale is None
    scale = float16.loss_scale
    assert (scale.scale, scale.fin_steps) == (65536, 0)
    # As a step gives them, or the second one would be compiled anew.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(scale))
    # PyTorch's.
    assert (scale.growth_factor, scale.backoff_factor, scale.growth_interval) == (2, 0.5, 2000)
    trainer = make_trainer({"matmul_dtype": "bfloat16"})
    assert jax.eval_shape(trainer.init, jax.random.key(0)).loss_scale is None


def test_a_float16_step_is_a_float32_step(half_states, half_steps):
    """To the rounding of float16: Adam's first moment is the gradient."""
    batch = candidate_batch(9, BATCH_SIZE)
    given = [with_scale(half_states[0], 1024.0), half_states[1]]
    states, losses = [], []
    for state, step in zip(given, half_steps, strict=True):
        for _ in range(2):
            state, loss = step(state, KEY, batch)
            losses.append(float(loss))
        states.append(state)
    assert (states[0].loss_scale.fin_steps, states[0].loss_scale.scale) == (2, 1024)
    for before, after in zip(given, states, strict=True):
        assert jax.tree.map(jax.typeof, before) == jax.tree.map(jax.typeof, after)
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=2e-3)
    assert losses[:2] != losses[2:]
    rough, exact = (leaves(state.opt_state[0].mu) for state in states)
    for name, gradient in exact.items():
        assert rough[name].dtype == np.float32
        error = np.linalg.norm(rough[name] - gradient) / np.linalg.norm(gradient)
        assert error < 0.01, name


def test_an_overflow_leaves_the_step_out(half_states, half_steps):
    batch = candidate_batch(9, BATCH_SIZE)
    # A step before, so that the moments are not 0.
    state, _ = half_steps[0](with_scale(half_states[0], 1024.0), KEY, batch)
    assert state.loss_scale.fin_steps == 1
    before = leaves(without_scale(state))
    after, loss = half_steps[0](with_scale(state, 2.0**100), KEY, batch)
    assert np.isfinite(loss)  # the run goes on
    assert after.loss_scale.scale == 2.0**99
    assert after.loss_scale.fin_steps == 0
    result = leaves(without_scale(after))
    assert result.pop(".step") == before.pop(".step") + 1
    for name, value in before.items():
        if not name.startswith(".ema"):
            assert result[name].tobytes() == value.tobytes(), name
    # And when the scale is small enough, as without a scale.
    state, _ = half_steps[0](with_scale(after, 1024.0), KEY, batch)
    expected, _ = half_steps[1](without_scale(after), KEY, batch)
    assert state.loss_scale.fin_steps == 1
    rough, exact = (leaves(s.opt_state[0].mu) for s in (state, expected))
    for name in exact:
        assert np.linalg.norm(rough[name] - exact[name]) < 0.01 * np.linalg.norm(exact[name])


def test_an_overflow_on_one_device_is_one_on_all(half, half_states):
    """In the first of two steps, whose gradient is too large for one image alone."""
    trainer = half[0]
    batch = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), candidate_batch(10, 16))
    batch.pose_mm[0, 5] *= 100
    state = with_scale(jax.tree.map(jnp.copy, half_states[0]), 128.0)  # it is donated
    start = leaves(state.params)
    ((state, scalars),) = loop.run(trainer, state, KEY, [batch])
    losses = scalars.loss
    # Of the step that was left out the gradient is not known.
    assert scalars.grad_norm[0] == 0 < scalars.grad_norm[1] < np.inf
    assert np.isfinite(losses).all()
    assert losses[0] > 100 * losses[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        copies = {np.array(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(copies) == 1, path
    assert int(state.step) == 2
    scale = jax.tree.map(np.asarray, state.loss_scale)
    assert (scale.scale, scale.fin_steps) == (64, 1)
    assert int(np.asarray(state.opt_state[0].count)) == 1
    # Adam's first update has the learning rate's size.
    moved = [np.abs(leaves(state.params)[name] - start[name]).max() for name in start]
    assert 0.5e-2 < max(moved) < 1.01e-2


def test_images_have_draws_of_their_own():
    """The loss of 16 equal images varies 1 / 16 as much as that of one."""
    trainer = make_trainer({"joint_dropout": 0.0, "encoder_layers": 0})
    state, step = trainer.init(jax.random.key(0)), jitted(trainer)
    one = candidate_batch(8, 1)
    many = jax.tree.map(lambda x: np.repeat(x, 16, axis=0), one)
    keys = jax.random.split(jax.random.key(2), 200)
    one, many = ([step(state, key, batch)[1] for key in keys] for batch in (one, many))
    # A ratio of two sample variances of 200 draws each.
    assert 8 < np.var(one) / np.var(many) < 32
    assert abs(np.mean(many) - np.mean(one)) < 5 * np.sqrt(np.var(one) / 200)


def test_heatmaps_and_predrawn_candidates_do_the_same(trainer, step):
    """With one positive cell a map, there is only one candidate to draw."""
    given = candidate_batch(6, BATCH_SIZE)
    only = jax.tree.map(lambda x: x[:, :1], given.inputs)
    maps = np.zeros((BATCH_SIZE, 16, 64 * 64), np.float32)
    np.put_along_axis(
        maps, only.cells[:, 0, :, None].astype(int), only.likelihood[:, 0, :, None], axis=2
    )
    same = jax.tree.map(
        lambda x: np.repeat(x, trainer.network.sampler.num_candidates, axis=1), only
    )
    state = trainer.init(jax.random.key(0))
    _, drawn = step(state, KEY, given.replace(inputs=maps.reshape(-1, 16, 64, 64)))
    _, predrawn = step(state, KEY, given.replace(inputs=same))
    assert np.isfinite(drawn)
    np.testing.assert_allclose(drawn, predrawn, rtol=1e-5)


def test_learning_rates():
    steps = np.arange(20)
    falling = np.cos(np.pi * np.maximum(steps - 4, 0) / 16)
    for changes, expected in (
        ({}, np.ones(20)),
        ({"decay": "cosine"}, 0.5 * (1 + np.cos(np.pi * steps / 20))),
        ({"decay": "cosine", "warmup_steps": 4}, np.minimum(steps / 4, 0.5 * (1 + falling))),
    ):
        trainer = make_trainer(learning_rate=2e-3, **changes)
        rates = [trainer.learning_rate(s) for s in steps]
        np.testing.assert_allclose(rates, 2e-3 * expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("warmup_steps", "first_move"), [(0, 2e-3), (4, 0.0)])
def test_optimizer_is_adam_at_that_rate(warmup_steps, first_move):
    """Adam's first update has the learning rate's size, whatever the gradient's."""
    optimizer = make_trainer(learning_rate=2e-3, warmup_steps=warmup_steps).optimizer
    gradient = jnp.array([1e-3, -5.0, 300.0])
    update, _ = optimizer.update(gradient, optimizer.init(gradient))
    np.testing.assert_allclose(update, -first_move * np.sign(gradient), rtol=1e-3)


def test_the_first_step_that_is_not_finite_is_named():
    fine = StepScalars(loss=jnp.array([1.0, 2.0]), grad_norm=jnp.array([3.0, 4.0]))
    assert loop.check_finite(40, fine).grad_norm.tolist() == [3.0, 4.0]
    bad = StepScalars(loss=np.array([1.0, 1.0, np.nan]), grad_norm=np.array([3.0, np.inf, np.nan]))
    with pytest.raises(NonFiniteLossError, match="gradient of step 42 is inf") as error:
        loop.check_finite(40, bad)
    assert (error.value.step, error.value.what) == (42, "gradient")
    with pytest.raises(NonFiniteLossError, match="loss of step 43 is nan"):
        loop.check_finite(42, jax.tree.map(lambda x: x[2:], bad))


def test_shard_gives_each_device_its_images():
    batch = Batch(
        inputs=np.zeros((3, 8, 16, 64, 64), np.float32),
        pose_mm=np.arange(3 * 8).reshape(3, 8, 1, 1) * np.ones((17, 3)),
    )
    sharded = loop.shard(batch, 4)
    assert sharded.inputs.shape == (4, 3, 2, 16, 64, 64)
    for step in range(3):
        for image in range(8):
            assert (sharded.pose_mm[image // 2, step, image % 2] == 8 * step + image).all()
    with pytest.raises(ValueError, match=r"batch_size = 8 cannot be split over 3 devices"):
        loop.shard(batch, 3)


def test_a_dispatch_of_one_step_is_that_step(trainer, step, batches):
    """It is compiled without the loop over the steps."""
    first = jax.tree.map(lambda x: x[:1], batches[0])
    start, devices = trainer.init(jax.random.key(0)), jax.local_devices()[:1]
    ((state, scalars),) = loop.run(trainer, start, KEY, [first], devices)
    expected, loss = step(trainer.init(jax.random.key(0)), KEY, jax.tree.map(lambda x: x[0], first))
    np.testing.assert_allclose(scalars.loss, [loss], rtol=1e-6)
    assert_same_states(leaves(state), leaves(expected))
    # Adam's first moment after one step is a tenth of the gradient.
    gradient = [10 * np.float64(leaf) for leaf in jax.tree.leaves(state.opt_state[0].mu)]
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in gradient))
    np.testing.assert_allclose(scalars.grad_norm, [norm], rtol=1e-5)


def test_the_fast_way_has_the_losses_of_the_plain_one():
    """Over 100 steps: 25 a call on eight devices that hold the data, or singly from the host."""
    trainer = make_trainer(num_steps=100, steps_per_dispatch=25, checkpoint_every=100)
    few = examples(21, 64)
    arrays = pipeline.TrainingArrays(few.pose_mm, np.float16(few.heatmaps(np.arange(64))))
    data = pipeline.TrainingData(few, arrays, seed=22)
    start = trainer.init(jax.random.key(0))
    selections = data.dispatches(0, 100, 25, BATCH_SIZE, selections=True)
    fast = loop.run(trainer, start, KEY, selections, data=arrays)
    fast = np.concatenate([scalars.loss for _, scalars in fast])
    state, plain = trainer.init(jax.random.key(0)), []
    step = jitted(trainer)
    for i in range(100):
        batch = jax.tree.map(lambda x: x[0], data.batch(data.select(i, 1, BATCH_SIZE)))
        state, loss = step(state, KEY, batch)
        plain.append(loss)
    np.testing.assert_allclose(fast, plain, rtol=1e-4)
    assert np.mean(plain[-10:]) < 0.9 * np.mean(plain[:10])
