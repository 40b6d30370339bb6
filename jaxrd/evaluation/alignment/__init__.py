"""What a network does around an image, and how alike two networks are there: the instruments of gradient matching.

Pure functions over `logits_fn`, images [batch, h, w, c] -> logits [batch, classes], with examples independent of each other
(`models.logits_fn(model, variables)`, or any function of one's own). All give numbers per example, work under `jax.jit` and
`jax.vmap`, and take one batch; `in_batches` takes any of them over as many images as there are, in the memory of one batch:

    >>> from jax.tree_util import Partial
    >>> share = alignment.in_batches(Partial(alignment.taylor_remainder, logits_fn), images, deltas, batch_size=128)

| question | functions |
|---|---|
| what do the first derivatives say | `input_gradients`, `directional_derivative`, `vector_jacobian_product`, `jacobian` |
| how alike are those of two networks | `gradient_distance`, `gradient_cosine`, `jacobian_alignment` |
| how far do they reach | `taylor_remainder`, `central_remainder`, `linearity_error`, `path_linearity`, `local_linearity` |
| how much does the network bend | `second_derivative`, `path_curvature`, `gradient_change` |
| how alike are two outputs | `point_distance`, `point_bound` |
| where does the prediction change | `boundary_distance`, `path_boundary` |
| how does the loss look from above | `loss_surface` |
| which classes | `per_class`, `confusion` |

Lee et al. 2025 (IGDM) §4.2 report the mean L2 distance (GD) and the mean cosine similarity (GC) of student and teacher input
gradients over the test images, without saying of which scalar. Here it is the softmax probability of the true class, the
reading whose magnitude fits the published figures; every function that differentiates a scalar takes any other.
"""

from jaxrd.distillation.gradient_matching import directional_derivative, gradient_cosine, gradient_distance, input_gradients
from jaxrd.evaluation.alignment.batching import in_batches
from jaxrd.evaluation.alignment.breakdown import confusion, per_class
from jaxrd.evaluation.alignment.curvature import gradient_change, path_curvature, second_derivative
from jaxrd.evaluation.alignment.jacobians import JacobianAlignment, jacobian, jacobian_alignment, vector_jacobian_product
from jaxrd.evaluation.alignment.landscape import LossSurface, boundary_distance, loss_surface, path_boundary
from jaxrd.evaluation.alignment.linearity import (
    central_remainder, linearity_error, local_linearity, path_linearity, taylor_remainder)
from jaxrd.evaluation.alignment.points import PointBound, point_bound, point_distance

__all__ = [
    "DEFINITION", "JacobianAlignment", "LossSurface", "PointBound", "boundary_distance", "central_remainder", "confusion",
    "directional_derivative", "gradient_change", "gradient_cosine", "gradient_distance", "in_batches", "input_gradients",
    "jacobian", "jacobian_alignment", "linearity_error", "local_linearity", "loss_surface", "path_boundary", "path_curvature",
    "path_linearity", "per_class", "point_bound", "point_distance", "second_derivative", "taylor_remainder",
    "vector_jacobian_product"]

DEFINITION = (
    "input gradients of the softmax probability of the true class at the clean images; distance is the mean L2 norm of their "
    "difference, cosine the mean cosine similarity, student against teacher")
