"""CIFAR-100 with published hyper-parameters (`jaxrd.presets`): of the IGDM paper (Lee et al. 2025, appendix B) and of DGAD.

    python -m launch.train --config=configs/cifar100.py:teacher    --workdir=runs/cifar100/teacher
    python -m launch.train --config=configs/cifar100.py:adaad+igdm --workdir=runs/cifar100/adaad+igdm
    python -m launch.train --config=configs/cifar100.py:ard+igdm,published_teacher=bdm --workdir=runs/cifar100/ard+igdm

Argument: "teacher" (PGD-AT of a WRN-34-10) or any method, then name=value pairs: `student` (resnet18 or mobilenet_v2, whose
alphas are published), `preset` (default, paper or official), `published_teacher` (ltd, bdm or ikl: whose alpha), and any
field. The data set: CIFAR-100, prepared by

    python -m launch.prepare --dataset=cifar100

or one's own: --config.data.name=mine, or --config.data.arrays=train.npz,test.npz.

Published: L-infinity 8/255, 10 steps of 2/255, SGD 0.1 with momentum 0.9 and weight decay 5e-4, 200 epochs with the rate
divided by 10 after 100 and 150 (rslad: 300; 215, 260, 285), crops padded by 4, flips; alpha of IGDM for pgd_at, trades, ard,
iad, akd, rslad, adaad, adaiad. For another teacher than those three it wants its own search, as it does for mart, dgad and
path, where nothing is published. The formulas of the path method are a reconstruction, and its schedule is that of later code.

One epoch is some 380 steps of 10 forward and backward passes: meant for accelerators. As the data set has no validation split,
2 % of the training images (1,000) are held out for it; the papers train on all 50,000. IGDM's code takes the last epoch
(data.selection=last), DGAD's the best by PGD-10 on the test images (data.selection=test).

PUBLISHED numbers, single runs: clean / PGD-20 / AutoAttack. None has been reproduced with this file yet.

              ResNet-18, BDM-AT teacher (IGDM, table 2)      MobileNetV2, BDM-AT teacher (IGDM, table 10)
              alone                  +IGDM                   alone                  +IGDM
    pgd_at    55.80 / 19.88 / 18.86  60.83 / 35.09 / 29.16   59.23 / 24.04 / 21.58  59.52 / 32.88 / 27.28
    trades    53.56 / 25.85 / 22.02  60.88 / 32.26 / 25.50   51.05 / 24.83 / 20.62  57.80 / 29.47 / 22.05
    ard       61.51 / 30.23 / 24.77  61.62 / 35.75 / 28.79   60.74 / 29.92 / 24.33  60.83 / 33.55 / 27.50
    iad       59.92 / 31.47 / 25.15  62.99 / 34.76 / 27.76   56.35 / 28.96 / 23.43  57.65 / 31.97 / 25.60
    akd       60.27 / 31.38 / 25.09  60.42 / 33.62 / 28.86   60.84 / 29.37 / 24.22  60.39 / 33.62 / 28.04
    rslad     60.22 / 32.16 / 26.76  62.06 / 35.67 / 29.78   61.29 / 31.74 / 26.18  61.48 / 35.22 / 29.32
    adaad     64.43 / 33.21 / 28.06  64.44 / 36.19 / 30.32   61.89 / 29.54 / 23.80  61.43 / 33.51 / 27.43
    adaiad    64.13 / 33.33 / 27.82  -                       60.83 / 29.94 / 23.83  -

              ResNet-18, LTD teacher (IGDM, table 2)
    ard       61.34 / 31.19 / 25.74  61.58 / 33.45 / 27.84
    rslad     60.01 / 32.39 / 26.94  60.43 / 34.02 / 28.51
    adaad     63.34 / 33.39 / 27.81  63.44 / 34.23 / 28.87

dgad: no absolute number was found; path: none that can be trusted.
"""

from jaxrd import presets


def get_config(argument: str = ""):
    return presets.from_argument("cifar100", argument)
