"""HDF5 files lead to no other file, and hold as many rows as they say."""

import h5py
import human36m_files
import numpy as np
import pytest

from diffpose_jax.data import hdf5
from diffpose_jax.data.human36m import released


def released_file(path):
    rows = human36m_files.released_rows("test", 3)
    human36m_files.write_released(path, trainset=rows, testset=rows)
    return path


def linked(file, name, other, how):
    """Puts what another file holds in the place of a data set."""
    del file[name]
    if how == "external link":
        file[name] = h5py.ExternalLink(other, name)
    elif how == "soft link":
        file["elsewhere"] = h5py.ExternalLink(other, name)
        file[name] = h5py.SoftLink("/elsewhere")
    else:
        with h5py.File(other) as source:
            layout = h5py.VirtualLayout(source[name].shape, source[name].dtype)
            layout[:] = h5py.VirtualSource(source[name])
        file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("how", ["external link", "soft link", "virtual", "link of the folder"])
def test_hdf5_leads_to_no_other_file(tmp_path, how):
    secret = released_file(tmp_path / "secret.h5")
    path = released_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        if how == "link of the folder":
            file.move("dataset", "moved")
            file["dataset"] = h5py.ExternalLink(secret, "dataset")
        else:
            linked(file, "/dataset/testset", secret, how)
    with h5py.File(path) as file:
        assert len(file["/dataset/testset"]) == 3  # h5py follows it
    with pytest.raises(ValueError, match=r"a\.h5: /dataset/testset lies in another file"):
        released.check(path, "standard")


def test_hdf5_with_its_numbers_in_another_file(tmp_path):
    (tmp_path / "secret").write_bytes(b"s" * 24)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (3, 1), "f8", external=[(tmp_path / "secret", 0, 24)])
    with (
        pytest.raises(ValueError, match=r"a\.h5: a lies in another file"),
        hdf5.opened(path, "human36m") as file,
    ):
        hdf5.dataset(file, "a")


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
