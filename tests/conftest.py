"""Four fake CPU devices for every test, before JAX starts: what runs on one device must run the same on four."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 4)
