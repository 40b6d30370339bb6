"""Sweeps without computing: training and evaluation that leave the files of real ones at once."""

import json
import types

import pytest


class Fakes:
    """Stands for training and evaluation.

    Attributes:
      trained, evaluated: names of the directories, in the order of the calls, with the attacks of the latter.
      act: is called with the configuration before a training; may raise.
    """

    def __init__(self):
        self.trained, self.evaluated, self.act = [], [], lambda config: None

    def train(self, config, workdir):
        from jaxrd.training.checks import claim

        claim(workdir, config)
        self.trained.append(workdir.name)
        self.act(config)
        steps = config.training.steps
        (workdir / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
        (workdir / "environment.json").write_text("{}")
        (workdir / "metrics.jsonl").write_text(json.dumps({"step": steps, "seconds": 2.0}) + "\n")
        return types.SimpleNamespace(step=steps)

    def evaluate(self, workdir, attacks, *, step, seed, curve):
        self.evaluated.append((workdir.name, tuple(attacks)))
        config = json.loads((workdir / "config.json").read_text())
        path = workdir / "evaluation.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        found = {
            "run": {"workdir": str(workdir), "method": config["method"]["name"], "student": config["student"], "parameters": 9,
                    "step": config["training"]["steps"] if step == "last" else 1, "checkpoint": str(step),
                    "seed": config["seed"]},
            "data": {"split": "test", "name": "digits", "examples": 40}, "seed": seed, "attacks": {},
            "threat": {"norm": "linf", "epsilon": 0.2, "bounds": [0.0, 1.0]},
            "accuracy": (earlier or {"accuracy": {}})["accuracy"] | {name: self.accuracy(config, name) for name in attacks},
            "seconds": dict.fromkeys(attacks, 1.0), "alignment": {"gradient_cosine": config["seed"] / 10},
            "training": {"seconds_per_step": 0.5, "step_memory": 1000000}}
        path.write_text(json.dumps(found))
        return found

    @staticmethod
    def accuracy(config, attack):
        """Of seed s and beta b: (50 + 10 s + b) %, under an attack half of it."""
        clean = 0.5 + config["seed"] / 10 + config["method"]["trades_beta"] / 100
        return clean if attack == "clean" else clean / 2


@pytest.fixture
def fakes(monkeypatch):
    from jaxrd.evaluation import evaluate
    from jaxrd.training import loop

    fakes = Fakes()
    monkeypatch.setattr(loop, "train", fakes.train)
    monkeypatch.setattr(evaluate, "evaluate", fakes.evaluate)
    return fakes
