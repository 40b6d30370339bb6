"""CIFAR-10 with published hyper-parameters (`jaxrd.presets`): of the IGDM paper (Lee et al. 2025, appendix B) and of DGAD.

    python -m launch.train --config=configs/cifar10.py:teacher    --workdir=runs/cifar10/teacher
    python -m launch.train --config=configs/cifar10.py:adaad+igdm --workdir=runs/cifar10/adaad+igdm
    python -m launch.train --config=configs/cifar10.py:ard+igdm,student=mobilenet_v2,preset=official --workdir=runs/cifar10/a

Argument: "teacher" (PGD-AT of a WRN-34-10) or any method, then name=value pairs: `student` (resnet18 or mobilenet_v2, whose
alphas are published), `preset` (default, paper or official), `published_teacher` (ltd, bdm or ikl: whose alpha), and any
field. The data set: CIFAR-10, prepared by

    python -m launch.prepare --dataset=cifar10

or one's own: --config.data.name=mine, or --config.data.arrays=train.npz,test.npz.

Published: L-infinity 8/255, 10 steps of 2/255, SGD 0.1 with momentum 0.9 and weight decay 5e-4, 200 epochs with the rate
divided by 10 after 100 and 150 (rslad: 300; 215, 260, 285), crops padded by 4, flips; alpha of IGDM for pgd_at, trades, ard,
iad, akd, rslad, adaad, adaiad. For another teacher than those three it wants its own search, as it does for mart, dgad and
path, where nothing is published. The formulas of the path method are a reconstruction, and its schedule is that of later code.

One epoch is some 380 steps of 10 forward and backward passes: meant for accelerators. As the data set has no validation split,
2 % of the training images (1,000) are held out for it; the papers train on all 50,000. IGDM's code takes the last epoch
(data.selection=last), DGAD's the best by PGD-10 on the test images (data.selection=test).

On accelerators bodies may compute in bfloat16, together or one by one; evaluations stay in float32, and on CPU it is no faster:

    --config.dtype=bfloat16 --config.teacher_dtype=bfloat16 --config.attack.dtype=bfloat16

Large batches, on many devices: the rate in proportion to the batch, after 5 epochs of warm-up (Goyal et al. 2017), or LARS or
LAMB with a rate of their own, which wants a search; none was made here. Every 5 % of training is a checkpoint:

    --config.training.batch_size=4096 --config.training.checkpoint_every=5% --config.optimizer.warmup="5 epochs"
        --config.optimizer.scaling=linear         (to 0.1 * 4096 / 128 = 3.2)
        --config.optimizer.name=lars --config.optimizer.learning_rate=...

PUBLISHED numbers, single runs: clean / PGD-20 / AutoAttack. None has been reproduced with this file yet.

              ResNet-18, LTD teacher (IGDM, table 3)         MobileNetV2, LTD teacher (IGDM, table 11)
              alone                  +IGDM                   alone                  +IGDM
    pgd_at    84.52 / 42.80 / 41.12  84.15 / 53.70 / 49.63   83.52 / 44.47 / 41.19  81.73 / 52.63 / 48.51
    trades    82.46 / 49.13 / 47.09  83.50 / 54.64 / 48.83   81.57 / 50.49 / 46.88  81.82 / 52.96 / 47.47
    ard       85.04 / 53.27 / 49.49  85.18 / 54.75 / 50.20   84.18 / 52.16 / 48.11  84.25 / 54.03 / 49.53
    iad       84.33 / 54.24 / 50.09  84.49 / 56.55 / 51.09   83.38 / 52.71 / 48.45  83.65 / 54.57 / 50.14
    akd       85.10 / 51.53 / 48.04  84.94 / 54.89 / 50.87   84.46 / 50.84 / 46.96  83.98 / 54.40 / 49.99
    rslad     83.59 / 55.98 / 52.13  83.67 / 57.34 / 53.10   82.60 / 54.55 / 50.44  82.61 / 55.02 / 51.01
    adaad     84.74 / 56.78 / 52.79  84.83 / 57.61 / 54.02   84.24 / 55.47 / 51.36  84.27 / 56.15 / 52.15
    adaiad    84.75 / 57.04 / 52.88  -                       84.14 / 55.58 / 51.48  -

dgad, ResNet-18 with a WRN-34-10 teacher: 87.58 clean, 50.59 AutoAttack (DGAD, table 4, as quoted by others; AdaAD there: 86.75,
50.06). path: no number that can be trusted was found.
"""

from jaxrd import presets


def get_config(argument: str = ""):
    return presets.from_argument("cifar10", argument)
