#!/usr/bin/env bash
# Reinforcement learning on a TPU slice of a Google Kubernetes Engine cluster: fills in scripts/launch_gke.yaml and applies it.
#
#   NAME=gspo-1 IMAGE=us-docker.pkg.dev/PROJECT/REPO/gspo:1 CONFIG=configs/X.py WORKDIR=/mnt/gspo/runs/X BUCKET=my-bucket \
#   TPU_ACCELERATOR=tpu-v5p-slice TPU_TOPOLOGY=4x4x4 NUM_HOSTS=16 CHIPS_PER_HOST=4 \
#       bash scripts/launch_gke.sh [--dry-run] [-- --config.a.b=value ...]
#
#   NAME             of the run in the cluster: small letters, digits, dashes, at most 40
#   IMAGE            container image with the project in its working directory; scripts/launch_gke.yaml has a Dockerfile
#   CONFIG           as in the image
#   WORKDIR          under /mnt/gspo, where BUCKET is mounted: all hosts write the checkpoints
#   BUCKET           Cloud Storage bucket. A checkpoint is finished by renaming its folder, for which the bucket needs folders:
#                    gcloud storage buckets create gs://BUCKET --location=REGION --uniform-bucket-level-access \
#                        --enable-hierarchical-namespace
#   TPU_ACCELERATOR, TPU_TOPOLOGY      labels of the node pool:
#                    kubectl get nodes -L cloud.google.com/gke-tpu-accelerator -L cloud.google.com/gke-tpu-topology
#   NUM_HOSTS, CHIPS_PER_HOST          their product is the number of chips of the topology: 16 x 4 for 4x4x4
#   SERVICE_ACCOUNT  Kubernetes service account that may read and write BUCKET (default: default)
#   --dry-run        print the filled-in file and the kubectl command, and run nothing
#   -- ARGUMENTS     passed on to experiments/rl.py; in the yaml they stand for EXTRA_ARGS
#
# kubectl must be set to the cluster: gcloud container clusters get-credentials CLUSTER --location=REGION
# Then: kubectl get jobset NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
# To stop a run, kubectl delete jobset NAME: it saves and ends. The same command, later, resumes it.

set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

# ------------------------------------------------------------------------------------------------ arguments

dry_run=''
while (($#)); do
    case $1 in
        -h | --help) show_help; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --) shift; break ;;
        --config.*) fail "${1%%=*} is a field of the config; pass it after --" ;;
        *) fail "$(quote "$1") is no flag of this script; values come from variables like NAME, see --help" ;;
    esac
done
[[ -z ${EXTRA_ARGS:-} ]] || fail "EXTRA_ARGS is not read from a variable; pass its words after --"
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}

# Checks variable $1 against pattern $2, which lets nothing through that means something in YAML; $3 is an example.
check() {
    local value=${!1:-}
    [[ -n $value ]] || fail "$1 is not set; set it like $1=$3"
    [[ $value =~ ^($2)$ ]] || fail "$1=$(quote "$value"): cannot be right; set it like $1=$3"
}

number='[1-9][0-9]{0,5}'
check NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' gspo-1
check IMAGE '[a-z0-9][A-Za-z0-9._/:@-]*' us-docker.pkg.dev/PROJECT/REPO/gspo:1
check CONFIG '[A-Za-z0-9_./-]+\.py(:[A-Za-z0-9_.,=-]+)?' configs/gspo_running_sum.py
check WORKDIR '/mnt/gspo/[A-Za-z0-9_./=-]+' /mnt/gspo/runs/gspo
check BUCKET '[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]' my-bucket
check TPU_ACCELERATOR 'tpu[a-z0-9-]+' tpu-v5p-slice
check TPU_TOPOLOGY "$number(x$number){1,2}" 4x4x4
check NUM_HOSTS "$number" 16
check CHIPS_PER_HOST "$number" 4
check SERVICE_ACCOUNT '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' default

chips=$((${TPU_TOPOLOGY//x/*}))
((NUM_HOSTS * CHIPS_PER_HOST == chips)) ||
    fail "NUM_HOSTS=$NUM_HOSTS x CHIPS_PER_HOST=$CHIPS_PER_HOST are $((NUM_HOSTS * CHIPS_PER_HOST)) chips, and TPU_TOPOLOGY=$TPU_TOPOLOGY" \
        "has $chips; set NUM_HOSTS to $chips / CHIPS_PER_HOST"
for word in "$@"; do
    case $word in
        --config=* | --workdir=* | --config | --workdir) fail "${word%%=*} after --: set the variable CONFIG or WORKDIR instead" ;;
        --?*) ;;
        *) fail "unexpected argument $(quote "$word") after --; fields are set as --config.a.b=value" ;;
    esac
    [[ $word != *[[:cntrl:]]* ]] || fail "${word%%=*} after --: its value has a line end or another control character; leave it out"
done

# ------------------------------------------------------------------------------------------------ the file

# A word as a double-quoted YAML string. Kubernetes reads $(NAME) in arguments, and $$ as $.
yaml_string() {
    local text=$1
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//"\$("/"\$\$("}
    printf '"%s"' "$text"
}

# Prints the template with its names filled in; "- EXTRA_ARGS" becomes one line per argument, or none.
render() {
    local text name word
    while IFS= read -r text; do
        if [[ $text =~ ^(\ *-\ )"\${EXTRA_ARGS}"$ ]]; then
            for word in "$@"; do echo "${BASH_REMATCH[1]}$(yaml_string "$word")"; done
            continue
        fi
        for name in NAME IMAGE CONFIG WORKDIR BUCKET TPU_ACCELERATOR TPU_TOPOLOGY NUM_HOSTS CHIPS_PER_HOST SERVICE_ACCOUNT; do
            text=${text//"\${$name}"/"${!name}"}
        done
        [[ $text != *"\${"* ]] || fail "scripts/launch_gke.yaml: nothing is known of the name in the line: $text"
        echo "$text"
    done < scripts/launch_gke.yaml
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
yaml=$(render "$@")

if [[ -n $dry_run ]]; then
    echo "kubectl apply -f - <<'EOF'"
    echo "$yaml"
    echo EOF
    exit 0
fi
command -v kubectl > /dev/null ||
    fail "kubectl is missing; install it (gcloud components install kubectl), or see the file by --dry-run"
kubectl apply -f - <<< "$yaml"
