"""Methods: their losses against the formulas of the papers, their views, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrd import ThreatModel, distillation, objectives
from jaxrd.distillation import Context, InnerMaximisation, Method, Term, method, with_igdm
from jaxrd.distillation.catalogue import BASES
from jaxrd.distillation.views import ADVERSARIAL, CLEAN, MIRRORED, View
from tests.support import assert_input_error

BATCH, CLASSES = 8, 10
GENERATOR = np.random.default_rng(0)
VIEWS = ("clean", "adversarial", "mirrored")
STUDENT = {view: jnp.asarray(GENERATOR.normal(scale=2, size=(BATCH, CLASSES)), jnp.float32) for view in VIEWS}
TEACHER = {view: jnp.asarray(GENERATOR.normal(scale=2, size=(BATCH, CLASSES)), jnp.float32) for view in VIEWS}
LABELS = jnp.asarray(GENERATOR.integers(0, CLASSES, BATCH))
HALFWAY = jnp.float32(0.5)

# path has views of its own: test_identities.py, test_losses_torch_parity.py, test_adversarial_path.py
each_base = pytest.mark.parametrize("base", sorted({*BASES} - {"path"}))


def divergence(teacher_view, student_view):
    """KL(T || S) per example, in NumPy."""
    target = scipy.special.log_softmax(np.asarray(TEACHER[teacher_view], np.float64), axis=1)
    model = scipy.special.log_softmax(np.asarray(STUDENT[student_view], np.float64), axis=1)
    return np.sum(np.exp(target) * (target - model), axis=1)


def loss_of(chosen, progress=HALFWAY):
    """The loss, from a student and teacher that know no other views than those the method asks for."""
    student = {view.name: STUDENT[view.name] for view in chosen.student_views}
    teacher = {view.name: TEACHER[view.name] for view in chosen.teacher_views}
    return chosen.loss(student, teacher, LABELS, progress)


def names(views):
    return [view.name for view in views]


def test_pgd_at_is_the_adversarial_cross_entropy():
    loss, terms = loss_of(method("pgd_at"))
    probabilities = scipy.special.softmax(np.asarray(STUDENT["adversarial"], np.float64), axis=1)
    np.testing.assert_allclose(loss, -np.log(probabilities[np.arange(BATCH), LABELS]), rtol=1e-5)
    np.testing.assert_array_equal(terms["cross_entropy"], loss)


def test_ard_sets_the_clean_teacher_against_the_adversarial_student():
    loss, terms = loss_of(method("ard"))
    np.testing.assert_allclose(loss, divergence("clean", "adversarial"), rtol=1e-5)
    np.testing.assert_array_equal(terms["distillation"], loss)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_rslad_is_five_sixths_adversarial_and_one_sixth_clean(scale):
    loss, terms = loss_of(method("rslad", rslad_scale=scale))
    adversarial, clean = divergence("clean", "adversarial"), divergence("clean", "clean")
    np.testing.assert_allclose(loss, scale * (5 / 6 * adversarial + 1 / 6 * clean), rtol=1e-5)
    np.testing.assert_allclose(terms["distillation_adversarial"], adversarial, rtol=1e-5)
    np.testing.assert_allclose(terms["distillation_clean"], clean, rtol=1e-5)


def test_rslad_scale_is_one_tenth_by_default():
    np.testing.assert_array_equal(loss_of(method("rslad"))[0], loss_of(method("rslad", rslad_scale=0.1))[0])


@pytest.mark.parametrize("classes, factor", [(10, 1), (100, 10)])
def test_rslad_parity_with_the_loss_as_published_in_torch(classes, factor):
    """On 10 classes the mean over batch and classes, on 100 ten times it: one tenth of the batch mean either way."""
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
    student = {view: GENERATOR.normal(scale=2, size=(BATCH, classes)) for view in ("adversarial", "clean")}
    teacher = GENERATOR.normal(scale=2, size=(BATCH, classes))
    target = torch.softmax(torch.tensor(teacher), dim=1)

    def published(view, inside_logarithm):
        log_student = torch.log_softmax(torch.tensor(student[view]), dim=1)
        return factor * torch.mean(target * torch.log(target + inside_logarithm) - target * log_student).item()

    with jax.enable_x64(True):
        loss, _ = method("rslad").loss(
            jax.tree.map(jnp.asarray, student), {"clean": jnp.asarray(teacher)}, LABELS, jnp.asarray(0.5))
        ours = float(jnp.mean(loss))
    exact, shifted = (
        5 / 6 * published("adversarial", inside) + 1 / 6 * published("clean", inside) for inside in (0.0, 1e-5))
    np.testing.assert_allclose(ours, exact, rtol=1e-10)
    np.testing.assert_allclose(ours, shifted, rtol=2e-3)  # what the published 1e-5 inside the logarithm amounts to


@each_base
def test_igdm_is_added_to_any_base(base):
    loss, terms = loss_of(method(base, igdm=7.0))
    alone, alone_terms = loss_of(method(base))
    igdm = distillation.igdm(
        STUDENT["adversarial"], STUDENT["mirrored"], TEACHER["adversarial"], TEACHER["mirrored"])
    np.testing.assert_array_equal(terms["igdm"], igdm)
    np.testing.assert_allclose(loss, alone + 0.5 * 7.0 * igdm, rtol=1e-5)
    assert set(terms) == set(alone_terms) | {"igdm"}


@each_base
def test_igdm_costs_the_student_one_more_forward(base):
    plain, more = method(base), method(base, igdm=1.0)
    assert set(names(more.student_views)) - set(names(plain.student_views)) == {"mirrored"}
    assert len(set(names(more.student_views))) == len(more.student_views)  # each once


@pytest.mark.parametrize("name, student, teacher", [
    ("pgd_at", ["adversarial"], []),
    ("ard", ["adversarial"], ["clean"]),
    ("rslad", ["adversarial", "clean"], ["clean"]),
    ("pgd_at+igdm", ["adversarial", "mirrored"], ["adversarial", "mirrored"]),
    ("ard+igdm", ["adversarial", "mirrored"], ["adversarial", "clean", "mirrored"]),
    ("rslad+igdm", ["adversarial", "clean", "mirrored"], ["adversarial", "clean", "mirrored"]),
])
def test_views_come_in_declared_order_and_only_where_read(name, student, teacher):
    chosen = method(name)
    assert chosen.name == name
    assert names(chosen.student_views) == student
    assert names(chosen.teacher_views) == teacher
    assert chosen.needs_teacher == bool(teacher)


def test_the_views_are_what_their_names_say():
    clean, adversarial = jnp.full((1, 2, 2, 1), 0.1), jnp.full((1, 2, 2, 1), 0.4)
    known = {"clean": clean, "adversarial": adversarial}
    assert (CLEAN.points(known) == clean).all() and (ADVERSARIAL.points(known) == adversarial).all()
    # x - d, which may leave [0, 1].
    np.testing.assert_allclose(MIRRORED.points(known), -0.2, rtol=1e-6)


@pytest.mark.parametrize("moves", [True, False])
def test_whether_the_mirrored_view_moves_the_statistics_is_asked_for(moves):
    chosen = method("rslad+igdm", mirrored_statistics=moves)
    assert {view.name: view.updates_statistics for view in chosen.student_views} == {
        "adversarial": True, "clean": True, "mirrored": moves}
    assert not method("rslad+igdm").student_views[-1].updates_statistics


def test_linear_ramp_is_the_share_of_training_done():
    chosen = method("ard", igdm=20.0)
    base, igdm = loss_of(method("ard"))[0], loss_of(chosen)[1]["igdm"]
    for progress in (0.005, 0.25, 1.0):
        loss, _ = loss_of(chosen, jnp.float32(progress))
        np.testing.assert_allclose(loss - base, 20 * progress * igdm, rtol=1e-4, atol=1e-4)


def test_constant_ramp_is_the_same_throughout_and_ends_where_the_linear_one_does():
    constant, linear = method("ard", igdm=20.0, igdm_ramp="constant"), method("ard", igdm=20.0)
    first, last = (loss_of(constant, jnp.float32(progress))[0] for progress in (0.01, 1.0))
    np.testing.assert_array_equal(first, last)
    np.testing.assert_array_equal(last, loss_of(linear, jnp.float32(1.0))[0])
    assert (loss_of(linear, jnp.float32(0.01))[0] < first).all()


@each_base
def test_weight_zero_is_the_base(base):
    chosen = method(f"{base}+igdm", igdm=0)
    assert chosen.name == base
    assert names(chosen.student_views) == names(method(base).student_views)
    np.testing.assert_array_equal(loss_of(chosen)[0], loss_of(method(base))[0])


def test_weight_defaults_to_ten_where_the_name_asks_for_igdm():
    np.testing.assert_array_equal(loss_of(method("ard+igdm"))[0], loss_of(method("ard", igdm=10.0))[0])
    assert method("ard", igdm=3.0).name == "ard+igdm"


@pytest.mark.parametrize("call, mentions", [
    (lambda: method("rslda"), ["method.name", '"rslda"', 'did you mean "rslad"?', "pgd_at"]),
    (lambda: method("adversarial"), ["method.name", '"adversarial"', "known: "]),
    (lambda: method("rslad+igmd"), ["method.name", '"rslad+igmd"', '"+igdm"']),
    (lambda: method("rslad+igdm+igdm"), ["method.name", '"+igdm"']),
    (lambda: method("rslad", igdm=-1.0), ["method.igdm", "-1", "0 or above"]),
    (lambda: method("rslad", igdm=float("nan")), ["method.igdm", "nan", "0 or above"]),
    (lambda: method("rslad", igdm=float("inf")), ["method.igdm", "inf", "0 or above"]),
    (lambda: method("rslad", igdm=1.0, igdm_ramp="linaer"), ["method.igdm_ramp", '"linaer"', 'did you mean "linear"?']),
])
def test_bad_names_weights_and_ramps(call, mentions):
    assert_input_error(call, *mentions)


def term(name="sum", view="adversarial"):
    return Term(name, lambda student, teacher, labels: jnp.sum(student[view], axis=1), student=(view,))


@pytest.mark.parametrize("undeclared", ["student", "teacher"])
def test_a_term_may_read_declared_views_only(undeclared):
    reads = {"student": ("adversarial",), "teacher": ()} | {undeclared: ("path/3",)}
    bad = dataclasses.replace(term(), **reads)
    assert_input_error(
        lambda: Method("mine", method("ard").attack, (CLEAN, ADVERSARIAL), (bad,)), '"sum"', '"mine"', '"path/3"',
        "adversarial, clean")


def test_two_terms_or_views_of_one_name_are_refused():
    """Terms are kept by name: of two alike, one would count twice and the other not at all."""
    attack = method("ard").attack
    terms = (term("a"), term("b"), term("a"))
    assert_input_error(lambda: Method("mine", attack, (ADVERSARIAL,), terms), '"mine"', "2 terms", '"a"')
    views = (CLEAN, ADVERSARIAL, View("clean", lambda known: known["adversarial"]))
    assert_input_error(lambda: Method("mine", attack, views, (term(),)), '"mine"', "2 views", '"clean"')
    assert_input_error(lambda: with_igdm(method("ard+igdm"), 2.0), '"ard+igdm+igdm"')


def test_a_method_is_its_weighted_terms():
    terms = (term("a"), dataclasses.replace(term("b", "clean"), weight=-2.0, ramp=lambda progress: progress**2))
    loss, by_name = loss_of(Method("mine", method("ard").attack, (ADVERSARIAL, CLEAN), terms))
    sums = {view: jnp.sum(STUDENT[view], axis=1) for view in VIEWS}
    np.testing.assert_array_equal(by_name["b"], sums["clean"])
    np.testing.assert_allclose(loss, sums["adversarial"] - 2 * 0.25 * sums["clean"], rtol=1e-5)


IMAGES = jnp.asarray(GENERATOR.uniform(size=(BATCH, 3, 3, 1)), jnp.float32)
WEIGHTS = {model: jnp.asarray(GENERATOR.normal(size=(9, CLASSES)), jnp.float32) for model in ("student", "teacher")}


def network(model):
    return lambda images: jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS[model]) * 3


@each_base
def test_the_attack_climbs_its_objective_inside_the_threat_model(base):
    chosen, inner = method(base), InnerMaximisation(ThreatModel("linf", 0.1), step_size=0.03, steps=5)
    student, teacher_clean = network("student"), network("teacher")(IMAGES)
    context = Context(IMAGES, LABELS, student, network("teacher"), teacher_clean if chosen.attack.teacher_on_clean else None)
    generated = chosen.attack.generate(jax.random.key(0), context, inner)
    assert list(generated) == ["adversarial"]
    points = generated["adversarial"]
    assert inner.threat.distance(IMAGES, points).max() <= 0.1 + 1e-6 and 0 <= points.min() and points.max() <= 1

    objectives_of = {
        "cross-entropy": lambda x: objectives.cross_entropy(student(x), LABELS),
        "to T(x)": lambda x: objectives.kl_divergence(network("teacher")(IMAGES), student(x)),
        "to T(x')": lambda x: objectives.kl_divergence(network("teacher")(x), student(x)),
        "to S(x)": lambda x: objectives.kl_divergence(student(IMAGES), student(x))}
    own = {"trades": "to S(x)", "rslad": "to T(x)", "adaad": "to T(x')", "adaiad": "to T(x')", "dgad": "to T(x')"}
    raised = {name: jnp.mean(objective(points) - objective(IMAGES)) for name, objective in objectives_of.items()}
    assert raised[own.get(base, "cross-entropy")] > 0.1


def test_rslad_asks_for_the_teacher_on_clean_and_the_adaptive_ones_for_its_gradient():
    assert method("rslad").attack.teacher_on_clean and method("rslad").attack.teacher
    for base in sorted({*BASES} - {"rslad"}):
        attack = method(base).attack
        assert not attack.teacher_on_clean
        assert attack.teacher == attack.teacher_gradient == (base in ("adaad", "adaiad", "dgad"))


def test_an_attack_with_a_teacher_makes_the_method_need_one():
    alone = (term(),)
    assert Method("mine", method("rslad").attack, (CLEAN, ADVERSARIAL), alone).needs_teacher
    assert not Method("mine", method("ard").attack, (CLEAN, ADVERSARIAL), alone).needs_teacher
