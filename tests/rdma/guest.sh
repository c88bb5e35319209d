#!/bin/bash
# Runs as root inside the emulated guest. Makes the soft-RoCE device rxe0 and runs job.py on it under mpirun.
#
#   guest.sh ROOT PYTHON MPIRUN SECONDS
#
# Prints "guest: ..." lines that test_rdma.py reads. All other lines are UCX's log and the output of the job.
set -eu
exec 2>&1
root=$1 python=$2 mpirun=$3 seconds=$4
export PATH=$PATH:/usr/sbin:/sbin

echo "guest: up after $(cut -d' ' -f1 /proc/uptime) s"
ip link set lo up
for module in dummy rdma_rxe ib_uverbs rdma_ucm; do modprobe $module; done
ip link add d0 type dummy
ip addr add 10.77.0.1/24 dev d0
ip link set d0 up mtu 4200  # so that the RDMA port gets its largest MTU, 4096
rdma link add rxe0 type rxe netdev d0
rdma link show rxe0/1

packets() { cat /sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts; }

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 PYTHONPATH=$root
# ud_v is listed because UCX sets up the connections of rc_v through it.
export UCX_TLS=rc_v,ud_v,self UCX_NET_DEVICES=rxe0:1 UCX_LOG_LEVEL=info
cd "$root"
before=$(packets)
code=0
timeout "$seconds" "$mpirun" --oversubscribe --bind-to none --mca pml ucx --mca osc ucx \
  --mca opal_common_ucx_tls any --mca opal_common_ucx_devices any -n 2 "$python" tests/rdma/job.py || code=$?
echo "guest: $(($(packets) - before)) packets sent through rxe0"
echo "guest: job ended with exit code $code after $(cut -d' ' -f1 /proc/uptime) s"
