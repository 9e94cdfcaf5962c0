#!/bin/sh
# Machine set-up: makes sure that Python (with venv and Python.h) and a C++ compiler are here, before pip can run.
# As root, or where sudo asks no password, it installs what is missing by apt-get; else it prints the line to type.
set -eu
python=${PYTHON:-python3}
packages=""

if ! command -v "$python" >/dev/null 2>&1; then
    case $python in
        python3) packages="python3 python3-venv python3-dev" ;;
        *) echo "fused_sam: PYTHON is '$python', and no such program is here: name a Python 3.10 or newer" >&2; exit 1 ;;
    esac
else
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "fused_sam: Python 3.10 or newer is needed, and $python is $version: name a newer one, as in: make PYTHON=python3.12" >&2
        exit 1
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python$version-venv"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
        || packages="$packages python$version-dev"
    # Debian's packages serve Debian's own interpreter only.
    if [ -n "$packages" ] && [ "$("$python" -c 'import sys; print(sys.base_prefix)')" != /usr ]; then
        echo "fused_sam: $python lacks the venv module or Python.h: reinstall it whole, or name another, as in: make PYTHON=/usr/bin/python3" >&2
        exit 1
    fi
fi
compiler=${CXX:-c++}
command -v "${compiler%% *}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || packages="$packages g++"

[ -n "$packages" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "fused_sam: missing, under the names that Debian gives them:$packages. Install them by your system's package manager" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    root=""
elif sudo -n true 2>/dev/null; then
    root="sudo -n"
else
    echo "fused_sam: packages are missing; type this, then the same make again:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y$packages" >&2
    exit 1
fi
echo "fused_sam: installing$packages"
$root apt-get update -qq
# On standard output dpkg tells of every file it unpacks; what goes wrong comes on the other.
$root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
    apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 $packages >/dev/null
