#!/usr/bin/env bash
# A SLURM of one node for tests, on the loopback device, without systemd and without an installation's own daemons:
#   one_node.sh install        the packages of Debian or Ubuntu (as root, with a network)
#   one_node.sh start FOLDER   munged, slurmctld and slurmd, with all their files in FOLDER, until the node is idle (as root)
#   one_node.sh stop FOLDER    end them
# After `start`, `SLURM_CONF=FOLDER/slurm.conf sbatch ...` submits to it. It has no accounting and no GPUs.
set -euo pipefail
folder=${2:-}

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    [ "$(id -u)" = 0 ] || { echo "install needs root" >&2; exit 1; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

start() {
    local host port
    host=$(hostname -s)
    port=$((20000 + RANDOM % 6000 * 2))
    mkdir -p "$folder/ctl" "$folder/d"
    chmod 755 "$folder"
    head -c 1024 /dev/urandom > "$folder/munge.key"
    chmod 400 "$folder/munge.key"
    cat > "$folder/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$folder/ctld.pid
SlurmdPidFile=$folder/d.pid
StateSaveLocation=$folder/ctl
SlurmdSpoolDir=$folder/d
SlurmctldLogFile=$folder/ctld.log
SlurmdLogFile=$folder/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF=$folder/slurm.conf
    # --force: the folder may be below one that everybody can write to.
    munged --force --socket "$folder/munge.socket" --key-file "$folder/munge.key" --pid-file "$folder/munged.pid" \
        --log-file "$folder/munged.log" --seed-file "$folder/munged.seed" >/dev/null 2>&1
    slurmctld
    slurmd
    for _ in $(seq 100); do
        if sinfo --noheader --format %T 2>/dev/null | grep -q idle; then return; fi
        sleep 0.2
    done
    echo "the node did not become idle:" >&2
    tail -n 5 "$folder/ctld.log" "$folder/d.log" >&2
    exit 1
}

stop() {
    local file
    SLURM_CONF=$folder/slurm.conf timeout 10 scontrol shutdown >/dev/null 2>&1 || true
    sleep 0.5
    for file in d.pid ctld.pid munged.pid; do
        if [ -f "$folder/$file" ]; then kill "$(cat "$folder/$file")" 2>/dev/null || true; fi
    done
}

case "${1:-}:$folder" in
    install:) install ;;
    start:?*) start ;;
    stop:?*) stop ;;
    *) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;;
esac
