"""What accelerators are said to compute at most: published peaks, by the name that JAX gives a device.

Dense products with float32 accumulation, without sparsity, at the boost clock of the data sheet: what a utilisation is of. No
program reaches them; `ceilings` measures what one can. A CPU has no entry: its peak depends on cores, clock and vector units.

Sources: NVIDIA's data sheets of the A100, H100, H200, L4, L40S, V100 and A10 (the figures "with sparsity" halved) and its
Ada architecture paper for the RTX 4090; Google Cloud's pages on TPU v3, v4, v5e, v5p and v6e.
"""

import dataclasses
from collections.abc import Mapping

from jaxrd.errors import InputError

PRECISIONS = ("bfloat16", "tensorfloat32", "float32")


@dataclasses.dataclass(frozen=True)
class Peak:
    """Published peaks of one device, FLOP/s; None where it has no such unit.

    Attributes:
      kinds: what `jax.Device.device_kind` begins with, in small letters.
      bfloat16, tensorfloat32, float32: by what products are computed in.
      note: what the figures are of, where that is not the whole card.
    """

    kinds: tuple[str, ...]
    bfloat16: float | None
    tensorfloat32: float | None
    float32: float | None
    note: str = ""


# The first that fits counts, so longer names stand before shorter ones.
PEAKS = (
    Peak(("nvidia a100",), 312e12, 156e12, 19.5e12),  # "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB"
    Peak(("nvidia h100 pcie",), 756e12, 378e12, 51e12),
    Peak(("nvidia h100 nvl", "nvidia h200 nvl"), 835e12, 417e12, 60e12),
    Peak(("nvidia h100",), 989e12, 494e12, 67e12),  # SXM: "NVIDIA H100 80GB HBM3"
    Peak(("nvidia h200", "nvidia gh200"), 989e12, 494e12, 67e12),
    Peak(("nvidia l40s",), 362e12, 183e12, 91.6e12),
    Peak(("nvidia l4",), 121e12, 60e12, 30.3e12),
    Peak(("tesla v100-pcie",), None, None, 14e12),  # its tensor cores take float16 alone
    Peak(("tesla v100",), None, None, 15.7e12),  # "Tesla V100-SXM2-16GB"
    Peak(("nvidia geforce rtx 4090",), 165e12, 82.6e12, 82.6e12),
    Peak(("nvidia a10",), 125e12, 62.5e12, 31.2e12),
    # A float32 product is bfloat16 passes there; "TPU v3" is a device for each of a chip's two cores.
    Peak(("tpu v3",), 61.5e12, None, None, "one core, half a chip"),
    Peak(("tpu v4",), 275e12, None, None),
    Peak(("tpu v5 lite", "tpu v5e"), 197e12, None, None),
    Peak(("tpu v5", "tpu v5p"), 459e12, None, None),
    Peak(("tpu v6 lite", "tpu v6e"), 918e12, None, None),
)


def published_peak(kind: str) -> Peak | None:
    """Returns the published peaks of a device; None where they are not known.

    Args:
      kind: `jax.Device.device_kind`.
    """
    name = kind.strip().lower()
    return next((peak for peak in PEAKS if any(_names(name, prefix) for prefix in peak.kinds)), None)


def _names(name: str, prefix: str) -> bool:
    """An "NVIDIA A100" is no "NVIDIA A10", nor an "NVIDIA L40" an "NVIDIA L4"."""
    return name.startswith(prefix) and not name[len(prefix):len(prefix) + 1].isalnum()


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
