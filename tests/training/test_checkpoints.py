"""Checkpoints: to go on from to the bit, to load, to give away, and the errors."""

import dataclasses
import functools
import gc
import json
import re
import shutil
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small import parsed, random_errors, small_config

import diffpose_jax
import experiments
from diffpose_jax.config import ConfigError
from diffpose_jax.io import arrays, trees
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.method import network as network_lib
from diffpose_jax.training import checkpoints
from diffpose_jax.training.loop import NonFiniteLossError
from diffpose_jax.training.step import Trainer, TrainState

KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def quiet_orbax():
    """As in the programs; the complaints come some time later, perhaps in another test."""
    usual = sys.unraisablehook
    experiments.without_echoes()
    yield
    gc.collect()
    sys.unraisablehook = usual


def make_config(changes=(), **training_changes):
    config = small_config(ema_decay=0.9, **training_changes)
    config.model.update(encoder_layers=0, joint_dropout=0.0)
    config.update_from_flattened_dict(dict(changes))
    return parsed(config)


def make_trainer(config):
    return Trainer(network_lib.build(config.model), config.training)


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


def on_device(state):
    return jax.tree.map(jnp.asarray, state)


def assert_same_bits(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


def run_checkpoints(folder, config=None):
    return checkpoints.RunCheckpoints(folder / "checkpoints", config or make_config(), keep=2)


def names_in(folder):
    return {path.name for path in (folder / "checkpoints").iterdir()}


def write_run(folder, config):
    with run_checkpoints(folder, config) as saved:
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
    with run_checkpoints(folder, config) as saved:
        return saved.restore_latest(make_trainer(config or make_config()).init(KEY))


def test_the_newest_is_restored_to_the_bit(written, tmp_path):
    assert names_in(written) == {"10", "20"}
    restored = restore(written)
    assert isinstance(restored, TrainState)
    assert_same_bits(restored, states()[2])
    assert restore(tmp_path) is None


def test_one_too_many_is_removed(run_folder):
    """As of a process that was killed before it removed it."""
    folder = run_folder / "checkpoints"
    shutil.copytree(folder / "10", folder / "5")
    assert int(restore(run_folder).step) == 20
    assert names_in(run_folder) == {"10", "20"}


def test_no_moving_average(tmp_path):
    config = make_config({"training.ema_decay": 0.0})
    state = on_device(states()[1]).replace(ema=None)
    with run_checkpoints(tmp_path, config) as saved:
        saved.save(state)
    assert_same_bits(restore(tmp_path, config), state)
    with pytest.raises(CheckpointError, match="holds no ema weights"):
        checkpoints.load(tmp_path, "ema")


def test_the_scale_of_a_float16_loss(tmp_path):
    config = make_config({"model.matmul_dtype": "float16"})
    first = make_trainer(config).init(KEY)
    scale = first.loss_scale.replace(scale=jnp.float32(512.0), fin_steps=jnp.int32(1234))
    state = on_device(states()[1]).replace(loss_scale=scale)
    with run_checkpoints(tmp_path, config) as saved:
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
    with run_checkpoints(tmp_path) as saved:
        saved.save(state)
        for _ in range(20):
            state, _ = overwrite(state, np.zeros(2))
    assert_same_bits(restore(tmp_path), expected)


def test_saving_a_step_again_leaves_it(run_folder):
    with run_checkpoints(run_folder) as saved:
        saved.save(on_device(states()[0]).replace(step=jnp.int32(20)))
    assert_same_bits(restore(run_folder), states()[2])


def test_another_configuration_is_refused(written):
    changes = {"seed": 7, "data.builder.simulator.error": 0.5}
    config = make_config(changes, learning_rate=5e-3)
    with pytest.raises(CheckpointError) as error:
        restore(written, config)
    fields = "config.data.builder.simulator.error, config.seed, config.training.learning_rate"
    for part in (str(written), fields, "--workdir"):
        assert part in str(error.value)
    # Another evaluation is accepted.
    config = make_config({"evaluation.num_hypotheses": 3, "evaluation.weights": "ema"})
    assert_same_bits(restore(written, config), states()[2])


def test_a_half_written_step_is_ignored(run_folder):
    folder = run_folder / "checkpoints"
    shutil.copytree(folder / "20", folder / "30.orbax-checkpoint-tmp-1")
    shutil.rmtree(folder / "30.orbax-checkpoint-tmp-1" / "metadata")
    (folder / "40").mkdir()  # and a folder without anything
    assert_same_bits(checkpoints.load(run_folder).params, states()[2].params)
    assert_same_bits(restore(run_folder), states()[2])
    assert names_in(run_folder) == {"10", "20", "40.damaged"}


def test_load_from_every_folder(written):
    steps = written / "checkpoints"
    for folder, state in (
        (str(written), states()[2]),
        (steps, states()[2]),
        (steps / "20", states()[2]),
        (steps / "10", states()[1]),
    ):
        model = diffpose_jax.load(folder)
        assert_same_bits(model.params, state.params)
        assert model.config == make_config()


def test_raw_and_ema_weights(tmp_path, written):
    raw, ema = states()[2].params, states()[2].ema
    assert_same_bits(checkpoints.load(written, "ema").params, ema)
    config = make_config({"evaluation.weights": "ema"})
    run = write_run(tmp_path / "run", config)
    assert_same_bits(checkpoints.load(run).params, ema)
    assert_same_bits(checkpoints.load(run, "raw").params, raw)
    # An export holds what it was made from, whatever its configuration says.
    diffpose_jax.export(diffpose_jax.load(run, "raw"), tmp_path / "export")
    assert_same_bits(checkpoints.load(tmp_path / "export").params, raw)
    with pytest.raises(CheckpointError, match="weights must be raw or ema, not 'best'"):
        checkpoints.load(run, "best")


def test_an_export_is_the_model_is_small_and_overwrites_nothing(written, tmp_path):
    model = diffpose_jax.load(written)
    diffpose_jax.export(model, tmp_path / "export")
    exported = diffpose_jax.load(tmp_path / "export")
    assert_same_bits(exported.params, model.params)
    assert exported.config == model.config
    size = sum(p.stat().st_size for p in (tmp_path / "export").rglob("*") if p.is_file())
    parameters = sum(x.size for x in jax.tree.leaves(model.params))
    assert size < 4 * parameters + 50_000
    with pytest.raises(CheckpointError, match=r"export is there already"):
        diffpose_jax.export(model, tmp_path / "export")


@pytest.fixture
def with_errors(run_folder):
    """A run, and the errors of its raw weights in its folder."""
    errors = random_errors(1, num_steps=25).replace(noise={"ddpm+cov": 0.5})
    checkpoints.write_errors(run_folder, errors, states()[2].params)
    return run_folder, errors


def test_an_export_of_16_bits_is_the_rounded_model(with_errors, tmp_path):
    run, errors = with_errors
    model = diffpose_jax.load(run)
    diffpose_jax.export(model, tmp_path / "half", half=True)
    half = diffpose_jax.load(tmp_path / "half")
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), model.params)
    assert_same_bits(half.params, jax.tree.map(np.float32, rounded))
    assert_same_bits(half.errors, errors)


def test_prediction_errors_are_of_the_weights_they_were_measured_on(with_errors):
    run, errors = with_errors
    for folder in (run, run / "checkpoints", run / "checkpoints" / "20"):
        found = checkpoints.load(folder).errors
        assert_same_bits(found, errors)
        assert found.noise == errors.noise
    assert checkpoints.load(run, "ema").errors is None
    assert checkpoints.load(run / "checkpoints" / "10").errors is None
    checkpoints.write_errors(run, errors, states()[2].ema)
    assert checkpoints.load(run).errors is None
    assert_same_bits(checkpoints.load(run, "ema").errors, errors)


def test_a_solver_that_needs_errors(with_errors, tmp_path):
    """From a run's folder and from an export, which carries them."""
    run, _ = with_errors
    diffpose_jax.export(diffpose_jax.load(run), tmp_path / "export")
    for folder in (run, tmp_path / "export"):
        assert diffpose_jax.load(folder).parse_solver("ddpm:4@24+cov").noise.shape == (4, 48, 48)
    (run / "prediction_errors.npz").unlink()
    message = r"ddpm:4@24\+cov needs .*prediction_errors\.npz.*experiments\.evaluate"
    with pytest.raises(ConfigError, match=message):
        diffpose_jax.load(run).sample(KEY, np.zeros((1, 16, 64, 64)), 2, "ddpm:4@24+cov")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": {"ddpm+cov": -1.0}}, "a factor of the noise is no factor"),
        ({"noise": 3}, "has no attribute 'items'"),
        ({"mean": np.zeros(47, np.float32)}, r"mean is \(47,\), not \(48,\)"),
        ({"cross": np.zeros((24, 48, 48), np.float32)}, r"cross is \(24, 48, 48\), not \(25"),
        ({"variance": np.full(48, np.nan, np.float32)}, "not finite"),
        ({}, "is not a .npy or .npz file of numbers, or is damaged"),
    ],
)
def test_damaged_errors(with_errors, changes, message):
    run, errors = with_errors
    path = run / "prediction_errors.npz"
    content = dataclasses.asdict(errors) | changes
    about = {"parameters": trees.check_sum(states()[2].params), "noise": content.pop("noise")}
    arrays.write_tree(path, content, about)
    if not changes:
        path.write_bytes(flip_a_bit(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        diffpose_jax.load(run)
    assert str(path) in str(error.value)
    assert "remove it" in str(error.value)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    """In the middle of the largest file: in the bytes of an array, or in the configuration."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def damage(run_folder, step, item, how):
    file = largest_file(run_folder / "checkpoints" / str(step) / item)
    file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize("how", [truncate, flip_a_bit])
@pytest.mark.parametrize("item", ["params", "ema", "optimizer", "metadata"])
def test_a_damaged_step_is_put_aside_for_the_one_before(run_folder, item, how, caplog):
    damage(run_folder, 20, item, how)
    if item != "optimizer":
        with pytest.raises(CheckpointError) as error:
            checkpoints.load(run_folder, {"params": "raw", "ema": "ema"}.get(item))
        message = str(error.value)
        assert re.search(rf"20: (cannot read .*{item}|{item} is damaged)", message), message
        assert len(message) < 1000
    with run_checkpoints(run_folder) as saved:
        restored = saved.restore_latest(make_trainer(make_config()).init(KEY))
        assert_same_bits(restored, states()[1])
        assert "20.damaged" in names_in(run_folder)
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert re.search(r"checkpoints/20: .*put aside; going on from step 10", record.getMessage())
        saved.save(on_device(states()[2]))  # the same step again
    assert_same_bits(restore(run_folder), states()[2])
    assert_same_bits(checkpoints.load(run_folder).params, states()[2].params)
    assert names_in(run_folder) == {"10", "20", "20.damaged"}


def test_every_step_is_damaged(run_folder):
    for step in (10, 20):
        damage(run_folder, step, "params", truncate)
    for _ in range(2):  # the second time says the same: nothing was put aside
        with pytest.raises(CheckpointError, match=r"has no checkpoint that is whole: .*20.*10"):
            restore(run_folder)


def test_a_bit_anywhere(run_folder):
    """Of each file of a step, bits at random: what is read is what was written, or an error."""
    rng = np.random.default_rng(0)
    noticed = 0
    for file in sorted((run_folder / "checkpoints" / "20").rglob("*")):
        if not file.is_file():
            continue
        original = file.read_bytes()
        content = bytearray(original)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        try:
            params = checkpoints.load(run_folder).params
        except CheckpointError:
            noticed += 1
        else:
            assert_same_bits(params, states()[2].params)
        file.write_bytes(original)
    assert noticed >= 3


def test_a_checkpoint_of_before_the_sums(run_folder):
    def of_version_0_1(metadata):
        for name in ("crc32", "pose_unit", "pose_scale", "data_fingerprint"):
            del metadata[name]

    rewrite_metadata(run_folder, of_version_0_1, is_signed=False)
    assert checkpoints.load(run_folder).data_fingerprint == ""
    assert_same_bits(restore(run_folder), states()[2])


def rewrite_metadata(run_folder, change, is_signed=True):
    file = run_folder / "checkpoints" / "20" / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    del metadata["metadata_crc32"]
    change(metadata)
    if is_signed:
        own_sum = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
        metadata["metadata_crc32"] = own_sum
    file.write_text(json.dumps(metadata))


def test_other_data_is_refused(tmp_path):
    with run_checkpoints(tmp_path) as saved:
        saved.trains_on("abc")
        saved.save(on_device(states()[1]))
    assert checkpoints.load(tmp_path).data_fingerprint == "abc"
    diffpose_jax.export(diffpose_jax.load(tmp_path), tmp_path / "export")
    assert checkpoints.load(tmp_path / "export").data_fingerprint == "abc"
    with run_checkpoints(tmp_path) as saved:
        saved.restore_latest(make_trainer(make_config()).init(KEY))
        saved.trains_on("abc")
        with pytest.raises(CheckpointError, match=r"begun with other data .*abc, it is def now"):
            saved.trains_on("def")


def test_a_state_that_is_not_finite_is_not_saved(run_folder):
    state = on_device(states()[2]).replace(step=jnp.int32(30))
    params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), state.params)
    with (
        run_checkpoints(run_folder) as saved,
        pytest.raises(NonFiniteLossError, match="update of the params of step 30"),
    ):
        saved.save(state.replace(params=params))
    assert_same_bits(restore(run_folder), states()[2])


def test_what_is_no_checkpoint(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"weights": np.ones(3)})
    metadata = ocp.args.Composite(metadata=ocp.args.JsonSave({"version": 3}))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        for name in ("orbax_with_metadata", "list", "junk"):
            checkpointer.save(tmp_path / name, args=metadata)
    (tmp_path / "list" / "metadata" / "metadata").write_text("[1, 2]")
    (tmp_path / "junk" / "metadata" / "metadata").write_bytes(b"\x00\xffjunk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"PK")
    for foreign in sorted(tmp_path.iterdir()):
        with pytest.raises(CheckpointError, match=re.escape(str(foreign))):
            checkpoints.load(foreign)
    with pytest.raises(CheckpointError, match=r"nothing does not exist; name a training run"):
        checkpoints.load(tmp_path / "nothing")


OTHER_POSES = "20: its poses are others: "


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ((), {"joint_names": ["Head"]}, OTHER_POSES + r"joint_names is \['Head'\], not"),
        ((), {"pose_unit": "m"}, OTHER_POSES + "pose_unit is m, not mm"),
        ((), {"pose_scale": 1.0}, OTHER_POSES + "pose_scale is 1.0, not 10.0"),
        ((), {"format": "diffpose_jax checkpoint 2"}, "its format is 'diffpose_jax checkpoint 2'"),
        (("config", "model"), {"pose_prior": 1}, r"20: .*config\.model: unknown field pose_prior"),
        (
            ("config", "model"),
            {"denoiser_width": 24},
            r"params do not fit: denoiser.blocks_0_0.bias is \(16,\), not \(24,\)",
        ),
        (("config", "model"), {"denoiser_blocks": 2}, r"denoiser.blocks_1_0.bias is missing"),
    ],
)
def test_checkpoints_of_other_programs_or_models(run_folder, place, change, message):
    def update(metadata):
        for key in place:
            metadata = metadata[key]
        metadata.update(change)

    rewrite_metadata(run_folder, update)
    for read in (checkpoints.load,) if place else (checkpoints.load, restore):
        with pytest.raises(ValueError, match=message):
            read(run_folder)
