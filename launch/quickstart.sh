#!/bin/sh
# The main job from nothing, on real handwritten digits that come with scikit-learn: trains a robust teacher, then a small
# student three ways (PGD-AT, ARD, ARD+IGDM), attacks all of them, by AutoAttack too, and writes a report. About five minutes on
# two CPU cores.
# Run again, it finds its finished runs and only evaluates; delete runs/ to start over. Outside of the repository it writes
# the prepared digits (~/tensorflow_datasets or $TFDS_DATA_DIR) and compiled programs (~/.cache/jaxrd).
#
#   METHODS="pgd_at ard rslad+igdm" SEEDS="0 1 2" sh launch/quickstart.sh     other students, several seeds
set -eu
cd "$(dirname "$0")/.."
. launch/environment.sh
environment
began=$(date +%s)

step() { printf '\n== %s\n' "$1"; }

step "teacher: PGD adversarial training on all 1,000 training images"
"$python" -m launch.train --config=configs/digits.py:teacher --workdir=runs/teacher

workdirs=runs/teacher
for method in ${METHODS:-pgd_at ard ard+igdm}; do
    for seed in ${SEEDS:-0}; do
        workdir=runs/$method
        [ "$seed" = 0 ] || workdir=$workdir-seed$seed
        step "student: $method on 100 training images, seed $seed"
        "$python" -m launch.train --config="configs/digits.py:$method,seed=$seed" --workdir="$workdir"
        workdirs=$workdirs,$workdir
    done
done

step "evaluation on the 600 test images, which no training has seen"
"$python" -m launch.evaluate --workdir="$workdirs" --teacher=runs/teacher --report=runs/report.html
printf '%s\n' "The teacher has seen 1,000 images, the students 100 of them and the teacher's answers." \
    "Finished in $(($(date +%s) - began)) s. Open $(pwd)/runs/report.html in a browser."
