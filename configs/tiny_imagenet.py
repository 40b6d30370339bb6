"""Tiny-ImageNet (200 classes, 64x64) with published hyper-parameters (`jaxrd.presets`): of the IGDM paper (Lee et al. 2025,
appendix B) and of DGAD.

    python -m launch.train --config=configs/tiny_imagenet.py:teacher    --workdir=runs/tiny_imagenet/teacher
    python -m launch.train --config=configs/tiny_imagenet.py:adaad+igdm --workdir=runs/tiny_imagenet/adaad+igdm

Argument: "teacher" (PGD-AT of a WRN-34-10; the paper's is one fine-tuned by RiFT) or any method, then name=value pairs:
`student`, `preset` (default, paper or official), and any field. The data set, from the official archive or its folder (without
TensorFlow); its split "test" holds the official validation images, whose labels are public:

    python -m launch.prepare --dataset=tiny_imagenet --source=tiny-imagenet-200.zip

Published: L-infinity 8/255, 10 steps of 2/255, SGD 0.1 with momentum 0.9 and weight decay 5e-4, 100 epochs with the rate
divided by 10 after 50 and 80 (dgad: 200; 100, 150), crops padded by 4, flips; alpha of IGDM for a PreActResNet-18 and the
paper's teacher with pgd_at, trades, ard, iad, akd, rslad, adaad, adaiad. Not published: IGDM's batch size (128 here, as
DGAD's), and alpha for mart, dgad and path. The formulas of the path method are a reconstruction, and its schedule (200 epochs)
is that of later code.

One epoch is some 770 steps of 10 forward and backward passes, on images four times CIFAR's: meant for accelerators. 2 % of the
100,000 training images are held out for validation.

PUBLISHED numbers, single runs: clean / PGD-20 / AutoAttack, PreActResNet-18 (IGDM, table 14). None has been reproduced with
this file yet.

              alone                  +IGDM
    pgd_at    50.13 / 17.10 / 14.58  51.46 / 25.04 / 20.10
    trades    46.51 / 19.51 / 14.89  51.31 / 24.10 / 18.92
    ard       50.81 / 23.37 / 19.48  50.86 / 25.39 / 20.57
    iad       49.89 / 23.89 / 19.10  50.02 / 25.57 / 20.69
    akd       51.70 / 23.86 / 19.69  51.38 / 25.25 / 20.99
    rslad     47.12 / 22.14 / 17.65  47.54 / 23.95 / 18.35
    adaad     51.54 / 24.65 / 20.60  51.21 / 25.73 / 21.17
"""

from jaxrd import presets


def get_config(argument: str = ""):
    return presets.from_argument("tiny_imagenet", argument)
