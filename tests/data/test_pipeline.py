"""The input pipeline: order, candidates drawn ahead, dispatches."""

import dataclasses

import jax
import ml_collections
import numpy as np
import pytest
from scipy import stats
from small import examples, network, small_config, write_motion

from diffpose_jax.config import ConfigError
from diffpose_jax.data import motion, pipeline, simulator
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.method.heatmaps import Candidates

NUMBER = 10


class Rows:
    """Evidence that tells which rows were asked for, and with which random numbers."""

    def take(self, rows, places):
        return Candidates(cells=rows, likelihood=places)


def training_data(seed=3):
    return pipeline.TrainingData(examples(0, NUMBER), Rows(), seed)


def rows_of(data, first, steps, batch_size):
    return data.batch(first, steps, batch_size).evidence.cells


def test_each_epoch_is_a_permutation():
    rows = rows_of(training_data(), 0, 15, 4).reshape(6, NUMBER)
    assert (np.sort(rows, axis=1) == np.arange(NUMBER)).all()
    assert len({tuple(epoch) for epoch in rows}) == 6


def test_batch_is_a_function_of_the_step():
    data = training_data()
    whole = data.batch(0, 12, 4)
    assert whole.evidence.cells.shape == (12, 4)
    assert whole.pose_mm.shape == (12, 4, 17, 3)
    # In any order, from the middle of an epoch, by another object: the same rows.
    for step in (9, 3, 6, 0):
        part = training_data().batch(step, 3, 4)
        assert (part.evidence.cells == whole.evidence.cells[step : step + 3]).all()
        assert (part.pose_mm == data.examples.pose_mm[part.evidence.cells]).all()
        again = data.batch(step, 3, 4)
        assert (again.evidence.likelihood == part.evidence.likelihood).all()
    places = [data.batch(step, 3, 4).evidence.likelihood for step in (0, 3)]
    assert (places[0] != places[1]).mean() > 0.9


def test_seed_changes_the_order_and_the_draws():
    a, b = (training_data(seed).batch(0, 5, 4).evidence for seed in (3, 4))
    assert (a.cells != b.cells).any()
    assert (a.likelihood != b.likelihood).mean() > 0.9


def test_batch_larger_than_the_split():
    rows = rows_of(training_data(), 0, 1, 3 * NUMBER)
    assert (np.bincount(rows[0]) == 3).all()


@pytest.mark.parametrize(("first", "last"), [(0, 20), (5, 20), (15, 20), (20, 20)])
def test_dispatches_cover_exactly_the_steps(first, last):
    data = training_data()
    seen = list(data.dispatches(first, last, 5, 4))
    assert len(seen) == (last - first) // 5
    for i, batch in enumerate(seen):
        expected = data.batch(first + 5 * i, 5, 4)
        assert (batch.evidence.cells == expected.evidence.cells).all()
        assert (batch.evidence.likelihood == expected.evidence.likelihood).all()


def test_each_process_reads_its_own_images():
    """The parts of three processes are the batches of one; no other row is asked for."""
    data = examples(0, NUMBER)
    asked = []

    def heatmaps(rows):
        asked.extend(rows.tolist())
        return data.heatmaps(rows)

    recorded = dataclasses.replace(data, heatmaps=heatmaps)
    whole = pipeline.TrainingData(data, pipeline.HeatmapsOnDisk(data), 3).batch(0, 5, 6)
    order = pipeline.TrainingData(data, Rows(), 3).selection(0, 5, 6)
    for process in range(3):
        images = slice(2 * process, 2 * process + 2)
        of_process = pipeline.TrainingData(recorded, pipeline.HeatmapsOnDisk(recorded), 3)
        asked.clear()
        (batch,) = of_process.dispatches(0, 5, 5, 6, images=images)
        assert (batch.evidence == whole.evidence[:, images]).all()
        assert (batch.pose_mm == whole.pose_mm[:, images]).all()
        assert asked == order.rows[:, images].reshape(-1).tolist()
        (selection,) = of_process.dispatches(0, 5, 5, 6, images=images, held=True)
        assert (selection.rows == order.rows[:, images]).all()
        assert (selection.places == order.places[:, images]).all()


def test_an_error_in_the_background_arrives():
    class Broken:
        def take(self, rows, places):
            raise OSError("disk gone")

    data = pipeline.TrainingData(examples(0, NUMBER), Broken(), 0)
    with pytest.raises(OSError, match="disk gone"):
        next(data.dispatches(0, 10, 5, 4))


def test_examples_in_batches():
    data = examples(0, NUMBER)
    batches = list(data.batches(4))
    assert [len(rows) for rows in batches] == [4, 4, 2]
    assert (np.concatenate(batches) == np.arange(NUMBER)).all()


def test_heatmaps_in_the_step():
    data = examples(0, NUMBER)
    config = small_config()
    evidence = pipeline.evidence(data, network(config), 0, jax.random.key(0))
    rows = np.array([7, 2, 2])
    taken = evidence.take(rows, np.zeros(3, int))
    assert taken.shape == (3, 16, 64, 64)
    assert (taken == data.heatmaps(np.arange(NUMBER))[rows]).all()
    held = pipeline.evidence(data, network(config), 0, jax.random.key(0), in_memory=True)
    assert held.heatmaps.dtype == np.float16
    np.testing.assert_allclose(held.take(rows, np.zeros(3, int)), taken, atol=5e-4)


@pytest.fixture(scope="module", params=[True, False], ids=["argmax", "drawn only"])
def predrawn(request):
    """10 candidates drawn ahead, of which a step takes 4, the argmax counted in if there is one."""
    config = small_config()
    config.model.include_argmax = request.param
    data = examples(1, NUMBER)
    evidence = pipeline.evidence(data, network(config), 10, jax.random.key(2))
    return data, evidence, request.param


def test_predrawn_are_windows_of_the_draws(predrawn):
    data, evidence, include_argmax = predrawn
    rows = np.repeat(np.arange(NUMBER), 30)
    taken = evidence.take(rows, np.tile(np.arange(30), NUMBER))
    assert taken.cells.shape == taken.likelihood.shape == (len(rows), 4, 16)
    maps = data.heatmaps(rows).reshape(len(rows), 16, -1)
    heights = np.take_along_axis(maps, taken.cells.astype(int).swapaxes(1, 2), axis=2)
    np.testing.assert_allclose(taken.likelihood, heights.swapaxes(1, 2), atol=6e-4)
    if include_argmax:
        assert (taken.cells[:, 0] == maps.argmax(axis=-1)).all()
    # The other candidates stand together in the row's 10 draws, seen as a ring: all parts of
    # one row are pieces of it, of which there are 10.
    drawn = taken.cells[:, int(include_argmax) :].reshape(NUMBER, 30, -1, 16)
    for row in range(NUMBER):
        parts = {part.tobytes() for part in drawn[row]}
        assert len(parts) == 10
        starts = {part[0].tobytes() for part in drawn[row]}
        assert {part[1].tobytes() for part in drawn[row]} == starts


def test_predrawn_in_storage_types_and_by_key(predrawn):
    data, evidence, include_argmax = predrawn
    rows, places = np.arange(3), np.array([9, 0, 4])
    taken = evidence.take(rows, places)
    assert (taken.cells.dtype, taken.likelihood.dtype) == (np.uint16, np.float16)
    config = small_config()
    config.model.include_argmax = include_argmax
    for seed, same in ((2, True), (3, False)):
        other = pipeline.evidence(data, network(config), 10, jax.random.key(seed))
        assert (other.take(rows, places).cells == taken.cells).all() == same


def test_selected_on_the_device_as_on_the_host(predrawn):
    """Candidates and heatmaps, by a jitted function of the held data."""
    data, evidence, _ = predrawn
    in_memory = pipeline.HeatmapsInMemory.read(data)
    for of_data in (evidence, in_memory):
        training_data = pipeline.TrainingData(data, of_data, 5)
        expected = training_data.batch(4, 2, 3)
        held, selection = training_data.held(), training_data.selection(4, 2, 3)
        batch = jax.jit(lambda held, selection: held.batch(selection))(held, selection)
        jax.tree.map(np.testing.assert_array_equal, batch, expected)


def test_predrawn_have_the_distribution_of_direct_sampling():
    """Both against the exact probabilities, by the chi-squared test."""
    rng = np.random.default_rng(4)
    places = rng.choice(64 * 64, 6, replace=False)
    maps = np.full((1, 16, 64 * 64), -0.1, np.float32)
    maps[..., places] = rng.uniform(0.1, 1.0, 6)
    maps = maps.reshape(1, 16, 64, 64)
    data = pipeline.Examples(
        pose_mm=np.zeros((1, 17, 3), np.float32),
        clips=np.array(["clip"]),
        names=np.array(["clip 0"]),
        heatmaps=lambda rows: maps[rows],
    )
    config = small_config()
    config.model.update(include_argmax=False, num_candidates=600)
    ahead = pipeline.evidence(data, network(config), 600, jax.random.key(5))
    ahead = ahead.take(np.zeros(1, int), np.zeros(1, int))
    direct = heatmaps_lib.sample(jax.random.key(6), maps[0], 600, include_argmax=False)
    weight = maps[0, 0].reshape(-1)[places]
    for cells in (ahead.cells[0], np.asarray(direct.cells)):
        counts = np.array([(cells == place).sum() for place in places])
        assert counts.sum() == 600 * 16
        expected = weight / weight.sum() * counts.sum()
        assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_predrawn_probabilities():
    """What the network draws in the step, but for the bits of storage."""
    config = small_config()
    data = examples(5, 3)
    maps = data.heatmaps(np.arange(3))
    likelihoods = {}
    for likelihood in ("height", "probability"):
        config.model.likelihood = likelihood
        net = network(config)
        ahead = pipeline.evidence(data, net, 10, jax.random.key(7))
        taken = ahead.take(np.arange(3), np.array([2, 9, 5]))
        weight = np.maximum(np.float64(maps), 0).reshape(3, 16, -1)
        if likelihood == "probability":
            weight /= weight.sum(-1, keepdims=True)
        expected = np.take_along_axis(weight, taken.cells.astype(int).swapaxes(1, 2), axis=2)
        np.testing.assert_allclose(taken.likelihood, expected.swapaxes(1, 2), rtol=2e-3, atol=1e-7)
        draw = jax.jit(jax.vmap(net.draw_candidates))
        in_step = draw(jax.random.split(jax.random.key(8), 3), maps)
        # The argmax, which both take.
        np.testing.assert_allclose(taken.likelihood[:, 0], in_step.likelihood[:, 0], rtol=1e-3)
        likelihoods[likelihood] = taken.likelihood
    assert likelihoods["probability"].max() < 0.1 < likelihoods["height"].max()


def test_nothing_is_drawn_ahead_for_an_encoder_of_heatmaps():
    config = small_config()
    config.model.encoder = "heatmaps"
    data, rows = examples(0, 2), np.array([1])
    with pytest.raises(ConfigError, match=r"predrawn_candidates must be 0: the encoder reads"):
        pipeline.evidence(data, network(config), 10, jax.random.key(0))
    taken = pipeline.evidence(data, network(config), 0, jax.random.key(0)).take(rows, rows)
    assert (taken == data.heatmaps(rows)).all()


def test_too_few_predrawn():
    with pytest.raises(ConfigError, match=r"predrawn_candidates = 2 is less than the 3 that"):
        pipeline.evidence(examples(0, 2), network(small_config()), 2, jax.random.key(0))


def test_held_out_are_whole_recordings():
    data = dataclasses.replace(
        examples(0, 40), clips=np.repeat(list("abcdefgh"), [1, 2, 3, 4, 5, 6, 7, 12])
    )
    everything, nothing = pipeline.hold_out(data, 0.0)
    assert everything is data
    assert nothing is None
    train, held_out = pipeline.hold_out(data, 0.2)
    assert len(train) + len(held_out) == 40
    assert 0 < len(held_out) <= 8
    assert not set(train.clips) & set(held_out.clips)
    again, _ = pipeline.hold_out(data.select(np.arange(40)[::-1]), 0.2)
    assert set(again.clips) == set(train.clips)
    row = len(held_out) - 1
    original = data.names.tolist().index(held_out.names[row])
    assert (held_out.pose_mm[row] == data.pose_mm[original]).all()
    maps = held_out.heatmaps(np.array([row]))
    assert (maps == data.heatmaps(np.array([original]))).all()
    with pytest.raises(ConfigError, match="no recording is as small"):
        pipeline.hold_out(data, 0.01)
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\), not 1"):
        pipeline.hold_out(data, 1.0)


def test_unknown_data_set():
    config = ml_collections.ConfigDict({"name": "coco"})
    with pytest.raises(ConfigError, match=r"config\.data\.name: unknown data set 'coco'"):
        pipeline.load(config, "train")


def test_load(tmp_path):
    config = small_config().data
    config.builder.source = str(write_motion(tmp_path / "motion"))
    config.builder.update(train_views_per_frame=1, test_views_per_frame=1)
    test = pipeline.load(config, "test", tmp_path / "data")
    columns = motion.read_all(motion.prepare(config.builder, tmp_path / "data"), "test")
    assert len(test) == len(columns["pose_mm"])
    assert (test.pose_mm == columns["pose_mm"]).all()
    assert (test.clips == columns["clip"]).all()
    assert test.names[0] == f"{columns['clip'][0]} {columns['frame'][0]}"
    rows = np.array([3, 0])
    maps = test.heatmaps(rows)
    assert maps.shape == (2, 16, 64, 64)
    assert maps.dtype == np.float32
    assert (maps == simulator.render(columns["blobs"][rows])).all()
