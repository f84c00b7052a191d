"""The tables of joints agree with each other."""

import pytest

from diffpose_jax import skeleton
from diffpose_jax.skeleton import H36M_JOINTS, H36M_MIRROR, MPII_JOINTS, MPII_MIRROR, MPII_TO_H36M

OTHER_SIDE = {"R": "L", "L": "R"}


def mirrored_name(name):
    """The other side's joint: a capital after the R or L tells RHip from a name like Thorax."""
    if name[0] in OTHER_SIDE and name[1].isupper():
        return OTHER_SIDE[name[0]] + name[1:]
    return name


@pytest.mark.parametrize(
    ("joints", "mirror", "bones"),
    [
        (H36M_JOINTS, H36M_MIRROR, skeleton.H36M_BONES),
        (MPII_JOINTS, MPII_MIRROR, skeleton.MPII_BONES),
    ],
    ids=["h36m", "mpii"],
)
def test_joints_and_bones_mirror(joints, mirror, bones):
    assert [joints[i] for i in mirror] == [mirrored_name(name) for name in joints]
    assert {frozenset(mirror[j] for j in bone) for bone in bones} == set(map(frozenset, bones))
    # The bones form a tree of all joints.
    reached = {bones[0][0]}
    for _ in bones:
        reached |= {j for bone in bones if reached & set(bone) for j in bone}
    assert reached == {*range(len(joints))}
    assert len(bones) == len(set(joints)) - 1


def test_sides_and_parents():
    assert {H36M_JOINTS[i][0] for i in skeleton.H36M_RIGHT} == {"R"}
    assert [H36M_MIRROR[i] for i in skeleton.H36M_RIGHT] == list(skeleton.H36M_LEFT)
    parents = skeleton.H36M_PARENTS
    assert parents[0] == -1
    assert all(0 <= parent < joint for joint, parent in enumerate(parents[1:], start=1))
    assert list(skeleton.H36M_FROM_32) == sorted(set(skeleton.H36M_FROM_32))


def test_mpii_joints_are_the_h36m_joints_of_the_same_name():
    names = [{"Pelvis": "Hip"}.get(name, name) for name in MPII_JOINTS]
    assert [H36M_JOINTS[i] for i in MPII_TO_H36M] == names
    assert {*range(17)} - {*MPII_TO_H36M} == {H36M_JOINTS.index("Nose")}
