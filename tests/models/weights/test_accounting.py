"""Every key of a checkpoint is a weight, a counter, dead, the normalisation, or unused; and the right dictionary is taken."""

import numpy as np
import pytest

from jaxrd.models.weights import layouts
from jaxrd.models.weights.accounting import account, contents
from tests.support import assert_input_error

LAYOUT = layouts.entries("wrn10_1", 5)
KEYS = [entry.key for entry in LAYOUT]
REST = {key: None for key in KEYS}


def weights(seed=0, prefix="", name="wrn10_1"):
    draw = np.random.default_rng(seed)
    return {prefix + entry.key: draw.normal(size=entry.torch_shape).astype(np.float32) for entry in layouts.entries(name, 5)}


def find(content, **options):
    return account("x.pt", content, KEYS, **options)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "module.0.", "module.1.", "_orig_mod.", "net.0."])
def test_a_prefix_is_removed_whatever_it_is(prefix):
    state = weights(prefix=prefix)
    accounts = find({"state_dict": state, "epoch": 7})
    assert list(accounts.arrays) == KEYS and accounts.prefix == prefix and accounts.container == "state_dict"
    assert all(accounts.arrays[key] is state[prefix + key] for key in KEYS) and accounts.unused == ()


def test_every_key_is_accounted_for():
    state = weights(prefix="module.")
    others = {
        "module.bn1.num_batches_tracked": np.int64(8), "n_averaged": np.int64(3),
        "module.sub_block1.layer.0.conv1.weight": np.zeros((4, 4, 3, 3)),
        "module.sub_block1.layer.0.bn1.running_mean": np.zeros(4),
        "module.mu": np.reshape([0.1, 0.2, 0.3], (1, 3, 1, 1)), "module.sigma": np.reshape([0.4, 0.5, 0.6], (1, 3, 1, 1)),
        "module.fc_rotation.weight": np.zeros((4, 64)), "other": np.zeros(3)}
    accounts = find(state | others)
    assert list(accounts.arrays) == KEYS
    assert accounts.counters == {"bn1.num_batches_tracked": 8, "n_averaged": 3}
    assert accounts.dead == ("module.sub_block1.layer.0.conv1.weight", "module.sub_block1.layer.0.bn1.running_mean")
    assert accounts.normalization == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert accounts.unused == ("module.fc_rotation.weight", "other")


def test_single_numbers_beside_the_weights_are_no_reason_to_pass_them_over():
    average = weights(1) | {"decay": np.float32(0.999), "num_updates": np.int64(7)}
    accounts = find({"state_dict": weights(), "ema": average})
    assert accounts.container == "ema" and accounts.scalars == ("decay", "num_updates") and accounts.unused == ()
    assert accounts.others == ("state_dict",)


def test_an_average_without_statistics_is_named():
    partial = {key: value for key, value in weights(1).items() if "running" not in key}
    accounts = find({"state_dict": weights(), "ema": partial, "optimizer": {"lr": np.ones(3)}})
    assert accounts.container == "state_dict" and accounts.partial == ("ema",)


def test_a_counter_that_is_no_count_is_a_number_like_others():
    accounts = find(weights() | {"bn1.num_batches_tracked": np.float32(np.inf)})
    assert accounts.counters == {} and accounts.scalars == ("bn1.num_batches_tracked",)


def test_a_huge_mean_is_not_read():
    class Huge:
        shape, dtype = (2**40,), np.dtype(np.float32)

        def array(self):
            raise AssertionError

    accounts = find(weights() | {"mean": Huge(), "std": Huge()})
    assert accounts.normalization is None and accounts.unused == ("mean", "std")


def test_dictionaries_in_a_list_are_found():
    accounts = find([{"epoch": 1}, ({"net": weights()}, 3)])
    assert accounts.container == "1.0.net" and list(accounts.arrays) == KEYS


def test_two_networks_in_one_dictionary_are_told_apart_by_their_prefixes():
    content = weights(0, "student.") | weights(1, "teacher.") | {"teacher.bn1.num_batches_tracked": np.int64(3)}
    accounts = find({"net": content})
    assert accounts.container == "net.student" and accounts.others == ("net.teacher",) and accounts.unused == ()
    assert accounts.arrays[KEYS[0]] is content["student." + KEYS[0]] and accounts.counters == {}
    other = find({"net": content}, container="net.teacher")
    assert other.arrays[KEYS[0]] is content["teacher." + KEYS[0]] and other.counters == {"bn1.num_batches_tracked": 3}
    alone = find(weights(0) | weights(1, "ema."))
    assert alone.container == "ema" and alone.others == ("",)


def test_a_counter_in_a_vector_of_one_is_a_counter():
    assert find(weights() | {"bn1.num_batches_tracked": np.array([5])}).counters == {"bn1.num_batches_tracked": 5}


def test_half_a_normalisation_is_none_and_unused():
    accounts = find(weights() | {"mean": np.zeros(3)})
    assert accounts.normalization is None and accounts.unused == ("mean",)


@pytest.mark.parametrize("names, taken", [
    (["state_dict", "ema_state_dict"], "ema_state_dict"),
    (["state_dict", "state_dict_ema"], "state_dict_ema"),
    (["net", "swa"], "swa"),
    (["model_state_dict", "unaveraged_model_state_dict"], "model_state_dict"),
    (["best", "last"], "last"),
    (["best", "model"], "model"),
    (["best"], "best"),
    (["student", "teacher"], "student"),
])
def test_of_several_the_one_that_its_authors_evaluate_is_taken(names, taken):
    content = {name: weights(seed) for seed, name in enumerate(names)}
    for order in (content, dict(reversed(content.items()))):
        accounts = find(order)
        assert accounts.container == taken and accounts.arrays[KEYS[0]] is content[taken][KEYS[0]]
        assert set(accounts.others) == {*names} - {taken}
    other = names[-1] if names[-1] != taken else names[0]
    assert find(content, container=other).arrays[KEYS[0]] is content[other][KEYS[0]]


def test_a_dictionary_of_another_network_is_passed_over():
    content = {"teacher": {"state_dict": weights(name="wrn16_1")}, "student": {"net": weights()},
               "optimizer": {"state": {0: {"momentum_buffer": np.zeros(4)}}, "param_groups": [{"lr": 0.1}]}}
    # The larger network has every key of the smaller, which is no reason to take it.
    accounts = find(content)
    assert accounts.container == "student.net" and accounts.unused == ()


def test_what_is_missing_is_left_to_the_caller():
    state = weights(prefix="module.")
    del state["module.bn1.running_var"]
    accounts = find({"state_dict": state})
    assert [key for key in KEYS if key not in accounts.arrays] == ["bn1.running_var"] and accounts.prefix == "module."


def test_no_tensors_and_no_such_dictionary_are_one_line():
    assert_input_error(lambda: find({"epoch": 3, "args": {"lr": 0.1}}), "x.pt", "no tensors", "epoch, args")
    assert_input_error(lambda: find([1, 2]), "x.pt", "no tensors", "list")
    assert_input_error(lambda: find({}), "x.pt", "empty")
    content = {"state_dict": weights(), "ema": weights(1)}
    assert_input_error(lambda: find(content, container="swa"), '"swa"', '"state_dict", "ema"')


def test_dictionaries_that_share_each_other_end():
    shared = {"epoch": 1}
    for _ in range(60):  # 2^60 paths
        shared = {"a": shared, "b": shared}
    assert_input_error(lambda: find(shared), "no tensors")
    assert find({"deep": shared, "net": weights()}).container == "net"


def test_contents_are_those_of_the_largest_dictionary_without_prefix():
    shapes = contents({"ema": {"module.fc.weight": np.zeros((5, 64)), "module.conv1.weight": np.zeros((16, 3, 3, 3))},
                       "small": {"x": np.zeros(2)}})
    assert shapes == {"fc.weight": (5, 64), "conv1.weight": (16, 3, 3, 3)}
    assert layouts.identify(contents({"state_dict": weights(prefix="module.")})) == ("wrn10_1", 5)
