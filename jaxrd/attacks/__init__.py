"""Attacks: functions of `images -> per-example objective` or `images -> logits`."""

from jaxrd.attacks.pgd import ascent_step, loop_unroll, pgd, pgd_path

__all__ = ["ascent_step", "loop_unroll", "pgd", "pgd_path"]
