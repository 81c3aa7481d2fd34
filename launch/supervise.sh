# Sourced by the launch scripts: runs torchrun so that SIGTERM makes its ranks save and the whole exit with status 0.
# torchrun itself answers SIGTERM by ending with status 1, which schedulers take for a failure.

supervise() {
    "$@" &
    local torchrun=$! signalled=1 status=0
    # To the ranks alone: they are torchrun's children, and when all have ended well so has torchrun.
    trap 'signalled=1; pkill -TERM -P "$torchrun" || true' TERM
    # A trapped signal ends `wait` before torchrun has ended: wait again for torchrun's own status.
    while ((signalled)); do
        signalled=0
        status=0
        wait "$torchrun" || status=$?
    done
    return "$status"
}
