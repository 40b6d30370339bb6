"""The checkpoint that an evaluation is about, and what it does to images of any data set: attack after attack, on record."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

import jaxrd
from jaxrd import models
from jaxrd.config import Config
from jaxrd.data.source import Source
from jaxrd.evaluation import robustness
from jaxrd.models.batch_norm_sets import select_set
from jaxrd.threat import ThreatModel
from jaxrd.training import checkpoint, processes


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint of a run directory.

    Attributes:
      workdir: the run directory.
      asked: the checkpoint as it was asked for: "last", "best" or a step's number.
      model: its model, which computes in float32 whatever it was trained in.
      variables: its variables.
      origin: see `checkpoint.restore_model`.
      config: the run's configuration.
      threat: that of the configuration.
    """

    workdir: pathlib.Path
    asked: str
    model: models.Model
    variables: dict
    origin: dict[str, Any]
    config: Config
    threat: ThreatModel

    @classmethod
    def open(cls, workdir: pathlib.Path, step: str | int) -> "Subject":
        """Restores a checkpoint; raises InputError as `checkpoint.restore_model`."""
        model, variables, origin = checkpoint.restore_model(workdir, step)
        config = Config.from_dict(origin["config"])
        # A run may have been resumed with its data elsewhere, and they are there for its earlier checkpoints too.
        newest = Config.from_dict(checkpoint.newest_metadata(workdir)["config"])
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=newest.data.directory))
        model = models.variant(model, dtype="float32")
        return cls(workdir, str(step), model, variables, origin, config, config.threat.build())

    def record(self, data: dict[str, Any], seed: int) -> dict[str, Any]:
        """Returns a record without results, as evaluation.json has them.

        Args:
          data: which images it will be about.
          seed: of the random starts.
        """
        imported = self.origin["imported"]
        return {
            "jaxrd": jaxrd.__version__,
            "run": {
                "workdir": str(self.workdir), "student": self.config.student,
                "method": imported["name"] if imported else self.config.build_method().name,
                "parameters": models.parameter_count(select_set(self.variables, 0, self.model.batch_norm_sets)),
                "teacher": self.config.teacher, "seed": self.config.seed,
                "step": self.origin["step"], "checkpoint": self.asked, "weights": self.origin["weights"], "dtype": "float32"},
            "data": data,
            "threat": {"norm": self.threat.norm, "epsilon": self.threat.epsilon, "bounds": list(self.threat.bounds)},
            "seed": seed, "accuracy": {}, "attacks": {}, "seconds": {}, "cascades": {},
        }

    def directory(self, attack: str, data: str, seed: int) -> pathlib.Path:
        """Returns where a cascade keeps its finished batches and adversarial images; `data` is fit to be a file's name."""
        return self.workdir / "evaluation" / f"{attack}-{data}-step{self.origin['step']}-seed{seed}"

    def attacked(
        self,
        source: Source,
        chosen: dict[str, robustness.Protocol | robustness.Cascade],
        record: dict[str, Any],
        *,
        data: str,
        mesh: jax.sharding.Mesh,
        seed: int,
        batch_size: int,
        keep_images_of: str = "",
        say: Callable[[str], None],
    ) -> Iterator[tuple[str, robustness.Result]]:
        """Runs the attacks one after another, puts what each came to into `record`, and yields (name, result without cascade).

        Args:
          source: the images.
          chosen: from `robustness.protocols`.
          record: from `Subject.record`.
          data: what the images are called in the directories of cascades, see `directory`.
          mesh, seed, batch_size, say: see `robustness.run_attack`.
          keep_images_of: the attack whose result has its images.
        """
        for name, protocol in chosen.items():
            directory = self.directory(name, data, seed)
            cascade = isinstance(protocol, robustness.Cascade)
            result = robustness.run_attack(
                self.model, self.variables, source, protocol, self.threat, mesh=mesh, seed=seed, batch_size=batch_size,
                keep_images=name == keep_images_of, resume=directory if cascade else None, say=say)
            record["accuracy"][name], record["seconds"][name] = result.accuracy, round(result.seconds, 3)
            record["attacks"][name] = protocol.definition(self.threat.epsilon)
            if cascade:
                file = directory / "result.npz"
                if processes.is_main():
                    result.cascade.save(file)
                record["cascades"][name] = _stages(result.cascade) | {"file": str(file.relative_to(self.workdir))}
                say(f"{name}, stage by stage: " + ", ".join(
                    f"{stage} {accuracy:.1%}" for stage, accuracy in result.cascade.per_attack_accuracy.items()))
            yield name, dataclasses.replace(result, cascade=None)


def _stages(found) -> dict[str, Any]:
    """What a cascade came to, stage by stage, for the result file."""
    return {
        "stages": found.per_attack_accuracy, "rescored_accuracy": found.rescored_accuracy, "flags": found.flags,
        "passes": {name: list(pair) for name, pair in found.passes.items()}, "zero_gradients": found.zero_gradients,
        "seconds": found.seconds}
