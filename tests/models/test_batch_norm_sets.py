"""A model with several BatchNorm sets is as many models with one set, which share every other weight."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.errors import InputError
from jaxrd.models.batch_norm_sets import add_sets

NAME, SHAPE = "resnet6_w8", (8, 8, 1)


def create(sets, name=NAME):
    return models.create(name, classes=5, image_shape=SHAPE, batch_norm_sets=sets)


@functools.cache
def dual():
    """A model with two sets, variables in which they differ, and its compiled apply."""
    model = create(2)
    apply = jax.jit(model.apply, static_argnums=(2, 3))
    variables = model.init(jax.random.key(0))
    draw = np.random.default_rng(0)
    randomise = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(draw.uniform(0.5, 1.5, leaf.shape), jnp.float32))
    params = {**variables["params"], "batch_norm_1": randomise(variables["params"]["batch_norm_1"])}
    return model, {"params": params, "batch_stats": randomise(variables["batch_stats"])}, apply


def images(seed=0):
    return jax.random.uniform(jax.random.key(seed), (6, *SHAPE))


def without_sets(tree):
    return {name: value for name, value in tree.items() if not name.startswith("batch_norm_")}


def put(tree, part):
    """Returns the tree, its leaves replaced by those that `part` has under the same names."""
    return {name: put(value, part[name]) if isinstance(part.get(name), dict) else part.get(name, value)
            for name, value in tree.items()}


def alone(variables, index):
    """Returns set `index` of the variables as those of a model with one set."""
    params, batch_stats = without_sets(variables["params"]), without_sets(variables["batch_stats"])
    if index == 0:
        return {"params": params, "batch_stats": batch_stats}
    key = f"batch_norm_{index}"
    return {"params": put(params, variables["params"][key]), "batch_stats": variables["batch_stats"][key]}


@pytest.mark.parametrize("name", [
    "resnet18", "resnet50", "wrn34_10", "preact_resnet18", "preact_resnet18_raw", "mobilenet_v2", "dm_wrn28_10",
    "dm_preact_resnet18"])
@pytest.mark.parametrize("sets", [2, 3])
def test_further_sets_are_whole_and_lie_beside_the_tree_of_a_model_with_one(name, sets):
    variables = jax.eval_shape(create(sets, name).init, jax.random.key(0))
    single = jax.eval_shape(create(1, name).init, jax.random.key(0))
    keys = {f"batch_norm_{index}" for index in range(1, sets)}
    layers = [path for path, _ in jax.tree_util.tree_leaves_with_path(single["batch_stats"]) if path[-1].key == "mean"]
    statistics = sum(leaf.size for leaf in jax.tree.leaves(single["batch_stats"]))
    for kind, leaves in (("params", {"scale", "bias"}), ("batch_stats", {"mean", "var"})):
        assert without_sets(variables[kind]) == single[kind]
        assert set(variables[kind]) - set(single[kind]) == keys
        for key in keys:
            found = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables[kind][key])}
            assert found == {jax.tree_util.keystr(path[:-1]) + f"['{leaf}']" for path in layers for leaf in leaves}
    # Scale and bias of a layer have the sizes of its mean and variance.
    assert models.parameter_count(variables) == models.parameter_count(single) + (sets - 1) * statistics


def test_set_0_starts_as_a_model_with_one_set_and_the_others_equal_it():
    variables, single = (create(sets).init(jax.random.key(3)) for sets in (3, 1))
    for index in range(3):
        chex.assert_trees_all_equal(alone(variables, index), single)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_each_set_is_the_model_that_has_only_that_set(index, train):
    _, variables, apply = dual()
    single = jax.jit(create(1).apply, static_argnums=2)
    logits, batch_stats = apply(variables, images(), train, index)
    expected, expected_stats = single(alone(variables, index), images(), train)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    moved = alone({**variables, "batch_stats": batch_stats}, index)["batch_stats"]
    chex.assert_trees_all_close(moved, expected_stats, atol=1e-6)
    others = alone({**variables, "batch_stats": batch_stats}, 1 - index)["batch_stats"]
    chex.assert_trees_all_equal(others, alone(variables, 1 - index)["batch_stats"])
    assert jax.tree.structure(batch_stats) == jax.tree.structure(variables["batch_stats"])
    unchanged = jax.tree.map(lambda old, new: bool(jnp.all(old == new)), alone(variables, index)["batch_stats"], moved)
    assert not any(jax.tree.leaves(unchanged)) if train else all(jax.tree.leaves(unchanged))


def test_set_0_is_the_default():
    model, variables, apply = dual()
    for train in (False, True):
        chex.assert_trees_all_equal(jax.jit(model.apply, static_argnums=2)(variables, images(), train),
                                    apply(variables, images(), train, 0))
    np.testing.assert_allclose(
        models.logits_fn(model, variables)(images()), apply(variables, images(), False, 0)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["params", "batch_stats"])
@pytest.mark.parametrize("layer", ["bn1", "layer2_0"])
def test_a_change_of_set_1_is_seen_by_set_1_alone(kind, layer):
    _, variables, apply = dual()
    own = variables[kind]["batch_norm_1"]
    own = {**own, layer: jax.tree.map(lambda leaf: 1.5 * leaf, own[layer])}
    changed = {**variables, kind: {**variables[kind], "batch_norm_1": own}}
    np.testing.assert_array_equal(apply(changed, images(), False, 0)[0], apply(variables, images(), False, 0)[0])
    assert jnp.abs(apply(changed, images(), False, 1)[0] - apply(variables, images(), False, 1)[0]).max() > 1e-3


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_a_loss_reaches_the_shared_weights_and_the_sets_that_it_uses(used):
    model, variables, _ = dual()

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = [model.apply({**variables, "params": params}, images(), True, index)[0] for index in used]
        return sum(jnp.sum(jnp.sin(values)) for values in logits)

    gradients = gradient(variables["params"])
    norms = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), gradients)
    assert all(norm > 0 for norm in (norms["conv1"]["kernel"], norms["layer2_0"]["conv2"]["kernel"],
                                     norms["layer2_0"]["shortcut_conv"]["kernel"], norms["linear"]["kernel"]))
    sets = norms["bn1"] | norms["layer2_0"]["bn2"], norms["batch_norm_1"]["bn1"] | norms["batch_norm_1"]["layer2_0"]["bn2"]
    for index, own in enumerate(sets):
        assert all((norm > 0) == (index in used) for norm in own.values())


def test_the_gradient_of_a_sum_over_sets_is_the_sum_of_their_gradients():
    model, variables, _ = dual()

    def loss(params, index):
        return jnp.sum(jnp.sin(model.apply({**variables, "params": params}, images(index), True, index)[0]))

    @jax.jit
    def gradients(params):
        return [jax.grad(lambda p: loss(p, 0) + loss(p, 1))(params), *(jax.grad(loss)(params, index) for index in (0, 1))]

    both, first, second = gradients(variables["params"])
    chex.assert_trees_all_close(both, jax.tree.map(jnp.add, first, second), atol=1e-5)


@pytest.mark.parametrize("start", [create(2).init, lambda key: add_sets(create(1).init(key), 2)], ids=["init", "add_sets"])
def test_a_step_that_donates_its_variables_runs_from_the_initial_ones(start):
    model = create(2)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(variables, batch):
        params, batch_stats = variables["params"], variables["batch_stats"]
        for index in (0, 1):
            _, batch_stats = model.apply({"params": params, "batch_stats": batch_stats}, batch, True, index)
        return {"params": jax.tree.map(lambda leaf: 0.9 * leaf, params), "batch_stats": batch_stats}

    donated = start(jax.random.key(0))
    leaves = jax.tree.leaves(donated)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves), "two sets share a buffer"
    variables = step(step(donated, images()), images())
    assert all(leaf.is_deleted() for leaf in leaves)
    # Both sets have seen the same batches through the same weights.
    chex.assert_trees_all_close(alone(variables, 0), alone(variables, 1), atol=1e-6)


def test_a_specification_keeps_the_number_of_sets_and_an_old_one_has_one():
    model = create(2)
    again = models.create(**json.loads(json.dumps(model.specification)))
    assert again == model and again.batch_norm_sets == 2 and model != create(1)
    old = {name: value for name, value in create(1).specification.items() if name != "batch_norm_sets"}
    assert models.create(**old) == create(1) and create(1).batch_norm_sets == 1
    assert models.Model("linear", 5, SHAPE, None, None, {}).batch_norm_sets == 1


@pytest.mark.parametrize("sets, index, has", [(1, 1, "only set 0"), (2, 2, "sets 0 to 1"), (2, -1, "sets 0 to 1"),
                                              (2, 1.0, "sets 0 to 1"), (2, None, "sets 0 to 1")])
@pytest.mark.parametrize("train", [False, True])
def test_a_set_that_is_not_there_is_one_line_with_the_way_out(sets, index, has, train):
    model = create(sets)
    with pytest.raises(InputError) as error:
        model.apply(dual()[1], images(), train, batch_norm_set=index)
    assert f"batch_norm_set is {index}" in str(error.value) and has in str(error.value)
    assert "more batch_norm_sets" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("sets", [0, -1, 2.0, "2", None])
def test_a_bad_number_of_sets_is_named(sets):
    with pytest.raises(InputError) as error:
        create(sets)
    assert f"batch_norm_sets is {sets!r}" in str(error.value) and "at least 1" in str(error.value)
