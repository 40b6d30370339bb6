"""Recipes that the tests of performance share."""

import jax
import optax

from jaxrd import distillation, models
from jaxrd.threat import ThreatModel
from jaxrd.training import parallel, scaling, step

ONE_DEVICE = parallel.data_mesh(jax.devices()[:1])


def recipe(name, student="resnet6_w4", teacher="resnet6_w8", steps=2, image_shape=(8, 8, 1), method=None, **options):
    method = method or distillation.method(name, **({"path_points": 2} | options))
    student = models.create(student, classes=10, image_shape=image_shape, batch_norm_sets=method.batch_norm_sets)
    teacher = models.create(teacher, classes=10, image_shape=image_shape) if method.needs_teacher else None
    return step.Recipe(
        method=method, student=student, teacher=teacher, optimizer=optax.sgd(0.1), steps=5,
        inner=distillation.InnerMaximisation(ThreatModel(epsilon=0.1), 0.05, steps))


def shapes(of, batch):
    teacher = jax.eval_shape(of.teacher.init, jax.random.key(0)) if of.teacher else None
    return scaling.abstract_arguments(of, ONE_DEVICE, teacher, batch)
