"""HDF5 files lead to no other file, and hold as many rows as they say."""

import h5py
import numpy as np
import pytest

from diffpose_jax.data import hdf5


def external_link(file, other):
    file["a"] = h5py.ExternalLink(other, "a")


def soft_link(file, other):
    file["elsewhere"] = h5py.ExternalLink(other, "a")
    file["a"] = h5py.SoftLink("/elsewhere")


def link_of_the_folder(file, other):
    file["a"] = h5py.ExternalLink(other, "/")


def virtual(file, other):
    with h5py.File(other) as source:
        layout = h5py.VirtualLayout(source["a"].shape, source["a"].dtype)
        layout[:] = h5py.VirtualSource(source["a"])
    file.create_virtual_dataset("a", layout)


def numbers_elsewhere(file, other):
    file.create_dataset("a", (3, 1), "f8", external=[(other, 0, 24)])


@pytest.mark.parametrize(
    "link", [external_link, soft_link, link_of_the_folder, virtual, numbers_elsewhere]
)
def test_hdf5_leads_to_no_other_file(tmp_path, link):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["a"] = np.ones((3, 1))
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        link(file, tmp_path / "secret.h5")
    name = "a/a" if link is link_of_the_folder else "a"
    with h5py.File(path) as file:
        assert len(file[name]) == 3  # h5py follows it
    with (
        pytest.raises(ValueError, match=rf"a\.h5: {name} lies in another file"),
        hdf5.opened(path, "human36m") as file,
    ):
        hdf5.dataset(file, name)


def test_rows_that_are_not_there(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.ones((7, 2)), chunks=(3, 2), maxshape=(None, 2))
        file["a"].resize((10**9, 2))
    with (
        pytest.raises(ValueError, match=r"a\.h5: a holds fewer rows than it announces"),
        hdf5.opened(path, "human36m") as file,
    ):
        hdf5.dataset(file, "a")
