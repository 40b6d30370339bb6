"""The child process that times PyTorch: `python -m launch.pytorch.worker`, a line in, a line out, all of them JSON.

The first line in is a `Job`; the answer says what it runs on, {"torch", "device", "threads"}, or {"error"}. After that each
line names a variant: "warm_up NAME" builds it and runs its first step, compilation and all, "NAME" runs one more and "NAME N"
so many, one right after another; answered by {"seconds"}, of a step, and, of the warm-up on a GPU, {"memory"}, the peak in
bytes of a second step, when nothing is tried out or compiled any more. A variant that fails is answered by {"error": one
line}, let go, and built anew should it be asked for again.
"""

import json
import os
import sys
import time

import torch

from launch.pytorch import jobs, networks, steps
from launch.pytorch.jobs import VARIANTS, Job


class Bench:
    """The variants of one job, each with weights of its own, and one batch of random images.

    Raises:
      ValueError: a device that this PyTorch has not.
    """

    def __init__(self, job: Job):
        if job.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"PyTorch {torch.__version__} finds no GPU here; install its CUDA build, or time on CPU")
        self.job, self.device = job, torch.device(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if job.threads:
            torch.set_num_threads(job.threads)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.tf32
        torch.manual_seed(job.seed)
        height, width, channels = job.image_shape
        self.images = torch.rand(job.batch_size, channels, height, width).to(self.device)
        self.labels = torch.randint(job.classes, (job.batch_size,)).to(self.device)
        self._built = {}

    def facts(self) -> dict:
        cuda = self.device.type == "cuda"
        return {"torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu",
                "threads": torch.get_num_threads()}

    def warm_up(self, variant: str) -> dict:
        """Builds a variant and runs its first step."""
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        began = time.perf_counter()
        self._built[variant] = self._build(variant)
        self.step(variant)
        answer = {"seconds": time.perf_counter() - began}
        if not cuda:
            return answer
        torch.cuda.reset_peak_memory_stats()
        self.step(variant)
        return answer | {"memory": torch.cuda.max_memory_allocated() - before}

    def step(self, variant: str, times: int = 1) -> dict:
        """Runs so many steps of a variant, from images on the device to the end of the last optimiser's step."""
        if variant not in self._built:
            self._built[variant] = self._build(variant)
        student, teacher, optimizer, images = self._built[variant]
        self._wait()
        began = time.perf_counter()
        for _ in range(times):
            steps.train_step(self.job, student, teacher, optimizer, images, self.labels)
        self._wait()
        return {"seconds": (time.perf_counter() - began) / times}

    def let_go(self, variant: str) -> None:
        """Gives back the memory of a variant that failed."""
        self._built.pop(variant, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, name: str) -> tuple:
        if name not in VARIANTS:
            raise ValueError(f'variant "{name}" is not known; known: {", ".join(VARIANTS)}')
        job, variant = self.job, VARIANTS[name]
        if variant.compiled:
            # Networks of one class share the count of their programs, over all variants: above the limit of 8, PyTorch would
            # quietly run the rest eagerly.
            torch._dynamo.config.cache_size_limit = 64
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        torch.manual_seed(job.seed)  # every variant begins with the same weights

        def network(architecture):
            module = networks.create(architecture, job.classes, job.image_shape[2])
            module = module.to(self.device, memory_format=layout)
            return steps.Network(module, bfloat16=variant.bfloat16, compiled=variant.compiled)

        student, teacher = network(job.student), None
        if job.teacher is not None:
            teacher = network(job.teacher)
            teacher.train(False)
            teacher.module.requires_grad_(False)
        optimizer = torch.optim.SGD(
            student.module.parameters(), job.learning_rate, job.momentum, weight_decay=job.weight_decay, nesterov=job.nesterov)
        return student, teacher, optimizer, self.images.contiguous(memory_format=layout)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def one_line(error: BaseException) -> str:
    """As `jaxrd.errors.one_line`, whose package would import JAX."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def main() -> None:
    # What libraries and compilers print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(fields):
        print(json.dumps(fields), file=answers, flush=True)

    try:
        bench = Bench(Job(**json.loads(sys.stdin.readline())))
    except Exception as error:
        return answer({"error": one_line(error)})
    answer(bench.facts())
    for line in sys.stdin:
        asked, _, rest = line.strip().partition(" ")
        variant = rest if asked == "warm_up" else asked
        try:
            fields = bench.warm_up(variant) if asked == "warm_up" else bench.step(variant, int(rest or 1))
        except Exception as error:
            fields = {"error": one_line(error)}
        if "error" in fields:  # by now the exception, which holds on to the step's memory, is gone
            bench.let_go(variant)
        jobs.settle()
        answer(fields)


if __name__ == "__main__":
    main()
