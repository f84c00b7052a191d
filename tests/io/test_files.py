import errno
import json

import pytest

from diffpose_jax.io import files


def test_write_json(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"mpjpe": 1.5})
    files.write_json(path, {"mpjpe": 2.5, "best_at": {1: 2.0}})
    assert json.loads(path.read_text()) == {"mpjpe": 2.5, "best_at": {"1": 2.0}}
    with pytest.raises(TypeError):
        files.write_json(path, {"mpjpe": object()})
    assert json.loads(path.read_text())["mpjpe"] == 2.5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_write_atomic_is_whole_or_not_at_all(tmp_path, monkeypatch, step):
    path = files.write_atomic(tmp_path / "new" / "file", b"old")

    def fails(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(step, fails)
    with pytest.raises(OSError, match=r"disk full.*new/file'"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
