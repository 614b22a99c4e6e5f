#!/bin/bash
# One node's torchrun. Slurm signals this process, not its children (with proctrack/cgroup), and
# torchrun's agent would die of USR1: so the agent ignores it, and it is passed on to the workers.
#
#   torchrun_node.sh PROGRAM ARGUMENTS...
set -u

(
  trap '' USR1 USR2
  exec "$@"
) &
agent=$!

# shellcheck disable=SC2329  # the traps call it
pass_on() {
  local workers
  read -ra workers < <(cat "/proc/$agent/task/"*/children 2>/dev/null)
  ((${#workers[@]})) && kill -s "$1" "${workers[@]}" 2>/dev/null
}
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM

code=0
while kill -0 "$agent" 2>/dev/null; do
  wait "$agent"
  code=$?
done
exit "$code"
