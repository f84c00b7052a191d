"""Configurations are checked against the signatures that take them."""

import ml_collections
import pytest

from diffpose_jax import config as config_lib


def function(*, width, depth, name="x"):
    return width, depth, name


def call(**fields):
    return config_lib.call(function, ml_collections.ConfigDict(fields), "config.part")


def test_fields_are_the_keyword_arguments():
    assert call(depth=2, width=1) == (1, 2, "x")
    assert call(depth=2, width=1, name="y") == (1, 2, "y")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"width": 1, "dept": 2}, "unknown field dept, missing field depth"),
        ({"width": 1}, "missing field depth"),
        ({}, "missing field depth, missing field width"),
        ({"width": 1, "depth": 2, "b": 3, "a": 4}, "unknown field a, unknown field b"),
    ],
)
def test_unknown_and_missing_fields_are_named_at_once(fields, problem):
    with pytest.raises(ValueError, match=r"^config\.part: ") as error:
        call(**fields)
    expected = f"config.part: {problem}; the fields are width, depth, name"
    assert str(error.value) == expected
