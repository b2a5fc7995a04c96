#!/usr/bin/env bash
# The second stage of a container: what a Debian needs to run the program that lies in /opt/ouroboros, and an SSH server for launchers
# (Kubernetes' MPI operator starts it in its workers). Called by the Dockerfile and the Apptainer definition, as root.
set -euo pipefail

apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends libgomp1 openmpi-bin openssh-client openssh-server procps
rm -rf /var/lib/apt/lists/*
mkdir -p /run/sshd

# Workers come and go under the same names: their keys are the operator's.
cat >/etc/ssh/ssh_config.d/ouroboros.conf <<'END'
Host *
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
END
ln -sf /opt/ouroboros/ouroboros /usr/local/bin/ouroboros
