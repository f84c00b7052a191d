import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text

from diffpose_jax.evaluation.calibration import SinglePose
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.report import figures
from diffpose_jax.skeleton import H36M_JOINTS, MPII_TO_H36M

JOINTS = H36M_JOINTS[1:]
MODEL = {"mpjpe_best": 43.0, "mpjpe_best_at": {"1": 72.0, "10": 55.0, "200": 43.0}}
OTHERS = {"regression": {"mpjpe_best": 62.0}, "mean_pose": {"mpjpe_best": 140.0}}
AMBIGUOUS = {"frames": 41, "model": {"mpjpe_best_at": {"1": 99.0, "200": 62.5}}}
RESULTS = {"subsets": {"all": {"frames": 640, "model": MODEL} | OTHERS, "ambiguous": AMBIGUOUS}}
RELIABILITY = {
    axis: {joint: np.linspace(0, 1, 21) ** (1 + i / 10 + j / 50) for j, joint in enumerate(JOINTS)}
    for i, axis in enumerate("xyz")
}
COVERED = {"50": 0.4, "80": 0.7, "90": 0.85, "95": 0.9}
CALIBRATED = {
    "all": {
        "frames": 640,
        "model": {"reliability": RELIABILITY, "region_coverage": COVERED, "pit_error": 0.0625},
        "gaussian": {"region_coverage": COVERED | {"50": 0.6}},
        "regression": {"mpjpe_best": 62.0},
    },
    "ambiguous": {"frames": 41, "model": {"region_coverage": COVERED | {"95": 0.8}}},
}


def make_frame():
    rng = np.random.default_rng(11)
    heatmaps = rng.uniform(0, 0.1, (16, 64, 64))
    heatmaps[np.arange(16), rng.integers(8, 56, 16), rng.integers(8, 56, 16)] = 0.9
    cells, likelihood = rng.integers(0, 4096, (5, 16)), rng.uniform(0, 1, (5, 16))
    truth = rng.normal(0, 300, (17, 3))
    return {
        "heatmaps": heatmaps,
        "candidates": Candidates(cells.astype(np.int32), likelihood.astype(np.float16)),
        "poses_mm": truth + rng.normal(0, 50, (20, 17, 3)),
        "truth_mm": truth,
    }


FRAME = make_frame()
RADII_MM = np.linspace(10.0, 400.0, 17)
CHOSEN = SinglePose(FRAME["truth_mm"] + 9.0, RADII_MM, 0.85, "heatmap_agreement", "meaning")


def plot_all():
    return {
        "example": figures.plot_example(**FRAME, title=r"S9 a_$\frac{$ b"),
        "chosen": figures.plot_example(**FRAME, chosen=CHOSEN),
        "min_mpjpe": figures.plot_min_mpjpe(figures.min_mpjpe_curves(RESULTS)),
        "no curves": figures.plot_min_mpjpe({}),
        "close curves": figures.plot_min_mpjpe({name: {1: 9.0, 50: 5.0} for name in "abcd"}),
        "loss": figures.plot_loss(np.arange(300), 1 / (1 + np.arange(300.0))),
        "one loss": figures.plot_loss([0], [0.5]),
        "reliability": figures.plot_reliability({"subsets": CALIBRATED}),
    }


@pytest.fixture(scope="module")
def example():
    return figures.plot_example(**FRAME)


def hidden_ticks(figure):
    """Tick labels outside the view, which are laid out but not drawn."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


def test_every_text_lies_inside_its_figure_and_no_labels_overlap():
    settings = dict(matplotlib.rcParams)
    for name, figure in plot_all().items():
        assert dict(matplotlib.rcParams) == settings
        figure.draw_without_rendering()
        texts = {t for t in figure.findobj(Text) if t.get_visible() and t.get_text()}
        texts -= set(hidden_ticks(figure))
        boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts]  # without arrows
        assert boxes
        for text, box in boxes:
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, (name, text)
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, (name, text)
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.padded(-1).overlaps(b.padded(-1)), (name, one, other)


def test_example_shows_the_spread_and_the_errors_in_millimetres(example):
    axes = example.axes[3]
    joints = [H36M_JOINTS.index(label.get_text()) for label in axes.get_yticklabels()]
    assert sorted(joints) == list(range(1, 17))
    poses, truth = FRAME["poses_mm"], FRAME["truth_mm"]
    distances = [np.sqrt(((pose - truth) ** 2).sum(-1)) for pose in (poses.mean(0), *poses)]
    best = min(distances[1:], key=np.mean)
    spread = [np.sqrt(np.trace(np.cov(poses[:, joint].T, bias=True))) for joint in joints]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], spread)
    for line, errors in zip(axes.lines, (distances[0], best), strict=True):
        np.testing.assert_allclose(line.get_xdata(), errors[joints])


def scatters(axes):
    return [c for c in axes.collections if isinstance(c, PathCollection)]


def test_example_puts_candidates_and_argmax_on_their_cells(example):
    drawn, argmax = scatters(example.axes[0])
    cells, likelihood = FRAME["candidates"].cells, FRAME["candidates"].likelihood
    columns_rows = np.stack([cells % 64, cells // 64], -1)
    colours = [figures.GROUP_COLOURS[figures.JOINT_GROUPS[joint]] for joint in MPII_TO_H36M]
    found = zip(drawn.get_offsets().tolist(), map(to_hex, drawn.get_facecolors()), strict=True)
    expected = [(xy, colours[j]) for row in columns_rows.tolist() for j, xy in enumerate(row)]
    assert sorted(found) == sorted(expected)
    largest = drawn.get_offsets()[drawn.get_sizes() == drawn.get_sizes().max()]
    best = columns_rows[likelihood.argmax(0), np.arange(16)]
    assert sorted(largest.tolist()) == sorted(best.tolist())
    for joint, (x, y) in enumerate(argmax.get_offsets()):
        assert FRAME["heatmaps"][joint, int(y), int(x)] == 0.9


def test_example_leaves_out_joints_with_flat_maps():
    heatmaps = np.array(FRAME["heatmaps"])
    heatmaps[[7, 8, 9]] = 0.0
    axes = figures.plot_example(**FRAME | {"heatmaps": heatmaps}).axes[0]
    drawn, argmax = scatters(axes)
    all_drawn, all_argmax = scatters(figures.plot_example(**FRAME).axes[0])
    known = np.delete(np.arange(16), [7, 8, 9])
    np.testing.assert_array_equal(argmax.get_offsets(), all_argmax.get_offsets()[known])
    assert len(drawn.get_offsets()) == len(all_drawn.get_offsets()) * 13 // 16
    (bones,) = (c for c in axes.collections if isinstance(c, LineCollection))
    assert len(bones.get_segments()) == 10  # of 15: a leg has three, an arm two


def test_pose_panels_are_front_and_side_at_one_scale(example):
    for axes, across in zip(example.axes[1:3], (0, 2), strict=True):
        dots = np.asarray(axes.collections[-1].get_offsets())
        np.testing.assert_allclose(dots, FRAME["truth_mm"][:, [across, 1]])
        assert len(axes.collections[0].get_segments()) == 20 * 16
        assert axes.get_xlim()[0] < dots[:, 0].min() < dots[:, 0].max() < axes.get_xlim()[1]
    scales = [np.ptp(axes.get_xlim()) / axes.get_position().width for axes in example.axes[1:3]]
    assert scales[0] == pytest.approx(scales[1])


def test_example_shows_the_crop_the_chosen_pose_and_its_radii():
    crop = np.random.default_rng(9).integers(0, 256, (50, 50, 3), np.uint8)
    without = {"truth_mm": None, "candidates": None}
    figure = figures.plot_example(**FRAME | without, chosen=CHOSEN, crop=crop)
    evidence, front, side, spread = figure.axes
    assert len(scatters(evidence)) == 1
    assert evidence.get_title(loc="left") == "Picture, argmax"
    (image,) = evidence.images
    np.testing.assert_array_equal(image.get_array(), crop)
    assert image.get_extent() == [0, 64, 64, 0]  # the edge at cell 0's whole number
    dots = [axes.collections[-1].get_offsets() for axes in (front, side)]
    np.testing.assert_allclose(dots, [CHOSEN.pose_mm[:, :2], CHOSEN.pose_mm[:, [2, 1]]])
    joints = [H36M_JOINTS.index(label.get_text()) for label in spread.get_yticklabels()]
    widths = [bar.get_width() for bar in spread.patches if not bar.get_fill()]
    np.testing.assert_allclose(widths, RADII_MM[joints])
    assert spread.get_xlim()[1] > max(widths)
    texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"chosen pose (heatmap agreement)", "85% radius"} <= texts


def test_min_mpjpe_plot_is_logarithmic_with_flat_regression():
    found = figures.min_mpjpe_curves(RESULTS)
    assert list(found) == ["model, all", "regression, all", "model, ambiguous"]
    assert figures.min_mpjpe_curves({}) == {}
    axes = figures.plot_min_mpjpe(found).axes[0]
    assert axes.get_xscale() == "log"
    curves = {(tuple(line.get_xdata()), tuple(line.get_ydata())): line for line in axes.lines}
    model, ambiguous = curves[(1, 10, 200), (72, 55, 43)], curves[(1, 200), (99, 62.5)]
    assert curves[(1, 200), (62, 62)].get_color() == figures.METHOD_COLOURS["regression"]
    assert model.get_color() == ambiguous.get_color() == figures.METHOD_COLOURS["model"]
    assert (model.is_dashed(), ambiguous.is_dashed()) == (False, True)
    assert "model, all  43.0" in [text.get_text() for text in axes.texts]


def test_loss_plot_draws_the_running_median():
    losses = np.random.default_rng(5).lognormal(size=240)
    axes = figures.plot_loss(np.arange(240) * 10, losses).axes[0]
    assert axes.get_yscale() == "log"
    raw, median = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    for index in (4, 100, 235):  # the window is 240 // 60 to each side
        expected = np.median(losses[index - 4 : index + 5])
        assert median.get_ydata()[index] == pytest.approx(expected)


@pytest.mark.parametrize("losses", [[], [0.5, 0.5], [np.nan, 0.4], [0.0, np.inf]])
def test_loss_plot_bears_few_and_bad_points(losses):
    figure = figures.plot_loss(np.arange(len(losses)), losses)
    drawn = sum(len(line.get_ydata()) for line in figure.axes[0].lines)
    assert drawn == sum(np.isfinite(losses) & (np.array(losses) > 0))
    assert figures.figure_bytes(figure, dpi=40)


def test_reliability_has_each_joint_in_its_colour_and_the_regions():
    figure = figures.plot_reliability({"subsets": CALIBRATED})
    *panels, balls = figure.axes
    for axes, of_joints in zip(panels, RELIABILITY.values(), strict=True):
        diagonal, *lines = axes.lines
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        np.testing.assert_array_equal([line.get_ydata() for line in lines], [*of_joints.values()])
        np.testing.assert_allclose(lines[0].get_xdata(), np.arange(21) / 20)
        groups = figures.JOINT_GROUPS[1:]
        assert [line.get_color() for line in lines] == [figures.GROUP_COLOURS[g] for g in groups]
    drawn = {line.get_label(): line for line in balls.lines[1:]}
    assert list(drawn) == ["model, all", "model, ambiguous", "gaussian, all"]
    assert [line.is_dashed() for line in drawn.values()] == [False, True, False]
    np.testing.assert_array_equal(drawn["gaussian, all"].get_xdata(), [0.5, 0.8, 0.9, 0.95])
    np.testing.assert_array_equal(drawn["gaussian, all"].get_ydata(), [0.6, 0.7, 0.85, 0.9])
    assert "0.062" in figure.get_suptitle()


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_save_takes_the_format_from_the_name(tmp_path, suffix, start):
    path = figures.save(figures.plot_loss([0], [0.5]), tmp_path / f"new/loss.{suffix}", dpi=40)
    assert path.read_bytes().startswith(start)
