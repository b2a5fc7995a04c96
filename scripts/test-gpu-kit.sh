#!/usr/bin/env bash
# Whether scripts/gpu-kit.sh's folder runs on a machine without Open MPI and a network: in namespaces of mounts and of networks, where the
# system's Open MPI, its neighbours and .venv are hidden and only the loopback is there, PyTorch lying elsewhere. doctor, two ranks, a
# 2x1 training, and a check of scripts/gpu-check.sh.
#   OUROBOROS=/path/to/ouroboros scripts/test-gpu-kit.sh      tests that program instead of building one
#   OUROBOROS_NO_NAMESPACES=1 scripts/test-gpu-kit.sh         leaves it out, where namespaces are forbidden
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LIMIT=60 # seconds a command

# inside TORCH: what runs in the namespaces.
inside() {
    local site=$1 hidden shade name
    shade=$(mktemp -d)
    : >"$shade/nothing"

    # What lies at the places that the kit's files come from is no library and no program any more.
    for hidden in /usr/bin/{mpirun,mpiexec,orterun,orted,ssh,ompi_info} /usr/lib/*/lib{mpi,open-rte,open-pal,mca,pmix,hwloc,event,munge}[-._]*so*; do
        [ ! -e "$hidden" ] || mount --bind "$shade/nothing" "$(readlink -f "$hidden")"
    done
    for hidden in /usr/lib/*/openmpi /usr/lib/*/pmix* /usr/share/openmpi; do
        [ ! -d "$hidden" ] || mount -t tmpfs none "$hidden"
    done
    mkdir -p "$shade/site"
    mount --bind "$site" "$shade/site"
    mount -t tmpfs none .venv
    python3 -c 'import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x49))'
    [ "$(ls /sys/class/net 2>/dev/null | wc -l)" -ge 1 ]

    export PYTHONPATH=$shade/site
    unset OUROBOROS LIBTORCH
    # shellcheck disable=SC1091
    source .gpu-kit/env
    [ "$OUROBOROS" = "$root/.gpu-kit/bin/ouroboros" ]
    case "$(command -v mpirun)" in "$root"/.gpu-kit/*) ;; *) echo "mpirun is not the kit's" >&2; return 1 ;; esac

    say "doctor"
    timeout "$LIMIT" "$OUROBOROS" doctor | tee "$shade/doctor"
    for name in "$shade/site/torch/lib" "mpirun      mpirun (Open MPI)"; do
        grep -qF "$name" "$shade/doctor" || { echo "doctor does not tell of $name" >&2; return 1; }
    done
    say "two ranks"
    timeout "$LIMIT" mpirun -n 2 --oversubscribe --bind-to none grep Cpus_allowed_list /proc/self/status
    say "a training"
    timeout "$LIMIT" mpirun -n 2 --oversubscribe "$OUROBOROS" train configs/quickstart.toml --grid 2x1 --set steps=10 --out "$shade/run"
    [ -s "$shade/run/metrics.jsonl" ]
    say "a check"
    scripts/gpu-check.sh --quick --processor --only "2x1 equals the oracle (" --only "PyTorch's side" --json "$shade/check.json"
    [ "$(grep -c '"passed"' "$shade/check.json")" = 2 ]
}

if [ "${1:-}" = inside ]; then
    inside "$2"
    exit
fi
if [ -n "${OUROBOROS_NO_NAMESPACES:-}" ]; then
    echo "test-gpu-kit: skipped: OUROBOROS_NO_NAMESPACES is set"
    exit 0
fi
if [ ! -x .venv/bin/python ]; then
    echo "test-gpu-kit: skipped: no torch in .venv (set up without LIBTORCH to have it)"
    exit 0
fi

scripts/gpu-kit.sh
namespaces=(--mount --net)
[ "$(id -u)" = 0 ] || namespaces+=(--map-root-user)
if ! why=$(unshare "${namespaces[@]}" true 2>&1); then
    echo "test-gpu-kit: no namespaces of mounts and networks here ($why); set OUROBOROS_NO_NAMESPACES=1 to leave this test out" >&2
    exit 1
fi
site=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
unshare "${namespaces[@]}" bash "$0" inside "$site"
echo "test-gpu-kit: passed"
