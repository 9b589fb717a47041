#!/usr/bin/env bash
# The first process of a test host, in namespaces of its own. When it ends, the kernel ends everything on the host.
# Usage: host.sh NAME SHARED, where SHARED has `hosts` and `ssh_config`.
set -euo pipefail
hostname "$1"
ip link set lo up
# Mounts of this host only: /etc on the machine is not changed.
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
# A small disk that the nodes share.
[ "$1" != login ] || mount -t tmpfs -o size=4m tmpfs "$2/disk"
echo ready
# A shell collects processes whose parents have ended.
while :; do sleep 60 & wait $!; done
