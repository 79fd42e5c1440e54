"""What the models rely on in Flax: modules are plain pytrees to jax's own transforms. One test a behaviour."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smallmath_jax.models.layers import Linear
from smallmath_jax.models.tree import leaf_name, map_named, named_leaves, parameter_count


class Part(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = Linear(4, 4, bias=True, rngs=rngs)
        self.weight = nnx.Param(jnp.ones((4,)))
        self.later = nnx.data(None)

    def __call__(self, x):
        return self.linear(x) * self.weight[...]


class Whole(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.parts = jax.vmap(lambda key: Part(nnx.Rngs(key)))(jax.random.split(rngs.params(), 3))
        self.absent = None

    def __call__(self, x):
        return jax.lax.scan(lambda y, part: (part(y), None), x, self.parts)[0]


@pytest.fixture(scope="module")
def whole():
    return Whole(nnx.Rngs(0))


def test_vmapped_init_stacks_and_draws_each_layer_anew(whole):
    shapes = {name: leaf.shape for name, leaf in named_leaves(whole)}
    assert shapes == {
        "parts/linear/bias": (3, 4),
        "parts/linear/kernel": (3, 4, 4),
        "parts/weight": (3, 4),
    }
    kernel = np.asarray(whole.parts.linear.kernel[...])
    assert not np.array_equal(kernel[0], kernel[1])


def test_scan_over_a_module_equals_a_loop_over_its_slices(whole):
    x = jnp.arange(8.0).reshape(2, 4)
    expected = x
    for index in range(3):
        expected = jax.tree.map(lambda leaf, index=index: leaf[index], whole.parts)(expected)
    np.testing.assert_allclose(whole(x), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda model, x: model(x))(whole, x), expected, rtol=1e-5)


def test_grad_and_optax_take_the_module_itself(whole):
    loss = lambda model: (model(jnp.ones((2, 4))) ** 2).sum()
    gradient = jax.grad(loss)(whole)
    assert isinstance(gradient, Whole)
    assert jax.tree.structure(gradient) == jax.tree.structure(whole)
    optimizer = optax.sgd(1e-3)
    updates, _ = optimizer.update(gradient, optimizer.init(whole), whole)
    changed = optax.apply_updates(whole, updates)
    assert isinstance(changed, Whole) and loss(changed) < loss(whole)


def test_eval_shape_gives_the_abstract_model(whole):
    abstract = jax.eval_shape(lambda key: Whole(nnx.Rngs(key)), jax.random.key(0))
    assert parameter_count(abstract) == parameter_count(whole) == 3 * (16 + 4 + 4)
    assert abstract.parts.weight.shape == (3, 4)


def test_a_jitted_mutation_is_dropped_so_nothing_may_mutate(whole):
    def mutate(model):
        model.parts.weight[...] = jnp.zeros((3, 4))
        return model.parts.weight[...].sum()

    assert jax.jit(mutate)(whole) == 0
    assert whole.parts.weight[...].sum() == 12


def test_mapping_makes_new_modules_around_the_leaves(whole):
    copy = jax.tree.map(lambda leaf: leaf, whole)
    copy.parts.weight = nnx.Param(jnp.zeros((3, 4)))
    assert whole.parts.weight[...].sum() == 12


def test_an_empty_data_attribute_can_take_parameters_later(whole):
    copy = jax.tree.map(lambda leaf: leaf, whole)
    copy.parts.later = nnx.Param(jnp.zeros((2,)))
    assert "parts/later" in dict(named_leaves(copy))
    copy.parts.later = None
    assert jax.tree.structure(copy) == jax.tree.structure(whole)


def test_a_plain_none_stays_without_parameters(whole):
    copy = jax.tree.map(lambda leaf: leaf, whole)
    with pytest.raises(ValueError, match="static attribute"):
        copy.absent = nnx.Param(jnp.zeros((2,)))


def test_names_reach_through_optimizer_states(whole):
    state = optax.adamw(1e-3).init(whole)
    names = [name for name, _ in named_leaves(state)]
    assert "0/mu/parts/linear/kernel" in names
    path = jax.tree_util.tree_leaves_with_path({"value": jnp.zeros(1)})[0][0]
    assert leaf_name(path) == "value"  # only Flax's own step is dropped


def test_map_named_keeps_the_structure(whole):
    doubled = map_named(lambda name, leaf: leaf * 2 if name.endswith("bias") else leaf, whole)
    assert jax.tree.structure(doubled) == jax.tree.structure(whole)
