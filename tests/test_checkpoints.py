"""Checkpoints: to go on from to the bit, to load, to give away, and the errors."""

import functools
import gc
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small import examples, model_of, network, small_config

import diffpose_jax
from diffpose_jax import checkpoints, controls, evaluation, training
from diffpose_jax.checkpoints import CheckpointError

KEY = jax.random.key(0)


def make_config(**training_changes):
    config = small_config(ema_decay=0.9, **training_changes)
    config.model.update(encoder_layers=0, joint_dropout=0.0)
    return config


def make_trainer(config):
    return training.from_config(network(config), config.training)


@functools.cache
def states():
    """States of a run at step 0, 10 and 20, on the host: no two of their arrays are equal."""
    state = make_trainer(make_config()).init(KEY)
    rng = np.random.default_rng(0)

    def vary(x):
        x = np.asarray(x)
        return x if x.dtype == np.int32 else x + rng.normal(size=x.shape).astype(x.dtype)

    varied = [jax.tree.map(vary, state).replace(step=np.int32(step)) for step in (10, 20)]
    return [jax.device_get(state), *varied]


def as_json(config):
    """As it is saved, where a tuple is a list."""
    return config.to_json(sort_keys=True)


def on_device(state):
    return jax.tree.map(jnp.asarray, state)


def assert_same_bits(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


def write_run(folder, config):
    with checkpoints.RunCheckpoints(folder / "checkpoints", config, keep=2) as saved:
        for state in states():
            saved.save(on_device(state))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with checkpoints of the steps 10 and 20; step 0 was dropped."""
    return write_run(tmp_path_factory.mktemp("run"), make_config())


@pytest.fixture
def run_folder(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "run")


def restore(folder, config=None):
    config = config or make_config()
    with checkpoints.RunCheckpoints(folder / "checkpoints", config, keep=2) as saved:
        return saved.restore_latest(make_trainer(config).init(KEY))


def test_restored_to_the_bit(written):
    restored = restore(written)
    assert isinstance(restored, training.TrainState)
    assert_same_bits(restored, states()[2])


def test_only_the_newest_are_kept(written):
    assert {p.name for p in (written / "checkpoints").iterdir()} == {"10", "20"}


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def test_no_moving_average(tmp_path):
    config = make_config()
    config.training.ema_decay = 0.0
    state = on_device(states()[1]).replace(ema=None)
    with checkpoints.RunCheckpoints(tmp_path / "checkpoints", config, keep=2) as saved:
        saved.save(state)
    assert_same_bits(restore(tmp_path, config), state)
    with pytest.raises(CheckpointError, match="holds no ema weights"):
        checkpoints.load(tmp_path, "ema")


def test_the_scale_of_a_float16_loss(tmp_path):
    config = make_config()
    config.model.matmul_dtype = "float16"
    first = make_trainer(config).init(KEY)
    assert states()[1].loss_scale is None
    scale = first.loss_scale.replace(scale=jnp.float32(512.0), fin_steps=jnp.int32(1234))
    state = on_device(states()[1]).replace(loss_scale=scale)
    with checkpoints.RunCheckpoints(tmp_path / "checkpoints", config, keep=2) as saved:
        saved.save(state)
    restored = restore(tmp_path, config)
    assert_same_bits(restored, state)
    assert restored.loss_scale == scale  # its type and its constants too
    assert jax.tree.structure(restored) == jax.tree.structure(first)
    assert_same_bits(checkpoints.load(tmp_path).params, state.params)
    with pytest.raises(CheckpointError, match=r"\(config.model.matmul_dtype differ\)"):
        restore(tmp_path)


def test_a_state_that_is_donated_while_it_is_saved(tmp_path):
    """The next steps overwrite the state's memory; what is saved is from before."""
    state = on_device(states()[1])
    expected = jax.tree.map(np.array, state)
    overwrite = jax.pmap(
        lambda state, x: (jax.tree.map(lambda leaf: leaf + 1, state), x),
        in_axes=(None, 0),
        out_axes=(None, 0),
        donate_argnums=0,
        devices=jax.local_devices()[:2],
    )
    state, _ = overwrite(state, np.zeros(2))
    expected = jax.tree.map(lambda x: x + np.ones((), x.dtype), expected)
    with checkpoints.RunCheckpoints(tmp_path / "checkpoints", make_config(), keep=2) as saved:
        saved.save(state)
        for _ in range(20):
            state, _ = overwrite(state, np.zeros(2))
    assert_same_bits(restore(tmp_path), expected)


def test_saving_a_step_again_leaves_it(run_folder):
    with checkpoints.RunCheckpoints(run_folder / "checkpoints", make_config(), 2) as saved:
        saved.save(on_device(states()[0]).replace(step=jnp.int32(20)))
    assert_same_bits(restore(run_folder), states()[2])


def test_another_configuration_is_refused(written):
    config = make_config(learning_rate=5e-3)
    config.seed = 7
    config.data.builder.simulator.error = 0.5
    with pytest.raises(CheckpointError) as error:
        restore(written, config)
    message = str(error.value)
    assert str(written) in message
    assert "config.data.builder.simulator.error, config.seed, config.training.learning_rate" in (
        message
    )
    assert "--workdir" in message


def test_another_evaluation_is_accepted(written):
    config = make_config()
    config.evaluation.num_hypotheses = 3
    config.evaluation.weights = "ema"
    assert_same_bits(restore(written, config), states()[2])


def test_a_half_written_step_is_ignored(run_folder):
    folder = run_folder / "checkpoints"
    shutil.copytree(folder / "20", folder / "30.orbax-checkpoint-tmp-1")
    shutil.rmtree(folder / "30.orbax-checkpoint-tmp-1" / "metadata")
    (folder / "40").mkdir()  # and a folder without anything
    assert_same_bits(checkpoints.load(run_folder).params, states()[2].params)
    (folder / "40").rmdir()
    assert_same_bits(restore(run_folder), states()[2])


def test_load_from_every_folder(written, tmp_path):
    steps = written / "checkpoints"
    for folder, state in (
        (written, states()[2]),
        (str(written), states()[2]),
        (steps, states()[2]),
        (steps / "20", states()[2]),
        (steps / "10", states()[1]),
    ):
        model = diffpose_jax.load(folder)
        assert_same_bits(model.params, state.params)
        assert as_json(model.config) == as_json(make_config())
    checkpoints.export(model, tmp_path / "export")
    exported = diffpose_jax.load(tmp_path / "export")
    assert_same_bits(exported.params, states()[1].params)
    assert as_json(exported.config) == as_json(make_config())


def test_a_loaded_model_samples_as_the_one_saved(written, tmp_path):
    config = make_config()
    maps = examples(0, 1).heatmaps(np.arange(1))
    loaded = checkpoints.load(written)
    original = model_of(config, KEY)
    original = type(original)(original.network, on_device(states()[2].params), config)
    a, b = (np.asarray(model.sample(KEY, maps, 2)) for model in (loaded, original))
    assert a.tobytes() == b.tobytes()


def test_raw_and_ema_weights(tmp_path, written):
    raw, ema = states()[2].params, states()[2].ema
    assert make_config().evaluation.weights == "raw"
    assert_same_bits(checkpoints.load(written, "raw").params, raw)
    assert_same_bits(checkpoints.load(written, "ema").params, ema)
    config = make_config()
    config.evaluation.weights = "ema"
    run = write_run(tmp_path / "run", config)
    assert_same_bits(checkpoints.load(run).params, ema)
    assert_same_bits(checkpoints.load(run, "raw").params, raw)
    # An export holds what it was made from, whatever its configuration says.
    checkpoints.export(checkpoints.load(run, "raw"), tmp_path / "export")
    assert_same_bits(checkpoints.load(tmp_path / "export").params, raw)
    with pytest.raises(CheckpointError, match="weights must be raw or ema, not 'best'"):
        checkpoints.load(run, "best")


def test_export_is_small_and_refuses_what_is_there(written, tmp_path):
    model = checkpoints.load(written)
    checkpoints.export(model, tmp_path / "export")
    size = sum(p.stat().st_size for p in (tmp_path / "export").rglob("*") if p.is_file())
    parameters = sum(x.size for x in jax.tree.leaves(model.params))
    assert size < 4 * parameters + 50_000
    with pytest.raises(CheckpointError, match=r"export is there already"):
        checkpoints.export(model, tmp_path / "export")


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing does not exist; name a training run"):
        checkpoints.load(tmp_path / "nothing")


def foreign_orbax(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "it", {"weights": np.ones(3)})


def foreign_orbax_with_metadata(folder):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            folder / "it", args=ocp.args.Composite(metadata=ocp.args.JsonSave({"version": 3}))
        )


def foreign_list(folder):
    foreign_orbax_with_metadata(folder)
    (folder / "it" / "metadata" / "metadata").write_text("[1, 2]")


def foreign_junk(folder):
    (folder / "it" / "metadata").mkdir(parents=True)
    (folder / "it" / "metadata" / "metadata").write_bytes(b"\x00\xffjunk")


def foreign_empty(folder):
    (folder / "it").mkdir()


def foreign_file(folder):
    (folder / "it").write_bytes(b"PK")


@pytest.mark.parametrize(
    "write",
    [
        foreign_orbax,
        foreign_orbax_with_metadata,
        foreign_list,
        foreign_junk,
        foreign_empty,
        foreign_file,
    ],
)
def test_foreign(tmp_path, write):
    write(tmp_path)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(tmp_path / "it")
    assert str(tmp_path / "it") in str(error.value)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def message_of(read, run_folder):
    try:
        read(run_folder)
    except CheckpointError as error:
        return str(error)
    return "read without an error"


@pytest.mark.parametrize("item", ["params", "metadata"])
def test_truncated_file(run_folder, item, monkeypatch):
    # Orbax reads all arrays at once and abandons the others at the first error: these
    # complain when they are collected, which is not the matter here.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    file = largest_file(run_folder / "checkpoints" / "20" / item)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for read in (checkpoints.load, restore):
        message = message_of(read, run_folder)
        assert re.search(rf"20: cannot read .*{item}", message)
        assert len(message) < 1000
    gc.collect()


def rewrite_metadata(run_folder, change):
    file = run_folder / "checkpoints" / "20" / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))


def test_unknown_field_in_a_checkpoint(run_folder):
    rewrite_metadata(run_folder, lambda m: m["config"]["model"].update(pose_prior=1))
    with pytest.raises(ValueError, match=r"20: config\.model: unknown field pose_prior"):
        checkpoints.load(run_folder)


def test_another_format(run_folder):
    rewrite_metadata(run_folder, lambda m: m.update(format="diffpose_jax checkpoint 2"))
    for read in (checkpoints.load, restore):
        with pytest.raises(CheckpointError, match="its format is 'diffpose_jax checkpoint 2'"):
            read(run_folder)


def test_shape_mismatch_is_named(run_folder):
    rewrite_metadata(run_folder, lambda m: m["config"]["model"].update(denoiser_width=24))
    with pytest.raises(
        CheckpointError,
        match=r"\['denoiser'\]\['blocks_0_0'\]\['bias'\] has shape \(16,\).*wants \(24,\)",
    ):
        checkpoints.load(run_folder)
    rewrite_metadata(
        run_folder, lambda m: m["config"]["model"].update(denoiser_width=16, denoiser_blocks=2)
    )
    with pytest.raises(CheckpointError, match=r"\['blocks_1_0'\].*it is missing"):
        checkpoints.load(run_folder)


def test_controls(tmp_path):
    config = small_config().evaluation
    config.regression_steps = 1
    fitted = evaluation.fit_controls(KEY, examples(1, 8), config)
    checkpoints.save_tree(tmp_path / "controls", controls.to_tree(fitted))
    loaded = controls.from_tree(checkpoints.load_tree(tmp_path / "controls"))
    assert_same_bits(loaded, fitted)
    # In place of what was there.
    checkpoints.save_tree(tmp_path / "controls", {"mean_pose_mm": np.ones(3)})
    tree = checkpoints.load_tree(tmp_path / "controls")
    assert_same_bits(tree, {"mean_pose_mm": np.ones(3)})
    with pytest.raises(ValueError, match="no controls"):
        controls.from_tree(tree)
    with pytest.raises(CheckpointError, match="nothing: cannot be read"):
        checkpoints.load_tree(tmp_path / "nothing")
