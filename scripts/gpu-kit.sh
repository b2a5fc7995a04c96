#!/usr/bin/env bash
# Makes .gpu-kit: what a machine with one GPU, Python and PyPI's torch, but without Rust, MPI and a network, needs to run the program
# and scripts/gpu-check.sh. Copy the checkout with it there, and:
#   . .gpu-kit/env && scripts/gpu-check.sh
#
#   bin/       ouroboros (stripped), mpirun, orted         env     to be sourced
#   lib/       libmpi and what it is linked with           lib-fallback/   the same of the system, where that has none
#   openmpi3/  the parts of Open MPI that one host needs   share/openmpi/  its messages   pmix/  those of its start-up
#
#   OUROBOROS=/path/to/ouroboros scripts/gpu-kit.sh      takes that program instead of building one
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LIMIT=40 # MB: it travels with every check
kit=$root/.gpu-kit

# Components of Open MPI 4.1 for ranks of one host; a name may stand for several.
components="allocator_* bml_r2 btl_self btl_vader coll_basic coll_inter coll_libnbc coll_self coll_sm coll_sync coll_tuned
    errmgr_default_app errmgr_default_hnp errmgr_default_orted ess_env ess_hnp ess_pmi ess_singleton filem_raw grpcomm_direct iof_hnp
    iof_orted mpool_hugepage odls_* oob_tcp op_avx osc_pt2pt osc_rdma osc_sm patcher_overwrite plm_isolated plm_rsh pmix_ext3x
    pmix_isolated pml_ob1 pstat_linux ras_simulator rcache_grdma reachable_weighted regx_* rmaps_* rml_oob routed_* rtc_hwloc
    schizo_ompi schizo_orte shmem_* state_app state_hnp state_novm state_orted topo_basic"
# What every Linux has, and what comes with PyTorch.
everywhere='^(linux-vdso|ld-linux[-_a-z0-9]*|libc|libm|libdl|librt|libutil|libpthread|libstdc\+\+|libgcc_s|libgomp[-a-f0-9]*|libtorch[_a-z]*|libc10[_a-z]*|libcu[a-z]+|libnv[a-z]+|libnccl)\.so'
# What most have: theirs first.
often='^(libz|libudev)\.so'

missing() {
    echo "gpu-kit: $1 is missing; run scripts/setup.sh" >&2
    exit 1
}

# Copies the libraries that files are linked with.
libraries() {
    local name path
    while read -r name path; do
        if [[ $name =~ $everywhere ]]; then
            continue
        elif [[ $name =~ $often ]]; then
            cp -L "$path" "$kit/lib-fallback/$name"
        else
            cp -L "$path" "$kit/lib/$name"
        fi
    done < <(ldd "$@" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u)
}

if [ -z "${OUROBOROS:-}" ]; then
    cargo build --release --quiet
    OUROBOROS=$root/target/release/ouroboros
fi
type -P mpirun >/dev/null || missing mpirun
type -P ompi_info >/dev/null || missing ompi_info
plugins=$(ompi_info --parsable --path pkglibdir | cut -d: -f3 | tail -n 1)
texts=$(ompi_info --parsable --path pkgdatadir | cut -d: -f3 | tail -n 1)
[ -e "$plugins/mca_pml_ob1.so" ] || missing "Open MPI's folder of components ($plugins/mca_pml_ob1.so)"

rm -rf "$kit"
mkdir -p "$kit"/{bin,lib,lib-fallback,openmpi3,share/openmpi,pmix/pmix}
strip -o "$kit/bin/ouroboros" "$OUROBOROS"
cp -L "$(type -P mpirun)" "$kit/bin/mpirun"
cp -L "$(type -P orted)" "$kit/bin/orted"
for name in $components; do
    compgen -G "$plugins/mca_$name.so" >/dev/null || continue # Releases differ.
    cp -L "$plugins"/mca_$name.so "$kit/openmpi3/"
done
cp -L "$texts"/help-*.txt "$kit/share/openmpi/"
libraries "$kit/bin/ouroboros" "$kit/bin/mpirun" "$kit"/openmpi3/*.so

# Where PMIx is a library of its own, its components lie beside it, under this name or that.
pmix=$(ldd "$plugins/mca_pmix_ext3x.so" 2>/dev/null | awk '/libpmix/ { print $3 }')
if [ -n "$pmix" ]; then
    folder=$(dirname "$(readlink -f "$pmix")")
    for beside in "$folder/pmix" "$folder/pmix2/lib/pmix"; do
        if compgen -G "$beside/*.so" >/dev/null; then cp -L "$beside"/*.so "$kit/pmix/pmix/"; fi
    done
fi

cat >"$kit/env" <<'END'
# To be sourced in the checkout's folder. The program finds PyTorch's libraries, mpirun its own parts; ranks of one host only.
k=${KIT:-$PWD/.gpu-kit}
t=$(python3 -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))') || echo "gpu-kit: python3 has no torch" >&2
export PATH=$k/bin:$PATH
# What is there already may be the driver's folder.
export LD_LIBRARY_PATH=$k/lib:$t/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}:$k/lib-fallback
export OPAL_PREFIX=$k OPAL_BINDIR=$k/bin OPAL_LIBDIR=$k OPAL_PKGLIBDIR=$k/openmpi3 OPAL_PKGDATADIR=$k/share/openmpi
export PMIX_PREFIX=$k/pmix PMIX_LIBDIR=$k/pmix PMIX_PKGLIBDIR=$k/pmix/pmix
# No copies from process to process: containers forbid them. No network but the loopback.
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_oob_tcp_if_include=lo
export OMPI_MCA_plm=isolated OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export NCCL_RAS_ENABLE=0 NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONUNBUFFERED=1
export OUROBOROS=$k/bin/ouroboros PYTHON=${PYTHON:-$(command -v python3)}
unset k t
END

size=$(du -sk --apparent-size "$kit" | cut -f1)
printf 'gpu-kit: %s, %d.%d MB\n' "$kit" $((size / 1024)) $((size % 1024 * 10 / 1024))
if [ "$size" -gt $((LIMIT * 1024)) ]; then
    echo "gpu-kit: that is more than $LIMIT MB" >&2
    exit 1
fi
