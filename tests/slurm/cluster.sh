#!/usr/bin/env bash
# A throw-away Slurm cluster on one machine, for the tests.
#
#   cluster.sh up DIR NODES     start: a controller "ctl" and node1..nodeN, each with its own network,
#                               process and host name; they share the file system
#   cluster.sh exec DIR CMD...  run a command on the controller
#   cluster.sh fail DIR NODE    the node loses power: no packet, no process
#   cluster.sh cut DIR NODE     the node's network cable is pulled (cluster.sh mend puts it back)
#   cluster.sh down DIR         everything ends with the cluster's pid namespace
#
# Needs root, iproute2, util-linux, slurm-wlm, munge. Changes nothing outside DIR: /etc/slurm, /etc/hosts
# and /run are mounts that only the cluster sees. It ends itself after MAX_S seconds (default 600).
# With BARE=1 the hosts have no Slurm.
set -euo pipefail

SELF="$(readlink -f "$0")"
verb="${1:?verb}"
mkdir -p "${2:?folder}"
DIR="$(cd "$2" && pwd)"
shift 2
NET=10.78.0

first_child() { local all; all="$(cat "/proc/$1/task/$1/children" 2>/dev/null)" || true; echo "${all%% *}"; }
await() { # await SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@"; do [ "$SECONDS" -lt "$end" ] || return 1; sleep 0.02; done
}
inside() { local pid="$1"; shift; nsenter -t "$pid" -n -m -u -p -i --wd="$PWD" -- "$@"; }
# In the background: its only child is the process 1 of the new namespaces.
capsule() { exec unshare --net --mount --pid --uts --ipc --fork --kill-child=KILL --mount-proc -- "$@"; }

write_configuration() {
  local nodes="$1" i
  cat >"$DIR/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=ctl($NET.254)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for this long.
AuthInfo=cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/run/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MinJobAge=600
KillWait=10
MessageTimeout=5
TCPTimeout=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
$(for i in $(seq "$nodes"); do echo "NodeName=node$i NodeAddr=$NET.$i CPUs=8 RealMemory=4000"; done)
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
CONF
  {
    echo "127.0.0.1 localhost"
    echo "$NET.254 ctl"
    for i in $(seq "$nodes"); do echo "$NET.$i node$i"; done
  } >"$DIR/etc/hosts"
  # From the file alone: a name server that does not answer costs 10 s for each look-up.
  { grep -v '^hosts:' /etc/nsswitch.conf; echo "hosts: files"; } >"$DIR/etc/nsswitch.conf"
}

start_munge() {
  mkdir -p /run/munge
  chmod 755 /run/munge
  munged --force --key-file=/etc/slurm/munge.key --pid-file=/run/munge/munged.pid \
    --log-file="$DIR/log/munged.$1.log" --seed-file=/run/munge/seed --num-threads=2
}

all_idle() { [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null | head -n 1)" = "$1" ]; }

case $verb in
  up)
    nodes="${1:-2}"
    mkdir -p "$DIR"/{etc,log,run,state}
    write_configuration "$nodes"
    (umask 077 && head -c 128 /dev/urandom >"$DIR/etc/munge.key")
    setsid bash "$SELF" outer "$DIR" "$nodes" </dev/null >"$DIR/log/init.log" 2>&1 &
    if ! await 40 test -e "$DIR/run/ready"; then
      tail -n 20 "$DIR"/log/*.log >&2
      bash "$SELF" down "$DIR"
      exit 1
    fi
    ;;
  outer)
    capsule bash "$SELF" controller "$DIR" "$1" &
    await 5 bash -c "[ -n \"\$(cat /proc/$!/task/$!/children)\" ]"
    first_child $! >"$DIR/run/ctl.pid"
    wait
    ;;
  controller)
    hostname ctl
    mount --make-rprivate /
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p /etc/slurm
    mount --bind "$DIR/etc" /etc/slurm
    mount --bind "$DIR/etc/hosts" /etc/hosts
    mount --bind "$DIR/etc/nsswitch.conf" /etc/nsswitch.conf
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$NET.254/24" dev br0
    ip link set br0 up
    if [ "${BARE:-0}" = 0 ]; then
      start_munge ctl
      slurmctld -c
    fi
    for i in $(seq "$1"); do
      ip link add "veth$i" type veth peer name "peer$i"
      ip link set "veth$i" master br0 up
      capsule bash "$SELF" node "$DIR" "$i" </dev/null >"$DIR/log/node$i.log" 2>&1 &
      await 5 bash -c "[ -n \"\$(cat /proc/$!/task/$!/children)\" ]"
      first_child $! >"/run/node$i.pid"
      ip link set "peer$i" netns "$(first_child $!)"
    done
    for i in $(seq "$1"); do await 20 test -e "$DIR/run/up.node$i"; done
    [ "${BARE:-0}" = 1 ] || await 30 all_idle "$1"
    touch "$DIR/run/ready"
    sleep "${MAX_S:-600}"
    ;;
  node)
    name="node$1"
    hostname "$name"
    mount --make-rprivate /
    mount -t tmpfs -o mode=755 tmpfs /run
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mkdir -p "$DIR/run/spool.$name"
    ip link set lo up
    await 5 ip link show "peer$1" >/dev/null 2>&1
    ip link set "peer$1" name eth0
    ip addr add "$NET.$1/24" dev eth0
    ip link set eth0 up
    if [ "${BARE:-0}" = 0 ]; then
      start_munge "$name"
      slurmd
    fi
    touch "$DIR/run/up.$name"
    while :; do sleep 60 & wait $! || true; done
    ;;
  exec) inside "$(cat "$DIR/run/ctl.pid")" "$@" ;;
  on) inside "$(cat "$DIR/run/ctl.pid")" bash "$SELF" on_node "$DIR" "$@" ;;
  on_node)
    name="$1"
    shift
    inside "$(cat "/run/$name.pid")" "$@"
    ;;
  fail | cut | mend) inside "$(cat "$DIR/run/ctl.pid")" bash "$SELF" "${verb}_node" "$DIR" "$@" ;;
  fail_node)
    ip link set "veth${1#node}" down
    kill -KILL "$(cat "/run/$1.pid")"
    ;;
  cut_node) ip link set "veth${1#node}" down ;;
  mend_node) ip link set "veth${1#node}" up ;;
  down)
    pid="$(cat "$DIR/run/ctl.pid" 2>/dev/null || true)"
    # Only if it is still ours.
    if [ -n "$pid" ] && grep -q controller "/proc/$pid/cmdline" 2>/dev/null; then
      kill -KILL "$pid"
      await 10 bash -c "! kill -0 $pid 2>/dev/null" || true
    fi
    rm -f "$DIR"/run/{ready,ctl.pid}
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$SELF" >&2
    exit 2
    ;;
esac
