import errno
import itertools
import json
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text

from diffpose_jax.report import figures as plotting
from diffpose_jax.skeleton import H36M_JOINTS, H36M_LEFT, H36M_MIRROR, H36M_RIGHT, MPII_JOINTS

RESULTS = {
    "num_hypotheses": 200,
    "subsets": {
        "all": {
            "frames": 640,
            "model": {"mpjpe_best": 43.0, "mpjpe_best_at": {"1": 72.0, "10": 55.0, "200": 43.0}},
            "gaussian": {"mpjpe_best_at": {"1": 90.0, "200": 60.0}},
            "regression": {"mpjpe_best": 62.0},
            "mean_pose": {"mpjpe_best": 140.0},
        },
        "ambiguous": {"frames": 41, "model": {"mpjpe_best_at": {"1": 99.0, "200": 62.5}}},
    },
}


@pytest.fixture
def frame():
    rng = np.random.default_rng(11)
    heatmaps = rng.uniform(0, 0.1, (16, 64, 64))
    cells = rng.integers(8, 56, (16, 2))
    heatmaps[np.arange(16), cells[:, 1], cells[:, 0]] = 0.9
    columns_rows = rng.integers(0, 64, (5, 16, 2))
    truth = rng.normal(0, 300, (17, 3))
    truth[0] = 0
    hypotheses = truth + rng.normal(0, 50, (20, 17, 3))
    hypotheses[:, 0] = 0
    return {
        "heatmaps": heatmaps,
        "candidates_xy": 2 * (columns_rows - 32) / 64,
        "likelihood": rng.uniform(0, 1, (5, 16)),
        "hypotheses_mm": hypotheses,
        "truth_mm": truth,
    }


def figures(frame):
    levels = np.linspace(0, 1, 11)
    return {
        "example": plotting.plot_example(**frame, title="S9 Walking, frame 64"),
        "no truth": plotting.plot_example(**(frame | {"truth_mm": None})),
        "grid": plotting.plot_heatmap_grid(frame["heatmaps"], frame["candidates_xy"]),
        "min_mpjpe": plotting.plot_min_mpjpe(plotting.min_mpjpe_curves(RESULTS)),
        "no curves": plotting.plot_min_mpjpe({}),
        "loss": plotting.plot_loss(np.arange(300), 1 / (1 + np.arange(300.0))),
        "one loss": plotting.plot_loss([0], [0.5]),
        "calibration": plotting.plot_calibration(levels, levels**2),
    }


def test_every_text_lies_inside_its_figure_and_no_labels_overlap(frame):
    for name, figure in figures(frame).items():
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
        # Tick labels outside the view are laid out but not drawn.
        ticks = {
            label
            for axes in figure.axes
            for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks()
            for label in (tick.label1, tick.label2)
            if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        }
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t not in ticks]
        assert boxes
        for text, box in boxes:
            assert box.x0 >= 0, (name, text)
            assert box.y0 >= 0, (name, text)
            assert box.x1 <= figure.bbox.width, (name, text)
            assert box.y1 <= figure.bbox.height, (name, text)
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.padded(-1).overlaps(b.padded(-1)), (name, one, other)


def test_example_shows_the_spread_and_the_errors_in_millimetres(frame):
    axes = plotting.plot_example(**frame).axes[3]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(names) == sorted(H36M_JOINTS[1:])
    hypotheses, truth = frame["hypotheses_mm"], frame["truth_mm"]
    distances = [np.sqrt(((pose - truth) ** 2).sum(-1)) for pose in hypotheses]
    best = min(distances, key=lambda d: d.mean())
    mean_line, best_line = axes.lines
    for row, (name, bar) in enumerate(zip(names, axes.patches, strict=True)):
        joint = H36M_JOINTS.index(name)
        spread = np.sqrt(np.trace(np.cov(hypotheses[:, joint].T, bias=True)))
        assert bar.get_width() == pytest.approx(spread)
        mean_error = np.linalg.norm(hypotheses[:, joint].mean(0) - truth[joint])
        assert mean_line.get_xdata()[row] == pytest.approx(mean_error)
        assert best_line.get_xdata()[row] == pytest.approx(best[joint])


def test_example_puts_candidates_and_argmax_on_their_cells(frame):
    axes = plotting.plot_example(**frame).axes[0]
    scatters = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert len(scatters) == len(MPII_JOINTS) + 1
    for joint, scatter in enumerate(scatters[:-1]):
        cells = np.asarray(scatter.get_offsets())
        np.testing.assert_allclose(cells / 32 - 1, frame["candidates_xy"][:, joint], atol=1e-12)
        assert scatter.get_sizes().argmax() == frame["likelihood"][:, joint].argmax()
    for joint, (x, y) in enumerate(np.asarray(scatters[-1].get_offsets())):
        assert frame["heatmaps"][joint, int(y), int(x)] == 0.9


def test_pose_panels_are_front_and_side_at_one_scale(frame):
    figure = plotting.plot_example(**frame)
    for axes, across in zip(figure.axes[1:3], (0, 2), strict=True):
        dots = np.asarray(axes.collections[-1].get_offsets())
        np.testing.assert_allclose(dots, frame["truth_mm"][:, [across, 1]])
        assert len(axes.collections[0].get_segments()) == 20 * 16
        assert (np.abs(dots) < 1e4).all()
        assert axes.get_xlim()[0] < dots[:, 0].min() < dots[:, 0].max() < axes.get_xlim()[1]
    scales = [np.ptp(axes.get_xlim()) / axes.get_position().width for axes in figure.axes[1:3]]
    assert scales[0] == pytest.approx(scales[1])


def test_a_lying_person_gets_a_figure_of_ordinary_shape(frame):
    lying = frame | {k: frame[k] * [3.0, 0.1, 0.1] for k in ("hypotheses_mm", "truth_mm")}
    width, height = plotting.plot_example(**lying).get_size_inches()
    assert width / height < 3.5


def test_left_and_right_differ_and_mirror():
    for joint, group in enumerate(plotting.JOINT_GROUPS):
        side = "right" if joint in H36M_RIGHT else "left" if joint in H36M_LEFT else "trunk"
        assert group.startswith(side)
        mirrored = plotting.JOINT_GROUPS[H36M_MIRROR[joint]]
        assert mirrored.split()[1:] == group.split()[1:]
        assert (mirrored == group) == (side == "trunk")
    assert len(set(plotting.GROUP_COLOURS.values())) == len(plotting.GROUP_COLOURS)


def test_titles_are_literal(frame):
    figure = plotting.plot_example(**frame, title=r"a_$\frac{$ b")
    assert len(plotting.figure_bytes(figure, dpi=40)) > 1000


def test_min_mpjpe_curves_take_what_is_there():
    curves = plotting.min_mpjpe_curves(json.loads(json.dumps(RESULTS)))
    assert curves == {
        "model, all": {1: 72.0, 10: 55.0, 200: 43.0},
        "gaussian, all": {1: 90.0, 200: 60.0},
        "regression, all": {1: 62.0},
        "model, ambiguous": {1: 99.0, 200: 62.5},
    }
    assert plotting.min_mpjpe_curves({}) == {}


def test_min_mpjpe_plot_is_logarithmic_with_flat_regression():
    axes = plotting.plot_min_mpjpe(plotting.min_mpjpe_curves(RESULTS)).axes[0]
    assert axes.get_xscale() == "log"
    curves = {(tuple(line.get_xdata()), tuple(line.get_ydata())): line for line in axes.lines}
    model = curves[(1, 10, 200), (72, 55, 43)]
    hard = curves[(1, 200), (99, 62.5)]
    assert curves[(1, 200), (62, 62)].get_color() == plotting.METHOD_COLOURS["regression"]
    assert model.get_color() == hard.get_color() == plotting.METHOD_COLOURS["model"]
    assert not model.is_dashed()
    assert hard.is_dashed()


def test_loss_plot_draws_the_running_median():
    rng = np.random.default_rng(5)
    losses = rng.lognormal(size=240)
    axes = plotting.plot_loss(np.arange(240) * 10, losses).axes[0]
    assert axes.get_yscale() == "log"
    raw, median = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    for index in (4, 100, 235):  # the window is 240 // 60 to each side
        expected = np.median(losses[index - 4 : index + 5])
        assert median.get_ydata()[index] == pytest.approx(expected)


@pytest.mark.parametrize("losses", [[], [0.3], [0.5, 0.5], [np.nan, 0.4], [np.inf], [0.0, -1.0]])
def test_loss_plot_bears_few_and_bad_points(losses):
    figure = plotting.plot_loss(np.arange(len(losses)), losses)
    drawn = sum(len(line.get_ydata()) for line in figure.axes[0].lines)
    assert drawn == sum(np.isfinite(losses) & (np.array(losses) > 0))
    assert plotting.figure_bytes(figure, dpi=40)


def test_calibration_prints_the_expected_calibration_error():
    levels = np.array([0.1, 0.5, 0.9])
    figure = plotting.plot_calibration(levels, {"model": [0.2, 0.5, 0.7], "gaussian": levels})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "model: ECE 0.100" in texts
    assert "gaussian: ECE 0.000" in texts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heatmaps", np.zeros((17, 64, 64))),
        ("candidates_xy", np.zeros((5, 16, 3))),
        ("likelihood", np.zeros((4, 16))),
        ("hypotheses_mm", np.zeros((0, 17, 3))),
        ("hypotheses_mm", np.full((2, 17, 3), np.nan)),
        ("truth_mm", np.zeros((16, 3))),
    ],
)
def test_bad_arrays_are_named(frame, name, value):
    with pytest.raises(ValueError, match=name):
        plotting.plot_example(**(frame | {name: value}))


def test_bad_curves_are_refused():
    with pytest.raises(ValueError, match="one loss for each step"):
        plotting.plot_loss([0, 1], [0.5])
    with pytest.raises(ValueError, match="gaussian"):
        plotting.plot_calibration([0.1, 0.9], {"gaussian": [0.5]})


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    figure = plotting.plot_loss([0], [0.5])
    path = plotting.save(figure, tmp_path / "new" / "loss.png", dpi=40)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]

    def broken(self, target):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("pathlib.Path.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        plotting.save(figure, path, dpi=80)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_settings_stay_as_they_were(frame):
    before = dict(matplotlib.rcParams)
    figures(frame)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
    code = "import sys, diffpose_jax.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
