"""What parent and child share: what is to be timed, what there is to time, and how a turn ends.

Imports neither torch nor jax.
"""

import dataclasses
import difflib
import re
import time
from typing import NamedTuple

# Base method -> what its attack climbs, and the start that it has unless told otherwise.
ATTACKS = {
    "pgd_at": ("cross_entropy", "uniform"),
    "trades": ("own_clean", "gaussian"),
    "ard": ("cross_entropy", "uniform"),
    "rslad": ("teacher_clean", "gaussian"),
    "adaad": ("teacher_moving", "gaussian"),
    "dgad": ("teacher_moving", "gaussian"),
}
MODULE = "+igdm"
METHODS = (*ATTACKS, *(f"{base}{MODULE}" for base in ATTACKS))
STARTS = ("", "uniform", "gaussian", "none")

# "least": the forwards that the losses need, as jaxrd has them. "published": also those that published code repeats, or makes
# for a term of weight 0.
FLAVOURS = ("least", "published")

# Residual blocks per stage, as in `jaxrd.models`.
RESNET_BLOCKS = {6: (1, 1), 8: (1, 1, 1), 10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
FORMS = "resnet18, resnet34, resnet50, resnet{depth}_w{width} with depth 6, 8, 10, 18, 34 or 50, and wrn{depth}_{width}"
_NOT_HERE = "which the PyTorch side does not have"


class Variant(NamedTuple):
    """How the same step is run.

    Attributes:
      channels_last: memory format of images, activations and weights; else PyTorch's own, NCHW.
      bfloat16: networks under autocast; the losses stay in float32.
      compiled: forwards (and so their backwards) by `torch.compile`.
    """

    channels_last: bool = True
    bfloat16: bool = False
    compiled: bool = False


VARIANTS = {
    "eager": Variant(channels_last=False),  # what published code runs
    "channels_last": Variant(),
    "bf16": Variant(bfloat16=True),
    "compile": Variant(compiled=True),
    "compile+bf16": Variant(bfloat16=True, compiled=True),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One step to time, with random images and weights; its fields are what JSON can hold.

    Attributes:
      method: one of `METHODS`, with the default options of jaxrd.
      student: architecture, see `FORMS`.
      teacher: architecture; None for methods without one.
      classes: number of logits.
      image_shape: (height, width, channels).
      batch_size: images per step.
      attack_steps: gradient steps of the training attack.
      step_size: length of one, in pixel units of [0, 1].
      epsilon: L-infinity radius, in pixel units.
      start: "uniform", "gaussian" or "none"; empty: the method's own.
      project_start: put the start inside ball and pixel range.
      igdm: weight of the IGDM term, where the method has one.
      progress: fraction of training, in (0, 1], by which the weight of IGDM is ramped.
      learning_rate, momentum, weight_decay, nesterov: of SGD.
      flavour: one of `FLAVOURS`.
      variants: names in `VARIANTS`.
      device: "cpu" or "cuda"; empty: "cuda" where there is one.
      threads: of PyTorch on CPU; 0: its own choice.
      tf32: let convolutions and products round their float32 inputs to TF32 on GPUs; PyTorch's default for convolutions.
      seed: of weights, images and starts.
    """

    method: str
    student: str
    teacher: str | None
    classes: int
    image_shape: tuple[int, int, int]
    batch_size: int
    attack_steps: int = 10
    step_size: float = 2 / 255
    epsilon: float = 8 / 255
    start: str = ""
    project_start: bool = True
    igdm: float = 10.0
    progress: float = 1.0
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    flavour: str = "least"
    variants: tuple[str, ...] = tuple(VARIANTS)
    device: str = ""
    threads: int = 0
    tf32: bool = True
    seed: int = 0

    @property
    def base(self) -> str:
        return self.method.removesuffix(MODULE)

    @property
    def matches_gradients(self) -> bool:
        return self.method.endswith(MODULE)


def architecture(name: str) -> tuple[str, int, int] | None:
    """Returns ("resnet" or "wrn", depth, width) of an architecture that the PyTorch side has, else None."""
    if match := re.fullmatch(r"resnet([1-9]\d*)(?:_w([1-9]\d*))?", str(name)):
        depth = int(match[1])
        if depth in (18, 34, 50) or depth in RESNET_BLOCKS and match[2]:
            return "resnet", depth, int(match[2] or 64)
    if match := re.fullmatch(r"wrn([1-9]\d{1,2})_([1-9]\d{0,2})", str(name)):
        if int(match[1]) % 6 == 4:
            return "wrn", int(match[1]), int(match[2])
    return None


def fault(job: Job) -> str | None:
    """Returns in one line what the PyTorch side does not have of a job, and what it has; None where it has everything."""
    names = [("method", job.method, METHODS), ("flavour", job.flavour, FLAVOURS), ("start", job.start, STARTS)]
    for field, value, known in (*names, *(("variant", variant, VARIANTS) for variant in job.variants)):
        if value not in known:
            close = difflib.get_close_matches(str(value), known, n=1)
            hint = f'did you mean "{close[0]}"? ' if close else ""
            return f'{field} is "{value}", {_NOT_HERE}; {hint}it has {", ".join(filter(None, known))}'
    needs_teacher = job.matches_gradients or job.base not in ("pgd_at", "trades")
    if needs_teacher and job.teacher is None:
        return f"{job.method} needs a teacher; name its architecture"
    for field, value in (("student", job.student), ("teacher", job.teacher)):
        if value is not None and architecture(value) is None:
            return f'{field} is "{value}", {_NOT_HERE}; it has {FORMS}'
    if not job.variants:
        return f"no variant is given; name some of {', '.join(VARIANTS)}"
    return None


def settle(longest: float = 0.5) -> None:
    """Returns once the threads of this process sleep, or after so many seconds.

    A pool's threads watch for more work before they sleep, OpenMP's for about 10 ms: on cores that the other side's turn needs.
    OMP_WAIT_POLICY=passive, by which they sleep at once, made PyTorch's own steps some 8 % slower.
    """
    began = time.monotonic()
    while time.monotonic() - began < longest:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.002:
            return
