"""The input pipeline: order, candidates drawn ahead, dispatches."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from scipy import stats
from small import examples, network, parsed, small_config, write_motion

from diffpose_jax.config import ConfigError
from diffpose_jax.data import cameras, motion, pipeline, simulator
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.method import network as network_lib

NUMBER = 10


def training_data(seed=3):
    return pipeline.TrainingData(examples(0, NUMBER), None, seed)


def test_each_epoch_is_a_permutation():
    for batch_size in (4, 3 * NUMBER):
        rows = training_data().select(0, 60 // batch_size, batch_size).rows.reshape(6, NUMBER)
        assert (np.sort(rows, axis=1) == np.arange(NUMBER)).all()
        assert len({tuple(epoch) for epoch in rows}) == 6


def test_a_selection_is_a_function_of_the_step():
    data = training_data()
    whole = data.select(0, 12, 4)
    # In any order, from the middle of an epoch, by another object: the same rows.
    for step in (9, 3, 6, 0):
        part = training_data().select(step, 3, 4)
        assert (part.rows == whole.rows[step : step + 3]).all()
        assert (part.offsets == data.select(step, 3, 4).offsets).all()
    first, second, another = (
        training_data(seed).select(step, 3, 4) for step, seed in ((0, 3), (3, 3), (0, 4))
    )
    for other in (second, another):
        assert (first.rows != other.rows).any()
        assert (first.offsets != other.offsets).mean() > 0.9


def test_dispatches_cover_exactly_the_steps():
    data = training_data()
    for first in (0, 5, 15, 20):
        seen = list(data.dispatches(first, 20, 5, 4))
        expected = [data.batch(data.select(step, 5, 4)) for step in range(first, 20, 5)]
        chex.assert_trees_all_equal(seen, expected)


def test_each_process_reads_its_own_images():
    """The parts of three processes are the batches of one; no other row is asked for."""
    data = examples(0, NUMBER)
    asked = []

    def heatmaps(rows):
        asked.extend(rows.tolist())
        return data.heatmaps(rows)

    recorded = pipeline.TrainingData(dataclasses.replace(data, heatmaps=heatmaps), None, 3)
    order = training_data().select(0, 5, 6)
    whole = training_data().batch(order)
    for process in range(3):
        images = slice(2 * process, 2 * process + 2)
        asked.clear()
        (batch,) = recorded.dispatches(0, 5, 5, 6, images=images)
        chex.assert_trees_all_equal(batch, jax.tree.map(lambda x, i=images: x[:, i], whole))
        assert asked == order.rows[:, images].reshape(-1).tolist()
        (selection,) = recorded.dispatches(0, 5, 5, 6, images=images, selections=True)
        chex.assert_trees_all_equal(selection, jax.tree.map(lambda x, i=images: x[:, i], order))


def test_an_error_in_the_background_arrives():
    def heatmaps(rows):
        raise OSError("disk gone")

    broken = dataclasses.replace(examples(0, NUMBER), heatmaps=heatmaps)
    with pytest.raises(OSError, match="disk gone"):
        next(pipeline.TrainingData(broken, None, 0).dispatches(0, 10, 5, 4))


def test_examples_in_batches():
    batches = [rows.tolist() for rows in examples(0, NUMBER).batches(4)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def made(data, config, key=0):
    config = parsed(config)
    net = network_lib.build(config.model)
    return pipeline.training_data(data, net, config.data, jax.random.key(key), seed=5)


def test_heatmaps_in_the_step():
    data, config = examples(0, NUMBER), small_config()
    on_disk = made(data, config)
    selection = on_disk.select(0, 2, 3)
    batch = on_disk.batch(selection)
    assert (batch.inputs == data.heatmaps(np.arange(NUMBER))[selection.rows]).all()
    assert (batch.pose_mm == data.pose_mm[selection.rows]).all()
    config.data.on_device = True
    in_memory = made(data, config).arrays
    assert in_memory.inputs.dtype == np.float16
    np.testing.assert_allclose(in_memory.batch(selection).inputs, batch.inputs, atol=5e-4)


@pytest.fixture(scope="module", params=[True, False], ids=["argmax", "drawn only"])
def predrawn(request):
    """10 candidates drawn ahead, of which a step takes 4, the argmax counted in if there is one."""
    config = small_config()
    config.model.include_argmax = request.param
    config.data.predrawn_candidates = 10
    return examples(1, NUMBER), config, made(examples(1, NUMBER), config, 2).arrays.inputs


def test_predrawn_are_windows_of_the_draws_by_key(predrawn):
    data, config, ahead = predrawn
    include_argmax = config.model.include_argmax
    rows, offsets = np.repeat(np.arange(NUMBER), 30), np.tile(np.arange(30), NUMBER)
    taken = ahead.take(rows, offsets)
    assert taken.cells.shape == (len(rows), 4, 16)
    maps = data.heatmaps(rows).reshape(len(rows), 16, -1)
    heights = np.take_along_axis(maps, taken.cells.astype(int).swapaxes(1, 2), axis=2)
    np.testing.assert_allclose(taken.likelihood, heights.swapaxes(1, 2), atol=6e-4)
    if include_argmax:
        assert (taken.cells[:, 0] == maps.argmax(axis=-1)).all()
    # The other candidates stand together in the row's 10 draws, seen as a ring: all parts of
    # one row are pieces of it, of which there are 10.
    for parts in taken.cells[:, int(include_argmax) :].reshape(NUMBER, 30, -1, 16):
        assert len({part.tobytes() for part in parts}) == 10
        assert {part[1].tobytes() for part in parts} == {part[0].tobytes() for part in parts}
    assert (taken.cells.dtype, taken.likelihood.dtype) == (np.uint16, np.float16)
    for key, same in ((2, True), (3, False)):
        other = made(data, config, key).arrays.inputs
        assert (other.take(rows, offsets).cells == taken.cells).all() == same


def test_selected_on_the_device_as_on_the_host(predrawn):
    """Candidates and heatmaps, by a jitted function of the arrays."""
    data, _, ahead = predrawn
    for inputs in (ahead, np.float16(data.heatmaps(np.arange(NUMBER)))):
        arrays = pipeline.TrainingArrays(data.pose_mm, inputs)
        host = pipeline.TrainingData(data, arrays, 5)
        selection = host.select(4, 2, 3)
        batch = jax.jit(lambda arrays, selection: arrays.batch(selection))(arrays, selection)
        chex.assert_trees_all_equal(batch, host.batch(selection))


def test_predrawn_have_the_distribution_of_direct_sampling():
    """Both against the exact probabilities, by the chi-squared test."""
    rng = np.random.default_rng(4)
    places = rng.choice(64 * 64, 6, replace=False)
    maps = np.full((1, 16, 64 * 64), -0.1, np.float32)
    maps[..., places] = rng.uniform(0.1, 1.0, 6)
    maps = maps.reshape(1, 16, 64, 64)
    data = dataclasses.replace(examples(0, 1), heatmaps=lambda rows: maps[rows])
    config = small_config()
    config.model.update(include_argmax=False, num_candidates=600)
    config.data.predrawn_candidates = 600
    ahead = made(data, config, 5).arrays.inputs.take(np.zeros(1, int), np.zeros(1, int))
    one = jax.numpy.asarray(maps[0])
    direct = heatmaps_lib.sample(jax.random.key(6), one, 600, include_argmax=False)
    weight = maps[0, 0].reshape(-1)[places]
    for cells in (ahead.cells[0], np.asarray(direct.cells)):
        counts = np.array([(cells == place).sum() for place in places])
        assert counts.sum() == 600 * 16
        expected = weight / weight.sum() * counts.sum()
        assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_predrawn_probabilities():
    """What the network draws in the step, but for the bits of storage."""
    config = small_config()
    config.data.predrawn_candidates = 10
    data = examples(5, 3)
    maps = data.heatmaps(np.arange(3))
    largest = []
    for likelihood in ("height", "probability"):
        config.model.likelihood = likelihood
        taken = made(data, config, 7).arrays.inputs.take(np.arange(3), np.array([2, 9, 5]))
        weight = np.maximum(np.float64(maps), 0).reshape(3, 16, -1)
        if likelihood == "probability":
            weight /= weight.sum(-1, keepdims=True)
        expected = np.take_along_axis(weight, taken.cells.astype(int).swapaxes(1, 2), axis=2)
        np.testing.assert_allclose(taken.likelihood, expected.swapaxes(1, 2), rtol=2e-3, atol=1e-7)
        draw = jax.jit(jax.vmap(network(config).encoder_input))
        in_step = draw(jax.random.split(jax.random.key(8), 3), maps)
        # The argmax, which both take.
        np.testing.assert_allclose(taken.likelihood[:, 0], in_step.likelihood[:, 0], rtol=1e-3)
        largest.append(taken.likelihood.max())
    assert largest[1] < 0.1 < largest[0]


def test_what_cannot_be_drawn_ahead():
    config = small_config()
    config.data.predrawn_candidates = 2
    with pytest.raises(ConfigError, match=r"predrawn_candidates = 2 is less than the candidates"):
        made(examples(0, 2), config)
    config.model.encoder = "heatmaps"
    with pytest.raises(ConfigError, match=r"predrawn_candidates must be 0: the encoder reads"):
        made(examples(0, 2), config)


def test_held_out_are_whole_recordings():
    data = dataclasses.replace(
        examples(0, 40), clips=np.repeat(list("abcdefgh"), [1, 2, 3, 4, 5, 6, 7, 12])
    )
    assert pipeline.hold_out(data, 0.0) == (data, None)
    train, held_out = pipeline.hold_out(data, 0.2)
    assert len(train) + len(held_out) == 40
    assert 0 < len(held_out) <= 8
    assert not set(train.clips) & set(held_out.clips)
    again, _ = pipeline.hold_out(data.select(np.arange(40)[::-1]), 0.2)
    assert set(again.clips) == set(train.clips)
    last = np.array([len(held_out) - 1])
    original = np.flatnonzero(data.names == held_out.names[last])
    assert (held_out.pose_mm[last] == data.pose_mm[original]).all()
    assert (held_out.heatmaps(last) == data.heatmaps(original)).all()
    with pytest.raises(ConfigError, match="no recording is as small"):
        pipeline.hold_out(data, 0.01)


def test_load(tmp_path):
    config = small_config()
    config.data.builder.source = str(write_motion(tmp_path / "motion"))
    config.data.builder.update(train_views_per_frame=1, test_views_per_frame=1)
    config = parsed(config).data
    test = pipeline.load(config, "test", tmp_path / "data")
    columns = motion.read_all(motion.prepare(config.builder, tmp_path / "data"), "test")
    assert len(test) == len(columns["pose_mm"])
    assert (test.pose_mm == columns["pose_mm"]).all()
    assert (test.clips == columns["clip"]).all()
    assert test.names[0] == f"{columns['clip'][0]} {columns['frame'][0]}"
    rows = np.array([3, 0])
    maps = test.heatmaps(rows)
    assert maps.dtype == np.float32
    assert (maps == simulator.render(columns["blobs"][rows])).all()


def test_poses_in_the_axes_of_the_crop(tmp_path):
    """They fit the crop's picture better than those in the axes of the camera."""
    config = small_config()
    config.data.builder.source = str(write_motion(tmp_path / "motion"))
    config.data.builder.camera.update(offset_mm=2000.0, distance_mm_max=4500.0)
    in_camera = pipeline.load(parsed(config).data, "test", tmp_path / "data")
    config.data.axes = "crop"
    in_crop = pipeline.load(parsed(config).data, "test", tmp_path / "data")
    columns = motion.read_all(motion.prepare(config.data.builder, tmp_path / "data"), "test")
    turned = in_crop.pose_mm @ cameras.turns_to(columns["ray"])
    np.testing.assert_allclose(turned, in_camera.pose_mm, atol=1e-3)

    def distance(poses_mm):
        image = columns["keypoints_xy"] - columns["keypoints_xy"].mean(1, keepdims=True)
        plane = (poses_mm - poses_mm.mean(1, keepdims=True))[..., :2] * [1, -1]
        scale = (plane * image).sum((1, 2)) / (plane**2).sum((1, 2))
        return np.linalg.norm(scale[:, None, None] * plane - image, axis=-1).mean()

    assert distance(in_crop.pose_mm) < 0.6 * distance(in_camera.pose_mm)
