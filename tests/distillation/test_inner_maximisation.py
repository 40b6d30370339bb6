"""Training attacks: each climbs what its name says, inside the threat model, and leaves the networks as they were."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, attacks, models, objectives
from jaxrd.distillation import (
    Context, InnerMaximisation, cross_entropy_attack, method, pgd_attack, teacher_fixed_attack, teacher_moving_attack,
    trades_attack)
from jaxrd.distillation.catalogue import BASES
from jaxrd.distillation.inner_maximisation import path_attack, with_random_direction
from jaxrd.training import state as states, step
from tests.support import assert_input_error

BATCH, SHAPE, CLASSES, STEPS = 12, (4, 4, 1), 5, 4
GENERATOR = np.random.default_rng(0)
IMAGES = jnp.asarray(np.clip(GENERATOR.uniform(-0.2, 1.2, (BATCH, *SHAPE)), 0, 1), jnp.float32)  # some pixels on the bounds
LABELS = jnp.asarray(np.arange(BATCH) % 4)
NEGATIVES = jnp.asarray(np.clip(np.random.default_rng(1).uniform(-0.2, 1.2, IMAGES.shape), 0, 1), jnp.float32)
NEGATIVE_LABELS = (LABELS + jnp.asarray(np.tile([1, 2, 3], 4))) % 4
KEY = jax.random.key(0)
PARAMS = {
    model: tuple(jnp.asarray(GENERATOR.normal(size=shape), jnp.float32) for shape in ((16, 12), (12,), (12, CLASSES)))
    for model in ("student", "teacher", "auxiliary")}
THREATS = {"linf": ThreatModel("linf", 0.1), "l2": ThreatModel("l2", 0.4)}

RECIPES = {
    "cross_entropy": cross_entropy_attack(), "mart": cross_entropy_attack("gaussian"), "trades": trades_attack(),
    "teacher_fixed": teacher_fixed_attack(), "teacher_moving": teacher_moving_attack()}
each_recipe = pytest.mark.parametrize("name", RECIPES)
INNER_LOSSES = ["cross_entropy", "teacher_clean", "teacher_moving"]


def network(params, points):
    hidden, bias, out = params
    return jnp.tanh(0.5 * points.reshape(len(points), -1) @ hidden + bias) @ out


student, teacher, auxiliary = (functools.partial(network, PARAMS[model]) for model in PARAMS)
CONTEXT = Context(IMAGES, LABELS, student, teacher, teacher(IMAGES), auxiliary, NEGATIVES, NEGATIVE_LABELS)


def inner(norm="linf", **options):
    threat = THREATS[norm]
    return InnerMaximisation(**{"threat": threat, "step_size": threat.epsilon / 3, "steps": STEPS} | options)


def generated(attack, budget=inner(), context=CONTEXT, key=KEY):
    """What the attack generates, operation by operation: to compile each of these takes longer, and rounds differently."""
    with jax.disable_jit():
        return attack.generate(key, context, budget)


@functools.cache
def adversarial(name, norm="linf", steps=STEPS):
    return generated(RECIPES[name], inner(norm, steps=steps))["adversarial"]


def along_paths(inner_loss="cross_entropy", points=STEPS, targeted=True, targeted_start="negative_image",
                target_class="uniform", negatives="batch"):
    return path_attack(
        inner_loss=inner_loss, points=points, targeted=targeted, targeted_start=targeted_start, target_class=target_class,
        negatives=negatives)


@functools.cache
def paths(norm="linf", **options):
    return generated(along_paths(**options), inner(norm))


OBJECTIVES = {
    "cross_entropy": lambda points: objectives.cross_entropy(student(points), LABELS),
    "trades": lambda points: objectives.kl_divergence(student(IMAGES), student(points)),
    "teacher_fixed": lambda points: objectives.kl_divergence(teacher(IMAGES), student(points)),
    "teacher_moving": lambda points: objectives.kl_divergence(teacher(points), student(points))}
OBJECTIVES["mart"] = OBJECTIVES["cross_entropy"]


def mean(name, points):
    return float(jnp.mean(OBJECTIVES[name](points)))


def assert_inside(threat, images, points):
    assert points.shape == images.shape and points.dtype == jnp.float32
    assert 0 <= points.min() and points.max() <= 1
    assert threat.distance(images, points).max() <= threat.epsilon * (1 + 1e-5)


def assert_same(points, expected):
    """Up to rounding."""
    np.testing.assert_allclose(points, expected, rtol=0, atol=1e-6)


# What is climbed.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@each_recipe
def test_each_recipe_raises_its_own_objective_and_no_other_raises_it_as_much(name, norm):
    own = mean(name, adversarial(name, norm, 6))
    start = THREATS[norm].random_start(KEY, IMAGES)
    assert own > max(mean(name, IMAGES), mean(name, start)) + 0.2
    for other in RECIPES:
        if OBJECTIVES[other] is not OBJECTIVES[name]:
            assert own > mean(name, adversarial(other, norm, 6)), other


def test_any_objective_of_the_context_makes_an_attack():
    attack = pgd_attack(lambda context: lambda points: jnp.sum(points, axis=(1, 2, 3)), "uniform")
    points = generated(attack, inner(step_size=0.2))["adversarial"]
    assert_same(points, jnp.clip(IMAGES + 0.1, 0, 1))


def test_the_adaptive_attack_climbs_through_the_teacher_too():
    fixed_at_the_point = dataclasses.replace(CONTEXT, teacher=lambda points: jax.lax.stop_gradient(teacher(points)))
    detached = generated(RECIPES["teacher_moving"], context=fixed_at_the_point)["adversarial"]
    points = adversarial("teacher_moving")
    assert jnp.mean(jnp.abs(points - detached) > 0.01) > 0.05
    assert mean("teacher_moving", points) > mean("teacher_moving", detached) + 0.01


def test_the_fixed_target_is_what_the_teacher_said_of_the_clean_images():
    """Whatever the teacher says elsewhere: it is not asked."""
    context = dataclasses.replace(CONTEXT, teacher=None)
    np.testing.assert_array_equal(
        generated(RECIPES["teacher_fixed"], context=context)["adversarial"], adversarial("teacher_fixed"))


# Where it stays, where it starts.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@each_recipe
def test_one_step_brings_any_start_into_ball_and_bounds(name, norm):
    # A ball that Gaussian noise of 0.001 leaves, around images that it takes out of the bounds.
    threat = ThreatModel(norm, 0.002)
    budget = inner(norm, threat=threat, step_size=0.0005, steps=1, project_start=False)
    start = threat.random_start(KEY, IMAGES, "gaussian", project=False)
    assert start.min() < 0 and start.max() > 1 and (threat.distance(IMAGES, start) > threat.epsilon).any()
    assert_inside(threat, IMAGES, generated(RECIPES[name], budget)["adversarial"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@each_recipe
def test_points_stay_in_ball_and_bounds_at_full_reach(name, norm):
    points = adversarial(name, norm)
    assert_inside(THREATS[norm], IMAGES, points)
    assert THREATS[norm].distance(IMAGES, points).max() > 0.9 * THREATS[norm].epsilon


def test_the_run_may_choose_another_start():
    threat, arguments = THREATS["linf"], {"step_size": 0.1 / 3, "steps": STEPS}

    def climbed(name, start):
        with jax.disable_jit():
            return attacks.pgd(KEY, OBJECTIVES[name], IMAGES, threat=threat, start=start, **arguments)

    for name, start in [("cross_entropy", "none"), ("cross_entropy", "gaussian"), ("teacher_fixed", "uniform")]:
        points = generated(RECIPES[name], inner(start=start))["adversarial"]
        assert_same(points, climbed(name, start))
        assert jnp.abs(points - adversarial(name)).max() > 0.01
    assert_same(adversarial("mart"), climbed("cross_entropy", "gaussian"))
    assert_same(adversarial("cross_entropy"), climbed("cross_entropy", "uniform"))


def test_without_a_start_of_their_own_points_depend_on_no_key():
    attack, budget = along_paths(targeted_start="anchor_image", target_class="teacher"), inner(start="none")
    one, other = (generated(attack, budget, key=jax.random.key(seed)) for seed in (0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert any((paths(targeted_start="anchor_image", target_class="teacher")[name] != one[name]).any() for name in one)


# What it asks for, and leaves alone.


# A method, its options, and the flags that its attack then raises.
NEEDS = [
    ("pgd_at", {}, ()), ("trades", {}, ()), ("mart", {}, ()), ("ard", {}, ()), ("iad", {}, ()), ("akd", {}, ()),
    ("rslad", {}, ("teacher_on_clean", "teacher")),
    ("adaad", {}, ("teacher", "teacher_gradient")), ("adaiad", {}, ("teacher", "teacher_gradient")),
    ("dgad", {}, ("teacher", "teacher_gradient")), ("dgad", {"dgad_attack": "rslad"}, ("teacher_on_clean", "teacher")),
    ("path", {}, ("negatives",)),
    ("path", {"path_negatives": "batch"}, ("two_classes",)),
    ("path", {"path_gamma": 0.0}, ()),
    ("path", {"path_inner_loss": "teacher_clean"}, ("teacher_on_clean", "teacher", "negatives")),
    ("path", {"path_inner_loss": "teacher_clean", "path_negatives": "batch"}, ("teacher_on_clean", "teacher", "two_classes")),
    ("path", {"path_inner_loss": "teacher_clean", "path_gamma": 0.0}, ("teacher_on_clean", "teacher")),
    ("path", {"path_inner_loss": "teacher_moving"}, ("teacher", "teacher_gradient", "negatives")),
    ("path", {"path_target_class": "teacher"}, ("teacher_on_clean", "teacher", "two_classes")),
    ("path", {"path_target_class": "student"}, ("two_classes",)),
    ("path", {"path_targeted_start": "anchor_image"}, ()),
    ("path", {"path_targeted_start": "anchor_runner_up"}, ()),
    ("path", {"path_targeted_start": "anchor_image", "path_target_class": "least_likely"}, ("teacher_on_clean", "teacher")),
    ("path", {"path_targeted_start": "anchor_image", "path_target_class": "student",
              "path_inner_loss": "teacher_moving"}, ("teacher", "teacher_gradient")),
]


def traced(attack, context):
    """Names and shapes of what the attack generates, without computing it."""
    return jax.eval_shape(lambda key: attack.generate(key, context, inner(steps=10)), KEY)


@pytest.mark.parametrize("name, options, needs", NEEDS)
def test_an_attack_declares_what_it_asks_for_and_does_without_the_rest(name, options, needs):
    attack = method(name, **options).attack
    flags = {
        flag: flag in needs for flag in ("teacher_on_clean", "teacher", "teacher_gradient", "two_classes", "negatives")}
    assert {flag: getattr(attack, flag) for flag in flags} == flags

    asked = []

    def noting(points):
        asked.append(points)
        return teacher(points)

    available = dataclasses.replace(
        CONTEXT, teacher=noting if attack.teacher else None,
        teacher_clean=CONTEXT.teacher_clean if attack.teacher_on_clean else None,
        negatives=NEGATIVES if attack.negatives else None, negative_labels=None)
    traced(attack, available)
    # The teacher is asked about the points that it is climbed through, else about none.
    assert bool(asked) == attack.teacher_gradient


@pytest.mark.parametrize("base", [name for name in BASES if name != "path"])
@pytest.mark.parametrize("attack, expected", [
    ("ce", cross_entropy_attack()), ("trades", trades_attack()), ("rslad", teacher_fixed_attack()),
    ("adaad", teacher_moving_attack())])
def test_the_attack_of_a_method_can_be_exchanged(base, attack, expected):
    own, chosen = method(base), method(base, attack=attack)
    flags = [field.name for field in dataclasses.fields(expected) if field.name != "generate"]
    assert [getattr(chosen.attack, flag) for flag in flags] == [getattr(expected, flag) for flag in flags]
    if attack in ("rslad", "adaad"):
        assert chosen.needs_teacher
    # And only that.
    assert chosen.views == own.views and [term.name for term in chosen.terms] == [term.name for term in own.terms]


@pytest.mark.parametrize("attack, recipe", [
    ("ce", "cross_entropy"), ("trades", "trades"), ("rslad", "teacher_fixed"), ("adaad", "teacher_moving")])
def test_an_exchanged_attack_generates_the_other_recipes_points(attack, recipe):
    base = "mart" if attack == "ce" else "pgd_at"
    np.testing.assert_array_equal(generated(method(base, attack=attack).attack)["adversarial"], adversarial(recipe))


def test_attacks_that_cannot_be_exchanged():
    assert_input_error(lambda: method("path", attack="ce"), "method.attack", "path_inner_loss")
    assert_input_error(lambda: method("ard", attack="adad"), "method.attack", '"adad"', 'did you mean "adaad"?')


@pytest.mark.parametrize("attack", [
    *RECIPES.values(), with_random_direction(cross_entropy_attack()),
    *(along_paths(inner_loss, 2) for inner_loss in INNER_LOSSES), along_paths(points=2, negatives="data"),
    along_paths(targeted_start="anchor_image", target_class="student", points=2)],
    ids=[*RECIPES, "random", *(f"path-{inner_loss}" for inner_loss in INNER_LOSSES), "path-data", "path-student"])
def test_no_gradient_flows_back_into_a_network(attack):
    def reached(params):
        functions = {model: functools.partial(network, params[model]) for model in params}
        context = Context(
            IMAGES, LABELS, functions["student"], functions["teacher"], functions["teacher"](IMAGES), functions["auxiliary"],
            NEGATIVES, NEGATIVE_LABELS)
        points = attack.generate(KEY, context, inner("l2", steps=2))
        return sum(jnp.sum(value**2) for value in points.values())

    with jax.disable_jit():
        value, gradients = jax.value_and_grad(reached)(PARAMS)
    assert value > 0
    for gradient in jax.tree.leaves(gradients):
        assert (gradient == 0).all()


# A random direction besides.


@pytest.mark.parametrize(
    "base", [*RECIPES.values(), along_paths(points=2), along_paths(points=2, negatives="data")],
    ids=[*RECIPES, "path", "path-data"])
def test_a_random_direction_leaves_the_points_of_the_base_as_they_are(base):
    extended = with_random_direction(base)
    own, both = (generated(attack, inner(steps=2)) for attack in (base, extended))
    assert {*both} == {*own, "random"}
    for name in own:
        np.testing.assert_array_equal(both[name], own[name])
    assert vars(extended) | {"generate": None} == vars(base) | {"generate": None}


@pytest.mark.parametrize("norm, start, project_start", [("linf", None, True), ("l2", None, True), ("linf", "none", False)])
def test_a_random_direction_is_uniform_in_the_ball_and_no_start_of_the_attack(norm, start, project_start):
    images = jnp.concatenate([jnp.full((100, *SHAPE), 0.5), jnp.zeros((10, *SHAPE))])
    context, threat = Context(images, jnp.zeros(110, int), student), ThreatModel(norm, 0.3)
    budget = InnerMaximisation(threat, 0.1, 0, start=start, project_start=project_start)  # no steps: adversarial is the start
    attack = with_random_direction(cross_entropy_attack())
    points, others = map(jax.jit(lambda key: attack.generate(key, context, budget)), jax.random.split(KEY))
    assert_inside(threat, images, points["random"])
    noise, begin, other = (
        np.asarray(points[:100] - 0.5).reshape(100, -1)
        for points in (points["random"], points["adversarial"], others["random"]))
    reach = (np.abs(noise) if norm == "linf" else np.linalg.norm(noise, axis=1)) / 0.3
    np.testing.assert_allclose(np.histogram(reach, 4, (0, 1))[0] / reach.size, 0.25, atol=0.05 if norm == "linf" else 0.15)
    assert abs(noise.mean()) < 0.02
    for unrelated in [other, *([begin] if start is None else [])]:
        assert abs(np.corrcoef(noise.ravel(), unrelated.ravel())[0, 1]) < 0.1


# Along the path.


@pytest.mark.parametrize("points, targeted", [(1, False), (1, True), (3, False), (3, True), (10, True)])
def test_a_path_has_its_points_by_name(points, targeted):
    views = traced(along_paths(points=points, targeted=targeted), CONTEXT)
    expected = [f"path/{number}" for number in range(1, points)] + ["adversarial"]
    if targeted:
        expected += [f"targeted/{number}" for number in range(1, points + 1)]
    assert sorted(views) == sorted(expected)
    assert all(view.shape == IMAGES.shape for view in views.values())
    # They are what a method declares.
    declared = {view.name for view in method("path", path_points=points, path_gamma=1.0 if targeted else 0.0).views}
    assert {*expected} == declared - {"clean", "negative"}
    declared = {view.name for view in method(
        "path", path_points=points, path_gamma=1.0 if targeted else 0.0, path_negatives="batch").views}
    assert {*expected} == declared - {"clean", "clean/targeted"}


@functools.cache
def every_point(steps):
    """All points of both paths; the steps are so short that no two are alike."""
    budget = inner("l2", step_size=0.02, steps=steps)
    return budget, generated(along_paths(points=steps), budget)


@pytest.mark.parametrize("steps, points, expected", [
    (10, 10, range(1, 11)), (10, 3, [3, 7, 10]), (10, 5, [2, 4, 6, 8, 10]), (10, 1, [10]), (10, 4, None), (7, 3, None),
    (7, 5, None), (10, 9, None)])
def test_the_points_are_evenly_spaced_and_the_last_is_included(steps, points, expected):
    budget, whole = every_point(steps)
    views = generated(along_paths(points=points), budget)

    def numbers(prefix, last):
        path = {number: whole.get(f"{prefix}/{number}", whole["adversarial"]) for number in range(1, steps + 1)}
        found = []
        for name in [f"{prefix}/{number}" for number in range(1, points)] + [last]:
            alike = [number for number, value in path.items() if (value == views[name]).all()]
            assert len(alike) == 1
            found += alike
        return found

    chosen = numbers("path", "adversarial")
    assert chosen == numbers("targeted", f"targeted/{points}")
    assert chosen[-1] == steps and len(chosen) == points
    gaps = np.diff([0, *chosen])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    if expected is not None:
        assert chosen == [*expected]


@pytest.mark.parametrize("inner_loss, name", [
    ("cross_entropy", "cross_entropy"), ("teacher_clean", "teacher_fixed"), ("teacher_moving", "teacher_moving")])
def test_the_untargeted_path_is_that_of_pgd_on_the_inner_loss(inner_loss, name):
    views, budget = paths(inner_loss=inner_loss, targeted=False), inner()
    with jax.disable_jit():
        expected = attacks.pgd_path(
            KEY, OBJECTIVES[name], IMAGES, threat=budget.threat, step_size=budget.step_size, steps=STEPS, start="gaussian")
    for number in range(1, STEPS):
        assert_same(views[f"path/{number}"], expected[number - 1])
    assert_same(views["adversarial"], expected[-1])
    # The same ascent as that of the method whose inner loss it is, from the same start.
    assert_same(views["adversarial"], adversarial("mart" if name == "cross_entropy" else name))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("inner_loss", INNER_LOSSES)
def test_the_untargeted_path_leaves_the_class_and_both_stay_in_the_ball(inner_loss, norm):
    views = paths(norm, inner_loss=inner_loss)
    for points in views.values():
        assert_inside(THREATS[norm], IMAGES, points)
    name = "teacher_fixed" if inner_loss == "teacher_clean" else inner_loss
    climbed = [mean(name, points) for points in (
        IMAGES, *(views[f"path/{number}"] for number in range(1, STEPS)), views["adversarial"])]
    assert (np.diff(climbed) > 0).all() and climbed[-1] > climbed[0] + 0.3


@pytest.mark.parametrize("dual", [False, True], ids=["one BatchNorm set", "two"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_targeted_path_nears_the_class_of_the_anchor(norm, dual):
    # Of two classes, the other one is the anchor's.
    labels, branch = LABELS % 2, auxiliary if dual else student
    context = dataclasses.replace(CONTEXT, labels=labels, auxiliary=auxiliary if dual else None)
    views = generated(along_paths(), inner(norm), context)
    targeted = [IMAGES, *(views[f"targeted/{number}"] for number in range(1, STEPS + 1))]
    left = [float(jnp.mean(objectives.cross_entropy(branch(points), 1 - labels))) for points in targeted]
    assert (np.diff(left) < 0).all() and left[-1] < left[0] - 0.3
    for points in targeted:  # the ball of its own start, not of the anchor
        assert_inside(THREATS[norm], IMAGES, points)


@pytest.mark.parametrize("dual", [False, True], ids=["one BatchNorm set", "two"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_from_negatives_of_the_data_the_targeted_path_nears_the_classes_of_the_batch(norm, dual):
    branch = auxiliary if dual else student
    context = dataclasses.replace(CONTEXT, auxiliary=auxiliary if dual else None)
    views = generated(along_paths(negatives="data"), inner(norm), context)
    targeted = [NEGATIVES, *(views[f"targeted/{number}"] for number in range(1, STEPS + 1))]
    left = [float(jnp.mean(objectives.cross_entropy(branch(points), LABELS))) for points in targeted]
    assert (np.diff(left) < 0).all() and left[-1] < left[0] - 0.3
    for points in targeted:  # the ball of the negative
        assert_inside(THREATS[norm], NEGATIVES, points)
    # The other path is the same as ever, and the draws are the same for any negatives.
    for number in range(1, STEPS):
        np.testing.assert_array_equal(views[f"path/{number}"], paths(norm)[f"path/{number}"])
    others = generated(along_paths(negatives="data"), inner(norm), dataclasses.replace(context, negatives=NEGATIVES[::-1]))
    assert (others["targeted/1"] != views["targeted/1"]).any()
    np.testing.assert_array_equal(others["adversarial"], views["adversarial"])


@pytest.mark.parametrize("target_class", ["teacher", "student", "least_likely"])
def test_the_targeted_path_nears_the_chosen_class(target_class):
    views = paths(targeted_start="anchor_image", target_class=target_class)
    scores = auxiliary(IMAGES) if target_class == "student" else teacher(IMAGES)
    scores = -scores if target_class == "least_likely" else scores
    target = jnp.argmax(scores - 1e9 * jax.nn.one_hot(LABELS, CLASSES), axis=1)
    left = [float(jnp.mean(objectives.cross_entropy(auxiliary(points), target))) for points in (
        IMAGES, *(views[f"targeted/{number}"] for number in range(1, STEPS + 1)))]
    assert (np.diff(left) < 0).all() and left[-1] < left[0] - 0.3


def test_the_runner_up_is_the_class_that_the_student_finds_second_best():
    attack = method("path", path_targeted_start="anchor_runner_up", path_points=STEPS).attack
    views, expected = generated(attack), paths(targeted_start="anchor_image", target_class="student")
    for name in expected:
        np.testing.assert_array_equal(views[name], expected[name])


def test_the_two_paths_do_not_disturb_each_other():
    alone = paths(targeted=False)
    for name, points in alone.items():
        assert_same(points, paths()[name])


def test_more_points_than_steps():
    assert_input_error(
        lambda: along_paths(points=5).generate(KEY, CONTEXT, inner(steps=4)), "method.path_points is 5", "steps (4)",
        "attack.steps")
    untargeted = along_paths(points=5, targeted=False)
    assert_input_error(  # while it is compiled, too
        lambda: jax.eval_shape(lambda key: untargeted.generate(key, CONTEXT, inner(steps=4)), KEY),
        "method.path_points is 5", "steps (4)")


# In the train step.


def batch_norm_model(seed, width) -> models.Model:
    """One hidden layer behind two sets of BatchNorm, whose running statistics are not those of any batch."""
    def init(key):
        draw = np.random.default_rng(seed)
        shapes = {"hidden": (16, width), "scale": (2, width), "bias": (2, width), "out": (width, CLASSES)}
        params = {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
        statistics = {
            "mean": jnp.asarray(draw.normal(size=(2, width)), jnp.float32),
            "var": jnp.asarray(draw.uniform(2, 4, (2, width)), jnp.float32)}
        return {"params": params, "batch_stats": statistics}

    def apply(variables, images, train, batch_norm_set=0):
        params, statistics, index = variables["params"], variables["batch_stats"], batch_norm_set
        x = images.reshape(len(images), -1) @ params["hidden"]
        batch = {"mean": jnp.mean(x, axis=0), "var": jnp.var(x, axis=0)}
        used = batch if train else {name: value[index] for name, value in statistics.items()}
        x = (x - used["mean"]) / jnp.sqrt(used["var"] + 1e-5) * params["scale"][index] + params["bias"][index]
        if train:
            statistics = {name: value.at[index].set(0.9 * value[index] + 0.1 * batch[name])
                          for name, value in statistics.items()}
        return jnp.tanh(x) @ params["out"], statistics

    return models.Model(f"batch_norm{width}", CLASSES, SHAPE, init, apply, {}, batch_norm_sets=2)


STUDENT, TEACHER = batch_norm_model(1, 8), batch_norm_model(2, 10)


@pytest.mark.parametrize("name", [*BASES, "rslad+igdm"])
def test_an_attack_of_the_train_step_leaves_batch_norm_as_it_was(name):
    chosen = method(name, **({"path_points": 3} if name == "path" else {}))
    calls = []

    def noting(model, which):
        def apply(variables, images, train, batch_norm_set=0):
            calls.append((which, train, batch_norm_set))
            return model.apply(variables, images, train, batch_norm_set)
        return dataclasses.replace(model, apply=apply)

    optimizer = optax.sgd(0.1)
    recipe = step.Recipe(
        chosen, noting(STUDENT, "student"), noting(TEACHER, "teacher") if chosen.needs_teacher else None, inner(steps=3),
        optimizer, steps=10)
    state = states.create(STUDENT, optimizer, KEY, weight_average=False)
    variables = TEACHER.init(KEY) if chosen.needs_teacher else None
    with jax.disable_jit():
        negatives = (NEGATIVES, NEGATIVE_LABELS) if chosen.negatives else (None, None)
        views, teacher_clean = step.attack(recipe, KEY, state, variables, IMAGES, LABELS, *negatives)
        attack_calls = [*calls]
        logits = step.teacher_logits(recipe, variables, views, teacher_clean, LABELS, negatives[1])
        _, moved, _ = step.gradients_of(recipe, state, views, logits, LABELS, negatives[1])
    # Eval mode throughout: running statistics normalise, and nothing is there to move them.
    assert attack_calls and not any(train for _, train, _ in attack_calls)
    assert {index for which, _, index in attack_calls if which == "student"} == ({0, 1} if name == "path" else {0})
    assert {which for which, _, _ in attack_calls} == {"student"} | (
        {"teacher"} if chosen.attack.teacher_gradient or chosen.attack.teacher_on_clean else set())

    # What moves them after it are the views that say so, once each.
    expected = jax.tree.map(np.array, state.batch_stats)
    for forward in chosen.student_forwards:
        if forward[0].updates_statistics:
            hidden = np.concatenate([views[view.name] for view in forward]).reshape(-1, 16) @ state.params["hidden"]
            for statistic, value in (("mean", hidden.mean(axis=0)), ("var", hidden.var(axis=0))):
                running = expected[statistic][forward[0].batch_norm_set]
                running[:] = 0.9 * running + 0.1 * value
    for statistic in expected:
        np.testing.assert_allclose(moved[statistic], expected[statistic], rtol=1e-4, atol=1e-5)
    assert (np.abs(moved["mean"] - state.batch_stats["mean"])[0] > 1e-3).any()


@pytest.mark.parametrize("name", ["adaad", "path"])
def test_attacking_by_batch_statistics_leaves_the_running_ones_out_of_it(name):
    chosen, optimizer = method(name, **({"path_points": 3} if name == "path" else {})), optax.sgd(0.1)
    state = states.create(STUDENT, optimizer, KEY, weight_average=False)
    recipe = step.Recipe(
        chosen, STUDENT, TEACHER, inner(steps=3), optimizer, steps=10, attack_batch_statistics=True)

    def attacked(batch_stats):
        with jax.disable_jit():
            return step.attack(
                recipe, KEY, state.replace(batch_stats=batch_stats), TEACHER.init(KEY), IMAGES, LABELS, NEGATIVES,
                NEGATIVE_LABELS)[0]

    views, others = attacked(state.batch_stats), attacked(jax.tree.map(lambda value: 2 * value, state.batch_stats))
    for view in views:
        np.testing.assert_array_equal(views[view], others[view])
