#!/usr/bin/env bash
# Runs one experiment as several processes on this machine, on the CPU: a rehearsal of a run on several hosts.
#
#   bash scripts/launch_local.sh -n 2 -- python experiments/rl.py --config=configs/gspo_running_sum.py --workdir=runs/two
#
#   -n N                        number of processes
#   --devices-per-process D     CPU devices that each process pretends to have (default: that of XLA_FLAGS, or 4)
#   --port P                    port at which process 0 gathers the others (default: a free one)
#   --dry-run                   print the commands, one per line, and run nothing
#   -- COMMAND...               runs in the project's root; `python` is that of .venv where there is one
#
# Each process gets --coordinator=127.0.0.1:P --num_processes=N --process_id=I appended, and finds the others by them; what they
# then exchange goes through gloo. Output of process 0 comes as it is, that of process I > 0 on stderr behind "[I] ".
#
# Ctrl-C and SIGTERM ask all processes, by SIGTERM, to save and end; the launcher waits for them. A second Ctrl-C kills them.
# When a process dies, the others get GRACE seconds (an environment variable, default 60) to stop by themselves before they are killed.
# The exit code is that of the process that failed first (128 + number of the signal), or 0.

set -u

source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || fail "bash 5.1 or later is needed, this is $BASH_VERSION; install a newer one"

# ------------------------------------------------------------------------------------------------ arguments

processes='' devices='' port='' dry_run='' grace=${GRACE:-60}
while (($#)); do
    case $1 in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case $1 in
        -h | --help) show_help; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        -n | --devices-per-process | --port)
            (($# > 1)) || fail "$1 has no value; pass a number, like $1 2"
            case $1 in -n) processes=$2 ;; --port) port=$2 ;; *) devices=$2 ;; esac
            shift 2 ;;
        --) shift; break ;;
        -*) fail "$1 is no flag of this script; flags of the experiment come after --, see --help" ;;
        *) fail "unexpected argument $(quote "$1"); the command comes after --, as in -n 2 -- python experiments/rl.py ..." ;;
    esac
done
[[ -n $processes ]] || fail "-n is missing; pass the number of processes, like -n 2"
[[ $processes =~ ^[1-9][0-9]{0,3}$ ]] || fail "-n $(quote "$processes"): not a number of processes; pass one like -n 2"
(($#)) || fail "COMMAND is missing; pass it after --, as in -n 2 -- python experiments/rl.py ..."
for word in "$@"; do
    case $word in --coordinator* | --num_processes* | --process_id* | --distributed*)
        fail "${word%%=*} is set by this script; leave it out of COMMAND" ;;
    esac
done
[[ $grace =~ ^[0-9]+$ ]] || fail "GRACE=$(quote "$grace"): not a number of seconds; set one like GRACE=60"

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
command=("$@")
python=python3
if [[ -x .venv/bin/python ]]; then
    python=$PWD/.venv/bin/python
    [[ ${command[0]} != python ]] || command[0]=$python
fi

# XLA_FLAGS with the number of devices in it once. One that the user has set counts unless --devices-per-process is given.
flag=--xla_force_host_platform_device_count
read -r -d '' -a words <<< "${XLA_FLAGS:-}"
xla_flags=()
for word in "${words[@]}"; do
    if [[ $word != "$flag"=* ]]; then xla_flags+=("$word"); else devices=${devices:-${word#*=}}; fi
done
devices=${devices:-4}
[[ $devices =~ ^[1-9][0-9]{0,3}$ ]] ||
    fail "--devices-per-process $(quote "$devices"): not a number of devices; pass one like --devices-per-process 4"
xla_flags+=("$flag=$devices")

if [[ -z $port ]]; then
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') ||
        fail "--port: no free one could be found by $python; pass one, like --port 12345"
fi
if [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then
    fail "--port $(quote "$port"): not a port; pass a number from 1 to 65535, or leave the flag out"
fi

# The command line of process $1, in the array `line`.
command_line() {
    line=(env JAX_PLATFORMS=cpu "XLA_FLAGS=${xla_flags[*]}" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
        "${command[@]}" "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$1")
}

if [[ -n $dry_run ]]; then
    for ((i = 0; i < processes; i++)); do command_line "$i"; print_command "${line[@]}"; done
    exit 0
fi

# ------------------------------------------------------------------------------------------------ start

# Job control gives each process a process group of its own: Ctrl-C at the terminal then reaches the launcher alone, and whatever a
# process has started itself can be found by the group and killed with it.
set -m
declare -A alive=()   # process id -> I
readers=() tick='' deadline='' stopping=''
# bash remarks on jobs that are killed, with the line of this script; what the user has to know is said here.
exec {messages}>&2 2> /dev/null

kill_all() {
    local pid
    for pid in "${!alive[@]}"; do kill -KILL -- "-$pid"; done
}

stop() {
    local pid
    if [[ -n $stopping && $1 == INT ]]; then kill_all; return; fi
    stopping=yes
    for pid in "${!alive[@]}"; do kill -TERM "$pid"; done
}

# Copies stdin to stderr behind "[I] ". Ends with its input, not by the signals that end the processes: their last words pass here.
prefix() {
    local text
    trap '' INT TERM
    while IFS= read -r text || [[ -n $text ]]; do
        [[ $text == *'connected peer ranks is : '* ]] || printf '[%s] %s\n' "$1" "$text"
    done >&"$messages"
}

# Copies stdin to stdout without gloo's greetings, of which there are dozens.
without_greetings() {
    local text
    trap '' INT TERM
    while IFS= read -r text || [[ -n $text ]]; do
        [[ $text == *'connected peer ranks is : '* ]] || printf '%s\n' "$text"
    done
}

trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'kill_all; [[ -z $tick ]] || kill -KILL "$tick"' EXIT

for ((i = 0; i < processes; i++)); do
    [[ -z $stopping ]] || break
    command_line "$i"
    if ((i == 0)) && [[ -t 1 ]]; then   # a terminal: the live display
        "${line[@]}" < /dev/null 2>&"$messages" {messages}>&- &
        alive[$!]=$i
    elif ((i == 0)); then
        exec {output}> >(without_greetings)
        readers+=("$!")
        "${line[@]}" < /dev/null >&"$output" 2>&"$messages" {output}>&- {messages}>&- &
        alive[$!]=$i
        exec {output}>&-
    else
        exec {output}> >(prefix "$i")
        readers+=("$!")
        "${line[@]}" < /dev/null >&"$output" 2>&1 {output}>&- {messages}>&- &
        alive[$!]=$i
        exec {output}>&-
    fi
done
# A signal may have come between a start and its entry in `alive`.
[[ -z $stopping ]] || stop TERM

# ------------------------------------------------------------------------------------------------ wait

# "ended with exit code 3", or the name of the signal.
how() {
    local name
    if (($1 > 128)) && name=$(kill -l "$(($1 - 128))"); then echo "was ended by SIG$name (exit code $1)"
    else echo "ended with exit code $1"; fi
}

first_code=0
while ((${#alive[@]})); do
    # `wait -n` tells who ended first, but forgets a process that bash has collected on the way. So each is looked at, too, and a sleep
    # among those waited for sees to it that this happens every second.
    ended=''
    for pid in "${!alive[@]}"; do
        kill -0 "$pid" && continue
        wait "$pid"
        code=$? ended=$pid
        break
    done
    if [[ -z $ended ]]; then
        if [[ -z $tick ]] || ! kill -0 "$tick"; then
            sleep 1 > /dev/null {messages}>&- &
            tick=$!
        fi
        wait -n -p ended "${!alive[@]}" "$tick"   # a signal leaves `ended` empty
        code=$?
        [[ ${ended:-} != "$tick" ]] || ended='' tick=''
    fi
    if [[ -z ${ended:-} && -n $deadline ]] && ((SECONDS > deadline)); then
        deadline=''
        stuck=$(printf '%s\n' "${alive[@]}" | sort -n)
        echo "error: after $grace s, these processes had not stopped and are killed: ${stuck//$'\n'/ }" >&"$messages"
        kill_all
    fi
    [[ -n ${ended:-} ]] || continue

    i=${alive[$ended]}
    unset "alive[$ended]"
    kill -KILL -- "-$ended"   # what the process has left behind
    if ((code == 0 || first_code)); then continue; fi
    first_code=$code
    rest=''
    if ((${#alive[@]})); then
        rest="; the others have $grace s to stop by themselves"
        deadline=$((SECONDS + grace))
    fi
    # 143 is what was asked for after a signal to the launcher.
    [[ -n $stopping && $code == 143 ]] || echo "error: process $i $(how "$code")$rest" >&"$messages"
done
for pid in "${readers[@]}"; do wait "$pid"; done
exit "$first_code"
