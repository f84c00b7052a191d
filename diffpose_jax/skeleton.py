"""Joint orders, bones and mirror pairs of the skeletons that the method touches.

Detectors that were trained on MPII give 16 heatmaps; poses are Human3.6M's 17 joints. The
network predicts 16 of those: the hip (index 0) is the midpoint of the two hips and is put
back afterwards. Index tables are tuples, so that they can be static arguments and constants.
"""

from __future__ import annotations

H36M_JOINTS: tuple[str, ...] = (
    "Hip", "RHip", "RKnee", "RAnkle", "LHip", "LKnee", "LAnkle", "Spine", "Thorax",
    "Nose", "Head", "LShoulder", "LElbow", "LWrist", "RShoulder", "RElbow", "RWrist",
)  # fmt: skip
"""The 17 joints of Human3.6M in the order of every pose here; Hip is the root."""

H36M_PARENTS: tuple[int, ...] = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
"""Parent of each joint; -1 for the root."""

H36M_BONES: tuple[tuple[int, int], ...] = tuple(
    (parent, joint) for joint, parent in enumerate(H36M_PARENTS) if parent >= 0
)
"""(parent, joint) pairs, 16 bones."""

H36M_MIRROR: tuple[int, ...] = (0, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 11, 12, 13)
"""`pose[..., H36M_MIRROR, :]` exchanges left and right."""

H36M_RIGHT: tuple[int, ...] = (1, 2, 3, 14, 15, 16)
H36M_LEFT: tuple[int, ...] = (4, 5, 6, 11, 12, 13)

H36M_FROM_32: tuple[int, ...] = (
    0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27,
)  # fmt: skip
"""Where the 17 joints stand among the 32 of the raw Human3.6M files."""

MPII_JOINTS: tuple[str, ...] = (
    "RAnkle", "RKnee", "RHip", "LHip", "LKnee", "LAnkle", "Pelvis", "Spine", "Thorax",
    "Head", "RWrist", "RElbow", "RShoulder", "LShoulder", "LElbow", "LWrist",
)  # fmt: skip
"""The 16 joints of MPII in the order of every heatmap here."""

MPII_TO_H36M: tuple[int, ...] = (3, 2, 1, 4, 5, 6, 0, 7, 8, 10, 16, 15, 14, 11, 12, 13)
"""MPII joint i is Human3.6M joint `MPII_TO_H36M[i]`; only Nose has no heatmap."""

MPII_MIRROR: tuple[int, ...] = (5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10)
"""`heatmaps[..., MPII_MIRROR, :, :]` exchanges the left and right maps."""

MPII_BONES: tuple[tuple[int, int], ...] = (
    (0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9),
    (10, 11), (11, 12), (12, 8), (8, 13), (13, 14), (14, 15),
)  # fmt: skip

NUM_JOINTS = len(H36M_JOINTS)
NUM_HEATMAPS = len(MPII_JOINTS)
HEATMAP_SIZE = 64
