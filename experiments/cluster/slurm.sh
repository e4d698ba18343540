#!/bin/bash
# A training run under Slurm that goes on after kills, time limits and preemption. Copy and adapt:
#
#   cd <folder of main.py>; . .venv/bin/activate
#   sbatch slurm.sh --config=configs/alexnet.py:imagenet2012 --workdir=<folder that all nodes see>
#
# What follows the script's name goes to main.py; sbatch's options before it win over these below:
#
#   --nodes=4 --gres=gpu:2                        a task a node, which takes all its GPUs
#   --nodes=4 --gres=gpu:2 --ntasks-per-node=2    a task a GPU (main.py gives each its own; not
#                                                 --gpus-per-task, which hides them from each other)
#   JAX_NUM_CPU_DEVICES=4 sbatch ...              no GPU: each task counts as four devices
#
#SBATCH --job-name=alexnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append  # one log over all restarts
#SBATCH --requeue           # after a node failed or the job was preempted, Slurm starts it again
#SBATCH --signal=TERM@120   # to the tasks, so many seconds before the time limit: save and leave

MOST_RESTARTS=${MOST_RESTARTS:-20}  # of all kinds together, Slurm's own included

# By scancel, preemption and `scontrol requeue` Slurm ends the job, and this shell gets SIGTERM as
# the tasks do. It waits until they have saved; whether the job comes back is for Slurm to say.
trap 'ended_by_slurm=yes' TERM

# A task that fails hands its exit code to the others, and all end with it; what has not ended 30 s
# later is killed. Not --kill-on-bad-exit=1: its signal could hide an exit code of 2.
srun --kill-on-bad-exit=0 --wait=30 "${PYTHON:-python}" main.py "$@"
code=$?

restarts=${SLURM_RESTART_COUNT:-0}
if [ $code -eq 0 ]; then
    echo 'slurm.sh: done'
elif [ $code -eq 2 ]; then
    echo 'slurm.sh: exit code 2, not started again: what was asked makes no sense, see above'
elif [ "${ended_by_slurm:-no}" = yes ]; then
    echo "slurm.sh: exit code $code, ended by Slurm"
elif [ "$restarts" -ge "$MOST_RESTARTS" ]; then
    echo "slurm.sh: exit code $code, not started again after $restarts restarts"
else
    echo "slurm.sh: exit code $code, goes into the queue again, restart $((restarts + 1))"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
