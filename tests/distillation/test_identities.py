"""What one method becomes in another's limit: identities between methods, and what a partition or a control leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import ThreatModel, distillation, objectives
from jaxrd.distillation import Context, InnerMaximisation, adversarial_path, method

BATCH, CLASSES, POINTS = 8, 10, 10
GENERATOR = np.random.default_rng(1)
LABELS = jnp.asarray(GENERATOR.integers(0, CLASSES, BATCH))
IMAGES = jnp.asarray(GENERATOR.uniform(size=(BATCH, 3, 3, 1)), jnp.float32)
NEGATIVES = jnp.asarray(GENERATOR.uniform(size=IMAGES.shape), jnp.float32)
NEGATIVE_LABELS = (LABELS + jnp.asarray(GENERATOR.integers(1, CLASSES, BATCH))) % CLASSES
WEIGHTS = {name: jnp.asarray(GENERATOR.normal(size=(9, CLASSES)), jnp.float32) for name in ("student", "auxiliary", "teacher")}
INNER = InnerMaximisation(ThreatModel("linf", 0.1), step_size=0.03, steps=POINTS)


def network(name):
    return lambda images: jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS[name]) * 3


def draws(chosen, seed=0, scale=2.0):
    """Random logits for every view that the method reads."""
    generator = np.random.default_rng(seed)
    names = sorted({view.name for view in chosen.views})
    drawn = {kind: {name: jnp.asarray(generator.normal(scale=scale, size=(BATCH, CLASSES)), jnp.float32) for name in names}
             for kind in ("student", "teacher")}
    student = {view.name: drawn["student"][view.name] for view in chosen.student_views}
    teacher = {view.name: drawn["teacher"][view.name] for view in chosen.teacher_views}
    return student, teacher


def mean_loss(chosen, student, teacher, labels=LABELS, progress=1.0):
    return jnp.mean(chosen.loss(student, teacher, labels, jnp.float32(progress), NEGATIVE_LABELS)[0])


def attacked(chosen, key=jax.random.key(3), images=IMAGES, labels=LABELS, negatives=NEGATIVES, negative_labels=NEGATIVE_LABELS):
    context = Context(
        images, labels, network("student"), network("teacher"),
        network("teacher")(images) if chosen.attack.teacher_on_clean else None, network("auxiliary"),
        *((negatives, negative_labels) if chosen.negatives else ()))
    return chosen.attack.generate(key, context, INNER)


# Path.

AS_RSLAD = {"path_weights": "last_only", "path_gamma": 0.0, "path_alpha": 5 / 6, "path_inner_loss": "teacher_clean"}


def test_the_last_point_alone_is_rslad():
    """Same attack, same views, same forwards, same loss."""
    path, rslad = method("path", **AS_RSLAD), method("rslad", rslad_scale=1.0)
    forwards = [[(view.name, view.updates_statistics) for view in forward] for forward in path.student_forwards]
    assert forwards == [[(view.name, view.updates_statistics) for view in forward] for forward in rslad.student_forwards]
    assert path.batch_norm_sets == 1
    assert [view.name for view in path.teacher_views] == ["clean"]
    np.testing.assert_array_equal(attacked(path)["adversarial"], attacked(rslad)["adversarial"])
    student, teacher = draws(rslad)
    np.testing.assert_allclose(mean_loss(path, student, teacher), mean_loss(rslad, student, teacher), rtol=1e-6)
    own, theirs = (jax.grad(mean_loss, argnums=1)(chosen, student, teacher) for chosen in (path, rslad))
    for view in theirs:
        np.testing.assert_allclose(own[view], theirs[view], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("change", [
    {"path_weights": "uniform"}, {"path_alpha": 0.5}, {"path_inner_loss": "cross_entropy"}, {"path_gamma": 1.0}])
def test_every_one_of_its_options_is_needed_for_that(change):
    path, rslad = method("path", **AS_RSLAD | change), method("rslad", rslad_scale=1.0)
    student, teacher = draws(path)
    same_points = np.array_equal(attacked(path)["adversarial"], attacked(rslad)["adversarial"])
    same_loss = np.allclose(mean_loss(path, student, teacher), mean_loss(rslad, student, teacher), rtol=1e-4)
    assert not (same_points and same_loss)


@pytest.mark.parametrize("options", [
    {}, {"path_inner_loss": "teacher_clean"}, {"path_weights": "gap"}, {"path_weight_model": "teacher"},
    {"path_weights": "boundary", "path_alpha": 0.5, "path_natural": "both"}])
def test_negatives_that_the_data_pair_as_the_batch_would_are_those_of_the_batch(options, monkeypatch):
    """The n-th image of a batch descends to an anchor in it; paired beforehand, the n-th negative does to the n-th image."""
    drawn, draw = [], adversarial_path.draw_anchors
    monkeypatch.setattr(adversarial_path, "draw_anchors", lambda *inputs: drawn.append(draw(*inputs)) or drawn[-1])
    batch, data = (method("path", path_negatives=source, **options) for source in ("batch", "data"))
    expected = attacked(batch)
    (anchors,) = drawn
    found = attacked(data, images=IMAGES[anchors], labels=LABELS[anchors], negatives=IMAGES, negative_labels=LABELS)
    assert len(drawn) == 1 and len(set(anchors.tolist())) > 2
    for point in range(1, POINTS + 1):
        np.testing.assert_array_equal(found[f"targeted/{point}"], expected[f"targeted/{point}"])

    student, teacher = draws(batch)
    of_data = (
        {"negative" if name == "clean/targeted" else name: logits for name, logits in student.items()},
        teacher | {"negative": teacher["clean"]})
    expected = batch.loss(student, teacher, LABELS, jnp.float32(1))[1]
    terms = data.loss(*of_data, LABELS[anchors], jnp.float32(1), LABELS)[1]
    for name in {*expected} - {"path_untargeted"}:  # that is about other images
        np.testing.assert_array_equal(terms[name], expected[name])


@pytest.mark.parametrize("options", [
    {"path_gamma": 0.0}, {"path_targeted_start": "anchor_image"}, {"path_targeted_start": "anchor_runner_up"},
    {"path_target_class": "teacher"}, {"path_target_class": "student"}])
def test_where_no_image_is_anothers_anchor_the_data_give_no_negatives(options):
    batch, data = (method("path", path_negatives=source, **options) for source in ("batch", "data"))
    assert not batch.negatives and not data.negatives
    assert data.attack.two_classes == batch.attack.two_classes == ("path_target_class" in options)
    views = [[(view.name, view.updates_statistics, view.batch_norm_set) for view in chosen.views] for chosen in (batch, data)]
    assert views[0] == views[1]
    expected, found = attacked(batch), attacked(data)
    for name in expected | found:
        np.testing.assert_array_equal(found[name], expected[name])
    logits = draws(batch)
    np.testing.assert_array_equal(mean_loss(data, *logits), mean_loss(batch, *logits))


# DGAD.


def taught(student, teacher, right):
    """Teacher logits that are right about the clean images where `right` says so, and wrong elsewhere."""
    shifted = jnp.where(right, LABELS, (LABELS + 1) % CLASSES)
    return student, {name: logits + 20 * jax.nn.one_hot(shifted, CLASSES) for name, logits in teacher.items()}


def half_wrong():
    logits = draws(method("ard"))[1]["clean"]
    return logits + 20 * jax.nn.one_hot(jnp.where(jnp.arange(BATCH) % 2, LABELS, (LABELS + 3) % CLASSES), CLASSES)


def test_a_teacher_that_is_never_wrong_makes_dgad_adaad():
    dgad, adaad = method("dgad", dgad_beta=0.0), method("adaad")
    student, teacher = taught(*draws(dgad), right=jnp.ones(BATCH, bool))
    np.testing.assert_array_equal(attacked(dgad)["adversarial"], attacked(adaad)["adversarial"])
    np.testing.assert_allclose(mean_loss(dgad, student, teacher), mean_loss(adaad, student, teacher), rtol=1e-6)
    own, theirs = (jax.grad(mean_loss, argnums=1)(chosen, student, teacher) for chosen in (dgad, adaad))
    np.testing.assert_allclose(own["adversarial"], theirs["adversarial"], rtol=1e-5, atol=1e-8)
    assert not np.any(own["clean"])


@pytest.mark.parametrize("options", [{}, {"dgad_consistency": "l2"}, {"dgad_correction": "smooth"}, {"dgad_product": True}])
@pytest.mark.parametrize("same", [False, True])
def test_a_batch_that_the_teacher_gets_all_wrong_stays_finite(options, same):
    dgad = method("dgad", **options)
    student, teacher = taught(*draws(dgad), right=jnp.zeros(BATCH, bool))
    if same:  # where a norm has no derivative
        student = {name: student["clean"] for name in student}
    value, gradients = jax.value_and_grad(mean_loss, argnums=1)(dgad, student, teacher)
    assert np.isfinite(value) and all(np.all(np.isfinite(gradient)) for gradient in gradients.values())


def test_a_partitioned_sample_gets_no_gradient_from_the_other_branch():
    dgad = method("dgad", dgad_beta=0.0)
    right = jnp.arange(BATCH) % 3 > 0
    student, teacher = taught(*draws(dgad), right=right)
    gradients = jax.grad(mean_loss, argnums=1)(dgad, student, teacher)
    reached = {view: np.any(np.abs(gradients[view]) > 0, axis=1) for view in ("clean", "adversarial")}
    np.testing.assert_array_equal(reached["adversarial"], right)
    np.testing.assert_array_equal(reached["clean"], ~right)


def test_dgad_without_its_three_parts_is_adaad_and_without_partition_swaps_everywhere():
    """Partitioning, swapping and consistency off one by one, with a teacher that is wrong about half of the batch."""
    right = jnp.arange(BATCH) % 2 == 0
    options = {"dgad_partition": False, "dgad_beta": 0.0}
    none, swapped = method("dgad", dgad_correction="none", **options), method("dgad", **options)
    student, teacher = taught(*draws(none), right=right)
    np.testing.assert_allclose(mean_loss(none, student, teacher), mean_loss(method("adaad"), student, teacher), rtol=1e-6)
    corrected = teacher | {"adversarial": distillation.swap_labels(teacher["adversarial"], LABELS)}
    assert (corrected["adversarial"] != teacher["adversarial"]).any()
    np.testing.assert_allclose(
        mean_loss(swapped, student, teacher), mean_loss(method("adaad"), student, corrected), rtol=1e-6)
    assert mean_loss(swapped, student, teacher) != mean_loss(method("dgad", dgad_beta=0.0), student, teacher)
    assert "partitioned" not in {monitor.name for monitor in none.monitors}


def test_what_the_monitors_of_dgad_count():
    dgad = method("dgad")
    right = jnp.arange(BATCH) % 3 > 0
    student, teacher = taught(*draws(dgad), right=right)
    wrong_when_attacked = right & (jnp.arange(BATCH) > 4)
    teacher["adversarial"] = teacher["adversarial"] + 100 * jax.nn.one_hot(
        jnp.where(wrong_when_attacked, (LABELS + 2) % CLASSES, LABELS), CLASSES)
    counted = {monitor.name: np.asarray(monitor.value(student, teacher, LABELS)) for monitor in dgad.monitors}
    np.testing.assert_array_equal(counted["partitioned"], ~right)
    np.testing.assert_array_equal(counted["swapped/adversarial"], wrong_when_attacked)
    assert "swapped/adversarial" not in {monitor.name for monitor in method("dgad", dgad_correction="none").monitors}


def test_swapping_makes_the_label_the_argmax_and_permutes_the_softmax():
    logits = half_wrong()
    swapped = distillation.swap_labels(logits, LABELS)
    np.testing.assert_array_equal(jnp.argmax(swapped, axis=1), LABELS)
    np.testing.assert_allclose(
        np.sort(jax.nn.softmax(swapped), axis=1), np.sort(jax.nn.softmax(logits), axis=1), rtol=1e-5, atol=1e-8)
    moved = np.sum(np.asarray(swapped) != np.asarray(logits), axis=1)
    wrong = np.asarray(distillation.misclassified(logits, LABELS))
    assert wrong.any() and not wrong.all()
    np.testing.assert_array_equal(moved, np.where(wrong, 2, 0))
    np.testing.assert_array_equal(distillation.swap_labels(swapped, LABELS), swapped)


@pytest.mark.parametrize("control", ["smooth_labels", "mix_labels"])
def test_the_controls_replace_wrong_outputs_only_and_by_distributions_with_the_label_on_top(control):
    logits = half_wrong()
    replaced = getattr(distillation.dynamic_guidance, control)(logits, LABELS)
    wrong = np.asarray(distillation.misclassified(logits, LABELS))
    np.testing.assert_array_equal(np.asarray(replaced)[~wrong], np.asarray(logits)[~wrong])
    one_hot, probabilities = np.eye(CLASSES)[LABELS], np.asarray(jax.nn.softmax(logits))
    expected = 0.9 * one_hot + 0.01 if control == "smooth_labels" else 0.5 * (one_hot + probabilities)
    np.testing.assert_allclose(jax.nn.softmax(replaced)[wrong], expected[wrong], rtol=1e-5)


def test_a_one_hot_target_is_the_cross_entropy():
    logits = half_wrong()
    target = distillation.dynamic_guidance.smooth_labels(logits, LABELS, smoothing=0.0)
    wrong = np.asarray(distillation.misclassified(logits, LABELS))
    student = draws(method("ard"))[0]["adversarial"]
    np.testing.assert_allclose(
        objectives.kl_divergence(target, student)[wrong], objectives.cross_entropy(student, LABELS)[wrong], rtol=1e-5)


# IGDM and its kin.


@pytest.mark.parametrize("scale", [0.1, 0.03])
def test_igdm_at_small_perturbations_is_the_jvp_form(scale):
    """They differ by O(t^4), both being O(t^2): the relative difference falls with t^2."""
    delta = scale * jnp.sign(jax.random.normal(jax.random.key(0), IMAGES.shape))
    student, teacher = network("student"), network("teacher")
    with jax.enable_x64(True):
        arguments = [jnp.asarray(x, jnp.float64) for x in (IMAGES, delta)]
        exact = np.asarray(distillation.jvp_matching(student, teacher, *arguments))
        plus, minus = arguments[0] + arguments[1], arguments[0] - arguments[1]
        taylor = np.asarray(distillation.igdm(student(plus), student(minus), teacher(plus), teacher(minus)))
    # Relative to the sum: a single example may happen to lie near 0.
    assert np.max(np.abs(taylor - exact)) < 60 * scale**2 * np.mean(exact)


@pytest.mark.parametrize("base", ["ard", "trades", "dgad"])
def test_modules_add_up(base):
    plain = method(base)
    both = method(base, igdm=3.0, awp=0.01)
    assert both.name == f"{base}+igdm+awp" and both.weight_perturbation.gamma == 0.01
    assert [term.name for term in both.terms] == [*(term.name for term in plain.terms), "igdm"]
    student, teacher = draws(both)
    extra = distillation.igdm(student["adversarial"], student["mirrored"], teacher["adversarial"], teacher["mirrored"])
    np.testing.assert_allclose(
        mean_loss(both, student, teacher), mean_loss(plain, student, teacher) + 3 * jnp.mean(extra), rtol=1e-5)


@pytest.mark.parametrize("control", ["zero", "mirror", "trades"])
def test_controls_of_igdm_need_no_teacher(control):
    chosen = method("pgd_at", igdm=2.0, igdm_control=control)
    assert not chosen.needs_teacher
    student, _ = draws(chosen)
    behind = student["clean" if control == "trades" else "mirrored"]
    expected = {
        "zero": objectives.kl_divergence(jnp.zeros((BATCH, CLASSES)), student["adversarial"] - behind),
        "mirror": objectives.kl_divergence(behind, student["adversarial"]),
        "trades": objectives.kl_divergence(behind, student["adversarial"])}[control]
    _, terms = chosen.loss(student, {}, LABELS, jnp.float32(1))
    np.testing.assert_allclose(terms["igdm"], expected, rtol=1e-6)


def test_the_trades_control_on_adversarial_training_is_trades_but_for_the_cross_entropy():
    control = method("pgd_at", igdm=6.0, igdm_control="trades", igdm_ramp="constant")
    trades = method("trades")
    student, _ = draws(control)
    np.testing.assert_allclose(
        control.loss(student, {}, LABELS, jnp.float32(1))[1]["igdm"],
        trades.loss(student, {}, LABELS, jnp.float32(1))[1]["self_distillation"], rtol=1e-6)


def test_introspection_begins_after_its_warm_up():
    chosen = method("iad", iad_warmup=0.3)
    student, teacher = draws(chosen)
    early, late = (chosen.loss(student, teacher, LABELS, jnp.float32(progress))[0] for progress in (0.3, 0.305))
    ard = method("ard").loss(student, teacher, LABELS, jnp.float32(1))[0]
    np.testing.assert_allclose(early, ard, rtol=1e-6)
    assert np.all(late > early)  # (1 - A) KL > 0


def test_a_teacher_that_is_sure_and_right_leaves_nothing_to_introspect():
    chosen = method("iad", iad_weighting="both")
    student, teacher = draws(chosen)
    teacher["adversarial"] = 100.0 * jax.nn.one_hot(LABELS, CLASSES)
    ard = method("ard").loss(student, teacher, LABELS, jnp.float32(1))[0]
    np.testing.assert_allclose(chosen.loss(student, teacher, LABELS, jnp.float32(1))[0], ard, rtol=1e-5)
