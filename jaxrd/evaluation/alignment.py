"""How alike the input gradients of two models are.

Lee et al. 2025 (IGDM) §4.2 report the mean L2 distance (GD) and the mean cosine similarity (GC) of student and teacher input
gradients over the test images, without saying of which scalar. Here it is the softmax probability of the true class, the
reading whose magnitude fits the published figures.
"""

from jaxrd.distillation.gradient_matching import gradient_cosine, gradient_distance, input_gradients

__all__ = ["DEFINITION", "gradient_cosine", "gradient_distance", "input_gradients"]

DEFINITION = (
    "input gradients of the softmax probability of the true class at the clean images; distance is the mean L2 norm of their "
    "difference, cosine the mean cosine similarity, student against teacher")
