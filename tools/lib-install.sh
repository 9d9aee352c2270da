# shellcheck shell=bash
# Install what is missing, and only that: sourced by tools/quickstart and tools/test.
# When everything is there, nothing here touches the network.

repo_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv_dir=$repo_dir/.venv
cache_dir=$repo_dir/.cache
# Debian's own Python: the headers that pyfuse3 is built with belong to it.
system_python=${PYTHON:-/usr/bin/python3}
apt_updated=

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# Debian keeps mkfs and its like where an ordinary user's PATH does not look.
PATH=$PATH:/usr/sbin:/sbin

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "must be root to run '$*', and there is no sudo: run it as root, then try again"
    fi
}

apt_update() {
    [ -z "$apt_updated" ] || return 0
    as_root apt-get -qq update >&2 || say "apt-get update failed; trying with the lists that are here"
    apt_updated=yes
}

# apt_install PACKAGE...: install packages; --no-install-recommends keeps it small.
apt_install() {
    command -v apt-get >/dev/null ||
        die "needs the packages $*; this is no Debian, so install their like by hand"
    say "Installing with apt: $*"
    apt_update
    mkdir -p "$cache_dir"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
        -o APT::Sandbox::User=root install "$@" >"$cache_dir/apt.log" 2>&1 || {
        tail -n 20 "$cache_dir/apt.log" >&2
        die "could not install $*: see $cache_dir/apt.log"
    }
}

# has_command NAME, has_module NAME, has_header: what a package is wanted for.
has_command() { command -v "$1" >/dev/null; }
has_package() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
has_python_headers() {
    [ -f "$("$system_python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}
has_fuse_headers() { has_command pkg-config && pkg-config --exists fuse3; }

missing=()
# want PACKAGE TEST...: remember PACKAGE as missing unless the TEST command succeeds.
want() {
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}

install_missing() {
    if [ ${#missing[@]} -gt 0 ]; then
        apt_install "${missing[@]}"
    fi
    missing=()
}

want_runtime() {
    want python3-venv "$system_python" -c 'import ensurepip, venv'
    want etcd-server has_command etcd
    want fuse3 has_command fusermount3
}

want_build() {
    want python3-dev has_python_headers
    want gcc has_command gcc
    want libc6-dev test -f /usr/include/stdio.h
    want pkg-config has_command pkg-config
    want libfuse3-dev has_fuse_headers
    want ca-certificates test -s /etc/ssl/certs/ca-certificates.crt
}

want_test_tools() {
    want fio has_command fio
    want qemu-system-x86 has_command qemu-system-x86_64
    want qemu-utils has_command qemu-io
    # In this package or in qemu-utils, as the release of Debian has it.
    want qemu-system-common has_command qemu-storage-daemon
    want e2fsprogs has_command mkfs.ext4
    want iproute2 has_command ip
    want iptables has_command iptables
    want xfsprogs has_command mkfs.xfs
    want sqlite3 has_command sqlite3
    want busybox-static has_package busybox-static
    want cpio has_command cpio
    want shellcheck has_command shellcheck
}

# What the virtual environment was made from: another Python, place or pyproject.toml means anew.
venv_fingerprint() {
    { echo "$repo_dir $1"; "$system_python" --version; cat "$repo_dir/pyproject.toml"; } | sha256sum
}

venv_is_current() {
    [ -x "$venv_dir/bin/python" ] &&
        [ "$(cat "$venv_dir/sheepfs-installed-$1" 2>/dev/null)" = "$(venv_fingerprint "$1")" ]
}

# install_venv WHAT: '' for what runs, 'dev' for that and the test tools. A venv made for 'dev'
# serves both.
install_venv() {
    local extra=$1 target=$repo_dir
    venv_is_current "${extra:-run}" && return 0
    [ -z "$extra" ] && venv_is_current dev && return 0
    [ -z "$extra" ] || target="$repo_dir[$extra]"
    want_build
    install_missing
    say "Installing Python packages into $venv_dir (once)"
    "$system_python" -m venv "$venv_dir" || die "could not make $venv_dir: remove it and try again"
    "$venv_dir/bin/pip" install -q --disable-pip-version-check -e "$target" ||
        die "pip could not install sheepfs: see its message above"
    venv_fingerprint "${extra:-run}" >"$venv_dir/sheepfs-installed-${extra:-run}"
}

# The guest of the boot test runs Debian's cloud kernel: unpacked into the cache, not installed.
fetch_guest_kernel() {
    local directory=$cache_dir/guest-kernel package
    compgen -G "$directory/boot/vmlinuz-*" >/dev/null && return 0
    apt_update
    package=$(apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64 (the guest's kernel)"
    say "Downloading $package for the guest of the boot test"
    rm -rf "$directory.part"
    mkdir -p "$directory.part"
    (
        cd "$directory.part" &&
            apt-get -q -o APT::Sandbox::User=root download "$package" >&2 &&
            dpkg -x "$package"_*.deb . && rm -f "$package"_*.deb
    ) || die "could not download and unpack $package"
    rm -rf "$directory"
    mv "$directory.part" "$directory"
}
