#!/usr/bin/env bash
# start.sh DIR NODES SHARED...: a throw-away Slurm cluster of virtual nodes on this machine, for root. Ended by stop.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
dir=$(cd "$1" && pwd -P) nodes=$2
shift 2
umask 022
mkdir -p "$dir"/{munge,state,spool,log,pids,gres}
chmod 755 "$dir"
chmod 700 "$dir/state"
printf '%s\n' "$dir" "$@" >"$dir/shared.txt"
number=$(printf %s "$dir" | cksum | awk '{print $1 % 250 + 1}')
id=mrlv$number net=10.213.$number
echo "$id $net" >"$dir/network"
host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf MRL_VIRTUAL_CLUSTER=$dir

# A munged of its own: nothing under /run/munge or /etc/munge is used.
(umask 077 && head -c 1024 /dev/urandom >"$dir/munge/munge.key")
chmod 400 "$dir/munge/munge.key"
munged --key-file="$dir/munge/munge.key" --socket="$dir/munge/munge.socket" --pid-file="$dir/pids/munged.pid" \
    --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/munged.seed" --num-threads=2

ip link add "$id" type bridge
ip addr add "$net.254/24" dev "$id"
ip link set "$id" up
{
    echo "127.0.0.1 localhost"
    echo "$net.254 $host"
    for i in $(seq "$nodes"); do echo "$net.$i node$i"; done
} >"$dir/hosts"
# No name server can be reached from a node: it is refused at once, or every reverse look-up waits for seconds.
printf 'nameserver 127.0.0.1\noptions timeout:1 attempts:1\n' >"$dir/resolv.conf"

lines=
for i in $(seq "$nodes"); do
    lines+="NodeName=node$i CPUs=16 RealMemory=65536 Gres=gpu:8 NodeAddr=$net.$i NodeHostname=node$i State=UNKNOWN"$'\n'
done
text=$(<"$here/slurm.conf.in")
for pair in "HOST=$host" "ADDRESS=$net.254" "PORT=$((17000 + 2 * number))" "DIR=$dir" "NODES=$lines"; do
    text=${text//@${pair%%=*}@/${pair#*=}}
done
printf '%s\n' "$text" >"$dir/slurm.conf"
# slurmd wants device files for GPUs: copies of /dev/null.
for i in 0 1 2 3 4 5 6 7; do mknod -m 666 "$dir/gres/nvidia$i" c 1 3; done
echo "NodeName=node[1-$nodes] Name=gpu File=$dir/gres/nvidia[0-7]" >"$dir/gres.conf"
case $(slurmctld -V) in
    *" 22."* | *" 23.02"*) echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf" ;;
    *) echo "CgroupPlugin=disabled" >"$dir/cgroup.conf" ;;
esac

slurmctld -i
names=()
for i in $(seq "$nodes"); do names+=("node$i"); done
"$here/node.sh" start "$dir" "${names[@]}"
for _ in $(seq 150); do
    up=$(sinfo -h -N -o '%N %t' 2>/dev/null | awk '$2 == "idle" {print $1}' | sort -u | wc -l)
    [ "$up" -lt "$nodes" ] || exit 0
    sleep 0.1
done
echo "only $up of $nodes nodes are up" >&2
tail -n 5 "$dir"/log/*.log >&2
exit 1
