"""From the same start, every training attack takes the very steps of the published loops, written a second time in torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrd import ThreatModel, distillation
from jaxrd.distillation import Context, InnerMaximisation
from jaxrd.distillation.inner_maximisation import path_attack

torch = pytest.importorskip("torch", reason="parity with the attacks as published needs torch, which jaxrd does not")
F = torch.nn.functional
pytestmark = pytest.mark.usefixtures("one_torch_thread")

BATCH, SHAPE, CLASSES = 12, (4, 4, 3), 5
STEPS, WATCHED = 10, (1, 2, 3, 4, 10)
GENERATOR = np.random.default_rng(0)
# Every third pixel lies on a bound: there a start that is not clipped is another one.
IMAGES = np.clip(GENERATOR.uniform(-0.2, 1.2, (BATCH, *SHAPE)), 0, 1)
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 0, 1, 2])  # and nothing of class 4
NEGATIVES = np.clip(GENERATOR.uniform(-0.2, 1.2, (BATCH, *SHAPE)), 0, 1)
NEGATIVE_LABELS = (LABELS + np.tile([1, 2, 3, 4], 3)) % CLASSES
WEIGHTS = {
    model: (GENERATOR.normal(size=(48, 16)) / 5, GENERATOR.normal(size=16), GENERATOR.normal(size=(16, CLASSES)))
    for model in ("student", "teacher", "auxiliary")}
KEY = jax.random.key(3)

# What the reference says of each method: what is climbed, from which start, and the budget of its published code.
TABLE = {
    "pgd_at": ("cross_entropy", "uniform", 8 / 255, 2 / 255),
    "ard": ("cross_entropy", "uniform", 8 / 255, 2 / 225),  # the default step of the IGDM authors' code is 2/225
    "iad": ("cross_entropy", "uniform", 8 / 255, 2 / 255),
    "akd": ("cross_entropy", "uniform", 8 / 255, 2 / 255),
    "mart": ("cross_entropy", "gaussian", 0.031, 0.007),
    "trades": ("trades", "gaussian", 0.031, 0.007),
    "rslad": ("teacher_clean", "gaussian", 8 / 255, 2 / 255),
    "adaad": ("teacher_moving", "gaussian", 8 / 255, 2 / 255),
    "adaiad": ("teacher_moving", "gaussian", 8 / 255, 2 / 255),
    "dgad": ("teacher_moving", "gaussian", 8 / 255, 2 / 255),
    "path": ("cross_entropy", "gaussian", 8 / 255, 2 / 255),
}
INNER_LOSSES = ["cross_entropy", "teacher_clean", "teacher_moving"]

projected = pytest.mark.parametrize("project_start", [True, False], ids=["start clipped", "start as it is"])


@pytest.fixture(autouse=True)
def float64():
    """Else the sign of a gradient that is nearly zero would be a matter of rounding."""
    with jax.enable_x64(True):
        yield


def ours(model, points):
    hidden, bias, out = WEIGHTS[model]
    return jnp.tanh(points.reshape(len(points), -1) @ hidden + bias) @ out


def theirs(model, points):
    hidden, bias, out = map(torch.tensor, WEIGHTS[model])
    return torch.tanh(points.flatten(1) @ hidden + bias) @ out


def context(auxiliary=False):
    networks = {model: functools.partial(ours, model) for model in WEIGHTS}
    images = jnp.asarray(IMAGES)
    return Context(
        images, jnp.asarray(LABELS), networks["student"], networks["teacher"], networks["teacher"](images),
        networks["auxiliary"] if auxiliary else None, jnp.asarray(NEGATIVES), jnp.asarray(NEGATIVE_LABELS))


def published_loss(name, student="student", labels=LABELS, target=None):
    """What a published attack climbs or descends, images -> scalar; `target` stands in for the logits T(x)."""
    images, labels = torch.tensor(IMAGES), torch.tensor(labels)

    def divergence(target, points):
        return F.kl_div(F.log_softmax(theirs(student, points), dim=1), F.softmax(target, dim=1), reduction="sum")

    return {
        "cross_entropy": lambda points: F.cross_entropy(theirs(student, points), labels),
        "trades": lambda points: divergence(theirs(student, images), points),  # in every step anew, as published
        "teacher_clean": lambda points: divergence(theirs("teacher", images) if target is None else target, points),
        "teacher_moving": lambda points: divergence(theirs("teacher", points), points),
    }[name]


def published_path(loss, start, epsilon, step_size, norm="linf", direction=1, images=IMAGES):
    """The points after each step of the published loop: a step, then the ball, then [0, 1]."""
    images, points, path = torch.tensor(images), torch.tensor(np.array(start)), []
    for _ in range(STEPS):
        points = points.detach().requires_grad_()
        gradient, = torch.autograd.grad(loss(points), points)
        points = points.detach()
        if norm == "linf":
            points = points + direction * step_size * torch.sign(gradient)
            points = torch.min(torch.max(points, images - epsilon), images + epsilon)
        else:
            points = points + direction * step_size * gradient / length(gradient)
            points = images + (points - images) * torch.clamp(epsilon / length(points - images), max=1)
        points = torch.clamp(points, 0, 1)
        path.append(points.numpy())
    return np.stack(path)


def published_descents(loss_to, candidates, start, epsilon, step_size, norm):
    """The published paths of the batch towards each candidate, [steps, candidates, batch, h, w, c].

    `loss_to` takes a candidate for each image, here all of them for each: in eval mode nobody depends on its neighbours.
    """
    images, start = np.tile(IMAGES, (candidates, 1, 1, 1)), np.tile(start, (candidates, 1, 1, 1))
    loss = loss_to(np.repeat(np.arange(candidates), BATCH))
    path = published_path(loss, start, epsilon, step_size, norm, direction=-1, images=images)
    return path.reshape(STEPS, candidates, BATCH, *SHAPE)


def length(delta):
    return delta.flatten(1).norm(dim=1)[:, None, None, None]


def recording(norm, epsilon):
    """A threat model, and a list that it writes the starts into that an attack asks it for."""
    starts = []

    class Recording(ThreatModel):
        def random_start(self, *arguments, **options):
            starts.append(super().random_start(*arguments, **options))
            return starts[-1]

    return Recording(norm, epsilon), starts


def attacked(attack, **inner):
    """Returns the adversarial points of attacks with more and more steps, [WATCHED, batch, h, w, c]."""
    with jax.disable_jit():  # nothing to compile for every number of steps
        return np.stack([
            attack.generate(KEY, context(), InnerMaximisation(**inner, steps=steps))["adversarial"] for steps in WATCHED])


def assert_same_steps(points, path):
    """`points` are WATCHED ones of the published path, or all."""
    numbers = WATCHED if len(points) == len(WATCHED) else range(1, STEPS + 1)
    for number, mine in zip(numbers, points, strict=True):
        np.testing.assert_allclose(mine, path[number - 1], rtol=0, atol=1e-6, err_msg=f"after step {number}")


# Steps.


@projected
@pytest.mark.parametrize("name", ["pgd_at", "mart", "trades", "rslad", "adaad"])
def test_each_recipe_takes_the_steps_of_the_published_loop(name, project_start):
    objective, kind, epsilon, step_size = TABLE[name]
    threat = ThreatModel("linf", epsilon)
    start = threat.random_start(KEY, jnp.asarray(IMAGES), kind, project=project_start)
    expected = published_path(published_loss(objective), start, epsilon, step_size)
    points = attacked(distillation.method(name).attack, threat=threat, step_size=step_size, project_start=project_start)
    assert_same_steps(points, expected)
    assert (expected.min(), expected.max()) == (0, 1)
    assert np.abs(expected - IMAGES).max() == pytest.approx(epsilon)  # both clips were at work


@pytest.mark.parametrize("name", ["ard", "iad", "akd", "adaiad", "dgad"])
def test_methods_that_share_a_recipe_take_its_steps_too(name):
    objective, kind, epsilon, step_size = TABLE[name]
    threat = ThreatModel("linf", epsilon)
    expected = published_path(
        published_loss(objective), threat.random_start(KEY, jnp.asarray(IMAGES), kind), epsilon, step_size)
    inner = InnerMaximisation(threat, step_size, STEPS)
    points = distillation.method(name).attack.generate(KEY, context(), inner)["adversarial"]
    np.testing.assert_allclose(points, expected[-1], rtol=0, atol=1e-6)


@projected
@pytest.mark.parametrize("name", ["pgd_at", "rslad", "adaad"])
def test_in_l2_a_step_has_its_length_and_the_ball_comes_before_the_bounds(name, project_start):
    (objective, kind, _, _), epsilon, step_size = TABLE[name], 0.5, 0.125
    threat = ThreatModel("l2", epsilon)
    start = threat.random_start(KEY, jnp.asarray(IMAGES), kind, project=project_start)
    expected = published_path(published_loss(objective), start, epsilon, step_size, "l2")
    points = attacked(distillation.method(name).attack, threat=threat, step_size=step_size, project_start=project_start)
    assert_same_steps(points, expected)
    assert (expected.min(), expected.max()) == (0, 1)


@projected
@pytest.mark.parametrize("norm, epsilon, step_size, inner_loss", [
    *(("linf", 8 / 255, 2 / 255, inner_loss) for inner_loss in INNER_LOSSES), ("l2", 0.5, 0.125, "teacher_clean")])
def test_the_path_is_every_point_of_the_published_ascent(norm, epsilon, step_size, inner_loss, project_start):
    threat = ThreatModel(norm, epsilon)
    start = threat.random_start(KEY, jnp.asarray(IMAGES), "gaussian", project=project_start)
    expected = published_path(published_loss(inner_loss), start, epsilon, step_size, norm)
    attack = path_attack(
        inner_loss=inner_loss, points=STEPS, targeted=False, targeted_start="negative_image", target_class="uniform")
    with jax.disable_jit():
        views = attack.generate(KEY, context(), InnerMaximisation(threat, step_size, STEPS, project_start=project_start))
    assert_same_steps([*(views[f"path/{step}"] for step in range(1, STEPS)), views["adversarial"]], expected)


def descended(norm="linf", epsilon=8 / 255, step_size=2 / 255, project_start=True, auxiliary=False, **options):
    """Returns the points of the targeted path and the start that they are reached from."""
    threat, starts = recording(norm, epsilon)
    attack = path_attack(points=STEPS, targeted=True, **options)
    inner = InnerMaximisation(threat, step_size, STEPS, project_start=project_start)
    with jax.disable_jit():
        views = attack.generate(KEY, context(auxiliary), inner)
    _, start = starts
    return np.stack([views[f"targeted/{step}"] for step in range(1, STEPS + 1)]), start


@projected
@pytest.mark.parametrize("norm, epsilon, step_size, inner_loss, auxiliary", [
    ("linf", 8 / 255, 2 / 255, "cross_entropy", False), ("linf", 8 / 255, 2 / 255, "cross_entropy", True),
    ("linf", 8 / 255, 2 / 255, "teacher_moving", True), ("l2", 0.5, 0.125, "cross_entropy", True)])
def test_the_targeted_path_descends_the_cross_entropy_of_an_anchors_class(
        norm, epsilon, step_size, inner_loss, auxiliary, project_start):
    points, start = descended(
        norm, epsilon, step_size, project_start, auxiliary, inner_loss=inner_loss, targeted_start="negative_image",
        target_class="uniform", negatives="batch")
    # Which class it is, is drawn; every image must have gone the way of exactly one.
    student = "auxiliary" if auxiliary else "student"
    paths = published_descents(
        lambda targets: published_loss("cross_entropy", student, targets), CLASSES, start, epsilon, step_size, norm)
    taken = np.abs(paths - points[:, None]).max(axis=(0, 3, 4, 5)) < 1e-6
    assert (taken.sum(axis=0) == 1).all()
    targets = taken.argmax(axis=0)
    assert (targets != LABELS).all() and set(targets) <= set(LABELS) and len(set(targets)) > 1


@projected
@pytest.mark.parametrize("norm, epsilon, step_size", [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.125)])
def test_towards_the_teachers_output_the_targeted_path_descends_the_divergence_from_that_on_an_anchor(
        norm, epsilon, step_size, project_start):
    points, start = descended(
        norm, epsilon, step_size, project_start, inner_loss="teacher_clean", targeted_start="negative_image",
        target_class="uniform", negatives="batch")
    teacher_clean = theirs("teacher", torch.tensor(IMAGES))
    paths = published_descents(
        lambda anchors: published_loss("teacher_clean", target=teacher_clean[anchors]), BATCH, start, epsilon, step_size, norm)
    taken = np.abs(paths - points[:, None]).max(axis=(0, 3, 4, 5)) < 1e-6
    assert (taken & (LABELS[:, None] != LABELS)).any(axis=0).all()
    if norm == "l2":  # signs alone may agree along the way to several anchors
        assert (taken.sum(axis=0) == 1).all() and len(set(taken.argmax(axis=0))) > 2


@projected
@pytest.mark.parametrize("norm, epsilon, step_size, inner_loss, auxiliary", [
    ("linf", 8 / 255, 2 / 255, "cross_entropy", False), ("linf", 8 / 255, 2 / 255, "teacher_moving", True),
    ("l2", 0.5, 0.125, "cross_entropy", True), ("l2", 0.5, 0.125, "teacher_clean", True)])
def test_from_a_negative_of_the_data_the_targeted_path_descends_to_its_own_anchor(
        norm, epsilon, step_size, inner_loss, auxiliary, project_start):
    points, start = descended(
        norm, epsilon, step_size, project_start, auxiliary, inner_loss=inner_loss, targeted_start="negative_image",
        target_class="uniform", negatives="data")
    np.testing.assert_allclose(start, NEGATIVES, rtol=0, atol=0.01)  # within its Gaussian noise
    inner_loss = "teacher_clean" if inner_loss == "teacher_clean" else "cross_entropy"  # T(anchors), or their labels
    loss = published_loss(inner_loss, "auxiliary" if auxiliary else "student")
    assert_same_steps(points, published_path(loss, start, epsilon, step_size, norm, direction=-1, images=NEGATIVES))


@pytest.mark.parametrize("targeted_start, target_class, auxiliary", [
    ("anchor_image", "teacher", False), ("anchor_image", "least_likely", False), ("anchor_image", "student", False),
    ("anchor_image", "student", True), ("negative_image", "teacher", False), ("negative_image", "student", True)])
def test_the_targeted_path_descends_towards_the_class_that_a_model_chooses(targeted_start, target_class, auxiliary):
    student = "auxiliary" if auxiliary else "student"
    scores = theirs(student if target_class == "student" else "teacher", torch.tensor(IMAGES)).numpy()
    scores = -scores if target_class == "least_likely" else scores.copy()
    scores[np.arange(BATCH), LABELS] = -np.inf
    if targeted_start == "negative_image":
        scores[:, 4] = -np.inf  # the batch has no anchor of it
    points, start = descended(
        auxiliary=auxiliary, inner_loss="cross_entropy", targeted_start=targeted_start, target_class=target_class)
    loss = published_loss("cross_entropy", student, scores.argmax(axis=1))
    assert_same_steps(points, published_path(loss, start, 8 / 255, 2 / 255, direction=-1))


# Starts.


def starts_of(attack, images, project_start, epsilon):
    """The starts that an attack climbs from, on these images."""
    threat, starts = recording("linf", epsilon)
    network, labels = functools.partial(ours, "student"), jnp.arange(len(images)) % 2
    attack.generate(
        KEY, Context(images, labels, network, network, network(images), negatives=images, negative_labels=1 - labels),
        InnerMaximisation(threat, epsilon / 4, 1, project_start=project_start))
    return [np.asarray(start) for start in starts]


@pytest.mark.parametrize("name, epsilon", [
    ("pgd_at", 8 / 255), ("mart", 0.031), ("trades", 0.031), ("rslad", 8 / 255), ("rslad", 0.002), ("adaad", 8 / 255),
    ("path", 8 / 255)])
def test_a_start_is_uniform_or_gaussian_as_published_and_clipped_or_left_as_drawn(name, epsilon):
    images = jnp.asarray(np.concatenate([np.zeros((30, *SHAPE)), np.ones((30, *SHAPE)), np.full((30, *SHAPE), 0.5)]))
    attack = distillation.method(name, **({"path_points": 1} if name == "path" else {})).attack
    drawn, clipped = (starts_of(attack, images, project_start, epsilon) for project_start in (False, True))
    assert len(drawn) == (2 if name == "path" else 1)  # both paths have theirs
    noises = [(start - images).ravel() for start in drawn]
    for noise in noises:
        if TABLE[name][1] == "uniform":
            assert scipy.stats.kstest(noise, "uniform", (-epsilon, 2 * epsilon)).pvalue > 0.01
        else:
            assert scipy.stats.kstest(noise, "norm", (0, 0.001)).pvalue > 0.01
        assert len(np.unique(noise)) == noise.size
    assert all(abs(np.corrcoef(noises[0], other)[0, 1]) < 0.06 for other in noises[1:])
    low, high = np.maximum(images - epsilon, 0), np.minimum(images + epsilon, 1)
    for mine, start in zip(clipped, drawn, strict=True):
        np.testing.assert_allclose(mine, np.clip(start, low, high), rtol=0, atol=1e-15)
