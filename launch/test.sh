#!/bin/sh
# The whole test suite, in .venv, which it makes where there is none. Extra arguments go to pytest: sh launch/test.sh -k igdm
set -eu
cd "$(dirname "$0")/.."
. launch/environment.sh
environment test
exec "$python" -m pytest -q -m "${JAXRD_TEST_MARKERS:-not slow}" "$@"
