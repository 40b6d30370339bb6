"""A run directory is claimed by the configuration that it holds, whatever fields have been added since."""

import json

import pytest

from configs import digits
from jaxrd.config import Config
from jaxrd.training.checks import check_claim
from tests.support import assert_input_error

# Since the first runs; each has a default that leaves a run as it was.
YOUNGER = {
    "optimizer": ("name", "scaling", "scaling_batch", "trust_coefficient", "betas"),
    "training": ("examples", "swa_start", "swa_every", "label_smoothing", "keep_every")}


@pytest.fixture
def old_run(tmp_path):
    """A function from an argument of the digits' file to a directory that such a run left before those fields were."""
    def make(argument):
        values = Config.from_dict(digits.get_config(argument)).to_dict()
        for section, fields in YOUNGER.items():
            for field in fields:
                del values[section][field]
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return make


@pytest.mark.parametrize("argument", ["teacher", "pgd_at", "ard+igdm"])
def test_a_run_that_is_older_than_a_field_goes_on(old_run, argument):
    check_claim(old_run(argument), Config.from_dict(digits.get_config(argument)))


def test_how_it_is_watched_and_kept_may_change(old_run):
    check_claim(old_run("pgd_at"), Config.from_dict(digits.get_config(
        "pgd_at,training.checkpoint_every=10%,training.log_every=1 epoch,training.keep_every=200")))


@pytest.mark.parametrize("override, field", [
    ("optimizer.name=lars", "optimizer.name = 'sgd'"), ("optimizer.scaling=linear", "optimizer.scaling = 'none'"),
    ("optimizer.warmup=5%", "optimizer.warmup = 0.1"), ("training.label_smoothing=0.1", "training.label_smoothing = 0.0"),
    ("training.weight_average=0,training.swa_start=0.5", "training.swa_start = None")])
def test_what_a_run_computes_may_not(old_run, override, field):
    config = Config.from_dict(digits.get_config(f"pgd_at,{override}"))
    assert_input_error(lambda: check_claim(old_run("pgd_at"), config), f"config.{field}", "--workdir")
