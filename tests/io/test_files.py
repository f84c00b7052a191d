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
