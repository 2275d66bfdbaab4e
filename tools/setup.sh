# Sourced by the other tools: finds a Python, and keeps .venv in the checkout as pyproject.toml wants it.
#
# The caller sets $root to the checkout and calls `set_up` (to run durablews) or `set_up test` (to work on it).
# Nothing outside the checkout is written, apart from pip's own cache.

venv=$root/.venv

# Another project's modules, or an outer virtual environment's, must not stand in for ours.
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() {
    printf '%s\n' "${0##*/}: $*" >&2
    exit 1
}

# Sets $python to a Python >= 3.11 that can make virtual environments. PYTHON=... names one to use instead.
find_python() {
    without_venv=
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
        # A name on PATH proves nothing (pyenv's shims, broken links): it has to run. The base executable, because the
        # caller may be inside the very .venv that is about to be remade.
        python=$("$candidate" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit(1)
print(sys._base_executable or sys.executable)' 2>/dev/null) || python=
        if [ -n "$python" ]; then
            "$python" -c 'import ensurepip, venv' 2>/dev/null && return
            without_venv=$python
        fi
        [ -z "${PYTHON:-}" ] || break
    done
    [ -z "$without_venv" ] ||
        die "$without_venv cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    die "${PYTHON:-Python} is missing or too old; Python 3.11 or newer is needed (PYTHON=/path/to/python names one)"
}

# What .venv was made from. The folder is part of it: a virtual environment does not survive being moved.
wanted_stamp() {
    printf '%s\n' "$root"
    "$python" -c 'import sys; print(sys.executable, sys.version)'
    grep '^__version__' "$root/durablews/__init__.py"
    cat "$root/pyproject.toml"
}

# Makes $venv hold durablews, editable, with the extra $1 if there is one. Returns at once when it already does.
set_up() {
    find_python
    stamp=$venv/installed${1:+-$1}
    wanted=$(wanted_stamp) || die "this is not a whole checkout: $root"
    # The stamp is written last, so that an interrupted set-up is never taken for a finished one.
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
        return
    fi
    printf '%s\n' "== set-up: .venv for Python $("$python" -c 'import platform; print(platform.python_version())')" >&2
    rm -rf "$venv"
    quietly "$python" -m venv "$venv"
    quietly "$venv/bin/python" -m pip install --quiet --editable "$root${1:+[$1]}"
    # Where the fuzzer has no wheel its tests are skipped, or fail in CI.
    [ "${1:-}" != test ] ||
        "$venv/bin/python" -m pip install --quiet --only-binary atheris --editable "$root[fuzz]" >/dev/null 2>&1 || :
    # Who has an extra has the rest as well.
    printf '%s\n' "$wanted" >"$venv/installed"
    printf '%s\n' "$wanted" >"$stamp"
}

# Runs a command and shows what it printed only when it fails; that ends the tool.
quietly() {
    output=$("$@" 2>&1) && return
    printf '%s\n' "$output" >&2
    die "failed: $*"
}
