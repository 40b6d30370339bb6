# Sourced by quickstart.sh and test.sh from the root of the repository: `environment [extras]` makes .venv where there is
# none, installs jaxrd into it where setup.cfg has changed since, and sets $python.

environment() {
    extras=${1:-}
    # Asked from elsewhere: in here the source tree itself would answer for an installation.
    if [ -n "${VIRTUAL_ENV:-}" ] && (cd / && "$VIRTUAL_ENV/bin/python" -c 'import jaxrd, orbax.checkpoint') 2>/dev/null; then
        python=$VIRTUAL_ENV/bin/python # an environment of one's own that already has jaxrd
    else
        python=.venv/bin/python
        if ! "$python" -m pip --version >/dev/null 2>&1; then
            base=
            for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
                if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
                    base=$candidate
                    break
                fi
            done
            if [ -z "$base" ]; then
                echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3.12 sh $0" >&2
                exit 1
            fi
            echo "making .venv with $("$base" --version)"
            rm -rf .venv
            if ! "$base" -m venv .venv; then
                rm -rf .venv
                echo "error: $base cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
                exit 1
            fi
        fi
    fi
    # The stamp is compared by content: a checkout gives files any time stamp.
    stamp=.venv/installed-$(echo "$extras" | tr ',' '-')
    if [ "$python" = .venv/bin/python ] && ! cmp -s setup.cfg "$stamp"; then
        echo "installing jaxrd${extras:+[$extras]} and its dependencies into .venv (about a minute)"
        if ! "$python" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"; then
            echo "error: the installation failed; the lines above say why (is the package index reachable?)" >&2
            exit 1
        fi
        cp setup.cfg "$stamp"
    elif [ "$extras" = test ] && ! "$python" -c 'import pytest' 2>/dev/null; then
        echo "error: $VIRTUAL_ENV has jaxrd but not pytest; pip install -e '.[test]' there, or deactivate it" >&2
        exit 1
    fi
}
