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
  "${python[@]}" -m soar_mega.train "$1" --print-config | sed -n '/^run:/,/^[^ ]/s/^  dir: *//p'
}
# Where Python is only in a container, the two folders are to be given.
pretrain_dir="${PRETRAIN_DIR:-$(run_dir "$pretrain")}"
soar_dir="${SOAR_DIR:-$(run_dir "$soar")}"
if [[ -z "$pretrain_dir" || -z "$soar_dir" ]]; then
  say "error: the run.dir of $pretrain or $soar could not be read: set PRETRAIN_DIR and SOAR_DIR"
  exit 78
fi

first="$(sbatch --parsable "$@" "$SOAR_MEGA_HOME/slurm/train.sbatch" "$pretrain" "run.dir=$pretrain_dir")"
first="${first%%;*}"
chained=(--parsable --kill-on-invalid-dep=yes)
second="$(sbatch "${chained[@]}" "--dependency=afterok:$first" "$@" "$SOAR_MEGA_HOME/slurm/train.sbatch" "$soar" \
  "run.dir=$soar_dir" "model.init_from=$pretrain_dir")"
second="${second%%;*}"
third="$(sbatch "${chained[@]}" "--dependency=afterok:$second" \
  "$SOAR_MEGA_HOME/slurm/convert.sbatch" "$soar_dir" "$out")"
printf 'pretraining %s -> SOAR %s -> export %s to %s\n' "$first" "$second" "${third%%;*}" "$out"
