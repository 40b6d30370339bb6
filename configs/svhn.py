"""SVHN with published hyper-parameters (`jaxrd.presets`): of the IGDM paper (Lee et al. 2025, appendix B).

    python -m launch.train --config=configs/svhn.py:teacher    --workdir=runs/svhn/teacher
    python -m launch.train --config=configs/svhn.py:adaad+igdm --workdir=runs/svhn/adaad+igdm

Argument: "teacher" (PGD-AT of a WRN-34-10, as in the paper, which does not say how it was trained) or any method, then
name=value pairs: `student`, `preset` (default, paper or official), and any field. The data set: SVHN, prepared by

    python -m launch.prepare --dataset=svhn_cropped

or one's own arrays, --config.data.arrays=train.npz,test.npz. Its 531,131 easier images can be mixed in:
--config.data.extra=svhn_cropped --config.data.extra_split=extra.

Published: L-infinity 8/255, 10 steps of 2/255, SGD 0.1 with momentum 0.9 and weight decay 5e-4, 50 epochs with the rate divided
by 10 after 40 and 45, crops (padded by 4 here; the padding is not published) and flips, which the code leaves out
(preset=official); alpha of IGDM for a ResNet-18 and this teacher with pgd_at, trades, ard, iad, akd, rslad, adaad, adaiad. Not
published: the batch size, and alpha for mart, dgad and path. The formulas of the path method are a reconstruction, and its
schedule (200 epochs) is that of later code.

One epoch is some 560 steps of 10 forward and backward passes: meant for accelerators. As the data set has no validation split,
2 % of the 73,257 training images are held out for it.

PUBLISHED numbers, single runs: clean / PGD-20 / AutoAttack, ResNet-18 (IGDM, table 3). None has been reproduced with this file
yet.

              alone                  +IGDM
    pgd_at    91.62 / 48.07 / 42.46  92.57 / 60.55 / 52.12
    trades    89.91 / 57.52 / 50.74  91.98 / 60.09 / 54.15
    ard       92.32 / 55.62 / 48.24  92.19 / 60.07 / 52.95
    iad       91.62 / 56.42 / 47.76  93.03 / 58.86 / 51.45
    akd       92.49 / 56.49 / 50.17  92.50 / 59.38 / 52.51
    rslad     90.52 / 53.80 / 48.41  90.71 / 56.14 / 50.69
    adaad     93.27 / 57.43 / 52.93  93.48 / 58.74 / 53.89
    adaiad    93.39 / 57.26 / 52.74  -
"""

from jaxrd import presets


def get_config(argument: str = ""):
    return presets.from_argument("svhn", argument)
