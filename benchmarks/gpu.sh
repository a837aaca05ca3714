#!/usr/bin/env bash
# Everything that needs a GPU, in steps of their own processes: one failure does not lose the rest.
#
#   benchmarks/gpu.sh [STEP ...]      tests kernels unet-512-1 unet-512-4 unet-1024-1 unet-1024-4 (default: these)
#                                     unet-1024-4:W8A8 for some variants beside fp16; tiles-512 tiles-1024 time tiles
#                                     and write the defaults of this GPU into inductor_kernels/tuned.json (most
#                                     important shapes first, after each; a copy is in OUT);
#                                     tiles-512:20 leaves out the first twenty
#                                     A variant takes minutes to compile, once: torch's caches have it afterwards. For
#                                     runs of ten minutes on one machine: unet-512-1:fp16, then unet-512-1:W8A8, then
#                                     unet-512-1:torchao-int8,W8A8,W4A8 and so on; what is cut off is not lost
#   DRY=1                             walk the same code on a CPU with tiny sizes
#   WHEELS=folder                     install the packages there first (pip --no-deps); no network is needed. Needed
#                                     beside torch and triton: diffusers and what it imports, torchao; for the tests
#                                     pytest, accelerate
#   OUT=folder  PYTHON=python3  LIMIT=seconds per step (580); rows measured before it are kept
case "${1:-}" in -h | --help) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d; exit ;; esac
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
LIMIT=${LIMIT:-580}
DRY=${DRY:+--dry-run}
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests kernels unet-512-1 unet-512-4 unet-1024-1 unet-1024-4)
mkdir -p "$OUT"
[ -z "${WHEELS:-}" ] || "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl

failed=0
for step in "${steps[@]}"; do
    echo "== $step"
    log=$OUT/${step//[:,]/-}.log
    if [ "$step" = tests ]; then
        # Only files that have such tests, and no file for the sake of another: they import packages that may be missing.
        files=$(grep -rlE --include='test_*.py' '^(@| +)pytest\.mark\.gpu' tests)
        timeout "$LIMIT" "$PYTHON" -m pytest -m gpu --continue-on-collection-errors -p no:cacheprovider $files \
            >"$log" 2>&1
        status=$?
        tail -1 "$log"
    else
        timeout "$LIMIT" "$PYTHON" -m benchmarks.gpu "$step" --out "$OUT" $DRY 2>&1 | tee "$log"
        status=${PIPESTATUS[0]}
    fi
    [ "$status" -eq 0 ] || { echo "== $step ended with status $status (see $log)"; failed=1; }
done
"$PYTHON" -m benchmarks.gpu report --out "$OUT" || failed=1
exit $failed
