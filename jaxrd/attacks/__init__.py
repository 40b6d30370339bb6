"""Attacks: functions of `images -> per-example objective` (pgd) or of `images -> logits` (all others)."""

from jaxrd.attacks.apgd import apgd
from jaxrd.attacks.autoattack import autoattack
from jaxrd.attacks.fab import fab
from jaxrd.attacks.iterated import cw_linf, mi_fgsm, pgd_attack
from jaxrd.attacks.pgd import ascent_step, loop_unroll, pgd, pgd_path
from jaxrd.attacks.results import AttackResult, AutoAttackResult
from jaxrd.attacks.square import square

__all__ = ["AttackResult", "AutoAttackResult", "apgd", "ascent_step", "autoattack", "cw_linf", "fab", "loop_unroll", "mi_fgsm",
           "pgd", "pgd_attack", "pgd_path", "square"]
