"""Image classifiers: `create` one by name, or `restore` one from a run directory."""

from jaxrd.models.zoo import Model, create, logits_fn, parameter_count, restore

__all__ = ["Model", "create", "logits_fn", "parameter_count", "restore"]
