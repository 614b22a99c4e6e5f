# shellcheck shell=bash
# What the job scripts share; they source it. Slurm runs a copy of a job script from its spool folder,
# so the repository is where sbatch was called, or SOAR_MEGA_HOME.

say() { printf '%s %s\n' "$(date '+%Y-%m-%dT%H:%M:%S')" "$*"; }

# Settings of the cluster, and what Python is: the arrays `python` and `srun_options`.
load_cluster() {
  local name settings="${CLUSTER_ENV:-$SOAR_MEGA_HOME/slurm/cluster.env}"
  [[ -f "$settings" ]] || settings="$SOAR_MEGA_HOME/slurm/cluster.env.example"
  # shellcheck source=slurm/cluster.env.example
  source "$settings"
  # An empty one is refused as an unknown partition.
  for name in SBATCH_PARTITION SBATCH_ACCOUNT SBATCH_QOS; do
    if [[ -n "${!name}" ]]; then export "${name?}"; else unset "$name"; fi
  done
  srun_options=()
  case "$RUNTIME" in
    venv)
      python=("${VENV:-$SOAR_MEGA_HOME/.venv}/bin/python")
      if [[ ! -x "${python[0]}" ]]; then
        say "error: VENV: ${python[0]} is no program: set VENV in $settings to a virtual environment" \
          "that all nodes see, or RUNTIME to pyxis or apptainer"
        exit 78
      fi
      ;;
    pyxis | apptainer)
      if [[ -z "$CONTAINER_IMAGE" ]]; then
        say "error: RUNTIME = $RUNTIME needs CONTAINER_IMAGE, which is empty: set it in $settings"
        exit 78
      fi
      python=(python)
      if [[ "$RUNTIME" == pyxis ]]; then
        srun_options+=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD")
        srun_options+=(${CONTAINER_MOUNTS:+"--container-mounts=$CONTAINER_MOUNTS"})
      else
        python=(apptainer exec --nv --pwd "$PWD" ${CONTAINER_MOUNTS:+--bind "$CONTAINER_MOUNTS"}
          "$CONTAINER_IMAGE" python)
      fi
      ;;
    *)
      say "error: RUNTIME = $RUNTIME must be venv, pyxis or apptainer"
      exit 78
      ;;
  esac
  export PYTHONPATH="$SOAR_MEGA_HOME${PYTHONPATH:+:$PYTHONPATH}"
  # Since 22.05 srun does not take it from the job.
  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}"
}

# The job's own folder for logs: `logs`. An array's tasks have one each.
make_log_folder() {
  logs="${LOG_DIR:-$PWD/logs}/${SLURM_JOB_NAME:-job}-$SLURM_JOB_ID"
  mkdir -p "$logs"
}

# finish CODE: end the job as the run's exit code asks (soar_mega/launch/exit_codes.py).
finish() {
  local code="$1" crashes=0 starts="${SLURM_RESTART_COUNT:-0}"
  case "$code" in
    0) say "done"; exit 0 ;;
    78) say "the configuration or its inputs cannot work (78): not started again"; exit 78 ;;
    93) say "do not restart (93): not started again, and jobs that depend on this one do not start"
      exit 93 ;;
    75) say "saved after a signal (75)"; rm -f "$logs/crashes" ;;
    *)
      [[ -f "$logs/crashes" ]] && crashes="$(<"$logs/crashes")"
      crashes=$((crashes + 1))
      echo "$crashes" >"$logs/crashes"
      say "crashed (srun's code $code), number $crashes in a row; logs of all ranks: $logs"
      if ((crashes >= MAX_CRASHES)); then
        say "MAX_CRASHES = $MAX_CRASHES: not started again (93)"
        exit 93
      fi
      ;;
  esac
  if ((starts >= MAX_REQUEUES)); then
    say "MAX_REQUEUES = $MAX_REQUEUES: not started again (93); submit the job again to go on"
    exit 93
  fi
  if ! command -v scontrol >/dev/null; then
    say "error: there is no scontrol here, so the job cannot requeue itself: submit it again to go on"
    exit "$code"
  fi
  say "requeued, start number $((starts + 2))"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "error: scontrol requeue was refused (is the job submitted with --no-requeue?): submit it" \
      "again to go on"
    exit "$code"
  fi
  sleep 60  # Slurm ends this script
  exit "$code"
}
