#!/usr/bin/env bash
# Install what the cluster tests need, and run them: tests/cluster/run.sh PYTHON [PYTEST ARGUMENT...]
# Where that is impossible, say why and succeed. On a machine that runs services, the packages start some of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
packages=(iproute2 munge openssh-server pdsh procps slurm-wlm util-linux)

skip() {
    echo "cluster tests skipped: $1"
    exit 0
}

[ "$(id -u)" = 0 ] || skip "they need root, to create network namespaces"
command -v apt-get >/dev/null || skip "they install Debian's packages, and there is no apt-get"
installed=$(dpkg-query --show --showformat '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null | grep -cx installed || true)
if [ "$installed" != "${#packages[@]}" ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || skip "apt-get update failed; no registry was reached"
    apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null || skip "apt-get install failed"
fi
export OMP_NUM_THREADS=1
exec "$@" -m pytest --timeout 1200 -m cluster tests/cluster
