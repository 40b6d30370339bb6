"""What evaluation.json says besides accuracies: how the network and its teacher behave around the images, and class by class.

The functions behind it, for one batch and for questions of one's own, are those of `jaxrd.evaluation.alignment`. Everything is
measured per example, by every process on its share, and put together before a mean is taken.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxrd.data.source import Source
from jaxrd.evaluation import alignment, shares
from jaxrd.evaluation.names import ALIGNMENT
from jaxrd.evaluation.robustness import Result, compare_gradients, float_images, on_mesh
from jaxrd.models import Model
from jaxrd.threat import ThreatModel, example_keys
from jaxrd.training import processes

Array = jax.Array

# Of the network under evaluation, f, and its teacher f_T: for a reader of the result file.
_UNIFORM = "d uniform in the ball of the threat model and x+d not clipped to the pixel bounds"
DEFINITIONS = {
    "gradient_distance": alignment.DEFINITION,
    "gradient_cosine": alignment.DEFINITION,
    "taylor_remainder": (
        f"mean of ||f(x+d) - f(x) - J d|| / ||f(x+d)||: the share of its own logits that the gradient at x misses, {_UNIFORM}"),
    "central_remainder": (
        "median of ||f(x+d) - f(x-d) - 2 J d|| / ||f(x+d) - f(x-d)||: the share of the difference that IGDM matches which is not "
        "the gradient's, d the perturbation by pgd20 and x-d not clipped to the pixel bounds"),
    "point_distance_uniform": f"mean of ||softmax f_T(x+d) - softmax f(x+d)||_2, {_UNIFORM}",
    "point_distance_adversarial": "mean of ||softmax f_T(x') - softmax f(x')||_2 at the adversarial images x' of pgd20",
}
ADVERSARIAL_ATTACK = "pgd20"  # 20 steps, as the paper measures the distance
_CONFUSION_CLASSES = 20  # at most: beyond, the matrices would be most of the file
# The difference all but vanishes at some images of some networks, and one of them would be the mean.
_MEDIANS = ("central_remainder",)
_NOISE = 2**20  # the fold of the seed that the uniform perturbations follow: no run of an attack gets so far


def around_images(
    model: Model,
    variables: dict,
    source: Source,
    threat: ThreatModel,
    *,
    teacher: tuple[Model, dict] | None = None,
    adversarial: np.ndarray | None = None,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, np.ndarray]:
    """Returns what there is to measure of each image, [n] each.

    In several processes all of them make the same call, and all return the same.

    Args:
      model, variables, source, threat, mesh, batch_size: see `robustness.run_attack`.
      teacher: a model and its variables, to compare with.
      adversarial: [n, h, w, c] float32, the images of `ADVERSARIAL_ATTACK`.
      seed: of the uniform perturbations, which follow the index of their image.

    Returns:
      "taylor_remainder" and "prediction" (int, of the clean image); with a teacher also "gradient_distance", "gradient_cosine"
      and "point_distance_uniform"; with adversarial images also "central_remainder" and "adversarial_prediction", and with
      both "point_distance_adversarial".
    """
    with processes.together():
        mesh = shares.local_mesh(mesh)
    networks = on_mesh(model, variables, mesh), None if teacher is None else on_mesh(*teacher, mesh)
    keys = example_keys(jax.random.fold_in(jax.random.key(seed), _NOISE), len(source))
    arrays = keys, float_images(source.images), np.asarray(source.labels, np.int32)
    arrays += () if adversarial is None else (adversarial,)
    return shares.per_example(Partial(_measure, *networks, threat), *arrays, batch_size=batch_size, mesh=mesh)


def alignment_record(
    measured: dict[str, np.ndarray], earlier: dict[str, Any], teacher: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns "alignment" of evaluation.json.

    Args:
      measured: from `around_images`.
      earlier: what stands there of the same checkpoint and terms; what was not measured again is kept.
      teacher: {"teacher": directory, "teacher_step": its checkpoint} that was compared with; None for none.
    """
    if teacher is not None and any(earlier.get(name) != value for name, value in teacher.items()):
        earlier = {}
    means = {name: float((np.median if name in _MEDIANS else np.mean)(measured[name].astype(np.float64)))
             for name in ALIGNMENT if name in measured}
    numbers = {name: value for name, value in means.items() if math.isfinite(value)}  # JSON has no other
    record = earlier | numbers | (teacher or {})
    if "gradient_distance" in record:
        record["definition"] = alignment.DEFINITION
    return record | {"definitions": {name: DEFINITIONS[name] for name in ALIGNMENT if name in record}}


def classes_record(
    measured: dict[str, np.ndarray], results: dict[str, Result], source: Source, earlier: dict[str, Any]
) -> dict[str, Any]:
    """Returns "classes" of evaluation.json: for each class its examples, its accuracies and its gradient cosine.

    {"examples": [classes], "accuracy": attack -> [classes], "gradient_cosine": [classes], "confusion": {"attack": its name,
    "true_to_adversarial", "clean_to_adversarial": [classes][classes] counts}}: a row is a true class, or the prediction of the
    clean image, a column the prediction under the attack. None stands for the mean of a class without images.

    Args:
      measured: from `around_images`.
      results: attack -> what it left.
      source: the images.
      earlier: what stands there of the same checkpoint, images and terms; what was not measured again is kept.
    """
    labels, classes = np.asarray(source.labels), source.classes

    def means(values):
        return [None if np.isnan(mean) else mean for mean in alignment.per_class(values, labels, classes).tolist()]

    record = earlier | {
        "examples": np.bincount(labels, minlength=classes).tolist(),
        "accuracy": earlier.get("accuracy", {}) | {name: means(result.robust) for name, result in results.items()}}
    if "gradient_cosine" in measured:
        record["gradient_cosine"] = means(measured["gradient_cosine"])
    if "adversarial_prediction" in measured and classes <= _CONFUSION_CLASSES:
        moved = measured["adversarial_prediction"]
        record["confusion"] = {
            "attack": ADVERSARIAL_ATTACK,
            "true_to_adversarial": alignment.confusion(labels, moved, classes).tolist(),
            "clean_to_adversarial": alignment.confusion(measured["prediction"], moved, classes).tolist()}
    return record


def _measure(
    logits_fn: Callable[[Array], Array],
    teacher_fn: Callable[[Array], Array] | None,
    threat: ThreatModel,
    keys: Array,
    images: Array,
    labels: Array,
    adversarial: Array | None = None,
) -> dict[str, Array]:
    deltas = threat.random_start(keys, images, project=False) - images
    found = {
        "taylor_remainder": alignment.taylor_remainder(logits_fn, images, deltas),
        "prediction": jnp.argmax(logits_fn(images), axis=-1)}
    if teacher_fn is not None:
        distance, cosine = compare_gradients(logits_fn, teacher_fn, images, labels)
        found |= {"gradient_distance": distance, "gradient_cosine": cosine,
                  "point_distance_uniform": alignment.point_distance(teacher_fn, logits_fn, images + deltas)}
    if adversarial is not None:
        found |= {"central_remainder": alignment.central_remainder(logits_fn, images, adversarial - images),
                  "adversarial_prediction": jnp.argmax(logits_fn(adversarial), axis=-1)}
    if teacher_fn is not None and adversarial is not None:
        found["point_distance_adversarial"] = alignment.point_distance(teacher_fn, logits_fn, adversarial)
    return found
