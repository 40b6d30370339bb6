"""AutoAttack on a trained model: as strong as many restarts of long PGD, which knows three losses and takes far longer."""

import jax
import numpy as np
import pytest

from configs import digits
from jaxrd import ThreatModel, attacks, data, models
from jaxrd.config import Config
from jaxrd.training import loop

COUNT = 300


@pytest.mark.slow
def test_no_exhaustive_search_breaks_more_than_one_point_more(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    config = Config.from_dict(digits.get_config("pgd_at"))
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    logits_fn = models.logits_fn(*models.restore(tmp_path / "run"))
    test = data.open_dataset("jaxrd_digits").test
    images, labels = np.asarray(data.augment.to_float(test.images[:COUNT])), test.labels[:COUNT]
    threat = ThreatModel(config.threat.norm, config.threat.epsilon)

    result = attacks.autoattack(jax.random.key(0), logits_fn, images, labels, threat=threat, say=None)
    assert result.flags == [] and 0.2 < result.accuracy < result.per_attack_accuracy["apgd-ce"] < 0.6
    left = np.flatnonzero(result.robust)
    broken = np.zeros(len(left), bool)
    for number, loss in enumerate(("ce", "margin", "dlr")):
        broken |= np.asarray(attacks.pgd_attack(
            jax.random.key(number), logits_fn, images[left], labels[left], threat=threat, loss=loss, steps=1000,
            step_size=threat.epsilon / 10, restarts=3).fooled)
    assert broken.sum() <= 0.01 * COUNT
    # And what it found is adversarial to the model as one would call it, image by image.
    predictions = np.concatenate([np.argmax(np.asarray(logits_fn(image[None])), axis=1) for image in result.images])
    np.testing.assert_array_equal(predictions == labels, result.robust)
