# Sourced by the launch scripts: runs torchrun so that SIGTERM makes its ranks save and the whole exit with status 0.
# torchrun itself answers SIGTERM by ending with status 1, which schedulers take for a failure.

supervise() {
    "$@" &
    local torchrun=$! stopping=0 status=0
    trap 'stopping=1' TERM
    # A trapped signal ends `wait` before torchrun has ended: wait again for torchrun's own status.
    while true; do
        status=0
        wait "$torchrun" || status=$?
        kill -0 "$torchrun" 2>/dev/null || break
        # To the ranks alone: they are torchrun's children, and when all have ended well so has torchrun. Again every
        # second, since ranks that are still starting do not listen yet.
        while ((stopping)) && kill -0 "$torchrun" 2>/dev/null; do
            pkill -TERM -P "$torchrun" || true
            sleep 1
        done
    done
    return "$status"
}
