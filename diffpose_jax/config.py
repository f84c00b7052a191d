"""Configurations: the ConfigDict that users edit becomes frozen dataclasses here, checked once.

Files in `configs/`, `--config.FIELD=VALUE` and checkpoints hold plain fields. `parse` turns them
into the dataclasses below, whose fields `configs/h36m.py` documents. No other code checks them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from flax.traverse_util import flatten_dict

_T = TypeVar("_T")

RENAMED = {
    "model.num_samples": "model.num_candidates",
    "evaluation.controls": "evaluation.baselines",
    "data.prepared.division": "data.prepared.split",
}
"""Fields of earlier versions: their names in checkpoints, and what they are called now."""


class ConfigError(ValueError):
    """A configuration has fields that do not exist or values that do not fit."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The networks and the diffusion process: `config.model`."""

    encoder: str
    num_candidates: int
    include_argmax: bool
    candidates: str
    coordinates: str
    likelihood: str
    likelihood_scaling: bool
    num_kernels: int
    cross_spatial: bool
    joint_dropout: float
    encoder_layers: int
    encoder_heads: int
    encoder_feed_forward: int
    encoder_dropout: float
    condition_size: int
    resnet_width: int
    denoiser_width: int
    denoiser_blocks: int
    diffusion_steps: int
    schedule_offset: float
    max_beta: float
    pose_scale: float
    clip: float
    matmul_dtype: str
    target: str = "noise"
    data_std: float = 0.0
    candidate_sets: int = 1

    def __post_init__(self) -> None:
        # Bounded above, too: a checkpoint may come from anyone, and its networks are built first.
        check_range(
            self,
            num_candidates=(1, 4096),
            candidate_sets=(1, 65_536),
            num_kernels=(2, 4096),
            joint_dropout=(0, 0.99),
            encoder_layers=(0, 100),
            encoder_heads=(1, 4096),
            encoder_feed_forward=(1, 65_536),
            encoder_dropout=(0, 0.99),
            condition_size=(1, 65_536),
            resnet_width=(4, 4096),
            denoiser_width=(1, 65_536),
            denoiser_blocks=(0, 100),
            diffusion_steps=(2, 10_000),
            schedule_offset=(0, 1),
            max_beta=(0, 1),
            pose_scale=(1e-3, 1e6),
            clip=(1e-3, 1e9),
            data_std=(0, 1e6),
        )
        check_choice(
            self,
            encoder=("embedding", "candidates", "heatmaps"),
            candidates=("per_image", "per_hypothesis"),
            coordinates=("image", "standardised"),
            likelihood=("height", "probability"),
            target=("noise", "edm"),
            matmul_dtype=("float32", "bfloat16", "float16"),
        )
        if self.resnet_width % 4:
            raise ValueError(f"resnet_width must be a multiple of 4, not {self.resnet_width}")
        if 2 * self.num_kernels % self.encoder_heads:
            raise ValueError(
                f"encoder_heads = {self.encoder_heads} does not divide 2 num_kernels"
                f" = {2 * self.num_kernels}"
            )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The optimizer and its steps: `config.training`."""

    num_steps: int
    batch_size: int
    draws_per_image: int
    learning_rate: float
    warmup_steps: int
    decay: str
    ema_decay: float
    ema_every: int
    steps_per_dispatch: int
    checkpoint_every: int
    keep_checkpoints: int
    init_from: str = ""

    def __post_init__(self) -> None:
        most = (1 << 31) - 1  # steps are counted in 32 bits
        positive = "num_steps batch_size draws_per_image ema_every steps_per_dispatch"
        positive += " checkpoint_every keep_checkpoints"
        check_range(
            self,
            **dict.fromkeys(positive.split(), (1, most)),
            learning_rate=(1e-12, 1e30),
            warmup_steps=(0, self.num_steps - 1),
            ema_decay=(0, 1 - 1e-9),
        )
        check_choice(self, decay=("constant", "cosine"))
        for field in ("num_steps", "checkpoint_every"):
            if getattr(self, field) % self.steps_per_dispatch:
                raise ValueError(
                    f"{field} = {getattr(self, field)} must be a multiple of steps_per_dispatch"
                    f" = {self.steps_per_dispatch}"
                )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and how training reads it: `config.data`.

    `builder` is for "motion" (`data.motion.MotionConfig`), `prepared` and `test_frames` are for the
    others.
    """

    name: str
    predrawn_candidates: int
    calibration_share: float
    on_device: bool
    builder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prepared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    test_frames: str = "all"
    axes: str = "camera"

    def __post_init__(self) -> None:
        check_range(self, predrawn_candidates=(0, 65_536), calibration_share=(0, 1 - 1e-9))
        check_choice(
            self,
            axes=("camera",) if self.name != "motion" else ("camera", "crop"),
            name=("motion", "human36m", "mpi_inf_3dhp"),
            test_frames=("every_64th_frame", "every_16th_row", "all"),
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured and how: `config.evaluation`."""

    num_hypotheses: int
    weights: str
    batch_size: int
    ambiguous: str
    ambiguous_sigma_px: float
    group_by: tuple[str, ...]
    group_metrics: tuple[str, ...]
    pose: str
    radius_level: float
    baselines: bool
    regression_width: int
    regression_steps: int
    regression_batch_size: int
    regression_learning_rate: float
    report_frames: int
    solver: str = "ddpm"

    def __post_init__(self) -> None:
        check_range(
            self,
            num_hypotheses=(1, 1_000_000),
            batch_size=(1, 65_536),
            ambiguous_sigma_px=(0, 1000),
            radius_level=(1e-6, 1 - 1e-6),
            regression_width=(1, 65_536),
            regression_steps=(1, 1 << 30),
            regression_batch_size=(1, 1 << 20),
            regression_learning_rate=(1e-12, 1e3),
            report_frames=(0, 10_000),
        )
        check_choice(
            self,
            weights=("raw", "ema"),
            pose=("mean", "medoid", "mode", "heatmap_agreement"),
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole configuration: of a run, a checkpoint or an evaluation's protocol."""

    seed: int
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    evaluation: EvaluationConfig


def parse(kind: type[_T], fields: Any, where: str) -> _T:
    """Makes a frozen dataclass of the fields that a user wrote or a checkpoint holds.

    Args:
      kind: the dataclass; fields that are dataclasses themselves are parsed likewise.
      fields: a ConfigDict or another mapping.
      where: what the fields are called in messages, such as "config.model".

    Raises:
      ConfigError: names the fields that are unknown and those that are missing, or says which
        value is of another type than its field, or was refused by `kind`.
    """
    if not hasattr(fields, "items"):
        raise ConfigError(f"{where} must hold fields, not {str(fields)[:100]!r}")
    known = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    required = {
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    unknown, missing = sorted(set(fields) - set(known)), sorted(required - set(fields))
    if unknown or missing:
        problems = [f"unknown field {name[:60]}" for name in unknown[:20]]
        problems += [f"missing field {name}" for name in missing]
        raise ConfigError(f"{where}: {', '.join(problems)}; the fields are {', '.join(known)}")
    wanted = typing.get_type_hints(kind)
    values = {
        name: _value(wanted[name], value, f"{where}.{name}") for name, value in fields.items()
    }
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    """A field's value as its type has it."""
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is Mapping and hasattr(value, "to_dict"):
        value = value.to_dict()
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        value = tuple(value)
    if not _is_a(value, kind):
        kind = getattr(kind, "__name__", kind)
        raise ConfigError(f"{where} must be of type {kind}, not {str(value)[:100]!r}")
    return float(value) if kind is float else value


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    if kind in (int, float):
        kinds = int if kind is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, typing.get_origin(kind) or kind)


def check_range(config: Any, **ranges: tuple[float, float]) -> None:
    """For `__post_init__`: raises ValueError if a field is less or more than its bounds."""
    for field, (least, most) in ranges.items():
        if not least <= getattr(config, field) <= most:
            raise ValueError(f"{field} must be {least} to {most}, not {getattr(config, field)}")


def check_choice(config: Any, **choices: tuple[str, ...]) -> None:
    """For `__post_init__`: raises ValueError if a field is none of its choices."""
    for field, words in choices.items():
        if getattr(config, field) not in words:
            raise ValueError(
                f"{field} must be one of {', '.join(words)}, not {getattr(config, field)!r}"
            )


def flat(config: Config) -> dict[str, Any]:
    """The fields by their whole names, such as "model.encoder", as JSON holds the values."""
    return flatten_dict(json.loads(json.dumps(dataclasses.asdict(config))), sep=".")


def from_dict(fields: Any, where: str = "config") -> Config:
    """Parses a whole configuration, also one that an earlier version wrote, see `RENAMED`.

    Raises:
      ConfigError: see `parse`.
    """
    plain = fields.to_dict() if hasattr(fields, "to_dict") else fields
    return parse(Config, with_new_names(plain), where)


def with_new_names(fields: Any, prefix: str = "") -> Any:
    """Nested fields with the names of earlier versions replaced by those of today."""
    if not isinstance(fields, dict):
        return fields
    renamed = {}
    for name, value in fields.items():
        new = RENAMED.get(f"{prefix}{name}", f"{prefix}{name}").rpartition(".")[2]
        renamed[new] = with_new_names(value, f"{prefix}{name}.")
    return renamed
