"""The Acclaim reader against numbers by hand, scipy's rotations, and files not in order."""

import numpy as np
import pytest
from motion_files import (
    CMU_BONES,
    CMU_HIERARCHY,
    amc_text,
    asf_text,
    cmu_frame,
    write_cmu,
)
from scipy.spatial.transform import Rotation

from diffpose_jax.data.motion.asf_amc import find_asf, read_amc, read_asf

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


def write(tmp_path, asf=ASF, amc=AMC, name="07_01"):
    (tmp_path / "07.asf").write_text(asf)
    path = tmp_path / f"{name}.amc"
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


def test_random_skeletons_against_scipy(tmp_path):
    rng = np.random.default_rng(3)
    names = [f"bone{i}" for i in range(10)]
    parents = [-1, *(int(rng.integers(-1, i)) for i in range(1, 10))]
    bones, axes, freedoms = {}, [], []
    for name in names:
        order = "".join(rng.permutation(list("XYZ")))
        angles = rng.uniform(-180, 180, 3).round(3)
        dof = list(rng.permutation(["rx", "ry", "rz"])[: rng.integers(0, 4)])
        axes.append((order, dict(zip("XYZ", angles, strict=True))))
        freedoms.append(dof)
        direction = rng.normal(size=3).round(4)
        bones[name] = (
            direction,
            1.5,
            f"{angles[0]} {angles[1]} {angles[2]} {order}",
            " ".join(dof),
        )
    hierarchy = {"root": [names[j] for j in range(10) if parents[j] == -1]}
    for i in range(10):
        if i in parents:
            hierarchy[names[i]] = [names[j] for j in range(10) if parents[j] == i]
    frames = []
    for _ in range(4):
        moving = {
            n: rng.uniform(-180, 180, len(d)) for n, d in zip(names, freedoms, strict=True) if d
        }
        frames.append({"root": rng.uniform(-180, 180, 6), **moving})
    frames[1] = dict(reversed(frames[1].items()))  # the order of the bones in a frame is free
    # Children may come before their parents.
    shuffled = {name: bones[name] for name in rng.permutation(names)}
    recording = read_amc(write(tmp_path, asf_text(shuffled, hierarchy), amc_text(frames)))

    def fixed(axes, angles):
        """About fixed axes, first first: scipy's lower case."""
        axes = "".join(axes).lower()
        return Rotation.from_euler(axes, angles, degrees=True) if axes else Rotation.identity()

    index = {name: k for k, name in enumerate(recording.joints)}
    for f, frame in enumerate(frames):
        rotations = {-1: fixed("xyz", frame["root"][3:])}
        positions = {-1: frame["root"][:3]}
        for i, name in enumerate(names):
            order, angles = axes[i]
            own = fixed(order, [angles[axis] for axis in order])
            motion = fixed([d[1] for d in freedoms[i]], frame.get(name, ()))
            rotations[i] = rotations[parents[i]] * own * motion * own.inv()
            direction, length, _, _ = bones[name]
            positions[i] = positions[parents[i]] + rotations[i].apply(length * direction)
            np.testing.assert_allclose(recording.positions[f, index[name]], positions[i], atol=1e-9)
            np.testing.assert_allclose(
                recording.rotations[f, index[name]], rotations[i].as_matrix(), atol=1e-9
            )


def test_units_and_angles(tmp_path):
    radians = asf_text(
        {**BONES, "shin": ((0, -1, 0), 3, f"0 0 {np.pi / 2} XYZ", "rx rz")},
        HIERARCHY,
        units=("mass 1.0", "length 2.54", "angle rad"),
    )
    frames = [
        {key: (*v[:-3], *np.radians(v[-3:])) if key == "root" else np.radians(v)
         for key, v in frame.items()} for frame in FRAMES
    ]  # fmt: skip
    expected = read_amc(write(tmp_path)).positions
    found = read_amc(write(tmp_path, radians, amc_text(frames, header=())))
    np.testing.assert_allclose(found.positions, expected, atol=1e-12)
    assert found.unit_mm == pytest.approx(10)
    # The motion file has the last word on its own angles.
    found = read_amc(write(tmp_path, ASF, amc_text(frames, (":radians",))))
    np.testing.assert_allclose(found.positions, expected, atol=1e-12)
    header = (":SAMPLES-PER-SECOND 60", ":DEGREES")
    assert read_amc(write(tmp_path, amc=amc_text(FRAMES, header))).fps == 60


def test_windows_lines(tmp_path):
    expected = read_amc(write(tmp_path)).positions
    found = read_amc(write(tmp_path, ASF.replace("\n", "\r\n"), AMC.replace("\n", "\r\n")))
    np.testing.assert_array_equal(found.positions, expected)


def test_the_knees_of_cmu_bend_backwards_and_its_elbows_forwards(tmp_path):
    straight, bent = (
        cmu_frame(),
        cmu_frame(ltibia=(90,), rtibia=(90,), lradius=(90,), rradius=(90,)),
    )
    recording = read_amc(write_cmu(tmp_path, "09_01", [straight, bent]))
    at = {name: recording.positions[:, k] for k, name in enumerate(recording.joints)}
    for side in "lr":
        shin = at[f"{side}tibia"] - at[f"{side}femur"]
        np.testing.assert_allclose(shin[1] @ shin[0], 0, atol=0.01)
        assert shin[1, 2] < -7  # backwards: it faces z
        forearm = at[f"{side}radius"] - at[f"{side}humerus"]
        assert forearm[0, 1] < -2.5  # hanging
        assert forearm[1, 2] > 2
    assert at["lclavicle"][0, 0] > at["rclavicle"][0, 0] + 3


def test_find_asf(tmp_path):
    motion = tmp_path / "02_03.amc"
    with pytest.raises(ValueError, match=r"02_03\.amc: no skeleton .* put 02\.asf .*no \.asf"):
        find_asf(motion)
    (tmp_path / "01.asf").write_text("")
    with pytest.raises(ValueError, match=r"put 02\.asf beside it .*the folder has: 01\.asf"):
        find_asf(motion)  # another subject's
    assert find_asf(tmp_path / "walk.amc") == tmp_path / "01.asf"
    assert find_asf(tmp_path / "walk_2.amc") == tmp_path / "01.asf"
    (tmp_path / "02.ASF").write_text("")
    assert find_asf(motion) == tmp_path / "02.ASF"
    with pytest.raises(ValueError, match=r"put walk\.asf beside it .*01\.asf, 02\.ASF"):
        find_asf(tmp_path / "walk.amc")
    (tmp_path / "02_03.asf").write_text("")
    assert find_asf(motion) == tmp_path / "02_03.asf"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ASF, "", "no section :root; it is no ASF file or is cut off"),
        (ASF[ASF.index(":hierarchy") :], "", "no section :hierarchy"),
        ("length 0.45", "length 0", r"line 5: length is 0\.0; it must be positive"),
        ("length 0.45", "length inch", r"line 5: could not convert"),
        ("TX TY TZ RX RY RZ", "TX TY TZ RX RY", "line 10: the root's order must hold"),
        ("TX TY TZ RX RY RZ", "TX TY TZ RX RY RY", "line 10: the root's order must hold"),
        ("position 0 0 0", "position 0 0", "line 12: 2 numbers where there must be 3"),
        ("axis XYZ", "axis XXZ", "the order of the axes is 'XXZ'"),
        ("name shin", "name thigh", "two bones have one name"),
        ("name shin", "name root", "two bones have one name, or one is named root"),
        ("    name shin\n", "", "the bone that begins here has no name"),
        ("    length 3\n", "", "the bone that begins here has no length"),
        ("direction 0 -1 0", "direction 0 inf 0", "line 17: a number is not finite"),
        ("axis 0 0 90 XYZ", "axis 0 0 90", "the order of the axes is ''"),
        ("dof rx rz", "dof rx rx", "dof of shin may hold rx, ry and rz once each"),
        ("dof rx rz", "dof rx tz", "dof of shin may hold rx, ry and rz once each"),
        ("  end\n:hierarchy", ":hierarchy", "the block never ends; the file is cut off"),
        ("  end\n", "", r"begin out of place"),
        ("    thigh shin", "    thigh foot", "there is no bone 'foot'"),
        ("    thigh shin", "    shin thigh", "thigh has two parents or is the root"),
        ("    thigh shin", "    thigh root", "root has two parents or is the root"),
        ("    thigh shin", "    shin shin", "bones that hang on nothing: shin"),
        ("    thigh shin", "", "bones that hang on nothing: shin"),
        (":bonedata", ":bonedata\n:bonedata", "line 14: :bonedata a second time"),
    ],
)
def test_skeleton_errors(tmp_path, old, new, message):
    assert old in ASF
    path = write(tmp_path, ASF.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        read_amc(path)
    assert "07.asf" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (AMC, "", "no frames; it is no AMC file or is cut off"),
        (AMC, "hello", r"line 1: 'hello' is neither a bone that moves nor a frame's number"),
        ("1\nroot", "root", r"line 4: 'root' is neither a bone"),
        ("shin 0 0", "foot 0 0", r"line 6: 'foot' is neither a bone"),
        ("shin 0 0", "thigh 0 0", r"line 6: 'thigh' is neither a bone"),
        ("shin 0 0", "shin 0", r"line 6: 1 numbers where there must be 2"),
        ("shin 0 0", "shin 0 0 0", r"line 6: 3 numbers where there must be 2"),
        ("shin 0 0", "shin 0 nan", r"line 6: a number is not finite"),
        ("shin 0 0", "shin 0 1e12", r"line 6: a number is not finite or is far too large"),
        ("shin 0 0", "shin 0 x", r"line 6: could not convert string to float: 'x'"),
        ("shin 0 0\n", "", r"line 6: the frame that starts in line 4 ends without shin"),
        ("shin 0 0", "shin 0 0\nshin 0 0", r"line 7: shin twice in one frame"),
        ("shin 90 0\n", "", r"line 8: the frame that starts in line 7 ends without shin"),
        ("shin 0 0", "shin 0 0\n:DEGREES", r"line 7: ':DEGREES' is neither"),
    ],
)
def test_motion_errors(tmp_path, old, new, message):
    assert old in AMC
    path = write(tmp_path, amc=AMC.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        read_amc(path)
    assert "07_01.amc" in str(error.value)


def test_no_text_and_no_file(tmp_path):
    path = write(tmp_path)
    path.write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"07_01\.amc is not a text file"):
        read_amc(path)
    with pytest.raises(FileNotFoundError):
        read_amc(tmp_path / "07_02.amc")


def test_damaged_files_give_value_errors_and_nothing_else(tmp_path):
    rng = np.random.default_rng(23)
    asf, amc = ASF.encode(), AMC.encode()
    for turn in range(400):
        data = bytearray(amc if turn % 2 else asf)
        for place in rng.integers(len(data), size=rng.integers(1, 6)):
            data[place] = rng.integers(1, 256)
        path = write(tmp_path)
        (path if turn % 2 else tmp_path / "07.asf").write_bytes(data)
        try:
            read_amc(path)
        except ValueError as error:
            assert "07" in str(error)  # noqa: PT017


def test_a_deep_skeleton_needs_no_recursion(tmp_path):
    bones = {f"b{i}": ((0, 1, 0), 1, "0 0 0 XYZ", "") for i in range(2500)}
    hierarchy = {"root": ("b0",), **{f"b{i}": (f"b{i + 1}",) for i in range(2499)}}
    frames = [{"root": (0, 0, 0, 0, 0, 0)}]
    recording = read_amc(write(tmp_path, asf_text(bones, hierarchy), amc_text(frames)))
    assert recording.positions[0, -1, 1] == 2500


def test_the_made_up_body_is_whole(tmp_path):
    skeleton = read_asf(write(tmp_path, asf_text(CMU_BONES, CMU_HIERARCHY)).with_name("07.asf"))
    assert len(skeleton.bones) == len(CMU_BONES) + 1
    assert skeleton.bones[0].name == "root"
    assert all(bone.parent < index for index, bone in enumerate(skeleton.bones))
