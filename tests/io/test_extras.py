import json

import pytest

from diffpose_jax.io import extras


def test_gives_the_module_or_says_what_to_install():
    assert extras.load("json", "any") is json
    with pytest.raises(extras.MissingExtraError, match=r"needs nowhere\.at_all.*diffpose_jax\[x\]"):
        extras.load("nowhere.at_all", "x")


def test_a_fault_within_the_library_is_its_own(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_either") as error:
        extras.load("broken_library", "x")
    assert not isinstance(error.value, extras.MissingExtraError)
