"""The parts of a train step, each as a function of its own with the arguments that the parts before it give.

"student forward" is the loss without its gradient; what "student" takes more is the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxrd.training import step as steps
from jaxrd.training.step import Recipe

Part = tuple[Callable, tuple]


def parts(
    recipe: Recipe, key, state, teacher_variables: dict | None, batch: dict, evaluate: Callable[..., Any],
) -> dict[str, Part]:
    """Returns the parts of a step by name, in their order: (function, arguments).

    Args:
      recipe: of a batch that is not cut: `accumulation` 1.
      key: a typed key.
      state: the state of the run.
      teacher_variables: the teacher's; None without one.
      batch: images and labels, partners and negatives where the recipe has them, and "teacher_clean" where it comes with it.
      evaluate: (name, function, *arguments) -> what it gives: how the arguments of the parts behind it come about.
    """
    found = {}

    def add(name, function, *arguments):
        found[name] = function, arguments
        return evaluate(name, function, *arguments)

    def augmentation(key, batch):
        return steps.augment(recipe, key, batch), steps.augment_negatives(recipe, key, batch)

    def attack(*arguments):
        return steps.attack(recipe, *arguments)

    def teacher(*arguments):
        return steps.teacher_logits(recipe, *arguments)

    def student_forward(*arguments):
        _, batch_stats, metrics = steps.gradients_of(recipe, *arguments)
        return batch_stats, metrics["loss"]  # the compiler leaves out what only the gradient needs

    def student(*arguments):
        return steps.gradients_of(recipe, *arguments)

    def optimiser(*arguments):
        return steps.update(recipe, *arguments)

    (images, labels), (negatives, negative_labels) = add("augmentation", augmentation, key, batch)
    views, clean = add("attack", attack, key, state, teacher_variables, images, labels, negatives, negative_labels,
                       batch.get("teacher_clean"))
    logits = {}
    if recipe.method.needs_teacher:
        logits = add("teacher", teacher, teacher_variables, views, clean, labels, negative_labels)
    inputs = state, views, logits, labels, negative_labels
    add("student forward", student_forward, *inputs)
    gradients, batch_stats, _ = add("student", student, *inputs)
    add("optimiser", optimiser, state, gradients, batch_stats)
    return found


def of_shapes(recipe: Recipe, state, teacher_variables: dict | None, rows: dict) -> dict[str, Part]:
    """Returns the parts of a step with the shapes of their arguments; nothing is computed.

    Args:
      recipe: as for `parts`.
      state, teacher_variables, rows: shapes.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    return parts(recipe, key, state, teacher_variables, rows, lambda _, function, *arguments: jax.eval_shape(
        function, *arguments))
