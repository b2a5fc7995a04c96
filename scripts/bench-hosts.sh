#!/usr/bin/env bash
# What a link of 1 Gb/s between two hosts costs: two network namespaces with a veth pair between them, limited by tbf.
#   scripts/bench-hosts.sh [--rounds N] [--short]      some ten minutes; --short only tries whether it works
# Needs root, iproute2 and the right to make namespaces; says so and leaves with 0 where it has not.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

skip() { echo "bench-hosts: skipped: $*"; exit 0; }
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
for tool in ip tc unshare taskset; do
    type -P "$tool" >/dev/null || skip "$tool is missing (packages iproute2, util-linux)"
done
for core in 0 1; do
    taskset -c "$core" true 2>/dev/null || skip "two hosts need two cores, 0 and 1, for this process"
done
work=$(mktemp -d)
a="ouroboros-a-$$" b="ouroboros-b-$$"
child=
clean_up() {
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    # Ranks of a run that was broken off.
    for space in "$a" "$b"; do
        ip netns pids "$space" 2>/dev/null | xargs -r kill 2>/dev/null || true
    done
    ip netns del "$a" 2>/dev/null || true
    ip netns del "$b" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap "exit 143" INT TERM HUP
ip netns add "$a" 2>"$work/why" || skip "no network namespace can be made: $(cat "$work/why")"
ip netns add "$b" 2>"$work/why" || skip "no second network namespace can be made: $(cat "$work/why")"
ip -n "$a" link add link0 type veth peer name link0 netns "$b" 2>"$work/why" || skip "no veth pair can be made: $(cat "$work/why")"
number=1
for host in "$a" "$b"; do
    ip -n "$host" addr add "10.77.0.$number/24" dev link0
    # A network card cuts large packets itself; here tbf would, on the core that computes. So packets stay large, and the rate
    # is what frames of 1514 bytes leave of 1 Gb/s for their 1448 bytes of data.
    ip -n "$host" link set link0 mtu 65000
    ip -n "$host" link set link0 up
    ip -n "$host" link set lo up
    number=$((number + 1))
done

# Limits both directions, or frees them.
cat >"$work/link" <<END
#!/usr/bin/env bash
set -eu
for host in $a $b; do
    tc -n "\$host" qdisc del dev link0 root 2>/dev/null || true
    [ "\$1" = off ] || tc -n "\$host" qdisc add dev link0 root tbf rate 956mbit burst 256kb latency 20ms
done
END
# A command on a host: its namespace, a host name and a core of its own.
cat >"$work/on" <<END
#!/usr/bin/env bash
host=\$1; shift
case "\$host" in 10.77.0.1) space=$a core=0 ;; *) space=$b core=1 ;; esac
exec ip netns exec "\$space" unshare --uts taskset -c "\$core" sh -c 'hostname "\$0"; eval "\$*"' "\$space" "\$@"
END
cat >"$work/mpirun" <<END
#!/usr/bin/env bash
slots=1
case " \$* " in *" -n 4 "*) slots=2 ;; esac
exec "$work/on" 10.77.0.1 exec mpirun --host "10.77.0.1:\$slots,10.77.0.2:\$slots" --bind-to none --mca plm_rsh_agent "$work/on" \
    --mca pml ob1 --mca btl self,tcp --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 "\$@"
END
chmod +x "$work/link" "$work/on" "$work/mpirun"
"$work/link" on 2>"$work/why" || skip "the link cannot be limited: $(cat "$work/why")"
cargo build --release --quiet
# In the background, so that a signal is heeded at once.
python3 benches/hosts.py --launcher "$work/mpirun" --link "$work/link" "$@" &
child=$!
wait "$child"
