#!/bin/bash
# A training run under Slurm that resumes after kills, time limits and preemption. Copy and adapt:
#
#   cd <folder of main.py>; . .venv/bin/activate
#   sbatch slurm.sh --config=configs/alexnet.py:imagenet2012 --workdir=<folder that all nodes see>
#
# What follows the script's name goes to main.py; sbatch's options before it override those below:
#
#   --nodes=4 --gres=gpu:2                        one task per node, which takes all its GPUs
#   --nodes=4 --gres=gpu:2 --ntasks-per-node=2    one task per GPU (main.py gives each its own; not
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
#SBATCH --signal=TERM@120   # to the tasks, 120 s before the time limit: they save and exit

MOST_RESTARTS=${MOST_RESTARTS:-20}  # in all, Slurm's own included

# By scancel, preemption and `scontrol requeue` Slurm ends the job, and this shell gets SIGTERM as
# the tasks do. It waits until they have saved; Slurm decides whether the job is requeued.
trap 'ended_by_slurm=yes' TERM

# A task that fails hands its exit code to the others, and all end with it; what has not ended 30 s
# later is killed. Not --kill-on-bad-exit=1: its signal could hide an exit code of 2.
srun --kill-on-bad-exit=0 --wait=30 "${PYTHON:-python}" main.py "$@"
code=$?

restarts=${SLURM_RESTART_COUNT:-0}
if [ $code -eq 0 ]; then
    echo 'slurm.sh: done'
elif [ $code -eq 2 ]; then
    echo 'slurm.sh: exit code 2, not started again: correct the command, see above'
elif [ "${ended_by_slurm:-no}" = yes ]; then
    echo "slurm.sh: exit code $code, ended by Slurm"
elif [ "$restarts" -ge "$MOST_RESTARTS" ]; then
    echo "slurm.sh: exit code $code, not started again after $restarts restarts"
else
    echo "slurm.sh: exit code $code, goes into the queue again, restart $((restarts + 1))"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
