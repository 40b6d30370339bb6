"""Published robust classifiers of CIFAR-10 and CIFAR-100 whose architecture jaxrd has: teachers, and numbers to compare with.

Two collections: the L-infinity and L2 models of RobustBench (Croce et al. 2021, "RobustBench: a standardized adversarial
robustness benchmark"), by its identifiers, and the JAX files of DeepMind (google-deepmind/deepmind-research,
adversarial_robustness), by the names of their files. Nothing is downloaded: an entry says where the file lies.

Accuracies are the sources', in percent of all 10,000 test images; jaxrd has not measured them. RobustBench's are those of its
tables of 2023 and, for what came later, of its model_info files up to commit 78fcc9e of 31 March 2025; they are what the
leaderboard shows, so the lower one where an external evaluation has gone below AutoAttack (with AutoAttack's own in the note,
where it is known). DeepMind's are those of its own README, found with AutoAttack.

It is a selection, the teachers of distillation papers first. Left out altogether: other activations, padding or layers,
normalisation by the statistics of each image, ensembles, models of timm.
"""

from collections.abc import Iterable
import dataclasses

from jaxrd.errors import InputError

_CLASSES = {"cifar10": 10, "cifar100": 100}
_THREATS = {"linf": "Linf", "l2": "L2"}  # as RobustBench writes them


@dataclasses.dataclass(frozen=True)
class Published:
    """One published classifier.

    Attributes:
      name: RobustBench's identifier without its folders, or the name of DeepMind's file without its ending.
      dataset: "cifar10" or "cifar100", as TFDS names them.
      norm: "linf" or "l2", as in `jaxrd.ThreatModel`.
      epsilon: radius of the published AutoAttack accuracy, in pixel units of [0, 1].
      model: jaxrd's name of the architecture.
      classes: number of logits.
      mean: per channel, subtracted from images in [0, 1] inside the model; None: they go in as they are.
      std: per channel, the images are divided by it; None exactly where `mean` is.
      clean: published accuracy on unperturbed images, in percent; None where no source gives it.
      autoattack: published robust accuracy, in percent; None where no source gives it.
      format: "torch" (a state dict of RobustBench, .pt) or "haiku" (DeepMind's parameters and state, .npy).
      file: the file to download by hand; RobustBench's with its folders.
      where: where it lies.
      paper: authors, place and year.
      note: what else to know, or "".
    """

    name: str
    dataset: str
    norm: str
    epsilon: float
    model: str
    classes: int
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    clean: float | None
    autoattack: float | None
    format: str
    file: str
    where: str
    paper: str
    note: str = ""

    @property
    def identifier(self) -> str:
        """Its path in RobustBench, such as "cifar10/Linf/Wang2023Better_WRN-28-10"."""
        return f"{self.dataset}/{_THREATS[self.norm]}/{self.name}"


# First part of RobustBench's names -> paper.
_PAPERS = {
    "Addepalli2021Towards": "Addepalli et al., ECCV 2022",
    "Addepalli2022Efficient": "Addepalli et al., NeurIPS 2022",
    "Andriushchenko2020Understanding": "Andriushchenko and Flammarion, NeurIPS 2020",
    "Bartoldson2024Adversarial": "Bartoldson et al., ICML 2024",
    "Carmon2019Unlabeled": "Carmon et al., NeurIPS 2019",
    "Chen2020Efficient": "Chen et al., arXiv 2020",
    "Chen2021LTD": "Chen and Lee, arXiv 2021",
    "Cui2020Learnable": "Cui et al., ICCV 2021",
    "Cui2023Decoupled": "Cui et al., NeurIPS 2024",
    "Engstrom2019Robustness": "Engstrom et al., GitHub 2019",
    "Gowal2020Uncovering": "Gowal et al., arXiv 2020",
    "Gowal2021Improving": "Gowal et al., NeurIPS 2021",
    "Hendrycks2019Using": "Hendrycks et al., ICML 2019",
    "Jia2022LAS-AT": "Jia et al., arXiv 2022",
    "Pang2022Robustness": "Pang et al., ICML 2022",
    "Rade2021Helper": "Rade and Moosavi-Dezfooli, OpenReview 2021",
    "Rebuffi2021Fixing": "Rebuffi et al., arXiv 2021",
    "Rice2020Overfitting": "Rice et al., ICML 2020",
    "Sehwag2021Proxy": "Sehwag et al., ICLR 2022",
    "Sitawarin2020Improving": "Sitawarin et al., arXiv 2020",
    "Standard": "Croce et al. 2021 (RobustBench)",
    "Wang2020Improving": "Wang et al., ICLR 2020",
    "Wang2023Better": "Wang et al., ICML 2023",
    "Wong2020Fast": "Wong et al., ICLR 2020",
    "Wu2020Adversarial": "Wu et al., NeurIPS 2020",
    "Xu2023Exploring": "Xu et al., ICLR 2023",
    "Zhang2019Theoretically": "Zhang et al., ICML 2019",
}

# (mean, std) inside the models.
_NONE = (None, None)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_ENGSTROM = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_HENDRYCKS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # 2 x - 1
_CHEN_CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_EXACT_CIFAR100 = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404))


def _robustbench(dataset: str, norm: str, epsilon: float, normalisation: tuple, rows: Iterable[tuple]) -> list[Published]:
    """Returns entries from rows of name, architecture, clean and AutoAttack accuracy, id of the file, and any notes."""
    return [
        Published(
            name, dataset, norm, epsilon, model, _CLASSES[dataset], *normalisation, clean, autoattack, "torch",
            f"{dataset}/{_THREATS[norm]}/{name}.pt", f"Google Drive {drive}", _PAPERS[name.partition("_")[0]], "; ".join(notes))
        for name, model, clean, autoattack, drive, *notes in rows]


def _deepmind(rows: Iterable[tuple]) -> list[Published]:
    """Returns entries from rows of the file's name, clean and AutoAttack accuracy, RobustBench's name of it, and any notes."""
    entries = []
    for name, clean, autoattack, twin, *notes in rows:
        dataset, norm, network, _ = name.split("_", 3)
        mean, std = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
        notes = [f"the network that RobustBench calls {dataset}/{_THREATS[norm]}/{twin}", *notes]
        entries.append(Published(
            name, dataset, norm, {"linf": 8 / 255, "l2": 128 / 255}[norm], f"dm_{network.replace('-', '_')}", _CLASSES[dataset],
            mean, std, clean, autoattack, "haiku", f"{name}.npy",
            f"storage.googleapis.com/dm-adversarial-robustness/{name}.npy", _PAPERS[twin.partition("_")[0]], "; ".join(notes)))
    return entries


PUBLISHED: tuple[Published, ...] = (
    *_robustbench("cifar10", "linf", 8 / 255, CIFAR10, [
        ("Bartoldson2024Adversarial_WRN-94-16", "dm_wrn94_16", 93.68, 73.71, "1g6o9H1b6vjoBi1USdCBt64C8B8LPiioX"),
        ("Wang2023Better_WRN-70-16", "dm_wrn70_16", 93.25, 70.69, "1-RF7ZSS-PAh6bfQcuqx4lh9bc9BUGnap"),
        ("Wang2023Better_WRN-28-10", "dm_wrn28_10", 92.44, 67.31, "1-6MYKJdECDVGaWjj6GgqvaT95BGKhUvI",
         "BDM-AT in the IGDM paper",
         "the authors' own file: huggingface.co/wzekai99/DM-Improves-AT, cifar10_linf_wrn28-10.pt"),
        ("Cui2023Decoupled_WRN-28-10", "dm_wrn28_10", 92.16, 67.73, "1-AaTrYt23WJFR22hXgBd-i6kjpsz6Hf2",
         "IKL-AT in the IGDM paper"),
        ("Xu2023Exploring_WRN-28-10", "dm_wrn28_10", 93.69, 63.89, "1k1uJI13ft0h0dfzuEihVpBvjBXwFRH2o"),
        ("Gowal2021Improving_28_10_ddpm_100m", "dm_wrn28_10", 87.50, 63.38, "12L8YE6VBgUDKyW6GMSNefSYj2gg4LEKx"),
        ("Gowal2021Improving_R18_ddpm_100m", "dm_preact_resnet18", 87.35, 58.50, "1-0EuCJashqSXEkkd1DOzFA4tH8KL2kim"),
        ("Gowal2020Uncovering_28_10_extra", "dm_wrn28_10", 89.48, 62.76, "1MBAWGxiZxKt-GfqEqtLcXcd3tAxPhvV2",
         "62.80 by AutoAttack alone"),
        ("Pang2022Robustness_WRN28_10", "dm_wrn28_10", 88.61, 61.04, "16ChNkterCp17BXv-xxqpfedb4u2_CjjS"),
        ("Rade2021Helper_ddpm", "dm_wrn28_10", 88.16, 60.97, "1AOF6LxnwgS5fCz_lVLYqs_wnUYuv6O7z"),
        ("Rade2021Helper_R18_ddpm", "dm_preact_resnet18", 86.86, 57.09, "1f2yJUo-jxCQNk589frzriv6wPyrQEZdX"),
        ("Rebuffi2021Fixing_28_10_cutmix_ddpm", "dm_wrn28_10", 87.33, 60.73, "1-0EChXbc6pOvx26O17av263bCeqIAz6s",
         "60.75 by AutoAttack alone"),
        ("Rebuffi2021Fixing_R18_ddpm", "dm_preact_resnet18", 83.53, 56.66, "1--dxE66AsgBSUsuK2sXCTrsYUV9B5f95"),
        ("Rice2020Overfitting", "wrn34_20", 85.34, 53.42, "1vC_Twazji7lBjeMQvAD9uEQxi9Nx2oG-"),
        ("Wong2020Fast", "preact_resnet18_raw", 83.34, 43.21, "1Re--_lf3jCEw9bnQqGkjw3J7v2tSZKrv"),
    ]),
    *_robustbench("cifar10", "linf", 8 / 255, _NONE, [
        ("Sehwag2021Proxy", "wrn34_10", 86.68, 60.27, "1QFA5fPMj2Qw4aYNG33PkFqiv_RTDWvzm"),
        ("Sehwag2021Proxy_R18", "resnet18", 84.59, 55.54, "1-ZgoSlD_AMhtXdnUElilxVXnzK2DcHuu"),
        ("Wu2020Adversarial_extra", "wrn28_10", 88.25, 60.04, "1-WJWpAZLlmc4gJ8XXNf7IETjnSZzaCNp", "RST-AWP"),
        ("Wu2020Adversarial", "wrn34_10", 85.36, 56.17, "13LBcgNvhFppCFG22i1xATrahFPfMgXGf", "TRADES-AWP"),
        ("Carmon2019Unlabeled", "wrn28_10", 89.69, 59.53, "15tUx-gkZMYx7BfEOw1GY5OKC-jECIsPQ", "RST"),
        ("Addepalli2021Towards_WRN34", "wrn34_10", 85.32, 58.04, "1-3vgjTNfSq7LSMKuayEQ-jLflAP196dB"),
        ("Addepalli2021Towards_RN18", "resnet18", 80.24, 51.06, "1-1DxecXz5U_xZ54DVdE-GVm71Tiox-Ri"),
        ("Addepalli2022Efficient_WRN_34_10", "wrn34_10", 88.71, 57.81, "1--dVDtZhAk4D2zMtTDwIGnImuCGxTcBA"),
        ("Addepalli2022Efficient_RN18", "resnet18", 85.71, 52.48, "1m5vhdzIUUKhDbsZdOG9z76Eyp6f4xe_f"),
        ("Chen2021LTD_WRN34_20", "wrn34_20", 86.03, 57.71, "1-5JmY9rapuGwCUc2nPvy7Rb_sn_dHhFm",
         "LTD", "a teacher of the AdaAD and DGAD papers"),
        ("Chen2021LTD_WRN34_10", "wrn34_10", 85.21, 56.94, "1-0RoQKYvHLNh7hZ71wJjSit1XtrJQo9D", "LTD in the IGDM paper"),
        ("Cui2023Decoupled_WRN-34-10", "wrn34_10", 85.31, 57.09, "1-ArD-TugRXUbH3VtM9qnzvby6NvdXNUN"),
        ("Wang2020Improving", "wrn28_10", 87.50, 56.29, "1T939mU4kXYt5bbvM55aT4fLBvRhyzjiQ", "MART"),
        ("Jia2022LAS-AT_34_10", "wrn34_10", 84.98, 56.26, "1-3l7xKhIPyes3O4QSz0HU6L-hfOoS0xD", "LAS-AT"),
        ("Andriushchenko2020Understanding", "preact_resnet18_raw", 79.84, 43.93, "1Uyvprd98bIyxfMjLdCZwm-NEJ-6GMVis",
         'the file holds the weights "best" and "last", and the accuracies are those of "last"'),
        ("Standard", "wrn28_10", 94.78, 0.0, "1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC", "trained on clean images"),
    ]),
    *_robustbench("cifar10", "linf", 0.031, _NONE, [
        ("Zhang2019Theoretically", "wrn34_10", 84.92, 53.08, "1hPz9QQwyM7QSuWu-ANG_uXR-29xtL8t_",
         "TRADES", "the RSLAD paper's teacher on CIFAR-10"),
    ]),
    *_robustbench("cifar10", "linf", 8 / 255, _HENDRYCKS, [
        ("Hendrycks2019Using", "wrn28_10", 87.11, 54.92, "1-DcJsYw2dNEOyF9epks2QS7r9nqBDEsw"),
    ]),
    *_robustbench("cifar10", "linf", 8 / 255, _ENGSTROM, [
        ("Engstrom2019Robustness", "resnet50", 87.03, 49.25, "1etqmQsksNIWBvBQ4r8ZFk_3FJlLWr8Rr"),
    ]),
    *_robustbench("cifar10", "l2", 0.5, CIFAR10, [
        ("Wang2023Better_WRN-70-16", "dm_wrn70_16", 95.54, 84.97, "101UyURyte05tJLA9VFRBN6UDLyn-0sJw"),
        ("Wang2023Better_WRN-28-10", "dm_wrn28_10", 95.16, 83.68, "1-fwKiJXEqHHUngt8wKsNnHuD4vAPvPXC"),
        ("Rebuffi2021Fixing_28_10_cutmix_ddpm", "dm_wrn28_10", 91.79, 78.80, "1-DUKcvfDzeWwt0NK7q2XvU-dIi8up8B0"),
        ("Rebuffi2021Fixing_R18_cutmix_ddpm", "dm_preact_resnet18", 90.33, 75.86, "1-AlwHsXU28tCOJsf9RKAZxVzbinzzQU3"),
        ("Rice2020Overfitting", "preact_resnet18", 88.67, 67.68, "1jo-31utiYNBVzLM0NxUEWz0teo3Z0xa7"),
    ]),
    *_robustbench("cifar10", "l2", 0.5, _NONE, [
        ("Wu2020Adversarial", "wrn34_10", 88.51, 73.66, "1M5AZ0EZQt7d2AlTmsnqZcfx91-x7YEAV", "TRADES-AWP"),
    ]),
    *_robustbench("cifar10", "l2", 0.5, _ENGSTROM, [
        ("Engstrom2019Robustness", "resnet50", 90.83, 69.24, "1O8rGa6xOUIRwQ-M4ESrCjzknby8TM2ZE"),
    ]),
    *_robustbench("cifar100", "linf", 8 / 255, CIFAR100, [
        ("Wang2023Better_WRN-70-16", "dm_wrn70_16", 75.22, 42.66, "1-yYcT73GP13c0y9HrgtpyB3NAfkGKgjY",
         "42.67 by AutoAttack alone"),
        ("Wang2023Better_WRN-28-10", "dm_wrn28_10", 72.58, 38.77, "1-jOu3wKWyw0XnBCXDGR32xn8Bw9GTJgh",
         "BDM-AT in the IGDM paper", "38.83 by AutoAttack alone",
         "the authors' own file: huggingface.co/wzekai99/DM-Improves-AT, cifar100_linf_wrn28-10.pt"),
        ("Cui2023Decoupled_WRN-28-10", "dm_wrn28_10", 73.85, 39.18, "15BwWdWbNfoarTEWWugicOVkTjh3nXH36",
         "IKL-AT in the IGDM paper"),
        ("Gowal2020Uncovering_extra", "dm_wrn70_16", 69.15, 36.88, "1LQBdwO2b391mg7VKcP6I0HIOpC6O83gn"),
        ("Gowal2020Uncovering", "dm_wrn70_16", 60.86, 30.03, "16I86x2Vv_HCRKROC86G4dQKgO3Po5mT3",
         "the RSLAD paper's teacher on CIFAR-100"),
        ("Rebuffi2021Fixing_28_10_cutmix_ddpm", "dm_wrn28_10", 62.41, 32.06, "1-P7cs82Tj6UVx7Coin3tVurVKYwXWA9p"),
        ("Rebuffi2021Fixing_R18_ddpm", "dm_preact_resnet18", 56.87, 28.50, "1-Qcph_EXw1SCYhDIl8cwqTQQy0sJKO8N"),
        ("Pang2022Robustness_WRN28_10", "dm_wrn28_10", 63.66, 31.08, "1VDDM_j5M4b6sZpt1Nnhkr8FER3kjE33M"),
        ("Rade2021Helper_R18_ddpm", "dm_preact_resnet18", 61.50, 28.88, "1-qUvfOjq6x4I8mZynfGtzzCH_nvqS_VQ"),
    ]),
    *_robustbench("cifar100", "linf", 8 / 255, _NONE, [
        ("Cui2023Decoupled_WRN-34-10", "wrn34_10", 65.76, 31.91, "1whziIioVu5SGI1fBKyc331IfG_1MgenN"),
        ("Addepalli2022Efficient_WRN_34_10", "wrn34_10", 68.75, 31.85, "1-3c-iniqNfiwGoGPHC3nSostnG6J9fDt"),
        ("Addepalli2022Efficient_RN18", "resnet18", 65.45, 27.67, "1-2hnxC7lZOQDqQbum4yPbtRtTND86I5N"),
        ("Jia2022LAS-AT_34_10", "wrn34_10", 64.89, 30.77, "1-338K2PUf5FTwk4cbUUeTNz247GrXaMG", "LAS-AT"),
        ("Chen2021LTD_WRN34_10", "wrn34_10", 64.07, 30.59, "1-I4NZyULdEWH46b4EaCTxuuRo4eFXsg_", "LTD in the IGDM paper"),
        ("Addepalli2021Towards_WRN34", "wrn34_10", 65.73, 30.35, "1-9GAld_105-jWBLXL73btmfOCwAqvz7Y"),
        ("Addepalli2021Towards_PARN18", "preact_resnet18", 62.02, 27.14, "1-FwVya1sDvdFXr0_ZBoXEJW9ukGC7hPK"),
        ("Sitawarin2020Improving", "wrn34_10", 62.82, 24.57, "1hbpwans776KM1SMbOxISkDx0KR0DW8EN",
         "figure 4 of the IGDM paper"),
    ]),
    *_robustbench("cifar100", "linf", 0.031, _NONE, [
        ("Cui2020Learnable_34_10_LBGAT6", "wrn34_10", 60.64, 29.33, "1TfIgvW3BAkL8jL9J7AAWFSLW3SSzJ2AE",
         "LBGAT", "figure 4 of the IGDM paper", "RobustBench's footnote gives the radius 0.031, its table 8/255"),
    ]),
    *_robustbench("cifar100", "linf", 8 / 255, _EXACT_CIFAR100, [
        ("Wu2020Adversarial", "wrn34_10", 60.38, 28.86, "1yWGvHmrgjtd9vOpV5zVDqZmeGhCgVYq7", "AT-AWP"),
        ("Rice2020Overfitting", "preact_resnet18", 53.83, 18.95, "1XXNZn3fZBOkD1aqNL1cvcD8zZDccyAZ6",
         "figure 4 of the IGDM paper"),
    ]),
    *_robustbench("cifar100", "linf", 8 / 255, _HENDRYCKS, [
        ("Hendrycks2019Using", "wrn28_10", 59.23, 28.42, "1If3tppQsCe5dN8Vbo9ff0tjlKQTTrShd", "figure 4 of the IGDM paper"),
    ]),
    *_robustbench("cifar100", "linf", 8 / 255, _CHEN_CIFAR100, [
        ("Chen2020Efficient", "wrn34_10", 62.15, 26.94, "1JEh95fvsfKireoELoVCBxOi12IPGFDUT", "figure 4 of the IGDM paper"),
    ]),
    *_deepmind([
        ("cifar10_linf_wrn70-16_with", 91.10, 65.88, "Gowal2020Uncovering_70_16_extra"),
        ("cifar10_linf_wrn28-10_with", 89.48, 62.80, "Gowal2020Uncovering_28_10_extra"),
        ("cifar10_linf_wrn70-16_without", 85.29, 57.20, "Gowal2020Uncovering_70_16"),
        ("cifar10_linf_wrn34-20_without", 85.64, 56.86, "Gowal2020Uncovering_34_20"),
        ("cifar10_linf_wrn106-16_cutmix_ddpm_v2", 88.50, 64.64, "Rebuffi2021Fixing_106_16_cutmix_ddpm"),
        ("cifar10_linf_wrn70-16_cutmix_ddpm_v2", 88.54, 64.25, "Rebuffi2021Fixing_70_16_cutmix_ddpm"),
        ("cifar10_linf_wrn28-10_cutmix_ddpm_v2", 87.33, 60.75, "Rebuffi2021Fixing_28_10_cutmix_ddpm"),
        ("cifar10_l2_wrn70-16_with", 94.74, 80.53, "Gowal2020Uncovering_extra"),
        ("cifar10_l2_wrn70-16_without", 90.90, 74.50, "Gowal2020Uncovering"),
        ("cifar10_l2_wrn70-16_cutmix_ddpm_v2", 92.41, 80.42, "Rebuffi2021Fixing_70_16_cutmix_ddpm"),
        ("cifar10_l2_wrn28-10_cutmix_ddpm_v2", 91.79, 78.80, "Rebuffi2021Fixing_28_10_cutmix_ddpm"),
        ("cifar100_linf_wrn70-16_with", 69.15, 36.88, "Gowal2020Uncovering_extra"),
        ("cifar100_linf_wrn70-16_without", 60.86, 30.03, "Gowal2020Uncovering", "the RSLAD paper's teacher on CIFAR-100"),
        ("cifar100_linf_wrn70-16_cutmix_ddpm", 63.56, 34.64, "Rebuffi2021Fixing_70_16_cutmix_ddpm"),
        ("cifar100_linf_wrn28-10_cutmix_ddpm", 62.41, 32.06, "Rebuffi2021Fixing_28_10_cutmix_ddpm"),
    ]),
)


def find(name: str, *, classes: int | None = None) -> Published | None:
    """Returns the published classifier of that name, or None where there is none.

    Args:
      name: an identifier, such as "cifar10/Linf/Rice2020Overfitting", with the threat in any case; or its last part alone,
        which `classes` narrows, and then L-infinity goes before L2.
      classes: number of logits that the caller wants; None: any.

    Raises:
      InputError: a name without its folders is published for both data sets and `classes` is None, or no entry of that name
        has so many classes.
    """
    *folders, last = str(name).split("/")
    entries = [entry for entry in PUBLISHED if entry.name == last]
    if folders:
        wanted = [folder.lower() for folder in folders[1:]]
        entries = [entry for entry in entries if entry.dataset == folders[0] and [entry.norm] == wanted]
    if not entries:
        return None
    fitting = [entry for entry in entries if classes is None or entry.classes == classes]
    if not fitting:
        published = " or ".join(str(count) for count in sorted({entry.classes for entry in entries}))
        raise InputError(
            f'model name is "{name}", which has {published} classes, not {classes}; choose another name, or as many classes: '
            + ", ".join(entry.identifier for entry in entries))
    if len({entry.dataset for entry in fitting}) > 1:
        raise InputError(
            f'model name is "{name}", which is published for {" and ".join(sorted({entry.dataset for entry in fitting}))}; '
            "name one: " + ", ".join(entry.identifier for entry in fitting))
    return min(fitting, key=lambda entry: list(_THREATS).index(entry.norm))


def names() -> list[str]:
    """Returns the identifiers of all entries."""
    return [entry.identifier for entry in PUBLISHED]


def table(text: str = "") -> str:
    """Returns a table for the console, a header and one line per entry; "-" stands for what no source gives.

    Args:
      text: only entries that contain it, in any case, in their identifier, architecture, paper or note.
    """
    rows = [("identifier", "model", "classes", "threat", "clean", "AutoAttack", "file", "where")]
    for entry in PUBLISHED:
        if any(text.lower() in field.lower() for field in (entry.identifier, entry.model, entry.paper, entry.note)):
            threat = f"{_THREATS[entry.norm]} {_radius(entry.epsilon)}"
            accuracies = ["-" if value is None else f"{value:.2f}" for value in (entry.clean, entry.autoattack)]
            rows.append((entry.identifier, entry.model, str(entry.classes), threat, *accuracies, entry.file, entry.where))
    if len(rows) == 1:
        return f'no published classifier contains "{text}"; an empty text lists all {len(PUBLISHED)}'
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = [str.ljust, str.ljust, str.rjust, str.ljust, str.rjust, str.rjust, str.ljust, str.ljust]
    lines = [[pad(cell, width) for pad, cell, width in zip(align, row, widths)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _radius(epsilon: float) -> str:
    """Returns "8/255" or "0.031"."""
    return f"{round(255 * epsilon)}/255" if 255 * epsilon == round(255 * epsilon) else f"{epsilon:g}"
