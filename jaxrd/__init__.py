"""jaxrd: adversarially robust distillation in JAX.

Primitives (`threat`, `objectives`, `attacks`, the losses in `distillation`) are pure functions of arrays; methods name
views and terms; `training` runs them all on one compiled, data-parallel step.
"""

from jaxrd import attacks, distillation, models, objectives
from jaxrd.errors import InputError
from jaxrd.threat import ThreatModel

__version__ = "0.1.0"

__all__ = ["InputError", "ThreatModel", "attacks", "distillation", "models", "objectives"]
