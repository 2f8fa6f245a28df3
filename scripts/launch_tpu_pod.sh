#!/usr/bin/env bash
# Reinforcement learning on a Cloud TPU pod slice: several TPU VMs (hosts), which are requested, used and deleted together.
#
#   bash scripts/launch_tpu_pod.sh all --name=NAME --zone=ZONE --type=v5p-128 --bucket=BUCKET \
#       --config=configs/X.py --workdir=/mnt/gspo/runs/X [-- --config.a.b=value ...]
#
#   create    requests the slice. The request waits in a queue until Google has the machines; nothing is paid before ("queued resource")
#   setup     waits until they are there, copies the committed code to ~/gspo on every host, installs .venv and jax[tpu], mounts BUCKET
#   run       starts experiments/rl.py on every host and shows its output. Ctrl-C or a lost connection ends the showing, not the run
#   stop      asks the run to save and end (SIGTERM), and waits for it; `run` with the same flags goes on where it was
#   delete    gives the machines back, which ends the costs. Call `stop` first
#   all       create, setup, run; it does not delete
#
#   --name N --zone Z        of the slice, like gspo-1 and us-east5-a; all subcommands need them
#   --project P              Google Cloud project (default: that of `gcloud config`)
#   --type T                 accelerator type, like v5p-128: for v5p and v4 the number counts cores, two per chip  [create]
#   --version V              runtime version of the TPU VMs (default: the one for the type)                        [create]
#   --spot                   cheaper machines, which Google may take away at any time                              [create]
#   --bucket B               Cloud Storage bucket to mount at /mnt/gspo on every host                              [setup]
#   --config C --workdir W   as for experiments/rl.py; arguments after -- are passed on to it                      [run]
#   --dry-run                print the commands, one per line, and run nothing
#   A flag may be given to any subcommand, so that one line of flags serves all.
#
# All hosts write the checkpoints, so the workdir lies on storage that they share: under /mnt/gspo with --bucket, or on a Filestore that
# you mounted. A checkpoint is finished by renaming its folder, for which the bucket needs folders:
#   gcloud storage buckets create gs://BUCKET --location=REGION --uniform-bucket-level-access --enable-hierarchical-namespace
# After spot machines were taken away: delete, then `all` with the same flags resumes.
# Before the first use: gcloud auth login; gcloud services enable tpu.googleapis.com; ssh to all hosts at once needs the key in an agent
# (eval "$(ssh-agent)"; ssh-add ~/.ssh/google_compute_engine).

set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

# Runs a command, or prints it.
run() { if [[ -n $dry_run ]]; then print_command "$@"; else "$@"; fi; }

# ------------------------------------------------------------------------------------------------ arguments

subcommands='create, setup, run, stop, delete, all'
name='' zone='' type='' version='' project='' workdir='' config='' bucket='' spot='' dry_run=''
case ${1:-} in
    create | setup | run | stop | delete | all) subcommand=$1; shift ;;
    -h | --help) show_help; exit 0 ;;
    '' | -*) fail "the subcommand is missing; pass one of $subcommands first, or --help" ;;
    *) fail "$(quote "$1") is no subcommand; pass one of $subcommands" ;;
esac
while (($#)); do
    case $1 in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case $1 in
        -h | --help) show_help; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --spot) spot=yes; shift ;;
        --name | --zone | --type | --version | --project | --workdir | --config | --bucket)
            [[ -n ${2:-} ]] || fail "$1 has no value; pass one as $1=VALUE"
            printf -v "${1#--}" '%s' "$2"
            shift 2 ;;
        --) shift; break ;;
        --config.*) fail "$1 is a field of the config; pass it after --" ;;
        *) fail "$(quote "$1") is no flag of this script; overrides of the config come after --, see --help" ;;
    esac
done

# Checks the value of flag $1 against pattern $2; $3 is an example.
check() {
    local value=${!1}
    [[ -n $value ]] || fail "--$1 is missing, which $subcommand needs; pass one like --$1=$3"
    [[ $value =~ ^($2)$ ]] || fail "--$1=$(quote "$value"): cannot be right; pass one like --$1=$3"
}

check name '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' gspo-1
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-a
[[ -z $project ]] || check project '[a-z][-a-z0-9:.]*[a-z0-9]' my-project
[[ -z $bucket ]] || check bucket '[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]' my-bucket

if [[ $subcommand == create || $subcommand == all ]]; then
    check type '[a-z0-9]+-[1-9][0-9]*' v5p-128
    if [[ -z $version ]]; then
        case $type in
            v5p-*) version=v2-alpha-tpuv5 ;;
            v5litepod-*) version=v2-alpha-tpuv5-lite ;;
            v6e-*) version=v2-alpha-tpuv6e ;;
            v4-* | v3-* | v2-*) version=tpu-ubuntu2204-base ;;
            *) fail "--version is missing, and --type=$type has no default; see https://cloud.google.com/tpu/docs/runtimes" ;;
        esac
    fi
    check version '[-a-z0-9.]+' v2-alpha-tpuv5
fi

if [[ $subcommand == run || $subcommand == all ]]; then
    check config '.+\.py(:.*)?' configs/gspo_running_sum.py
    [[ -n $workdir ]] || fail "--workdir is missing, which $subcommand needs; pass one like --workdir=/mnt/gspo/runs/X"
    [[ $workdir == /* ]] || fail "--workdir=$(quote "$workdir"): not a full path; pass one that all hosts share, like /mnt/gspo/runs/X"
    for word in "$@"; do
        case $word in
            --config=* | --workdir=* | --config | --workdir) fail "${word%%=*} after --: pass it before --" ;;
            --?*) ;;
            *) fail "unexpected argument $(quote "$word") after --; fields are set as --config.a.b=value" ;;
        esac
    done
elif (($#)); then
    # The same line of flags serves every subcommand; the overrides are for `run`.
    set --
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n $dry_run ]] || command -v gcloud > /dev/null ||
    fail "gcloud is missing; install it (https://cloud.google.com/sdk/docs/install), or see the commands by --dry-run"
place=("--zone=$zone" ${project:+"--project=$project"})
overrides=("$@")

# Runs shell command $1 on every host at once.
on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${place[@]}" "--command=$1"; }

# ------------------------------------------------------------------------------------------------ subcommands

create() {
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" "--accelerator-type=$type" \
        "--runtime-version=$version" ${spot:+--spot}
}

# A dry run prints the question once; it is repeated until the answer is ACTIVE.
wait_until_active() {
    local state question
    question=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)')
    if [[ -n $dry_run ]]; then print_command "${question[@]}"; return; fi
    while true; do
        state=$("${question[@]}")
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING)
                echo "error: --name=$name: the request is $state; delete it and create it again" >&2
                exit 1 ;;
        esac
        echo "$name is $state; asking again in 30 s (Ctrl-C leaves the request in the queue)" >&2
        sleep 30
    done
}

setup() {
    local archive=${TMPDIR:-/tmp}/gspo-$name.tar.gz jax
    wait_until_active

    # What is committed, so that the run can be told by its commit.
    if [[ -z $dry_run && -n $(git status --porcelain --untracked-files=no) ]]; then
        echo "note: changes that are not committed are not copied" >&2
    fi
    run git archive --format=tar.gz "--output=$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:gspo.tar.gz" --worker=all "${place[@]}"
    run rm -f "$archive"

    # uv brings a Python of its own: the one of the TPU VMs (3.10) is too old. It also has to install jax[tpu], as uv makes .venv
    # without pip.
    jax=$(sed -n 's/^jax==\([0-9.]*\).*/\1/p' requirements.txt)
    on_all_hosts "mkdir -p gspo && tar -xzf gspo.tar.gz -C gspo && cd gspo && export PATH=\"\$HOME/.local/bin:\$PATH\" && { command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; } && bash scripts/setup_env.sh && uv pip install --quiet --python .venv/bin/python $(quote "jax[tpu]==$jax")"

    # No caching of what the bucket holds: a host must see at once what another has written.
    [[ -n $bucket ]] || return 0
    on_all_hosts "command -v gcsfuse > /dev/null || { curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null && echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null && sudo apt-get -o DPkg::Lock::Timeout=600 -qq update && sudo apt-get -o DPkg::Lock::Timeout=600 -qq -y install gcsfuse; }"
    on_all_hosts "mountpoint -q /mnt/gspo || { sudo mkdir -p /mnt/gspo && sudo chown \"\$(id -u)\" /mnt/gspo && gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $bucket /mnt/gspo; }"
}

# How pgrep and pkill know the run by its command line. The ^ keeps them from finding the shell that calls them, in whose command line
# this pattern stands as well.
pattern='^[^ ]*python[0-9.]* experiments/rl[.]py '

# nohup: the run outlives the connection. JAX_PLATFORMS: without its TPU it fails instead of running on the CPU.
start() {
    local word line='nohup env JAX_PLATFORMS=tpu,cpu .venv/bin/python experiments/rl.py --distributed'
    for word in "--config=$config" "--workdir=$workdir" "${overrides[@]}"; do line+=" $(quote "$word")"; done
    on_all_hosts "cd gspo || exit 2; if pgrep -f '$pattern' > /dev/null; then echo \"error: a run is already going on \$(hostname); stop it first\" >&2; exit 2; fi; touch rl.log; seen=\$(stat -c %s rl.log); $line >> rl.log 2>&1 < /dev/null & pid=\$!; tail -c +\$((seen + 1)) --pid=\$pid -f rl.log & wait \$pid; code=\$?; wait; exit \$code"
}

stop() {
    on_all_hosts "pkill -TERM -f '$pattern' || { echo \"nothing is running on \$(hostname)\"; exit 0; }; for second in \$(seq 600); do pgrep -f '$pattern' > /dev/null || exit 0; sleep 1; done; echo \"error: still saving after 10 minutes on \$(hostname)\" >&2; exit 1"
}

delete() { run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

case $subcommand in
    create) create ;;
    setup) setup ;;
    run) start ;;
    stop) stop ;;
    delete) delete ;;
    all) create; setup; start ;;
esac
