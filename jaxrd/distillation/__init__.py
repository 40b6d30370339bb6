"""Distillation: losses over logits, and methods as an attack plus terms over views."""

from jaxrd.distillation.gradient_matching import igdm, jvp_matching
from jaxrd.distillation.methods import Attack, Context, InnerMaximisation, Method, Term, method, with_igdm
from jaxrd.distillation.views import View

__all__ = [
    "Attack", "Context", "InnerMaximisation", "Method", "Term", "View", "igdm", "jvp_matching", "method", "with_igdm"]
