"""The tables of joints agree with each other."""

import pytest

from diffpose_jax import skeleton
from diffpose_jax.skeleton import (
    H36M_BONES,
    H36M_FROM_32,
    H36M_JOINTS,
    H36M_LEFT,
    H36M_MIRROR,
    H36M_PARENTS,
    H36M_RIGHT,
    MPII_BONES,
    MPII_JOINTS,
    MPII_MIRROR,
    MPII_TO_H36M,
)

OTHER_SIDE = {"R": "L", "L": "R"}
SAME_JOINT = {"Pelvis": "Hip"}  # MPII's name: Human3.6M's


def mirrored_name(name):
    """The other side's joint: a capital after the R or L tells RHip from a name like Thorax."""
    if name[0] in OTHER_SIDE and name[1].isupper():
        return OTHER_SIDE[name[0]] + name[1:]
    return name


@pytest.mark.parametrize(
    ("joints", "mirror"), [(H36M_JOINTS, H36M_MIRROR), (MPII_JOINTS, MPII_MIRROR)]
)
def test_mirror_exchanges_the_names_of_the_sides(joints, mirror):
    assert [joints[i] for i in mirror] == [mirrored_name(name) for name in joints]
    assert [mirror[i] for i in mirror] == list(range(len(joints)))


def test_sides():
    assert {H36M_JOINTS[i][0] for i in H36M_RIGHT} == {"R"}
    assert [H36M_MIRROR[i] for i in H36M_RIGHT] == list(H36M_LEFT)
    assert {i for i, j in enumerate(H36M_MIRROR) if i != j} == {*H36M_RIGHT, *H36M_LEFT}


def test_mpii_joints_are_the_h36m_joints_of_the_same_name():
    names = [SAME_JOINT.get(name, name) for name in MPII_JOINTS]
    assert [H36M_JOINTS[i] for i in MPII_TO_H36M] == names
    assert {*range(17)} - {*MPII_TO_H36M} == {H36M_JOINTS.index("Nose")}


def test_mirroring_commutes_with_the_change_of_skeleton():
    via_mpii = [MPII_TO_H36M[i] for i in MPII_MIRROR]
    assert via_mpii == [H36M_MIRROR[i] for i in MPII_TO_H36M]


def test_parents_form_a_tree_that_mirrors():
    assert H36M_PARENTS[0] == -1
    assert all(0 <= parent < joint for joint, parent in enumerate(H36M_PARENTS[1:], start=1))
    assert len(H36M_BONES) == 16
    mirrored = {(H36M_MIRROR[a], H36M_MIRROR[b]) for a, b in H36M_BONES}
    assert mirrored == set(H36M_BONES)


def test_mpii_bones_join_all_joints_and_mirror():
    reached = {MPII_BONES[0][0]}
    for _ in MPII_BONES:
        reached |= {j for bone in MPII_BONES if reached & set(bone) for j in bone}
    assert reached == {*range(16)}
    assert len(MPII_BONES) == 15
    mirrored = {frozenset(MPII_MIRROR[j] for j in bone) for bone in MPII_BONES}
    assert mirrored == set(map(frozenset, MPII_BONES))


def test_sizes():
    assert len(H36M_JOINTS) == len(set(H36M_JOINTS)) == skeleton.NUM_JOINTS == 17
    assert len(MPII_JOINTS) == len(set(MPII_JOINTS)) == skeleton.NUM_HEATMAPS == 16
    assert list(H36M_FROM_32) == sorted(set(H36M_FROM_32))
    assert len(H36M_FROM_32) == 17
    assert max(H36M_FROM_32) < 32
