# Sourced by the launch scripts. (launch_slurm.sbatch has its own copy: SLURM runs that file from its spool, away from this one.)

# A mistake of the user's: one line, exit code 2.
fail() { echo "error: $*" >&2; exit 2; }

# One word of a command as it would have to be typed.
quote() { if [[ $1 =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then printf '%s' "$1"; else printf '%s' "${1@Q}"; fi; }

# A command as it would have to be typed, on a line.
print_command() {
    local word separator=''
    for word in "$@"; do printf '%s' "$separator"; quote "$word"; separator=' '; done
    echo
}

# The comment at the top of the script that is run.
show_help() { sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"; }
