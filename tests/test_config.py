"""Configurations: what becomes of the fields that a user wrote."""

import dataclasses
import json
from collections.abc import Mapping

import ml_collections
import pytest
from small import distinct_config, parsed, small_config

from configs import h36m, quickstart
from diffpose_jax import config as config_lib
from diffpose_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float


@dataclasses.dataclass(frozen=True)
class Outer:
    width: int
    names: tuple[str, ...]
    inner: Inner
    label: str | None = None
    others: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        config_lib.check_range(self, width=(1, 9))


GOOD = {"width": 3, "names": ["a", "b"], "inner": {"rate": 1}}


@pytest.mark.parametrize("kind", [dict, ml_collections.ConfigDict])
def test_fields_become_a_frozen_dataclass(kind):
    made = config_lib.parse(Outer, kind(GOOD | {"others": {"x": 1}}), "config.part")
    assert made == Outer(3, ("a", "b"), Inner(1.0), None, {"x": 1})
    assert type(made.inner.rate) is float
    assert type(made.others) is dict


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"b": 3, "a": 4}, "config.part: unknown field a, unknown field b; the fields are width,"),
        ({"width": True}, "config.part.width must be of type int, not 'True'"),
        ({"width": 10}, "config.part.width must be 1 to 9, not 10"),
        ({"label": 3}, "config.part.label must be of type str | None, not '3'"),
        ({"inner": {"rate": float("nan")}}, "config.part.inner.rate must be of type float"),
        ({"inner": {"rates": 1}}, "config.part.inner: unknown field rates, missing field rate"),
        ({"inner": 3}, "config.part.inner must hold fields, not '3'"),
    ],
)
def test_what_does_not_fit_is_named(changes, problem):
    with pytest.raises(ConfigError) as error:
        config_lib.parse(Outer, GOOD | changes, "config.part")
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize(
    ("part", "changes", "problem"),
    [
        ("model", {"candidates": "per_batch"}, "must be one of per_image, per_hypothesis, not"),
        ("model", {"resnet_width": 6}, "must be a multiple of 4, not 6"),
        ("model", {"num_candidates": 0}, "must be 1 to 4096, not 0"),
        ("model", {"encoder_heads": 3}, "= 3 does not divide 2 num_kernels = 16"),
        ("training", {"num_steps": 22}, "= 22 must be a multiple of steps_per_dispatch = 5"),
        ("training", {"num_steps": 1 << 31}, "must be 1 to 2147483647, not 2147483648"),
        ("training", {"checkpoint_every": 7}, "= 7 must be a multiple of steps_per_dispatch"),
        ("training", {"warmup_steps": 20}, "must be 0 to 19, not 20"),
        ("training", {"ema_decay": 1.0}, "must be 0 to 0.999999999, not 1.0"),
        ("data", {"name": "coco"}, "must be one of motion, human36m, mpi_inf_3dhp, not 'coco'"),
        ("data", {"axes": "world"}, "must be one of camera, crop, not 'world'"),
        ("data", {"calibration_share": 1.0}, "must be 0 to 0.999999999, not 1.0"),
        ("evaluation", {"pose": "best"}, "must be one of mean, medoid, mode, heatmap_agreement"),
    ],
)
def test_values_out_of_range_are_named(part, changes, problem):
    config = distinct_config() if part == "model" else small_config()
    config[part].update(changes)
    ((field, _),) = changes.items()
    with pytest.raises(ConfigError) as error:
        parsed(config)
    assert str(error.value).startswith(f"config.{part}.{field} {problem}")


def test_a_configuration_survives_json():
    config = config_lib.from_dict(quickstart.get_config())
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_lib.from_dict(content) == config


def test_names_of_earlier_versions_are_read():
    content = h36m.get_config().to_dict()
    expected = config_lib.from_dict(content)
    content["model"]["num_samples"] = content["model"].pop("num_candidates")
    content["evaluation"]["controls"] = content["evaluation"].pop("baselines")
    del content["evaluation"]["solver"], content["model"]["target"], content["model"]["data_std"]
    assert config_lib.from_dict(content) == expected
    content["data"]["prepared"] = {"division": "standard", "input_px": 255}
    assert config_lib.from_dict(content).data.prepared == {"split": "standard", "input_px": 255}
