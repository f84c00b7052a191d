"""The configuration files: what they say, that they build, and what each switch changes."""

import dataclasses
import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablations, h36m, h36m_released, protocols, quickstart
from diffpose_jax import config as config_lib
from diffpose_jax.config import ModelConfig
from diffpose_jax.method import network as network_lib
from diffpose_jax.method.ablation_encoders import CandidateVector, HeatmapResNet
from diffpose_jax.training.step import Trainer

FILES = sorted(path.stem for path in Path(h36m.__file__).parent.glob("[!_]*.py"))
BOTH = [f"{base}{name}" for base in ("", "quickstart/") for name in ablations.ABLATIONS]
WITH_NAMES = {"ablations": BOTH, "protocols": [*protocols.PROTOCOLS]}
"""Files that take an argument."""


def flat(config):
    """{"part.field": value}"""
    return {
        f"{part}.{field}": value
        for part, fields in config.to_dict().items()
        if part != "seed"
        for field, value in fields.items()
    }


def differences(config, other):
    """{"part.field": (value, other value)}"""
    ours, theirs = flat(config), flat(other)
    return {
        name: (ours.get(name), theirs.get(name))
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    }


def trainer_of(config):
    parsed = config_lib.from_dict(config)
    return Trainer(network_lib.build(parsed.model), parsed.training)


def test_the_paper_and_the_published_program():
    """The rows of the reference's table of disagreements that a configuration decides."""
    paper, program = h36m.get_config(), h36m_released.get_config()
    assert differences(paper, program) == {
        "model.joint_dropout": (0.01, 0.1),
        "model.candidates": ("per_image", "per_hypothesis"),
        "model.matmul_dtype": ("float32", "float16"),
        "training.batch_size": (64, 32),
        "training.ema_decay": (0.0, 0.995),
        "training.ema_every": (1, 10),
        "data.prepared": (
            {"split": "standard", "input_px": 256}, {"split": "standard", "input_px": 255}
        ),
        "data.test_frames": ("every_64th_frame", "every_16th_row"),
    }  # fmt: skip
    assert paper.seed == program.seed == 42
    same = flat(paper)
    assert (same["model.coordinates"], same["model.likelihood"]) == ("image", "height")
    assert same["evaluation.weights"] == "raw"
    assert (same["training.learning_rate"], same["training.decay"]) == (1e-4, "constant")
    assert (same["training.num_steps"], same["training.warmup_steps"]) == (700_000, 0)
    assert (same["model.num_candidates"], same["model.diffusion_steps"]) == (32, 25)
    assert (same["model.pose_scale"], same["model.clip"]) == (10.0, 30.0)
    assert same["evaluation.num_hypotheses"] == 200


@functools.cache
def shapes_of(model_json):
    """Parameters' shapes; many configurations have the same network."""
    config = h36m.get_config().model
    config.update(json.loads(model_json))
    network = network_lib.build(config_lib.parse(ModelConfig, config, "config.model"))
    return jax.eval_shape(network.init, jax.random.key(0))


@pytest.mark.parametrize("file", FILES)
def test_every_configuration_builds(file):
    module = importlib.import_module(f"configs.{file}")
    arguments = [(name,) for name in WITH_NAMES.get(file, [])] or [()]
    for argument in arguments:
        config = module.get_config(*argument)
        trainer = trainer_of(config)
        network = trainer.network
        sizes = config.model.copy_and_resolve_references()
        sizes.diffusion_steps = 25  # which no parameter depends on
        shapes = shapes_of(sizes.to_json(sort_keys=True))
        moments = {"moments"} if config.model.target == "edm" else set()
        assert set(shapes) == {"encoder", "denoiser"} | moments
        assert {p.dtype for p in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
        # Candidates drawn ahead must be enough; the heatmaps' encoder takes none.
        ahead, sampler = config.data.predrawn_candidates, network.sampler
        assert ahead == 0 or ahead >= sampler.num_candidates - sampler.include_argmax
        json.dumps(config.to_dict())  # as it goes into a checkpoint


def test_the_state_before_the_first_step():
    for config in (h36m.get_config(), h36m_released.get_config(), quickstart.get_config()):
        state = jax.eval_shape(trainer_of(config).init, jax.random.key(0))
        assert (state.ema is not None) == (config.training.ema_decay > 0)
        assert (state.loss_scale is not None) == (config.model.matmul_dtype == "float16")


def test_no_such_configuration():
    for name in ("without_luck", "laptop/full", ""):
        with pytest.raises(ValueError, match=f"'{name}' is no ablation; take .*without_transf"):
            ablations.get_config(name)
    with pytest.raises(ValueError, match="'coco' is no protocol; take one of human36m, "):
        protocols.get_config("coco")


def test_tables_of_ablations():
    names = [name for rows in ablations.TABLES.values() for name in rows]
    assert set(names) == set(ablations.ABLATIONS)


@pytest.mark.parametrize("base", ["h36m", "quickstart"])
def test_an_ablation_changes_what_it_names(base):
    full = ablations.get_config(f"{base}/full")
    assert differences(ablations.BASES[base].get_config(), full) == {}
    expected = {
        "without_transformer": {"model.encoder_layers": 0},
        "without_cross_spatial": {"model.cross_spatial": False},
        "without_sampling": {"model.num_candidates": 1},
        "candidates_96": {"model.num_candidates": 96},
        "diffusion_steps_1000": {"model.diffusion_steps": 1000},
        "hypotheses_2000": {"evaluation.num_hypotheses": 2000},
        "candidates_8_without_argmax": {"model.num_candidates": 8, "model.include_argmax": False},
    }
    for name, fields in expected.items():
        changed = differences(full, ablations.get_config(f"{base}/{name}"))
        assert {field: value for field, (_, value) in changed.items()} == fields
    if base == "h36m":
        assert differences(full, ablations.get_config("full")) == {}


@pytest.mark.parametrize(
    ("encoder", "kind"), [("candidates", CandidateVector), ("heatmaps", HeatmapResNet)]
)
def test_the_encoder_is_replaced_and_nothing_else(encoder, kind):
    config = h36m.get_config()
    before = trainer_of(config).network
    config.model.encoder = encoder
    after = trainer_of(config).network
    assert isinstance(after.encoder, kind)
    sampler = None if encoder == "heatmaps" else before.sampler
    assert after == dataclasses.replace(before, encoder=after.encoder, sampler=sampler)


def products(jaxpr):
    """The types of the factors of every matrix product and convolution in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(variable.aval.dtype.name for variable in equation.invars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("encoder", ["embedding", "candidates", "heatmaps"])
def test_products_are_in_the_type_and_all_else_in_float32(encoder, dtype):
    config = quickstart.get_config()
    config.model.update(encoder=encoder, matmul_dtype=dtype, encoder_layers=2)
    trainer = trainer_of(config)
    network = trainer.network
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    maps = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)
    read = jax.eval_shape(network.encoder_input, jax.random.key(0), maps)
    x_0 = jax.ShapeDtypeStruct((48,), jnp.float32)
    program = jax.make_jaxpr(jax.value_and_grad(network.loss))(params, jax.random.key(0), read, x_0)
    found = list(products(program.jaxpr))
    # The channel embedding is a product with a constant table and is no layer of the network.
    in_float32 = [pair for pair in found if pair == ("float32", "float32")]
    if dtype == "float16":
        assert len(in_float32) == (1 if encoder == "embedding" else 0)
        assert set(found) - set(in_float32) == {("float16", "float16")}
    else:
        assert len(in_float32) == len(found)
    assert len(found) > 15  # the denoiser's seven layers, forwards and backwards
    gradients = program.out_avals
    assert {aval.dtype for aval in gradients} == {np.dtype(np.float32)}


@pytest.mark.parametrize("likelihood", ["height", "probability"])
def test_a_probability_does_not_depend_on_the_scale_of_a_map(likelihood):
    config = quickstart.get_config()
    config.model.update(likelihood=likelihood, encoder_layers=0)
    network = trainer_of(config).network
    rng = np.random.default_rng(0)
    maps = jnp.asarray(np.maximum(rng.normal(size=(16, 64, 64)), -0.5), jnp.float32)
    factors = jnp.asarray(2.0 ** rng.integers(-3, 4, (16, 1, 1)), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda p: np.float32(rng.normal(0, 0.1, p.shape)), shapes)

    @jax.jit
    def draw(maps):
        samples = network.encoder_input(jax.random.key(1), maps)
        return samples, network.condition(params, samples)

    (drawn, *conditions), (scaled, condition) = draw(maps), draw(factors * maps)
    conditions.append(condition)
    np.testing.assert_array_equal(drawn.cells, scaled.cells)
    if likelihood == "probability":
        np.testing.assert_array_equal(*conditions)
        total = np.maximum(np.float64(maps), 0).sum((1, 2))
    else:
        assert jnp.abs(conditions[0] - conditions[1]).max() > 0.1 * conditions[0].std()
        total = 1
    heights = np.take_along_axis(
        np.asarray(maps).reshape(16, -1), np.asarray(drawn.cells).T, axis=1
    )
    np.testing.assert_allclose(drawn.likelihood, heights.T / total, rtol=1e-5)
