"""The PyTorch side of the benchmark takes the very steps that jaxrd takes: what is timed is the same work."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxrd import ThreatModel, distillation, models
from jaxrd.config import OptimizerConfig
from jaxrd.distillation import Context, InnerMaximisation
from jaxrd.models import weights
from jaxrd.models.weights import layouts
from jaxrd.training import parallel, schedule, state as states, step as steps_of_jaxrd
from launch.pytorch import jobs

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")

# After the line that skips where there is no torch.
from launch.pytorch import networks, steps

pytestmark = pytest.mark.usefixtures("quick_compilation", "exact_products", "one_torch_thread")
BATCH, SHAPE, CLASSES = 8, (8, 8, 3), 5
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(0, 1, (BATCH, *SHAPE)).astype(np.float32)
NOISE = GENERATOR.uniform(-0.04, 0.04, IMAGES.shape).astype(np.float32)
JOB = jobs.Job("pgd_at", "resnet6_w8", None, CLASSES, SHAPE, BATCH, attack_steps=2, step_size=0.02, epsilon=0.05, igdm=3.0,
               weight_decay=0.05)
TEACHER = "wrn10_1"
METHODS = pytest.mark.parametrize("name", jobs.METHODS)
FLAVOURS = pytest.mark.parametrize("flavour", jobs.FLAVOURS)


@functools.cache
def model_of(name):
    """A model and variables of which none is what it begins as."""
    model = models.create(name, classes=CLASSES, image_shape=SHAPE)
    generator = np.random.default_rng(1)

    def moved(path, leaf):
        kind = path[-1].key
        if kind in ("scale", "var"):
            return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return leaf + (0.2 if kind in ("bias", "mean") else 0.02) * generator.normal(size=leaf.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(moved, jax.device_get(model.init(jax.random.key(2))))


def module_of(name):
    """The same network in PyTorch, by way of the state dict that jaxrd exports."""
    module = networks.create(name, CLASSES)
    state = weights.state_dict(*model_of(name))
    module.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return module


@functools.cache
def labels():
    """Of the teacher, right for every other image, so that DGAD meets both cases."""
    model, variables = model_of(TEACHER)
    guesses = np.argmax(models.logits_fn(model, variables)(IMAGES), axis=1)
    return np.where(np.arange(BATCH) % 2, guesses, (guesses + 1) % CLASSES).astype(np.int32)


def truth():
    return torch.tensor(labels(), dtype=torch.int64)


def nchw(images):
    return torch.tensor(np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2))))


class Torch:
    """Both networks and the optimiser of a job in PyTorch."""

    def __init__(self, job, network=steps.Network):
        self.job, self.student, self.teacher = job, network(module_of(job.student)), None
        if job.teacher:
            self.teacher = network(module_of(job.teacher))
            self.teacher.train(False)
            self.teacher.module.requires_grad_(False)
        self.optimizer = torch.optim.SGD(
            self.student.module.parameters(), job.learning_rate, job.momentum, weight_decay=job.weight_decay)

    def step(self, images=IMAGES, **changes):
        return float(steps.train_step(
            dataclasses.replace(self.job, **changes), self.student, self.teacher, self.optimizer, nchw(images), truth(),
            nchw(images + NOISE)))


def job_of(name, **changes):
    needs_teacher = distillation.method(name).needs_teacher
    return dataclasses.replace(JOB, method=name, teacher=TEACHER if needs_teacher else None, **changes)


def method_of(name, **options):
    return distillation.method(name, igdm=JOB.igdm if name.endswith("+igdm") else None, **options)


def with_biased_variance(module, before):
    """The module's state dict with what moved in its running variances divided by n, as jaxrd has it, not by n - 1."""
    state, counts, hooks = {key: value.clone().numpy() for key, value in module.state_dict().items()}, {}, []
    for key, part in module.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            hooks.append(part.register_forward_hook(
                lambda part, inputs, output, key=key: counts.update({key: output.numel() // output.shape[1]})))
    module.eval()(nchw(IMAGES))
    for hook in hooks:
        hook.remove()
    for key, count in counts.items():
        kept = 0.9 ** state[f"{key}.num_batches_tracked"] * before[f"{key}.running_var"]
        state[f"{key}.running_var"] = kept + (state[f"{key}.running_var"] - kept) * (count - 1) / count
    return state


@pytest.mark.parametrize("name", ["resnet6_w8", "resnet10_w4", "resnet18_w4", "resnet50_w4", "wrn10_1", "wrn16_2"])
def test_networks_are_those_of_jaxrd(name):
    module = networks.create(name, CLASSES)
    exported = [entry.key for entry in layouts.entries(name, CLASSES)]
    assert [key for key in module.state_dict() if not key.endswith(layouts.COUNTER)] == exported
    model, variables = model_of(name)
    expected = models.logits_fn(model, variables)(IMAGES)
    with torch.no_grad():
        logits = module_of(name).eval()(nchw(IMAGES))
    assert np.std(expected) > 1e-2
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@METHODS
def test_two_updates_are_those_of_jaxrd(name):
    """With the adversarial images given: of an attack in float32 a sign may be a matter of rounding."""
    job, student, variables = job_of(name), *model_of(JOB.student)
    method = method_of(name)
    given = dataclasses.replace(
        method.attack, generate=lambda key, context, inner: {"adversarial": context.images + NOISE})
    recipe = steps_of_jaxrd.Recipe(
        dataclasses.replace(method, attack=given), student, model_of(TEACHER)[0] if job.teacher else None,
        InnerMaximisation(ThreatModel("linf", job.epsilon), job.step_size, job.attack_steps),
        schedule.optimizer(OptimizerConfig(learning_rate=job.learning_rate, weight_decay=job.weight_decay), 100), steps=100)
    mesh = parallel.data_mesh(jax.devices()[:1])
    teacher = parallel.replicate(model_of(TEACHER)[1], mesh) if job.teacher else None
    step, before = steps_of_jaxrd.make_train_step(recipe, mesh), weights.state_dict(student, variables)
    errors = []
    for shift in range(3):
        images = np.roll(IMAGES, shift, axis=1)
        state = states.create(student, recipe.optimizer, jax.random.key(0), weight_average=False)
        # Copies: the step consumes its state.
        state = parallel.replicate(state.replace(**jax.tree.map(np.copy, variables)), mesh)
        ours = Torch(job)
        for number in (1, 2):
            state, metrics = step(state, teacher, {"images": images, "labels": labels()})
            loss = steps.update(
                dataclasses.replace(job, progress=number / recipe.steps), ours.student, ours.teacher, ours.optimizer,
                nchw(images), nchw(images + NOISE), truth())
            assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-4)
        moved = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        expected, found = weights.state_dict(student, moved), with_biased_variance(ours.student.module, before)
        sizes = {key: np.abs(expected[key] - before[key]).max() for key in expected if not key.endswith(layouts.COUNTER)}
        assert min(sizes.values()) > 1e-6
        errors.append(max(np.abs(found[key] - expected[key]).max() / size for key, size in sizes.items()))
    # Of one batch a ReLU may have an input that is 0 to rounding, and fall on either side.
    assert np.median(errors) < 1e-3, errors


@pytest.mark.parametrize("start", ["inside", "outside"])
@pytest.mark.parametrize("name", jobs.ATTACKS)
def test_attacks_are_those_of_jaxrd(name, start, monkeypatch):
    """In float64, where no sign is a matter of rounding, on networks of one hidden layer."""
    job = job_of(name, attack_steps=6)
    noise = NOISE[..., :1] if start == "inside" else 10 * NOISE[..., :1]
    with jax.enable_x64(True):
        images = np.asarray(IMAGES[..., :1], np.float64)
        monkeypatch.setattr(ThreatModel, "random_start", lambda threat, key, images, kind, project: images + noise)
        generator = np.random.default_rng(3)
        arrays = [(generator.normal(size=(16, 64)) / 4, generator.normal(size=(CLASSES, 16))) for _ in range(2)]

        def ours(index, points):
            first, second = arrays[index]
            return jax.numpy.tanh(points.reshape(BATCH, -1) @ first.T) @ second.T

        def theirs(index):
            first, second = torch.nn.Linear(64, 16, bias=False), torch.nn.Linear(16, CLASSES, bias=False)
            first.weight.data, second.weight.data = map(torch.tensor, arrays[index])
            return steps.Network(torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.Tanh(), second))

        student, teacher = functools.partial(ours, 0), functools.partial(ours, 1)
        context = Context(images, jax.numpy.asarray(labels()), student, teacher, teacher(images))
        inner = InnerMaximisation(ThreatModel("linf", job.epsilon), job.step_size, job.attack_steps)
        expected = np.asarray(method_of(name).attack.generate(jax.random.key(0), context, inner)["adversarial"])
        clean = torch.tensor(np.asarray(context.teacher_clean))
    points = steps.attack(job, theirs(0), theirs(1), nchw(images), truth(), clean, nchw(images + noise))
    assert points.dtype == torch.float64
    np.testing.assert_allclose(np.transpose(points.numpy(), (0, 2, 3, 1)), expected, rtol=0, atol=1e-6)
    assert np.abs(expected - images).max() > 0.9 * job.epsilon


@METHODS
def test_published_forwards_come_to_the_same_update(name):
    least, published = Torch(job_of(name)), Torch(job_of(name, flavour="published"))
    assert published.step() == pytest.approx(least.step(), rel=1e-5)
    theirs = dict(published.student.module.named_parameters())
    for key, value in least.student.module.named_parameters():
        np.testing.assert_allclose(theirs[key].detach(), value.detach(), rtol=0, atol=1e-6, err_msg=key)


@METHODS
def test_forwards_are_in_the_order_of_jaxrds(name):
    method = method_of(name)
    least = steps.FORWARDS["least"][name]
    assert least.student == tuple(view.name for view in method.student_views)
    assert set(least.teacher) == {view.name for view in method.teacher_views}
    if name != "trades+igdm":  # of which jaxrd knows no published code
        official = method_of(name, preset="official")
        assert steps.FORWARDS["published"][name].student == tuple(view.name for view in official.student_views)


class Counting(steps.Network):
    """Counts batches forwarded and differentiated, by the mode the network is in."""

    def __init__(self, module):
        super().__init__(module)
        self.forwards, self.backwards = {True: 0, False: 0}, {True: 0, False: 0}

    def __call__(self, images):
        mode, logits = self.module.training, super().__call__(images)
        self.forwards[mode] += 1
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.backwards.update({mode: self.backwards[mode] + 1}))
        return logits


K = JOB.attack_steps


@pytest.mark.parametrize("name, attack, student, teacher, published", [
    # As in the README, under "What a step costs": forwards of the student in the attack and after it, and of the teacher; then
    # the published code's, after the attack.
    ("pgd_at", K, 1, 0, (1, 0)),
    ("trades", K + 1, 2, 0, (3, 0)),
    ("ard", K, 1, 1, (2, 1)),
    ("rslad", K, 2, 1, (2, 1)),
    ("rslad+igdm", K, 3, 3, (4, 4)),
    ("adaad", K, 1, K + 1, (2, K + 2)),
    ("adaad+igdm", K, 2, K + 2, (4, K + 4)),
    ("dgad", K, 2, K + 2, (2, K + 2)),
    # And of those that are not in it.
    ("ard+igdm", K, 2, 3, (3, 3)),
    ("pgd_at+igdm", K, 2, 2, (2, 2)),
    ("trades+igdm", K + 1, 3, 2, (4, 2)),
    ("dgad+igdm", K, 3, K + 3, (3, K + 3)),
])
def test_a_step_forwards_what_the_readme_says(name, attack, student, teacher, published):
    for flavour, in_attack, after, of_teacher in (
            ("least", attack, student, teacher),
            ("published", 2 * K if name.startswith("trades") else attack, *published)):
        counted = Torch(job_of(name, flavour=flavour), Counting)
        counted.step()
        assert counted.student.forwards == {False: in_attack, True: after}, flavour
        assert counted.student.backwards == {False: K, True: after}, flavour
        if counted.teacher is not None:
            climbed = K if name.startswith(("adaad", "dgad")) else 0
            assert counted.teacher.forwards == {False: of_teacher, True: 0}, flavour
            assert counted.teacher.backwards == {False: climbed, True: 0}, flavour


@METHODS
@FLAVOURS
def test_only_published_code_lets_the_mirrored_view_move_the_running_statistics(name, flavour):
    ours = Torch(job_of(name, flavour=flavour))
    ours.step()
    moves = [view for view in steps.FORWARDS[flavour][name].student if flavour == "published" or view != "mirrored"]
    assert int(ours.student.module.bn1.num_batches_tracked) == len(moves)
    assert all(layer.track_running_stats for layer in ours.student.module.modules()
               if isinstance(layer, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["pgd_at", "rslad"])
def test_random_starts(name):
    def noise(**changes):
        job = job_of(name, attack_steps=0, **changes)
        points = steps.attack(job, Torch(job).student, None, images, None)
        return (points - images).abs().numpy()

    torch.manual_seed(0)
    images = nchw(np.full_like(IMAGES, 0.5))
    noises = noise()
    if name == "pgd_at":  # uniform in the ball
        assert 0.95 * JOB.epsilon < noises.max() <= 1.0001 * JOB.epsilon
        assert noises.mean() == pytest.approx(JOB.epsilon / 2, rel=0.1)
    else:  # normal, of deviation 0.001
        assert np.sqrt(np.mean(noises**2)) == pytest.approx(0.001, rel=0.1)
    assert noise(start="none").max() == 0
    images = nchw(np.ones_like(IMAGES))
    assert steps.project(JOB, images, images + 1).max() == 1
    for project_start in (True, False):
        job = job_of(name, attack_steps=0, project_start=project_start)
        assert (steps.attack(job, Torch(job).student, None, images, None).max() <= 1) == project_start


def test_under_autocast_the_logits_are_near_and_in_float32():
    module = module_of(JOB.student).eval()
    exact, near = steps.Network(module)(nchw(IMAGES)), steps.Network(module, bfloat16=True)(nchw(IMAGES))
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of its own compiler
def test_compiled_networks_take_the_same_step():
    job = job_of("adaad+igdm", attack_steps=1)
    eager, compiled = Torch(job), Torch(job, functools.partial(steps.Network, compiled=True))
    try:
        loss = compiled.step()
    except Exception as error:
        if "compiler" in str(error).lower():
            pytest.skip("torch.compile needs a C++ compiler")
        raise
    assert loss == pytest.approx(eager.step(), rel=1e-4)
    theirs = dict(compiled.student.module.named_buffers()) | dict(compiled.student.module.named_parameters())
    for key, value in {**dict(eager.student.module.named_buffers()), **dict(eager.student.module.named_parameters())}.items():
        np.testing.assert_allclose(theirs[key].detach(), value.detach(), rtol=1e-3, atol=1e-4, err_msg=key)
