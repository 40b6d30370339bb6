"""What a configuration may say: the range of every field, then what the sections must say together; see `config`."""

import functools

from jaxrd import models
from jaxrd.distillation.composition import check_accumulation, check_label_smoothing, check_mixing
from jaxrd.errors import InputError, nearest_multiples
from jaxrd.training import durations


def check(config) -> None:
    """Raises InputError for the first field of a `Config` that is out of range, or that does not fit what others say."""
    def need(ok: bool, path: str, rule: str):
        if not ok:
            value = functools.reduce(getattr, path.split("."), config)
            raise InputError(f"config.{path} is {value!r}; it must be {rule}")

    training, optimizer = config.training, config.optimizer
    need(0 <= config.seed < 2**32, "seed", "in [0, 2**32)")
    need(config.dtype in ("float32", "bfloat16"), "dtype", '"float32" or "bfloat16"')
    for path, dtype in (("teacher_dtype", config.teacher_dtype), ("attack.dtype", config.attack.dtype)):
        need(dtype in (None, "float32", "bfloat16"), path, '"float32", "bfloat16" or None')
    need(config.data.examples is None or config.data.examples > 0, "data.examples", "above 0, or None for all images")
    need(0 < config.data.validation_fraction < 1, "data.validation_fraction", "between 0 and 1")
    need(config.data.selection in ("validation", "last", "test"), "data.selection", '"validation", "last" or "test"')
    need(0 < config.data.extra_fraction < 1, "data.extra_fraction", "between 0 and 1")
    need(config.attack.steps > 0, "attack.steps", "above 0")
    need(optimizer.name in ("sgd", "lars", "lamb"), "optimizer.name", '"sgd", "lars" or "lamb"')
    need(optimizer.learning_rate > 0, "optimizer.learning_rate", "above 0")
    need(optimizer.scaling in ("none", "linear", "sqrt"), "optimizer.scaling", '"none", "linear" or "sqrt"')
    need(optimizer.scaling_batch > 0, "optimizer.scaling_batch", "above 0")
    need(optimizer.trust_coefficient > 0, "optimizer.trust_coefficient", "above 0")
    need(len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas), "optimizer.betas",
         "two decays in [0, 1), such as 0.9,0.999")
    need(0 <= optimizer.momentum < 1, "optimizer.momentum", "in [0, 1)")
    need(optimizer.weight_decay >= 0, "optimizer.weight_decay", "0 or above")
    need(optimizer.schedule in ("step", "cosine", "onecycle"), "optimizer.schedule", '"onecycle", "step" or "cosine"')
    need(all(0 < at < 1 for at in optimizer.milestones), "optimizer.milestones", "fractions of training, between 0 and 1")
    # One step of warm-up is none, and 1 is more likely meant as the whole training.
    need(optimizer.warmup not in (1, "100%"), "optimizer.warmup",
         'a fraction of training in [0, 1), or "5 epochs", "100000 examples" or "500 steps"')
    need(optimizer.schedule != "onecycle" or optimizer.warmup != 0, "optimizer.warmup",
         'above 0 with schedule "onecycle": the part of training until the peak, such as 0.25')
    need(training.steps is None or training.steps > 0, "training.steps", "above 0")
    need(training.examples is None or training.examples > 0, "training.examples", "above 0")
    need(training.examples is None or training.steps is None, "training.examples",
         "None where training.steps gives the length: set --config.training.steps=None, or this")
    need(training.steps is not None or training.examples is not None or (training.epochs or 0) > 0, "training.epochs",
         "above 0 where training.steps and training.examples are None")
    need(training.batch_size > 0, "training.batch_size", "above 0")
    need(training.accumulation > 0, "training.accumulation", "above 0; 1 for no micro-batches")
    need(config.bn_groups is None or config.bn_groups > 0, "bn_groups", "above 0, or None for statistics of the whole batch")
    need((config.bn_groups or training.accumulation) % training.accumulation == 0, "bn_groups",
         f"a multiple of config.training.accumulation, {training.accumulation}: each micro-batch has its own groups")
    need(training.batch_size % (config.bn_groups or 1) == 0, "bn_groups",
         f"a divisor of config.training.batch_size, {training.batch_size}; or give that "
         f"{nearest_multiples(training.batch_size, config.bn_groups or 1)}")
    need(training.batch_size % training.accumulation == 0, "training.accumulation",
         f"a divisor of config.training.batch_size, {training.batch_size}; or give that "
         f"{nearest_multiples(training.batch_size, training.accumulation)}")
    need(durations.shorter(optimizer.warmup, batch_size=training.batch_size, steps=training.steps, examples=training.examples,
                           epochs=training.epochs), "optimizer.warmup", "shorter than training")
    need(0 <= training.weight_average < 1, "training.weight_average", "a decay in [0, 1)")
    need(training.swa_start is None or 0 < training.swa_start <= 1, "training.swa_start", "a fraction in (0, 1], or None")
    need(training.swa_start is None or training.weight_average == 0, "training.swa_start",
         f"None beside training.weight_average={training.weight_average:g}: there is one average; set either")
    need(0 <= training.label_smoothing < 1, "training.label_smoothing", "in [0, 1)")
    need(training.log_every != 0, "training.log_every", "above 0")
    for field in ("checkpoint_every", "keep_every", "swa_every"):
        need(getattr(training, field) != 0, f"training.{field}", "above 0 or None")
    need(training.keep > 0, "training.keep", "above 0")
    need({*training.writer_names} <= {"tensorboard", "wandb"}, "training.writers", 'empty, "tensorboard", "wandb" or both')
    need(config.attack.start in ("", "uniform", "gaussian", "none"), "attack.start",
         'empty, "uniform", "gaussian" or "none"')
    if config.method.name.split("+")[0] == "path":
        need(config.method.path_points <= config.attack.steps, "method.path_points",
             f"at most attack.steps, {config.attack.steps}")

    try:
        threat, method = config.threat.build(), config.build_method()
    except InputError as error:
        raise InputError(f"config.{error}") from None  # both begin with the field
    try:
        augmentation = config.build_augmentation()
    except InputError as error:
        raise InputError(f"config.data.{error}") from None
    check_mixing(method, augmentation)
    check_accumulation(method, training.accumulation)
    check_label_smoothing(method, training.label_smoothing)
    try:
        threat.check_step_size(config.attack.step_size)
    except InputError as error:
        raise InputError(f"config.attack.step_size{str(error).removeprefix('attack step_size')}") from None
    try:
        models.create(config.student, classes=2)
    except InputError as error:
        raise InputError(f"config.student: {error}") from None
    if method.needs_teacher and not config.teacher:
        raise InputError(
            f'config.teacher is empty; method "{method.name}" needs the run directory of a teacher: '
            "--config.teacher=runs/teacher")
