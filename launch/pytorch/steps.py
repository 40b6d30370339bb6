"""One train step of each method in plain PyTorch, as published code does it: eager, one forward after another.

The losses are those of `jaxrd.distillation` with default options. Which views student and teacher are forwarded on, and how
often, is a table per flavour: "least", what the losses need, and "published", what published code forwards.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from launch.pytorch.jobs import ATTACKS, FLAVOURS, Job

Logits = dict[str, Tensor]  # by view; a second forward of a view is "adversarial#2"


class Forwards(NamedTuple):
    """The forwards of a step besides those on the attack's points.

    Attributes:
      student: views of the student in train mode, in the order in which they move the running statistics. "mirrored" moves
        them in published code only.
      teacher: views of the teacher; "clean" comes before the attack where that needs it.
      clean_each_step: the attack that climbs KL(S(x) || S(x')) computes S(x) anew in each step.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    clean_each_step: bool = False


CLEAN, ADVERSARIAL, MIRRORED = "clean", "adversarial", "mirrored"  # x, x + d, x - d
_LEAST = {
    "pgd_at": Forwards((ADVERSARIAL,)),
    "trades": Forwards((CLEAN, ADVERSARIAL)),
    "ard": Forwards((ADVERSARIAL,), (CLEAN,)),
    "rslad": Forwards((ADVERSARIAL, CLEAN), (CLEAN,)),
    "adaad": Forwards((ADVERSARIAL,), (ADVERSARIAL,)),
    "dgad": Forwards((CLEAN, ADVERSARIAL), (CLEAN, ADVERSARIAL)),
}
_PUBLISHED = _LEAST | {
    "trades": Forwards((CLEAN, ADVERSARIAL, "clean#2"), clean_each_step=True),
    "ard": Forwards((ADVERSARIAL, CLEAN), (CLEAN,)),
    "adaad": Forwards((CLEAN, ADVERSARIAL), (CLEAN, ADVERSARIAL)),
}


def _with_igdm(forwards: Forwards) -> Forwards:
    """IGDM on any base; no code of it is published but on the bases below."""
    teacher = (*forwards.teacher, *(view for view in (ADVERSARIAL, MIRRORED) if view not in forwards.teacher))
    return forwards._replace(student=(*forwards.student, MIRRORED), teacher=teacher)


# Flavour -> method -> its forwards.
FORWARDS = {
    flavour: table | {f"{base}+igdm": _with_igdm(forwards) for base, forwards in table.items()}
    for flavour, table in zip(FLAVOURS, (_LEAST, _PUBLISHED), strict=True)}
FORWARDS["published"] |= {
    "rslad+igdm": Forwards((ADVERSARIAL, "adversarial#2", CLEAN, MIRRORED), (CLEAN, ADVERSARIAL, "clean#2", MIRRORED)),
    "adaad+igdm": Forwards((ADVERSARIAL, CLEAN, MIRRORED, "adversarial#2"), (ADVERSARIAL, CLEAN, MIRRORED, "adversarial#2")),
}


class Network:
    """A module, and how it is run: as it is or compiled, in float32 or under autocast.

    Args:
      module: images -> logits, on the device of the images.
      bfloat16: run it under autocast; the logits are float32 all the same.
      compiled: run it through `torch.compile`.
    """

    def __init__(self, module: nn.Module, *, bfloat16: bool = False, compiled: bool = False):
        self.module, self._bfloat16 = module, bfloat16
        self._forward = torch.compile(module, dynamic=False) if compiled else module

    def __call__(self, images: Tensor) -> Tensor:
        if not self._bfloat16:
            return self._forward(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self._forward(images)
        return logits.float()

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    @contextlib.contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Train-mode forwards inside normalise by their batch and leave the running statistics alone."""
        layers = [module for module in self.module.modules() if isinstance(module, nn.BatchNorm2d)]
        for layer in layers:
            layer.track_running_stats = False
        try:
            yield
        finally:
            for layer in layers:
                layer.track_running_stats = True


def train_step(
    job: Job, student: Network, teacher: Network | None, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor,
    start: Tensor | None = None,
) -> Tensor:
    """Takes one step of the method, which changes the student and the optimiser, and returns the loss, a scalar.

    Args:
      job: method, budget of the attack, weight of IGDM and flavour.
      student: the network that is trained.
      teacher: the one that is not: in eval mode, its parameters without gradient; None for methods without one.
      optimizer: of the student's parameters.
      images: [batch, channels, height, width] in [0, 1].
      labels: [batch] int64.
      start: like images, where the attack starts, in place of a random start.
    """
    teacher_clean = None
    if ATTACKS[job.base][0] == "teacher_clean":
        with torch.no_grad():
            teacher_clean = teacher(images)
    adversarial = attack(job, student, teacher, images, labels, teacher_clean, start)
    return update(job, student, teacher, optimizer, images, adversarial, labels, teacher_clean)


def attack(
    job: Job, student: Network, teacher: Network | None, images: Tensor, labels: Tensor, teacher_clean: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Returns the adversarial images: sign steps and projection, the student in eval mode."""
    student.train(False)
    # A compiled backward pass gives the gradients of all that asks for one, not those alone that the attack takes.
    student.module.requires_grad_(False)
    objective = _objective(job, student, teacher, images, labels, teacher_clean)
    points = _start(job, images) if start is None else start
    for _ in range(job.attack_steps):
        points = points.detach().requires_grad_()
        gradient, = torch.autograd.grad(objective(points), points)
        points = project(job, images, points.detach() + job.step_size * gradient.sign())
    student.module.requires_grad_(True)
    student.train(True)
    return points


def update(
    job: Job, student: Network, teacher: Network | None, optimizer: torch.optim.Optimizer, images: Tensor, adversarial: Tensor,
    labels: Tensor, teacher_clean: Tensor | None = None,
) -> Tensor:
    """Takes the optimiser's step on the loss at given adversarial images, and returns that loss."""
    forwards = FORWARDS[job.flavour][job.method]
    views = {CLEAN: images, ADVERSARIAL: adversarial}
    if job.matches_gradients:
        views[MIRRORED] = 2 * images - adversarial
    with torch.no_grad():
        targets = {name: teacher_clean if name == CLEAN and teacher_clean is not None else teacher(views[_view(name)])
                   for name in forwards.teacher}
    outputs = {}
    for name in forwards.student:
        kept = name == MIRRORED and job.flavour == "least"
        with student.statistics_kept() if kept else contextlib.nullcontext():
            outputs[name] = student(views[_view(name)])
    loss = LOSSES[job.base](outputs, targets, labels)
    if job.matches_gradients:
        loss = loss + job.igdm * job.progress * igdm(outputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def project(job: Job, images: Tensor, points: Tensor) -> Tensor:
    """Returns the points pulled back into the ball around the images, then into [0, 1]."""
    return torch.clamp(torch.min(torch.max(points, images - job.epsilon), images + job.epsilon), 0.0, 1.0)


def divergence(target: Tensor, logits: Tensor, reduction: str = "batchmean") -> Tensor:
    """Returns KL(softmax(target) || softmax(logits)), summed over classes; the gradient flows into both."""
    return functional.kl_div(functional.log_softmax(logits, dim=1), functional.softmax(target, dim=1), reduction=reduction)


def swapped(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns logits with those of the true and the top class exchanged (DGAD, error-corrective label swapping)."""
    true, top = labels[:, None], logits.argmax(dim=1, keepdim=True)
    return logits.scatter(1, true, logits.gather(1, top)).scatter(1, top, logits.gather(1, true))


def igdm(student: Logits, teacher: Logits) -> Tensor:
    """KL(T(x + d) - T(x - d) || S(x + d) - S(x - d)), the differences as logits (Lee et al. 2025, eq. 8)."""
    def difference(logits):
        return _last(logits, ADVERSARIAL) - logits[MIRRORED]

    return divergence(difference(teacher), difference(student))


def _pgd_at(student: Logits, teacher: Logits, labels: Tensor) -> Tensor:
    return functional.cross_entropy(student[ADVERSARIAL], labels)


def _trades(student: Logits, teacher: Logits, labels: Tensor) -> Tensor:
    robust = divergence(_last(student, CLEAN), student[ADVERSARIAL])
    return functional.cross_entropy(student[CLEAN], labels) + 6.0 * robust


def _ard(student: Logits, teacher: Logits, labels: Tensor) -> Tensor:
    loss = divergence(teacher[CLEAN], student[ADVERSARIAL])
    if CLEAN in student:  # what published code weighs by 0 is differentiated all the same
        loss = loss + 0.0 * functional.cross_entropy(student[CLEAN], labels)
    return loss


def _rslad(student: Logits, teacher: Logits, labels: Tensor) -> Tensor:
    robust, natural = (divergence(teacher[CLEAN], student[view]) for view in (ADVERSARIAL, CLEAN))
    return 0.1 * (5 / 6 * robust + 1 / 6 * natural)


def _adaad(student: Logits, teacher: Logits, labels: Tensor) -> Tensor:
    loss = divergence(teacher[ADVERSARIAL], student[ADVERSARIAL])
    if CLEAN in student:  # likewise
        loss = loss + 0.0 * divergence(teacher[CLEAN], student[CLEAN])
    return loss


def _dgad(student: Logits, teacher: Logits, labels: Tensor) -> Tensor:
    wrong = teacher[CLEAN].argmax(dim=1) != labels
    natural, robust = (divergence(swapped(teacher[view], labels), student[view], "none").sum(dim=1)
                       for view in (CLEAN, ADVERSARIAL))
    probabilities = (functional.softmax(student[view], dim=1) for view in (ADVERSARIAL, CLEAN))
    return torch.where(wrong, natural, robust).mean() + functional.mse_loss(*probabilities)


# Base method -> its loss, a scalar.
LOSSES: dict[str, Callable[[Logits, Logits, Tensor], Tensor]] = {
    "pgd_at": _pgd_at, "trades": _trades, "ard": _ard, "rslad": _rslad, "adaad": _adaad, "dgad": _dgad}


def _objective(job, student, teacher, images, labels, teacher_clean) -> Callable[[Tensor], Tensor]:
    """Returns what the attack climbs: points -> scalar, a sum, so that the size of the batch is none of its matter."""
    kind = ATTACKS[job.base][0]
    if kind == "cross_entropy":
        return lambda points: functional.cross_entropy(student(points), labels, reduction="sum")
    if kind == "teacher_clean":
        return lambda points: divergence(teacher_clean, student(points), "sum")
    if kind == "teacher_moving":
        return lambda points: divergence(teacher(points), student(points), "sum")
    if FORWARDS[job.flavour][job.method].clean_each_step:
        return lambda points: divergence(student(images), student(points), "sum")
    with torch.no_grad():
        clean = student(images)
    return lambda points: divergence(clean, student(points), "sum")


def _start(job: Job, images: Tensor) -> Tensor:
    kind = job.start or ATTACKS[job.base][1]
    if kind == "none":
        return images
    if kind == "uniform":
        points = images + torch.empty_like(images).uniform_(-job.epsilon, job.epsilon)
    else:
        points = images + 0.001 * torch.randn_like(images)
    return project(job, images, points) if job.project_start else points


def _view(name: str) -> str:
    return name.partition("#")[0]


def _last(logits: Logits, view: str) -> Tensor:
    """The logits of a view's second forward where there was one."""
    return logits.get(f"{view}#2", logits[view])
