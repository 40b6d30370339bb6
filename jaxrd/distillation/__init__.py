"""Distillation: losses over logits, and methods as an attack plus terms over views."""

from jaxrd.distillation.adversarial_path import path_weights
from jaxrd.distillation.catalogue import MethodConfig, method, register
from jaxrd.distillation.composition import Method, Monitor, Term
from jaxrd.distillation.dynamic_guidance import misclassified, predictive_consistency, swap_labels
from jaxrd.distillation.gradient_matching import gradient_matching, igdm, jvp_matching
from jaxrd.distillation.inner_maximisation import (
    Attack, Context, InnerMaximisation, cross_entropy_attack, pgd_attack, teacher_fixed_attack, teacher_moving_attack,
    trades_attack)
from jaxrd.distillation.introspection import reliability
from jaxrd.distillation.modules import with_awp, with_direct, with_igdm, with_jvp
from jaxrd.distillation.views import ADVERSARIAL, CLEAN, MIRRORED, NEGATIVE, View

__all__ = [
    "ADVERSARIAL", "CLEAN", "MIRRORED", "NEGATIVE", "Attack", "Context", "InnerMaximisation", "Method",
    "MethodConfig", "Monitor", "Term", "View", "cross_entropy_attack", "gradient_matching", "igdm", "jvp_matching", "method",
    "misclassified", "path_weights", "pgd_attack", "predictive_consistency", "register", "reliability",
    "swap_labels", "teacher_fixed_attack", "teacher_moving_attack", "trades_attack", "with_awp", "with_direct",
    "with_igdm", "with_jvp"]
