"""The mesh's arithmetic and the table of paths, on abstract models: no device is used."""

import dataclasses

import jax
import optax
import pytest
from jax.sharding import PartitionSpec as P

from smallmath_jax.models.config import tiny_config
from smallmath_jax.models.qwen_vl import abstract_model
from smallmath_jax.models.tree import named_leaves, parameter_count
from smallmath_jax.parallel import mesh as meshes
from smallmath_jax.parallel import rules
from smallmath_jax.parallel.published import PUBLISHED

VL_3B = "Qwen/Qwen2.5-VL-3B-Instruct"
VL_7B = "Qwen/Qwen2.5-VL-7B-Instruct"
TINY = tiny_config(
    512,
    image_token_id=1,
    video_token_id=2,
    vision_start_token_id=3,
    vision_end_token_id=4,
    eos_ids=(5,),
)


def specs_of(config, **sizes):
    sizes = {"data": 1, "fsdp": 1, "model": 1, **sizes}
    units = rules.head_units(config)
    return {
        name: rules.spec_for(name, leaf.shape, sizes, units=units)
        for name, leaf in named_leaves(abstract_model(config))
    }


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (1, 16, 1)),
        ({"data": 2, "model": 4}, (2, 2, 4)),
        ({"data": -1, "fsdp": 4, "model": 2}, (2, 4, 2)),
        ({"data": 4, "fsdp": 2, "model": 2}, (4, 2, 2)),
    ],
)
def test_one_axis_is_filled(sizes, shape):
    assert meshes.mesh_shape(16, **sizes) == shape


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"model": 3}, "does not divide the 16 devices"),
        ({"fsdp": 8}, "does not multiply to the 16 devices"),
        ({"data": -1}, "only one axis can be filled"),
        ({"data": 0}, "mesh.data is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(sizes, message):
    with pytest.raises(ValueError, match=message):
        meshes.mesh_shape(16, **sizes)


def test_published_counts():
    counts = {name: parameter_count(abstract_model(config)) for name, config in PUBLISHED.items()}
    assert counts == {
        VL_3B: 3_754_622_976,
        VL_7B: 8_292_166_656,
        "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
        "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
        "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    }


def test_every_parameter_has_a_rule_and_no_stack_is_cut():
    for config in PUBLISHED.values():
        for name, spec in specs_of(config, fsdp=4, model=2).items():
            if "/layers/" in name or "/blocks/" in name:
                assert len(spec) == 0 or spec[0] is None, name


def test_a_table_of_placements():
    specs = specs_of(PUBLISHED[VL_3B], fsdp=16, model=2)
    assert specs["text/embed"] == P("model", "fsdp")
    assert specs["text/layers/q/kernel"] == P(None, "fsdp", "model")
    assert specs["text/layers/o/kernel"] == P(None, "model", "fsdp")
    assert specs["text/layers/down/kernel"] == P(None, "model", "fsdp")
    assert specs["text/layers/k/bias"] == P(None, "model")
    assert specs["vision/merger/fc2/kernel"] == P("model", "fsdp")
    for name in ("text/norm", "text/layers/input_norm", "vision/blocks/norm1"):
        assert specs[name] == P()


@pytest.mark.parametrize(
    "hub, model, name, spec",
    [
        (VL_3B, 4, "text/layers/k/kernel", P(None, "fsdp", None)),  # 2 kv heads on 4
        (VL_3B, 2, "text/layers/k/kernel", P(None, "fsdp", "model")),
        (VL_7B, 8, "text/layers/q/kernel", P(None, "fsdp", None)),  # 28 heads on 8
        (VL_7B, 8, "text/layers/o/kernel", P(None, None, "fsdp")),
        (VL_7B, 4, "text/layers/q/kernel", P(None, "fsdp", "model")),
        (VL_7B, 8, "text/layers/down/kernel", P(None, "model", "fsdp")),
        (VL_3B, 8, "vision/blocks/gate/kernel", P(None, "fsdp", None)),  # 3420 = 4 * 855
        (VL_3B, 4, "vision/blocks/gate/kernel", P(None, "fsdp", "model")),
        (VL_3B, 8, "vision/blocks/gate/bias", P(None, None)),
    ],
)
def test_an_axis_that_does_not_divide_is_dropped(hub, model, name, spec):
    assert specs_of(PUBLISHED[hub], fsdp=2, model=model)[name] == spec


def test_an_unknown_parameter_is_named():
    with pytest.raises(ValueError, match="'text/layers/router/kernel'"):
        rules.spec_for("text/layers/router/kernel", (2, 8, 8), {"data": 1, "fsdp": 1, "model": 1})


def test_a_rule_with_too_many_dimensions_is_named():
    with pytest.raises(ValueError, match="'text/embed' has shape"):
        rules.spec_for("text/embed", (8,), {"data": 1, "fsdp": 1, "model": 1})


@pytest.mark.parametrize("head", [True, False])
def test_the_optimizer_follows_its_parameter(head):
    model = abstract_model(dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, tie=head)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    places = rules.shardings({"model": model, "opt": jax.eval_shape(optimizer.init, model)}, mesh)
    found = {name: sharding.spec for name, sharding in named_leaves(places)}
    parameters = {name[6:]: spec for name, spec in found.items() if name.startswith("model/")}
    moments = [name for name in found if "/mu/" in name or "/nu/" in name]
    assert len(moments) == 2 * len(parameters)
    for name in moments:
        assert found[name] == parameters[name.partition("u/")[2]], name


def test_lora_leaves_have_rules():
    sizes = {"data": 1, "fsdp": 2, "model": 2}
    spec = lambda name, shape: rules.spec_for(name, shape, sizes, units=rules.head_units(TINY))
    assert spec("text/layers/q/lora_a", (2, 128, 8)) == P(None, "fsdp", None)
    assert spec("text/layers/q/lora_b", (2, 8, 128)) == P(None, None, "model")
    assert spec("text/layers/o/lora_a", (2, 128, 8)) == P(None, "model", None)
    assert spec("text/layers/down/lora_b", (2, 8, 128)) == P(None, None, "fsdp")
