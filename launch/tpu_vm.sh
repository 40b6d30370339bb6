#!/bin/sh
# Runs a jaxrd command on every host of a TPU VM slice, with gcloud from your own machine:
#
#     TPU=my-tpu ZONE=my-zone sh launch/tpu_vm.sh launch.train --config=configs/cifar10.py:ard+igdm --workdir=/shared/runs/a
#
# Each host is one process with all of its chips. They find each other through the TPU VM's metadata, so no address is given.
# Before it, once: the repository and its .venv with jax[tpu] in DIRECTORY on every host, and a disk that all of them share
# for run directory and data. After a preemption: make the slice again, and give the same command again. Not tested on any.
set -eu

: "${TPU:?name of the TPU VM: TPU=... ZONE=... sh launch/tpu_vm.sh launch.train ...}"
: "${ZONE:?zone of the TPU VM: TPU=... ZONE=... sh launch/tpu_vm.sh launch.train ...}"
directory=${DIRECTORY:-jaxrd}

# Quoted once more for the shell of each host.
command=
for argument in "$@"; do
    command="$command '$(printf %s "$argument" | sed "s/'/'\\\\''/g")'"
done
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd '$directory' && exec .venv/bin/python -m $command"
