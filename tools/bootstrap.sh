#!/bin/sh
# Sets the machine up: pip needs Python with venv and Python.h, and the build needs a C++ compiler.
# As root, or if sudo asks for no password, it installs missing packages by apt-get; otherwise it prints the command.
set -eu
python=${PYTHON:-python3}
packages=""

if ! command -v "$python" >/dev/null 2>&1; then
    case $python in
        python3) packages="python3 python3-venv python3-dev" ;;
        *) echo "fused_sam: PYTHON is '$python', which is not installed; name a Python 3.10 or newer" >&2; exit 1 ;;
    esac
else
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "fused_sam: $python is Python $version, and 3.10 or newer is needed;" \
            "name another, such as make PYTHON=python3.12" >&2
        exit 1
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python$version-venv"
    "$python" -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
        || packages="$packages python$version-dev"
    # Debian's packages are for Debian's own interpreter only.
    if [ -n "$packages" ] && [ "$("$python" -c 'import sys; print(sys.base_prefix)')" != /usr ]; then
        echo "fused_sam: $python lacks the venv module or Python.h;" \
            "reinstall it, or name another, such as make PYTHON=/usr/bin/python3" >&2
        exit 1
    fi
fi
compiler=${CXX:-c++}
command -v "${compiler%% *}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || packages="$packages g++"

[ -n "$packages" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "fused_sam: packages are missing (Debian's names):$packages." \
        "Install them with your system's package manager" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    root=""
elif sudo -n true 2>/dev/null; then
    root="sudo -n"
else
    echo "fused_sam: packages are missing; type this, then run make again:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y$packages" >&2
    exit 1
fi
echo "fused_sam: installing$packages"
$root apt-get update -qq
# dpkg lists every file that it unpacks on standard output; errors go to standard error.
$root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
    apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 $packages >/dev/null
