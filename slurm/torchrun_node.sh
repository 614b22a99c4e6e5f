#!/bin/bash
# One node's torchrun. Slurm signals this process, not its children (with proctrack/cgroup), and
# torchrun's agent would die of USR1 and end the workers at a TERM: so the agent ignores them, and
# they are passed on to the workers. Where Slurm signals all processes, they come twice, which does
# no harm.
#
#   torchrun_node.sh PROGRAM ARGUMENTS...
set -u

(
  trap '' USR1 USR2 TERM
  # torchrun's option --signals-to-handle.
  export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
  exec "$@"
) &
agent=$!

# signal_workers SIGNAL PID: the workers among the descendants. Only they have LOCAL_RANK, and what
# they start themselves has no use for the signal. With apptainer the agent is a child of $agent.
# shellcheck disable=SC2329  # the traps call it
signal_workers() {
  local child children
  read -ra children < <(cat "/proc/$2/task/"*/children 2>/dev/null | tr '\n' ' ')
  for child in "${children[@]}"; do
    if grep -qz '^LOCAL_RANK=' "/proc/$child/environ" 2>/dev/null; then
      kill -s "$1" "$child" 2>/dev/null
    else
      signal_workers "$1" "$child"
    fi
  done
}

# shellcheck disable=SC2329  # the traps call it
pass_on() {
  interrupted=1
  signal_workers "$1" "$agent"
}
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM

# A signal ends `wait` too; a code that was told once is told again.
interrupted=1
while [[ -n "$interrupted" ]]; do
  interrupted=''
  wait "$agent"
  code=$?
done
exit "$code"
