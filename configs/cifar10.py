"""CIFAR-10 with the published hyper-parameters of the IGDM paper (Lee et al. 2025, appendix B.1 and B.2).

    python -m launch.train --config=configs/cifar10.py:teacher    --workdir=runs/cifar10/teacher
    python -m launch.train --config=configs/cifar10.py:rslad+igdm --workdir=runs/cifar10/rslad+igdm

Argument: teacher (PGD-AT of a WRN-34-10), or a student's method (pgd_at, ard, rslad, each with +igdm or without), then
field=value pairs. The data set: CIFAR-10 prepared by TFDS as array_record, or one's own arrays,
--config.data.arrays=train.npz,test.npz. L-infinity, epsilon 8/255, 10 attack steps of 2/255; SGD 0.1 with momentum 0.9 and
weight decay 5e-4; 200 epochs, the rate divided by 10 after half and three quarters (RSLAD: 300 epochs, 215/260/285).

Meant for accelerators: one epoch is some 380 steps of 10 forward and backward passes. Where the data set has no validation
split, as here, 2 % of the training images (1,000) are held out for it; the paper trains on all 50,000 and takes the last
epoch. alpha is what the paper found best for ResNet-18 with its LTD teacher (table in B.2); another teacher wants its own
search. No number of the paper has been reproduced with this file yet.
"""

from jaxrd.config import (
    AttackConfig, Config, DataConfig, MethodConfig, OptimizerConfig, ThreatConfig, TrainingConfig, config_dict_of,
    override, parse_argument)

TEACHER = "runs/cifar10/teacher"
ALPHA = {"pgd_at": 60.0, "ard": 5.0, "rslad": 0.9}


def get_config(argument: str = ""):
    preset, overrides = parse_argument(argument, default="rslad+igdm")
    name = "pgd_at" if preset == "teacher" else preset
    base, _, module = name.partition("+")
    rslad = base == "rslad"
    return override(config_dict_of(Config(
        method=MethodConfig(name=name, igdm=ALPHA.get(base) if module else None),
        student="wrn34_10" if preset == "teacher" else "resnet18",
        teacher="" if name == "pgd_at" else TEACHER,
        data=DataConfig(name="cifar10", shift=4, flip=True, validation_fraction=0.02),
        threat=ThreatConfig("linf", 8 / 255),
        attack=AttackConfig(steps=10, step_size=2 / 255),
        optimizer=OptimizerConfig(milestones=(215 / 300, 260 / 300, 285 / 300) if rslad else (0.5, 0.75)),
        training=TrainingConfig(epochs=300.0 if rslad else 200.0, checkpoint_every=766)  # two epochs,
    )), overrides)
