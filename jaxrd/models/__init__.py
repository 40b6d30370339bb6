"""Image classifiers: `create` one by name, `restore` one from a run directory, read one from a file of others (`weights`)."""

from jaxrd.models import weights
from jaxrd.models.averaging import average_weights, estimate_statistics
from jaxrd.models.zoo import Model, create, logits_fn, parameter_count, restore, variant

__all__ = [
    "Model", "average_weights", "create", "estimate_statistics", "logits_fn", "parameter_count", "restore", "variant",
    "weights"]
