#!/bin/bash
# Submits the chain: pretraining, SOAR from its weights, export to a diffusers folder.
#
#   slurm/pretrain_to_soar.sh PRETRAIN.yaml SOAR.yaml OUT [sbatch's options for both trainings ...]
#
# Each job starts when the one before is done (code 0). A job that is preempted and requeued keeps its
# id, so the next one waits for it; one that ends with another code takes the rest of the chain along.
set -euo pipefail

if (($# < 3)); then
  echo "usage: $0 PRETRAIN.yaml SOAR.yaml OUT [sbatch's options for both trainings ...]" >&2
  exit 78
fi
pretrain="$1" soar="$2" out="$3"
shift 3
SOAR_MEGA_HOME="${SOAR_MEGA_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
export SOAR_MEGA_HOME
# shellcheck source=slurm/common.sh
source "$SOAR_MEGA_HOME/slurm/common.sh"
load_cluster

# run_dir CONFIG: its run.dir, with what it inherits.
run_dir() {
  "${python[@]}" -c '
import sys
from soar_mega.config import ConfigError, load_config
try:
    print(load_config(sys.argv[1]).run.dir)
except ConfigError as error:
    sys.exit(f"error: {error}")' "$1"
}
# Where Python is only in a container, the two folders are to be given.
pretrain_dir="${PRETRAIN_DIR:-$(run_dir "$pretrain" || true)}"
soar_dir="${SOAR_DIR:-$(run_dir "$soar" || true)}"
if [[ -z "$pretrain_dir" || -z "$soar_dir" ]]; then
  say "error: the run.dir of $pretrain or $soar could not be read: set PRETRAIN_DIR and SOAR_DIR" >&2
  exit 78
fi

# submit WHAT OPTIONS...: its id, `id`; says which jobs stand where sbatch refuses it.
submitted=()
submit() {
  local what="$1"
  shift
  if ! id="$(sbatch --parsable "$@")"; then
    say "error: sbatch refused the $what (its message is above)" >&2
    if ((${#submitted[@]})); then
      say "these stand and run; take them back with: scancel ${submitted[*]}" >&2
    fi
    exit 1
  fi
  id="${id%%;*}"  # a federation's cluster comes after it
  submitted+=("$id")
}
train="$SOAR_MEGA_HOME/slurm/train.sbatch"
chained=(--kill-on-invalid-dep=yes)
submit pretraining "$@" "$train" "$pretrain" "run.dir=$pretrain_dir"
submit "SOAR training" "${chained[@]}" "--dependency=afterok:$id" "$@" "$train" "$soar" \
  "run.dir=$soar_dir" "model.init_from=$pretrain_dir"
submit export "${chained[@]}" "--dependency=afterok:$id" "$SOAR_MEGA_HOME/slurm/convert.sbatch" \
  "$soar_dir" "$out"
printf 'pretraining %s -> SOAR %s -> export %s to %s\n' "${submitted[@]}" "$out"
