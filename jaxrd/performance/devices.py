"""What accelerators are said to compute at most: published peaks, by the name that JAX gives a device.

Dense products with float32 accumulation, without sparsity, at the boost clock of the data sheet: what a utilisation is of. No
program reaches them; `ceilings` measures what one can. A CPU has no entry: its peak depends on cores, clock and vector units.

Sources: NVIDIA's data sheets of the A100, H100, H200, L4, L40S, V100 and A10 (the figures "with sparsity" halved) and its
Ada architecture paper for the RTX 4090; Google Cloud's pages on TPU v3, v4, v5e, v5p and v6e.
"""

import dataclasses
import re
from collections.abc import Mapping

from jaxrd.errors import InputError

PRECISIONS = ("bfloat16", "tensorfloat32", "float32")


@dataclasses.dataclass(frozen=True)
class Peak:
    """Published peaks of one device, FLOP/s; None where it has no such unit.

    Attributes:
      kind: pattern of the whole of `jax.Device.device_kind`, whatever its case.
      bfloat16, tensorfloat32, float32: by what products are computed in.
    """

    kind: str
    bfloat16: float | None
    tensorfloat32: float | None
    float32: float | None


# The first that fits counts.
PEAKS = (
    Peak("NVIDIA A100[- ].*", 312e12, 156e12, 19.5e12),  # "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"
    Peak("NVIDIA H100 PCIe", 756e12, 378e12, 51e12),
    Peak("NVIDIA H[12]00 NVL", 835e12, 417e12, 60e12),
    Peak("NVIDIA H100( 80GB HBM3)?", 989e12, 494e12, 67e12),  # SXM
    Peak("NVIDIA (H200|GH200 .*)", 989e12, 494e12, 67e12),
    Peak("NVIDIA L40S", 362e12, 183e12, 91.6e12),
    Peak("NVIDIA L4", 121e12, 60e12, 30.3e12),
    Peak("Tesla V100-SXM2-.*", None, None, 15.7e12),  # its tensor cores take float16 alone
    Peak("Tesla V100-PCIE-.*", None, None, 14e12),
    Peak("NVIDIA GeForce RTX 4090", 165e12, 82.6e12, 82.6e12),
    Peak("NVIDIA A10", 125e12, 62.5e12, 31.2e12),
    # A float32 product is made of bfloat16 ones there. "TPU v3" is each of the two cores of a chip of 123 TFLOP/s.
    Peak("TPU v3", 61.5e12, None, None),
    Peak("TPU v4", 275e12, None, None),
    Peak("TPU (v5 lite|v5e)", 197e12, None, None),
    Peak("TPU (v5|v5p)", 459e12, None, None),
    Peak("TPU (v6 lite|v6e)", 918e12, None, None),
)


def published_peak(kind: str) -> Peak | None:
    """Returns the published peaks of a device; None where they are not known, as for a part of one (MIG).

    Args:
      kind: `jax.Device.device_kind`.
    """
    if " MIG " in kind:
        return None
    return next((peak for peak in PEAKS if re.fullmatch(peak.kind, kind.strip(), re.IGNORECASE)), None)


def least_seconds(flop: Mapping[str, float], peaks: Mapping[str, float | None]) -> float | None:
    """Returns how long a device at its peak would take: sum of operations / peak over precisions.

    Args:
      flop: operations by precision.
      peaks: FLOP/s by precision.

    Returns:
      None where a precision with operations has no peak.
    """
    if any(count and not peaks.get(kind) for kind, count in flop.items()):
        return None
    return sum(count / peaks[kind] for kind, count in flop.items() if count)


def peaks_of(kind: str, given: float | None = None) -> dict[str, float] | None:
    """Returns FLOP/s by precision of a device: the published ones, or what a user says; None where neither is known.

    Args:
      kind: `jax.Device.device_kind`.
      given: FLOP/s, in place of what is published, for products of any precision; above 0.

    Raises:
      InputError: a `given` that no device of today computes, or none at all.
    """
    if given is not None:
        # Between a microcontroller's and a thousand times the fastest device's: a slip of the exponent.
        if not 1e6 <= given <= 1e18:
            raise InputError(
                f"--peak_flops={given:g} is no peak of a device; give operations a second, such as 989e12 for 989 TFLOP/s")
        return dict.fromkeys(PRECISIONS, given)
    peak = published_peak(kind)
    if peak is None:
        return None
    return {name: value for name in PRECISIONS if (value := getattr(peak, name))}
