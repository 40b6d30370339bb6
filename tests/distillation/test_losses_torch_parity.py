"""Every method's loss and gradient, written once more with torch.nn.functional from the papers and their published code.

Both sides compute in float64 and agree to rounding, so that no term, factor or path of a gradient can hide in a tolerance.
In float32 they agree to 1e-5 of the loss. The constants that published code adds inside logarithms (RSLAD 1e-5, MART 1e-12
and 1e-7) are left out on both sides; what they amount to is tested by itself, at the end.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import distillation

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
F = torch.nn.functional

BATCH = 32
SHORT = {"path_points": 3}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
each_size = pytest.mark.parametrize("classes", [10, 100])  # CIFAR-10's and CIFAR-100's


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of this size are not worth a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The methods, one function each: (student logits by view, teacher logits by view, labels, progress, options) -> scalar.


def kl(target, logits, reduction="batchmean", temperature=1.0):
    """KL(target || logits) by PyTorch; "rows" is one number per example."""
    log_student, target = F.log_softmax(logits / temperature, dim=1), F.softmax(target / temperature, dim=1)
    if reduction == "rows":
        return F.kl_div(log_student, target, reduction="none").sum(dim=1)
    return F.kl_div(log_student, target, reduction=reduction)


def pgd_at(student, teacher, labels, progress):
    return F.cross_entropy(student["adversarial"], labels)


def trades(student, teacher, labels, progress, beta=6.0, detach=False):
    target = student["clean"].detach() if detach else student["clean"]
    return F.cross_entropy(student["clean"], labels) + beta * kl(target, student["adversarial"])


def mart(student, teacher, labels, progress, beta=5.0, tiny=0.0, one=1.0):
    """The published code has tiny = 1e-12 and one = 1.0000001."""
    adversarial, clean = F.softmax(student["adversarial"], dim=1), F.softmax(student["clean"], dim=1)
    first, second = adversarial.argsort(dim=1)[:, -1], adversarial.argsort(dim=1)[:, -2]
    best_other = torch.where(first == labels, second, first)
    boosted = F.cross_entropy(student["adversarial"], labels) + F.nll_loss(
        torch.log(1.0001 - adversarial + tiny), best_other)
    log_student = torch.log(adversarial + tiny) if tiny else F.log_softmax(student["adversarial"], dim=1)
    divergences = F.kl_div(log_student, clean, reduction="none").sum(dim=1)
    true = clean.gather(1, labels[:, None]).squeeze(1)
    return boosted + beta * torch.sum(divergences * (one - true)) / len(labels)


def ard(student, teacher, labels, progress, temperature=1.0, alpha=1.0, reduction="batchmean"):
    from_teacher = kl(teacher["clean"], student["adversarial"], reduction, temperature)
    return alpha * temperature**2 * from_teacher + (1 - alpha) * F.cross_entropy(student["clean"], labels)


def iad(
    student, teacher, labels, progress, temperature=1.0, alpha=1.0, beta=0.1, warmup=60 / 200, weighting="self",
    target="clean",
):
    """Weights per example; a step of the warm-up trusts the teacher everywhere."""
    reliability = torch.ones(len(labels), dtype=torch.float64)
    if progress > warmup:
        for index, guide in enumerate(F.softmax(teacher["adversarial"], dim=1)):
            reliability[index] = guide[labels[index]].pow(beta).item()
    from_teacher = temperature**2 * kl(teacher[target], student["adversarial"], "rows", temperature)
    if weighting == "both":
        from_teacher = from_teacher * reliability
    from_itself = kl(student["clean"], student["adversarial"], "rows") * (1 - reliability)
    return (alpha * torch.sum(from_teacher + from_itself) / len(labels)
            + (1 - alpha) * F.cross_entropy(student["clean"], labels))


def akd(student, teacher, labels, progress, weight=0.5, target="adversarial"):
    hard = F.cross_entropy(student["adversarial"], labels)
    return (1 - weight) * hard + weight * kl(teacher[target], student["adversarial"])


def rslad(student, teacher, labels, progress, scale=0.1, inside=0.0):
    """A mean over batch and classes, ten times it on CIFAR-100; the published code has inside = 1e-5."""
    target = F.softmax(teacher["clean"], dim=1)
    times = {10: 1, 100: 10}[target.shape[1]]

    def k(view):
        log_student = F.log_softmax(student[view], dim=1)
        return times * torch.mean(-log_student * target + torch.log(target + inside) * target)

    return scale / 0.1 * (5 / 6 * k("adversarial") + 1 / 6 * k("clean"))


def adaad(student, teacher, labels, progress, weight=1.0, reduction="batchmean"):
    return (weight * kl(teacher["adversarial"], student["adversarial"], reduction)
            + (1 - weight) * kl(teacher["clean"], student["clean"], reduction))


adaiad = functools.partial(iad, target="adversarial")


def dgad(
    student, teacher, labels, progress, beta=1.0, consistency="mse", correction="swap", attack="adaad", scale=1.0,
    product=False,
):
    """The batch parted by the teacher's mistakes on the clean images, each part's mean weighed by its share."""
    classes, everyone = teacher["clean"].shape[1], torch.arange(len(labels))
    one_hot = F.one_hot(labels, classes).double()

    def corrected(logits):
        """The target's probabilities."""
        true = logits[everyone, labels]
        best, best_class = logits.scatter(1, labels[:, None], -math.inf).max(dim=1)
        wrong = true - best < 0
        if correction == "swap":
            logits = logits.clone()
            logits[everyone[wrong], labels[wrong]] = best[wrong]
            logits[everyone[wrong], best_class[wrong]] = true[wrong]
        probabilities = F.softmax(logits, dim=1)
        if correction == "smooth":
            probabilities[wrong] = 0.9 * one_hot[wrong] + 0.1 / classes
        if correction == "mix":
            probabilities[wrong] = (probabilities[wrong] + one_hot[wrong]) / 2
        return probabilities

    def divergences(view, target):
        return F.kl_div(F.log_softmax(student[view], dim=1), corrected(teacher[target]), reduction="none").sum(dim=1)

    standard = (teacher["clean"].argmax(dim=1) != labels).double()
    count, size = standard.sum().item(), len(labels)
    on_clean = torch.sum(standard * divergences("clean", "clean")) / (count + 1e-10)
    target = {"adaad": "adversarial", "rslad": "clean"}[attack]
    on_adversarial = torch.sum((1 - standard) * divergences("adversarial", target)) / (size - count)
    if product:
        distillation = scale * (count / size * on_clean + (size - count) / size) * on_adversarial
    else:
        distillation = scale * (count / size * on_clean + (size - count) / size * on_adversarial)
    adversarial, clean = F.softmax(student["adversarial"], dim=1), F.softmax(student["clean"], dim=1)
    regulariser = F.mse_loss(adversarial, clean) if consistency == "mse" else (adversarial - clean).norm(dim=1).mean()
    return distillation + beta * regulariser


def path(
    student, teacher, labels, progress, alpha=1.0, gamma=1.0, points=10, weights="drop", weight_model="student",
    normalisation="per_sample", floor=0.0, scale=1.0, align_target="teacher_clean", align_distance="kl",
    dual_batch_norm=True, natural="anchor", hinge=0.0, negatives="data", negative_labels=None,
):
    """Point by point along the two branches."""
    everyone = torch.arange(len(labels))

    def distance(target, probabilities):
        """Of two batches of probabilities, per example."""
        if align_distance == "kl":
            return F.kl_div(probabilities.log(), target, reduction="none").sum(dim=1)
        if align_distance == "js":
            middle = ((target + probabilities) / 2).log()
            return sum(F.kl_div(middle, each, reduction="none").sum(dim=1) for each in (target, probabilities)) / 2
        if align_distance == "squared_error":
            return F.mse_loss(probabilities, target, reduction="none").sum(dim=1)
        return (probabilities - target).norm(dim=1)

    def true_class(logits, labels):
        return F.softmax(logits, dim=1)[everyone, labels]

    def margin(logits, labels):
        return logits.scatter(1, labels[:, None], -math.inf).max(dim=1).values - logits[everyone, labels]

    def branch(names, start, origin, labels):
        looked_at, look_start = (student, student[start]) if weight_model == "student" else (teacher, teacher[origin])
        targets = [teacher[origin if align_target == "teacher_clean" else name] for name in names]
        w = []
        for number, (name, target) in enumerate(zip(names, targets), start=1):
            if weights == "drop":
                drop = (true_class(look_start, labels) - true_class(looked_at[name], labels)).clamp(min=0)
                w.append(drop / drop.max())
            else:
                w.append({
                    "uniform": lambda: torch.ones(len(labels)),
                    "linear": lambda: torch.full((len(labels),), number / len(names), dtype=torch.float64),
                    "last_only": lambda: torch.full((len(labels),), float(number == len(names))),
                    "boundary": lambda: torch.exp(-margin(looked_at[name], labels).abs() / scale),
                    "gap": lambda: torch.exp(kl(target, student[name], "rows") / scale),
                }[weights]())
        w = torch.stack(w).double().detach()
        if weights == "gap":
            w = w / w.sum(dim=0)
        w = w.clamp(min=floor)
        losses = torch.stack([
            distance(F.softmax(target, dim=1), F.softmax(student[name], dim=1)) for name, target in zip(names, targets)])
        weighted = {
            "per_sample": lambda: ((w * losses).sum(dim=0) / (w.sum(dim=0) + 1e-8)).mean(),
            "batch": lambda: (w * losses).sum() / (w.sum() + 1e-8 * len(labels)),
            "none": lambda: (w * losses).mean(),
        }[normalisation]()
        if not hinge:
            return weighted
        classes = teacher["clean"].shape[1]
        one_hot = torch.eye(classes, dtype=torch.float64)[:1]
        smoothed = (1 - hinge) * one_hot + hinge / (classes - 1) * (1 - one_hot)
        return F.relu(weighted - distance(one_hot, smoothed))[0]

    untargeted = [f"path/{number}" for number in range(1, points)] + ["adversarial"]
    total = alpha * branch(untargeted, "clean", "clean", labels)
    second, origin, seconds = "clean/targeted" if dual_batch_norm else "clean", "clean", labels
    if negatives == "data":
        second, origin, seconds = "negative", "negative", negative_labels
    if gamma:
        targeted = [f"targeted/{number}" for number in range(1, points + 1)]
        total = total + alpha * gamma * branch(targeted, second, origin, seconds)
    total = total + (1 - alpha) * kl(teacher["clean"], student["clean"])
    if natural == "both":
        total = total + (1 - alpha) * kl(teacher[origin], student[second])
    return total


BASES = {
    "pgd_at": pgd_at, "trades": trades, "mart": mart, "ard": ard, "iad": iad, "akd": akd, "rslad": rslad, "adaad": adaad,
    "adaiad": adaiad, "dgad": dgad, "path": path}


# The modules, without weight and ramp.


def igdm(student, teacher, labels, distance="kl", direction="attack", beta=1.0, gamma=1.0, control="none"):
    plus = "adversarial" if beta == 1 and direction == "attack" else "plus"
    minus = "clean" if gamma == 0 or control == "trades" else "mirrored"
    own = student[plus] - student[minus]
    if control in ("mirror", "trades"):
        return kl(student[minus], student[plus])
    target = torch.zeros_like(own) if control == "zero" else teacher[plus] - teacher[minus]
    if distance == "kl":
        return kl(target, own)
    return (own - target).norm(p={"l1": 1, "l2": 2}[distance], dim=1).mean()


def jvp(student, teacher, labels):
    return kl(2 * teacher["jvp"], 2 * student["jvp"])


def direct(student, teacher, labels, scalar="probability", distance="l2", at="clean"):
    own, target = student["input_gradient"].flatten(1), teacher["input_gradient"].flatten(1)
    if distance == "cosine":
        return (1 - F.cosine_similarity(own, target, dim=1, eps=0.0)).mean()
    norms = (own - target).norm(dim=1)
    return (norms if distance == "l2" else norms**2).mean()


MODULES = {"igdm": igdm, "jvp": jvp, "direct": direct}

# What a preset changes in the functions above.
PRESETS = {
    "default": {},
    "paper": {"ard_temperature": 30.0, "ard_reduction": "mean", "iad_weighting": "both", "dgad_consistency": "l2"},
    "official": {"adaiad_temperature": 30.0},
}


def published(name, options, student, teacher, labels, progress, negative_labels=None):
    """The whole loss: base + sum of weight * ramp * module. Options are named as the library's: `trades_beta`."""
    base, *modules = name.split("+")
    options = PRESETS[options.get("preset", "default")] | options

    def own(prefix):
        """Not `igdm_ramp`, which is every module's, nor what is about views rather than the loss."""
        return {option.removeprefix(f"{prefix}_"): value for option, value in options.items()
                if option.startswith(f"{prefix}_") and option not in ("igdm_ramp", "path_batching", "path_statistics")}

    further = {"negative_labels": negative_labels} if base == "path" else {}
    loss = BASES[base](student, teacher, labels, progress, **own(base), **further)
    ramp = {"linear": progress, "constant": 1.0}[options.get("igdm_ramp", "linear")]
    for module in modules:
        loss = loss + options.get(module, 10.0) * ramp * MODULES[module](student, teacher, labels, **own(module))
    return loss


# Two sides of one batch.


class Batch:
    """Made-up labels and logits, by view: of scale 2 to 5, and every model right about some images and wrong about others.

    With `negatives` from the data, the targeted path is of images with other labels.
    """

    def __init__(self, classes, teacher_right=0.5, negatives="data"):
        self.classes, self.teacher_right, self.negatives = classes, teacher_right, negatives
        generator = np.random.default_rng(classes)
        self.labels = generator.integers(0, classes, BATCH)
        self.negative_labels = (self.labels + generator.integers(1, classes, BATCH)) % classes

    def output(self, model, view):
        generator = np.random.default_rng([self.classes, *f"{model} {view}".encode()])
        if view == "input_gradient":
            return generator.normal(scale=0.1, size=(BATCH, 4, 4, 3))
        scale = np.linspace(2, 5, BATCH)
        deviations = generator.normal(size=(BATCH, self.classes))
        share = 0.5 if model == "student" else self.teacher_right
        # The largest where the model is right, below the average where it is not.
        true = np.where(generator.uniform(size=BATCH) < share, 5, -1)
        negative = self.negatives == "data" and view.startswith(("negative", "targeted"))
        labels = self.negative_labels if negative else self.labels
        deviations[np.arange(BATCH), labels] = true + generator.uniform(-0.5, 0.5, BATCH)
        return scale[:, None] * deviations


class Tensors(dict):
    """A model's outputs in PyTorch, by view, made when they are asked for: the formulas alone decide which views they read."""

    def __init__(self, batch, model):
        super().__init__()
        self.batch, self.model = batch, model

    def __missing__(self, view):
        self[view] = torch.tensor(self.batch.output(self.model, view), requires_grad=self.model == "student")
        return self[view]


def theirs(name, options, batch, progress=0.5):
    """Loss and gradients by view, by PyTorch in float64."""
    student, teacher = Tensors(batch, "student"), Tensors(batch, "teacher")
    loss = published(
        name, options, student, teacher, torch.tensor(batch.labels), progress, torch.tensor(batch.negative_labels))
    return loss.item(), gradients_by_view(loss, student)


def gradients_by_view(loss, tensors):
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    return {view: gradient.numpy() for view, gradient in zip(tensors, gradients)}


def ours(name, options, batch, progress=0.5, dtype=np.float64):
    """Loss and gradients by view, from the views that the method asks for and no others."""
    with jax.enable_x64(dtype == np.float64):
        chosen = distillation.method(name, **options)
        student, teacher = (
            {view.name: jnp.asarray(batch.output(model, view.name), dtype) for view in views}
            for model, views in (("student", chosen.student_views), ("teacher", chosen.teacher_views)))

        def mean_loss(student):
            loss, _ = chosen.loss(
                student, teacher, jnp.asarray(batch.labels), jnp.asarray(progress, dtype), jnp.asarray(batch.negative_labels))
            assert loss.shape == (BATCH,) and loss.dtype == dtype
            return jnp.mean(loss)

        loss, gradients = jax.value_and_grad(mean_loss)(student)
        return float(loss), jax.tree.map(np.asarray, gradients)


def assert_same(own, expected, *, rtol, atol):
    """Asserts equal losses and gradients, `atol` being in units of the loss where that is above 1."""
    (loss, gradients), (expected_loss, expected_gradients) = own, expected
    atol *= max(1.0, abs(expected_loss))
    np.testing.assert_allclose(loss, expected_loss, rtol=rtol, atol=atol)
    for view in gradients | expected_gradients:
        np.testing.assert_allclose(
            # Per example, not per batch: the gradient of a mean over the batch is small by its size.
            BATCH * gradients.get(view, 0.0), BATCH * expected_gradients.get(view, 0.0), rtol=rtol, atol=atol,
            err_msg=f"gradient with respect to S({view})")


def cases(*table):
    """pytest parameters (name, options), with readable ids."""
    def identity(name, options):
        return "-".join([name, *(f"{option}={value}" for option, value in options.items())])

    return pytest.mark.parametrize("name, options", [pytest.param(*row, id=identity(*row)) for row in table])


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("preset", ["default", "paper", "official"])
@pytest.mark.parametrize("module", ["", "+igdm"])
@pytest.mark.parametrize("base", BASES)
def test_every_base_alone_and_with_igdm_in_every_preset(base, module, preset, classes):
    case = base + module, {"preset": preset, **(SHORT if base == "path" else {})}, Batch(classes)
    assert_same(ours(*case), theirs(*case), **EXACT)


@pytest.mark.parametrize("base, preset", [*((base, "default") for base in BASES), ("ard", "paper"), ("adaiad", "official")])
def test_in_single_precision(base, preset):
    """Of the path, unnormalised: where p(x)_y hardly drops, its default normalisation divides rounding by rounding."""
    options = SHORT | {"path_normalisation": "none"} if base == "path" else {}
    case = f"{base}+igdm", options | {"preset": preset}, Batch(100)
    assert_same(ours(*case, dtype=np.float32), theirs(*case), **SINGLE)


@each_size
@cases(
    ("trades", {"trades_beta": 2.0}),
    ("trades", {"trades_detach": True}),
    ("trades", {"trades_beta": 0.0}),
    ("mart", {"mart_beta": 6.0}),
    ("ard", {"ard_temperature": 30.0, "ard_alpha": 0.7, "ard_reduction": "mean"}),
    ("ard", {"ard_temperature": 4.0}),
    ("ard", {"ard_alpha": 0.0}),
    ("ard", {"ard_reduction": "mean"}),
    ("akd", {"akd_target": "clean"}),
    ("akd", {"akd_weight": 0.8}),
    ("akd", {"akd_weight": 1.0, "akd_target": "clean"}),
    ("rslad", {"rslad_scale": 1.0}),
    ("adaad", {"adaad_weight": 0.25}),
    ("adaad", {"adaad_reduction": "mean"}),
    ("adaad", {"adaad_weight": 0.75, "adaad_reduction": "mean"}),
    ("adaad", {"adaad_weight": 0.0}),
    ("dgad", {"dgad_beta": 20.0}),
    ("dgad", {"dgad_beta": 20.0, "dgad_consistency": "l2"}),
    ("dgad", {"dgad_beta": 0.0}),
    ("dgad", {"dgad_correction": "smooth"}),
    ("dgad", {"dgad_correction": "mix"}),
    ("dgad", {"dgad_correction": "none"}),
    ("dgad", {"dgad_attack": "rslad"}),
    ("dgad", {"dgad_attack": "rslad", "dgad_correction": "mix"}),
    ("dgad", {"dgad_scale": 0.5}),
    ("dgad", {"dgad_scale": 0.5, "dgad_product": True}),
    ("dgad", {"dgad_product": True, "dgad_attack": "rslad", "dgad_correction": "none"}),
    ("ard+igdm", {"igdm_distance": "l1"}),
    ("ard+igdm", {"igdm_distance": "l2", "igdm": 3.0}),
    ("ard+igdm", {"igdm_ramp": "constant"}),
    ("ard+igdm", {"igdm_gamma": 0.0}),
    ("ard+igdm", {"igdm_gamma": 0.0, "igdm_distance": "l2"}),
    ("ard+igdm", {"igdm_beta": 0.5}),
    ("ard+igdm", {"igdm_beta": 2.0, "igdm_gamma": 0.5, "igdm_distance": "l1"}),
    ("ard+igdm", {"igdm_direction": "random"}),
    ("ard+igdm", {"igdm_control": "zero"}),
    ("ard+igdm", {"igdm_control": "mirror"}),
    ("ard+igdm", {"igdm_control": "trades"}),
    ("pgd_at+igdm", {"igdm_control": "zero"}),
    ("pgd_at+igdm", {"igdm_control": "zero", "igdm_distance": "l1"}),
    ("dgad+igdm", {"igdm": 70.0, "dgad_attack": "rslad"}),
    ("ard+jvp", {}),
    ("rslad+jvp", {"jvp": 3.0, "igdm_ramp": "constant"}),
    ("ard+direct", {}),
    ("ard+direct", {"direct_distance": "squared_l2", "direct": 1000.0}),
    ("ard+direct", {"direct_distance": "cosine", "igdm_ramp": "constant"}),
    ("adaad+igdm+jvp+direct", {"igdm": 5.0, "jvp": 7.0, "direct": 11.0}),
)
def test_options(name, options, classes):
    batch = Batch(classes)
    assert_same(ours(name, options, batch), theirs(name, options, batch), **EXACT)


@each_size
@pytest.mark.parametrize("progress", [0.29, 0.31], ids=["warm-up", "after"])
@pytest.mark.parametrize("weighting", ["self", "both"])
@pytest.mark.parametrize("options", [
    {}, {"temperature": 30.0}, {"temperature": 4.0, "alpha": 0.6, "beta": 0.5}, {"warmup": 0.0, "beta": 0.0}])
@pytest.mark.parametrize("name", ["iad", "adaiad"])
def test_introspection(name, options, weighting, progress, classes):
    options = {f"{name}_{option}": value for option, value in (options | {"weighting": weighting}).items()}
    batch = Batch(classes)
    assert_same(ours(name, options, batch, progress), theirs(name, options, batch, progress), **EXACT)


@cases(
    ("path", {}),
    ("path", SHORT | {"path_gamma": 0.0}),
    ("path", SHORT | {"path_gamma": 0.4, "path_dual_batch_norm": False}),
    ("path", SHORT | {"path_alpha": 0.7}),
    ("path", SHORT | {"path_alpha": 0.7, "path_natural": "both", "path_gamma": 0.4}),
    ("path", SHORT | {"path_alpha": 0.7, "path_natural": "both", "path_dual_batch_norm": False}),
    *(("path", SHORT | {"path_weights": scheme, "path_normalisation": normalisation})
      for scheme in ("drop", "uniform", "linear", "last_only", "boundary", "gap")
      for normalisation in ("per_sample", "batch", "none")),
    *(("path", SHORT | {"path_weights": scheme, "path_scale": 4.0}) for scheme in ("boundary", "gap")),
    *(("path", SHORT | {"path_weights": scheme, "path_weight_model": "teacher"}) for scheme in ("drop", "boundary")),
    *(("path", SHORT | {"path_weights": scheme, "path_floor": 0.2, "path_normalisation": "none"})
      for scheme in ("drop", "linear", "boundary", "gap")),
    *(("path", SHORT | {"path_align_distance": distance, "path_align_target": target})
      for distance in ("kl", "squared_error", "js", "l2") for target in ("teacher_clean", "teacher_at_point")),
    *(("path", SHORT | {"path_weights": scheme, "path_align_target": "teacher_at_point"})
      for scheme in ("last_only", "gap", "boundary")),
    ("path", SHORT | {"path_weights": "drop", "path_weight_model": "teacher", "path_align_target": "teacher_at_point"}),
    ("path", SHORT | {"path_batching": "separate", "path_statistics": True}),
    ("path+igdm", SHORT | {"igdm_gamma": 0.0}),
)
@pytest.mark.parametrize("negatives", ["data", "batch"])
def test_path(name, options, negatives):
    """At one size: of the formulas of the path, only the hinge depends on the number of classes."""
    batch, options = Batch(10, negatives=negatives), options | {"path_negatives": negatives}
    assert_same(ours(name, options, batch), theirs(name, options, batch), **EXACT)


@pytest.mark.parametrize("distance, classes", [
    ("kl", 10), ("squared_error", 10), ("js", 10), ("l2", 10), ("squared_error", 100), ("js", 100)])
def test_the_hinge_counts_what_exceeds_its_bound(distance, classes):
    options = SHORT | {"path_hinge": 0.3, "path_align_distance": distance, "path_weights": "uniform"}
    far, near = Batch(classes), Batch(classes)
    near.output = lambda model, view: (
        far.output("teacher", "negative" if view.startswith(("negative", "targeted")) else "clean")
        + 0.03 * (model == "student") * far.output(model, view))
    assert_same(ours("path", options, far), theirs("path", options, far), **EXACT)
    loss, gradients = ours("path", options, near)
    assert_same((loss, gradients), theirs("path", options, near), **EXACT)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    assert ours("path", options | {"path_hinge": 0.0}, near)[0] > 0


def test_path_on_its_last_point_is_rslad():
    """Its 1e-8 against division by 0 apart."""
    batch = Batch(10)
    own = ours("path", {
        "path_weights": "last_only", "path_gamma": 0.0, "path_alpha": 5 / 6, "path_inner_loss": "teacher_clean"}, batch)
    assert_same(own, theirs("rslad", {"rslad_scale": 1.0}, batch), rtol=1e-7, atol=1e-9)


@each_size
def test_the_batches_hold_what_the_formulas_tell_apart(classes):
    """The teacher is right and wrong on either view; the true class's probability falls and rises along the path."""
    batch = Batch(classes)
    right = {view: batch.output("teacher", view).argmax(1) == batch.labels for view in ("clean", "adversarial")}
    combinations = set(zip(right["clean"].tolist(), right["adversarial"].tolist()))
    assert combinations == {(True, True), (True, False), (False, True), (False, False)}
    start, point = (torch.softmax(torch.tensor(batch.output("student", view)), 1)[torch.arange(BATCH), batch.labels]
                    for view in ("clean", "path/1"))
    assert (start > point + 0.5).any() and (start < point - 0.5).any()
    assert all(np.abs(batch.output(model, "clean")).max() > 5 for model in ("student", "teacher"))


@each_size
@pytest.mark.parametrize("options", [
    {}, {"dgad_attack": "rslad"}, {"dgad_correction": "mix"}, {"dgad_consistency": "l2"}, {"dgad_product": True}])
def test_dgad_with_a_teacher_that_is_right_or_wrong_about_the_whole_batch(options, classes):
    """Where it is wrong about all, the published code divides by 0; what is left are the clean images' terms."""
    right, wrong = Batch(classes, teacher_right=1.0), Batch(classes, teacher_right=0.0)
    assert_same(ours("dgad", options, right), theirs("dgad", options, right), **EXACT)
    own = ours("dgad", options, wrong)
    assert np.isfinite(own[0]) and all(np.isfinite(gradient).all() for gradient in own[1].values())
    if not options.get("dgad_product"):
        student, teacher = Tensors(wrong, "student"), Tensors(wrong, "teacher")
        # One further image that is distilled adversarially, to no loss: the sums over the others remain.
        whole = {view: torch.cat([student[view], torch.zeros(1, classes)]) for view in ("clean", "adversarial")}
        asked = {view: torch.cat([teacher[view], torch.zeros(1, classes)]) for view in ("clean", "adversarial")}
        loss = dgad(whole, asked, torch.tensor([*wrong.labels, 0]), 0.5, **{
            option.removeprefix("dgad_"): value for option, value in options.items()}) * (BATCH + 1) / BATCH
        assert_same(own, (loss.item(), gradients_by_view(loss, student)), **EXACT)


# From images: the points of IGDM's views, and what the views of exact and direct matching read out.


def weights(model):
    generator = np.random.default_rng(list(model.encode()))
    return {"hidden": generator.normal(scale=0.5, size=(18, 12)), "output": generator.normal(size=(12, 10))}


def on_jax(weights):
    return lambda images: jnp.tanh(images.reshape(len(images), -1) @ weights["hidden"]) @ weights["output"]


def on_torch(weights):
    return lambda images: torch.tanh(images.flatten(1) @ weights["hidden"]) @ weights["output"]


def read_on_torch(network, clean, adversarial, labels, options):
    """Everything that the views of the modules hold, from images, differentiable in the weights."""
    delta = adversarial - clean

    def input_gradient():
        images = (adversarial if options.get("direct_at") == "adversarial" else clean).requires_grad_()
        logits, everyone = network(images), torch.arange(len(labels))
        scalar = {
            "probability": lambda: F.softmax(logits, dim=1)[everyone, labels].sum(),
            "logit": lambda: logits[everyone, labels].sum(),
            "cross_entropy": lambda: F.cross_entropy(logits, labels, reduction="sum"),
            "margin": lambda: (logits.masked_fill(F.one_hot(labels, 10).bool(), -torch.inf).amax(dim=1)
                               - logits[everyone, labels]).sum(),
        }[options.get("direct_scalar", "probability")]()
        return torch.autograd.grad(scalar, images, create_graph=True)[0]

    return {
        "clean": network(clean), "adversarial": network(adversarial), "input_gradient": input_gradient(),
        "plus": network(clean + options.get("igdm_beta", 1.0) * delta),
        "mirrored": network(clean - options.get("igdm_gamma", 1.0) * delta),
        "jvp": torch.autograd.functional.jvp(network, clean, delta, create_graph=True)[1],
    }


@cases(
    ("ard+igdm", {}),
    ("ard+igdm", {"igdm_beta": 0.5, "igdm_gamma": 2.0}),
    ("ard+igdm", {"igdm_gamma": 0.0, "igdm_distance": "l2"}),
    ("ard+igdm", {"igdm_control": "mirror", "igdm_gamma": 0.3}),
    ("ard+jvp", {}),
    *(("ard+direct", {"direct_scalar": scalar}) for scalar in ("probability", "logit", "cross_entropy", "margin")),
    ("ard+direct", {"direct_distance": "squared_l2"}),
    ("ard+direct", {"direct_distance": "cosine", "direct_scalar": "logit"}),
    ("ard+direct", {"direct_at": "adversarial"}),
)
def test_modules_from_images_to_the_gradient_of_the_weights(name, options):
    """Where the views lie and what they read out, with PyTorch's double backprop for the gradient of an input gradient."""
    generator = np.random.default_rng(0)
    clean, labels = generator.uniform(size=(BATCH, 3, 3, 2)), generator.integers(0, 10, BATCH)
    adversarial = clean + generator.uniform(-0.3, 0.3, size=clean.shape)

    tensors = {model: {layer: torch.tensor(value, requires_grad=True) for layer, value in weights(model).items()}
               for model in ("student", "teacher")}
    student, teacher = (
        read_on_torch(on_torch(tensors[model]), torch.tensor(clean), torch.tensor(adversarial), torch.tensor(labels), options)
        for model in ("student", "teacher"))
    teacher = {view: value.detach() for view, value in teacher.items()}
    loss = published(name, options, student, teacher, torch.tensor(labels), 0.5)
    expected = loss.item(), gradients_by_view(loss, tensors["student"])

    with jax.enable_x64(True):
        chosen = distillation.method(name, **options)
        known = {"clean": jnp.asarray(clean), "adversarial": jnp.asarray(adversarial)}

        def read(network, views):
            return {view.name: view.readout(network, view.points(known), known, jnp.asarray(labels))
                    if view.readout else network(view.points(known)) for view in views}

        def mean_loss(params):
            return jnp.mean(chosen.loss(
                read(on_jax(params), chosen.student_views), read(on_jax(weights("teacher")), chosen.teacher_views),
                jnp.asarray(labels), jnp.asarray(0.5))[0])

        loss, gradients = jax.value_and_grad(mean_loss)(jax.tree.map(jnp.asarray, weights("student")))
        assert_same((float(loss), jax.tree.map(np.asarray, gradients)), expected, **EXACT)


# What published code adds inside logarithms, and the tolerance that it forces.


@pytest.mark.parametrize("classes, bound", [(10, 1e-5), (100, 1e-4)])
def test_the_constant_in_the_logarithm_of_rslad_shifts_the_loss_by_its_size(classes, bound):
    """b log(b + 1e-5) is above b log b by 1e-5 at most, a constant to the student: times ten on CIFAR-100."""
    batch = Batch(classes)
    student, teacher = Tensors(batch, "student"), Tensors(batch, "teacher")
    shifted = rslad(student, teacher, torch.tensor(batch.labels), 0.5, inside=1e-5)
    expected = gradients_by_view(shifted, student)
    loss, gradients = ours("rslad", {}, batch)
    assert 0.1 * bound < shifted.item() - loss <= bound
    assert_same((loss, gradients), (loss, expected), **EXACT)


@each_size
def test_the_constants_in_mart_change_the_loss_by_a_millionth(classes):
    """Relative: 1e-7 through the weight 1.0000001 - p, the 1e-12 only where a probability is about as small."""
    batch, mild = Batch(classes), Batch(classes)
    mild.output = lambda model, view: 0.4 * batch.output(model, view)  # no probability below 1e-8
    student = Tensors(mild, "student")
    loss = mart(student, {}, torch.tensor(batch.labels), 0.5, tiny=1e-12, one=1.0000001)
    own = ours("mart", {}, mild)
    assert own[0] != loss.item()
    assert_same(own, (loss.item(), gradients_by_view(loss, student)), rtol=1e-6, atol=1e-6)
