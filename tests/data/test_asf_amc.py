"""The Acclaim reader against numbers by hand, rotations by definition, and files not in order."""

import numpy as np
import pytest
from motion_files import amc_text, asf_text, turn

from diffpose_jax.data.motion.asf_amc import find_asf, read_amc

BONES = {
    "thigh": ((0, -1, 0), 4, "0 0 0 XYZ", ""),
    "shin": ((0, -1, 0), 3, "0 0 90 XYZ", "rx rz"),
}
HIERARCHY = {"root": ("thigh",), "thigh": ("shin",)}
ASF = asf_text(BONES, HIERARCHY)
FRAMES = [
    {"root": (0, 0, 0, 0, 0, 0), "shin": (0, 0)},
    {"root": (1, 2, 3, 90, 90, 0), "shin": (90, 0)},
]
AMC = amc_text(FRAMES)


def write(tmp_path, asf=ASF, amc=AMC):
    (tmp_path / "07.asf").write_text(asf)
    path = tmp_path / "07_01.amc"
    path.write_text(amc)
    return path


def test_by_hand(tmp_path):
    recording = read_amc(write(tmp_path))
    assert recording.joints == ("root", "thigh", "shin")
    assert recording.fps is None
    assert recording.unit_mm == pytest.approx(25.4 / 0.45)
    rest = [[0, 0, 0], [0, -4, 0], [0, -7, 0]]
    np.testing.assert_allclose(recording.positions[0], rest, atol=1e-12)
    # The root turns about the fixed x axis first: (0, -4, 0) -> (0, 0, -4), then about the fixed
    # y axis -> (-4, 0, 0). The shin's x axis is the world's y axis at rest (C is a quarter turn
    # about z), along the bone: it turns on the spot.
    expected = [[1, 2, 3], [-3, 2, 3], [-6, 2, 3]]
    np.testing.assert_allclose(recording.positions[1], expected, atol=1e-12)
    frames = [{"root": (0, 0, 0, 0, 0, 0), "shin": (0, 90)}]
    # About its z axis, the world's: (0, -3, 0) -> (3, 0, 0).
    bent = read_amc(write(tmp_path, amc=amc_text(frames))).positions[0]
    np.testing.assert_allclose(bent[2], [3, -4, 0], atol=1e-12)


def test_presets_of_the_root(tmp_path):
    root = ("axis ZYX", "position 10 20 30", "orientation 0 0 90")
    asf = asf_text(BONES, HIERARCHY, root=root)
    frames = [{"root": (1, 0, 0, 90, 0, 0), "shin": (0, 0)}]
    positions = read_amc(write(tmp_path, asf, amc_text(frames))).positions[0]
    # C M C^-1: a quarter turn about the axis that C makes of x, the y axis.
    np.testing.assert_allclose(positions[:2], [[11, 20, 30], [11, 16, 30]], atol=1e-12)


def test_random_numbers_against_rotations_by_definition(tmp_path):
    rng = np.random.default_rng(3)
    hierarchy = {"root": ["a", "b"], "b": ["c", "d"], "d": ["e"]}
    parents = {child: parent for parent, children in hierarchy.items() for child in children}
    freedoms = {"a": "rz", "b": "ry rx rz", "c": "", "d": "rx rz", "e": "rz ry rx"}
    orders = {name: "".join(rng.permutation(list("XYZ"))) for name in parents}
    angles = {name: rng.uniform(-180, 180, 3).round(3) for name in parents}  # about X, Y and Z
    directions = {name: rng.normal(size=3).round(4) for name in parents}
    bones = {
        name: (directions[name], 1.5, " ".join([*map(str, angles[name]), orders[name]]), dof)
        for name, dof in reversed(freedoms.items())  # children may come before their parents
    }
    frames = []
    for _ in range(4):
        moving = {n: rng.uniform(-180, 180, len(d.split())) for n, d in freedoms.items() if d}
        frames.append({"root": rng.uniform(-180, 180, 6), **moving})
    frames[1] = dict(reversed(frames[1].items()))  # the order of the bones in a frame is free
    recording = read_amc(write(tmp_path, asf_text(bones, hierarchy), amc_text(frames)))

    def fixed(axes, degrees):
        """About fixed axes, the first acting first."""
        return turn([axis[-1].upper() for axis in reversed(axes)], degrees[::-1])

    assert set(recording.joints) == {"root", *parents}
    for f, frame in enumerate(frames):
        positions = {"root": frame["root"][:3]}
        rotations = {"root": fixed("XYZ", frame["root"][3:])}
        for name, parent in parents.items():
            own = fixed(orders[name], [angles[name]["XYZ".index(axis)] for axis in orders[name]])
            motion = fixed(freedoms[name].split(), frame.get(name, ()))
            rotations[name] = rotations[parent] @ own @ motion @ own.T
            positions[name] = positions[parent] + rotations[name] @ (1.5 * directions[name])
        for k, name in enumerate(recording.joints):
            found = recording.positions[f, k], recording.rotations[f, k]
            np.testing.assert_allclose(found[0], positions[name], rtol=1e-13, atol=1e-13)
            np.testing.assert_allclose(found[1], rotations[name], rtol=0, atol=1e-13)


def test_units_and_angles(tmp_path):
    expected = read_amc(write(tmp_path)).positions
    shin = ((0, -1, 0), 3, f"0 0 {np.pi / 2} XYZ", "rx rz")
    units = ("mass 1.0", "length 2.54", "angle rad")
    asf = asf_text({**BONES, "shin": shin}, HIERARCHY, units)
    frames = [
        {"root": (*frame["root"][:3], *np.radians(frame["root"][3:])),
         "shin": np.radians(frame["shin"])} for frame in FRAMES
    ]  # fmt: skip
    found = read_amc(write(tmp_path, asf, amc_text(frames, header=())))
    np.testing.assert_allclose(found.positions, expected, atol=1e-12)
    assert found.unit_mm == pytest.approx(10)
    # The motion file has the last word on its own angles.
    found = read_amc(write(tmp_path, ASF, amc_text(frames, (":radians",))))
    np.testing.assert_allclose(found.positions, expected, atol=1e-12)
    header = (":SAMPLES-PER-SECOND 60", ":DEGREES")
    assert read_amc(write(tmp_path, amc=amc_text(FRAMES, header))).fps == 60


def test_find_asf(tmp_path):
    motion, other = tmp_path / "02_03.amc", tmp_path / "walk.amc"
    with pytest.raises(ValueError, match=r"02_03\.amc: no skeleton .* put 02\.asf .*no \.asf"):
        find_asf(motion)
    (tmp_path / "01.asf").write_text("")
    with pytest.raises(ValueError, match=r"put 02\.asf beside it .*the folder has: 01\.asf"):
        find_asf(motion)  # another subject's
    assert find_asf(other) == tmp_path / "01.asf"
    (tmp_path / "02.ASF").write_text("")
    assert find_asf(motion) == tmp_path / "02.ASF"
    with pytest.raises(ValueError, match=r"put walk\.asf beside it .*01\.asf, 02\.ASF"):
        find_asf(other)
    (tmp_path / "02_03.asf").write_text("")
    assert find_asf(motion) == tmp_path / "02_03.asf"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ASF, "hello", "no section :units; it is no ASF file or is cut off"),
        ("length 0.45", "length 0", r"line 5: length is 0\.0; it must be positive"),
        ("TX TY TZ RX RY RZ", "TX TY TZ RX RY RY", "line 10: the root's order must hold"),
        ("position 0 0 0", "position 0 0", "line 12: 2 numbers where there must be 3"),
        ("axis XYZ", "axis XXZ", "the order of the axes is 'XXZ'"),
        ("name shin", "name thigh", "two of these bones have one name"),
        ("    name shin\n", "", "line 21: the bone that begins here has no name"),
        ("direction 0 -1 0", "direction 0 inf 0", "line 17: a number is not finite"),
        ("dof rx rz", "dof rx rx", "dof of shin may hold rx, ry and rz once each"),
        ("    thigh shin", "    thigh foot", "there is no bone 'foot'"),
        ("    thigh shin", "    shin thigh", "bones that hang on nothing: shin"),
        ("    thigh shin", "    thigh shin root", "a bone hangs on itself: .*root"),
        (AMC, "hello", "no frames; it is no AMC file or is cut off"),
        (AMC, "\0\1", "is not a text file"),
        ("1\nroot", "root", "line 4: 'ROOT' before the first frame's number"),
        ("shin 0 0", "foot 0 0", "line 6: 'foot' is neither a bone"),
        ("shin 0 0", "shin 0", "line 6: 1 numbers where there must be 2"),
        ("shin 0 0", "shin 0 1e12", "line 6: a number is not finite or is far too large"),
        ("shin 0 0\n", "", "line 4: the frame that starts here lacks shin"),
    ],
)
def test_errors_name_file_line_and_reason(tmp_path, old, new, message):
    assert (old in ASF) != (old in AMC)
    path = write(tmp_path, ASF.replace(old, new, 1), AMC.replace(old, new, 1))
    name = r"07\.asf" if old in ASF else r"07_01\.amc"
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_amc(path)
