#!/usr/bin/env bash
# stop.sh DIR: end what start.sh started for DIR, and nothing else.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin
dir=$(cd "$1" && pwd -P)
read -r id _ <"$dir/network" || exit 0
ours() { # daemons by their pid files, and everything in the networks of the nodes
    local link
    cat "$dir"/pids/*.pid 2>/dev/null
    for link in /run/netns/"$id"-*; do [ ! -e "$link" ] || ip netns pids "$(basename "$link")"; done
}
for signal in TERM KILL; do
    # shellcheck disable=SC2046  # a list of numbers
    kill -$signal $(ours) 2>/dev/null
    for _ in $(seq 20); do
        [ -n "$(ours)" ] || break 2
        sleep 0.1
    done
done
for link in /run/netns/"$id"-*; do [ ! -e "$link" ] || ip netns del "$(basename "$link")"; done
ip link del "$id" 2>/dev/null
exit 0
