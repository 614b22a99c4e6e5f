# shellcheck shell=bash
# What the job scripts share; they source it. Slurm runs a copy of a job script from its spool folder,
# so the repository is where sbatch was called, or SOAR_MEGA_HOME.

say() { printf '%s %s\n' "$(date '+%Y-%m-%dT%H:%M:%S')" "$*"; }

# Settings of the cluster: the environment, then cluster.env, then the example's.
read_settings() {
  local name
  settings="${CLUSTER_ENV:-$SOAR_MEGA_HOME/slurm/cluster.env}"
  if [[ -f "$settings" ]]; then
    # shellcheck source=slurm/cluster.env.example
    source "$settings"
  elif [[ -n "${CLUSTER_ENV:-}" ]]; then
    say "error: CLUSTER_ENV = $CLUSTER_ENV must be a file: copy slurm/cluster.env.example there, or" \
      "unset it" >&2
    exit 78
  fi
  # A copy may be older than a setting.
  # shellcheck source=slurm/cluster.env.example
  source "$SOAR_MEGA_HOME/slurm/cluster.env.example"
  # An empty one is refused as an unknown partition.
  for name in SBATCH_PARTITION SBATCH_ACCOUNT SBATCH_QOS; do
    if [[ -n "${!name:-}" ]]; then export "${name?}"; else unset "$name"; fi
  done
}

# read_settings, and what Python is: the arrays `python` and `srun_options`.
load_cluster() {
  read_settings
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

# The job's id as Slurm's commands take it, `job`, and its own folder for logs, `logs`. An array's
# tasks have one each; the plain number of an array's last task means the whole array.
make_log_folder() {
  job="$SLURM_JOB_ID"
  if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
  logs="${LOG_DIR:-$PWD/logs}/${SLURM_JOB_NAME:-job}-$job"
  mkdir -p "$logs"
}

# pass_on SIGNAL: the shell itself was signalled (sbatch --signal=B:USR1, scancel --batch), and lives
# on. srun hands USR1 and USR2 to all tasks, but at a TERM it kills them: they get USR1 for it. A
# task that Slurm has signalled as well notes the first one alone.
pass_on() {
  say "signal $1"
  asked=1 interrupted=1
  if [[ -n "$step" ]]; then kill -s "${1/TERM/USR1}" "$step" 2>/dev/null; fi
}

# listen: from here on signals are passed on.
listen() {
  local name
  asked='' step=''
  # shellcheck disable=SC2064  # one trap for each name
  for name in USR1 USR2 TERM; do trap "pass_on $name" "$name"; done
}

# run_step SRUN...: its code; 75 where the end was asked for before it began. Needs `listen`.
run_step() {
  local code=75 interrupted=1
  [[ -n "$asked" ]] && return "$code"
  # In the background: a trap does not run before a command in the foreground has ended.
  "$@" &
  step=$!
  # A signal ends `wait` too; a code that was told once is told again.
  while [[ -n "$interrupted" ]]; do
    interrupted=''
    wait "$step"
    code=$?
  done
  step=''
  return "$code"
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
  trap - TERM  # Slurm's, at once
  if ! scontrol requeue "$job"; then
    say "error: scontrol requeue was refused (is the job submitted with --no-requeue?): submit it" \
      "again to go on"
    exit "$code"
  fi
  sleep 60  # Slurm ends this script
  exit "$code"
}
