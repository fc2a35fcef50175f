#!/usr/bin/env bash
# node.sh start|kill|cut|heal DIR NODE...: a virtual node on; killed with all that runs on it; its link off, or on again.
# A node has its own network, host name, /etc/hosts, /dev/shm and /tmp. The folders in DIR/shared.txt are shared.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
op=$1 dir=$2
shift 2
read -r id net <"$dir/network"
export SLURM_CONF=$dir/slurm.conf MRL_VIRTUAL_CLUSTER=$dir

start() {
    local node=$1 number=${1#node} ns=$id-$1
    ! pgrep -F "$dir/pids/slurmd-$node.pid" slurmd >/dev/null 2>&1 || return 0
    mkdir -p "$dir/spool/$node" "$dir/private/$node"
    [ -e "$dir/hosts-$node" ] || cp "$dir/hosts" "$dir/hosts-$node"
    if [ ! -e "/run/netns/$ns" ]; then
        ip netns add "$ns"
        ip link add "$id$number" type veth peer name eth0 netns "$ns"
        ip link set "$id$number" master "$id" up
        ip -n "$ns" addr add "$net.$number/24" dev eth0
        ip -n "$ns" link set lo up
        ip -n "$ns" link set eth0 up
    fi
    # Not `ip netns exec`: it mounts a fresh /sys, without cgroups.
    nsenter "--net=/run/netns/$ns" unshare --uts --mount bash -euc '
        node=$1 dir=$2
        hostname "$node"
        mount --bind "$dir/hosts-$node" /etc/hosts
        mount --bind "$dir/resolv.conf" /etc/resolv.conf
        mount -t tmpfs -o size=2g tmpfs /dev/shm
        own=$dir/private/$node
        mount -t tmpfs -o size=2g tmpfs "$own"
        chmod 1777 "$own"
        while read -r folder; do
            case $folder in /tmp/*) mkdir -p "$own/${folder#/tmp/}"; mount --bind "$folder" "$own/${folder#/tmp/}" ;; esac
        done <"$dir/shared.txt"
        mount --rbind "$own" /tmp
        exec slurmd -N "$node"' bash "$node" "$dir"
}

# As in a crash: a step daemon that still lives would report the end of its tasks, so all are frozen first.
crash() {
    local signal
    for signal in STOP KILL; do
        # shellcheck disable=SC2046  # a list of numbers
        kill -$signal $(ip netns pids "$id-$1") 2>/dev/null || true
    done
    rm -f "$dir/pids/slurmd-$1.pid"
}

for node in "$@"; do
    case $op in
        start) start "$node" ;;
        kill) crash "$node" ;;
        cut) ip link set "$id${node#node}" down ;;
        heal) ip link set "$id${node#node}" up ;;
        *) echo "what is $op?" >&2; exit 2 ;;
    esac
done
