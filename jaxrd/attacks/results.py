"""What attacks return."""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from jaxrd.errors import InputError
from jaxrd.files import read_arrays, replacing
from jaxrd.threat import ThreatModel

Array = jax.Array


class AttackResult(NamedTuple):
    """What an attack found. Under `jax.jit` values are not checked: a row whose logits are not finite is nobody's to trust.

    Attributes:
      images: [batch, h, w, c] float32, the adversarial images; the clean ones where none was found.
      fooled: [batch] bool, whether the image is misclassified. An image that is misclassified as it is counts as fooled.
      loss: [batch] float32, the largest value reached of what the attack maximises; its docstring says what that is.
    """

    images: Array
    fooled: Array
    loss: Array


@dataclasses.dataclass(frozen=True)
class AutoAttackResult:
    """What a cascade found, on the host.

    Attributes:
      images: [n, h, w, c] float32, adversarial where one was found, else the clean ones.
      labels: [n] int32.
      robust: [n] bool, still classified correctly.
      clean_correct: [n] bool.
      attack_index: [n] int, the place in `stages` of what broke the point: 0 (clean) where it was wrong already; -1: robust.
      stages: ("clean", then the attacks in their order).
      per_attack_accuracy: stage -> accuracy after it.
      distances: [n] float32, of `images` to the clean ones in the threat model's norm.
      index: [n] int, what the random numbers of each point followed.
      flags: what makes the numbers doubtful, one line each; empty is good.
      passes: stage -> (forward, backward) passes through the network, in images.
      zero_gradients: stage -> points whose gradient was exactly 0 at a start, for the attacks by gradient.
      seconds: stage -> wall time, of all sittings together.
      rescored_accuracy: accuracy on `images` in a pass of its own.
      version: of the cascade, or the attacks' names joined by "+".
      threat: norm, radius, bounds.
      metadata: fingerprints of model, data and configuration, and the versions of jaxrd and jax.
    """

    images: np.ndarray
    labels: np.ndarray
    robust: np.ndarray
    clean_correct: np.ndarray
    attack_index: np.ndarray
    stages: tuple[str, ...]
    per_attack_accuracy: dict[str, float]
    distances: np.ndarray
    index: np.ndarray
    flags: list[str]
    passes: dict[str, tuple[int, int]]
    zero_gradients: dict[str, int]
    seconds: dict[str, float]
    rescored_accuracy: float
    version: str
    threat: ThreatModel
    metadata: dict

    @property
    def accuracy(self) -> float:
        """Robust accuracy."""
        return float(np.mean(self.robust))

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes everything to one .npz: arrays by name (images as float32: eight bits would undo attacks), the rest as JSON
        under "metadata". Returns the path; a kill leaves the old file or the new one.
        """
        path = pathlib.Path(path)
        if path.suffix != ".npz":
            raise InputError(f'result path "{path}" must end in .npz')
        rest = {name: getattr(self, name) for name in _REST} | {"threat": dataclasses.asdict(self.threat)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, metadata=json.dumps(rest), **{name: getattr(self, name) for name in _ARRAYS})
        return path

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "AutoAttackResult":
        """Reads what `save` wrote; raises InputError where the file is missing, damaged or another one."""
        try:
            arrays = read_arrays(path, (*_ARRAYS, "metadata"))
            rest = json.loads(str(arrays.pop("metadata")))
            threat = rest.pop("threat")
            rest |= {"threat": ThreatModel(threat["norm"], threat["epsilon"], tuple(threat["bounds"])),
                     "stages": tuple(rest["stages"]), "passes": {name: tuple(pair) for name, pair in rest["passes"].items()}}
            return cls(**arrays, **rest)
        except FileNotFoundError:
            raise InputError(f'result path "{path}" does not exist; it is what AutoAttackResult.save wrote') from None
        except Exception as error:  # whatever a damaged zip, array or JSON raises
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is no saved AutoAttackResult, or is damaged ({line}); run the evaluation again") from None


_ARRAYS = ("images", "labels", "robust", "clean_correct", "attack_index", "distances", "index")
_REST = tuple(field.name for field in dataclasses.fields(AutoAttackResult) if field.name not in (*_ARRAYS, "threat"))
