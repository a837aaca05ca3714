#!/usr/bin/env bash
# Everything that needs a GPU, in steps of their own processes: one failure does not lose the rest.
#
#   benchmarks/gpu.sh [STEP ...]      tests kernels unet-512-1 unet-512-4 unet-1024-1 unet-1024-4 (default: these)
#                                     unet-1024-4:W8A8,W4A8 for some variants beside fp16 (a variant takes minutes to
#                                     compile); tiles-512 tiles-1024 time tiles and write the defaults of this GPU
#                                     into inductor_kernels/tuned.json
#                                     each within ten minutes: tests, kernels, tiles-512, unet-512-1:W8A8,W4A8,
#                                     unet-1024-4:W8A8,torchao-int8; all variants of a size take longer
#   DRY=1                             walk the same code on a CPU with tiny sizes
#   WHEELS=folder                     install the packages there first; no network is needed
#   OUT=folder  PYTHON=python3  LIMIT=seconds per step (580); rows measured before it are kept
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
    if [ "$step" = tests ]; then
        timeout "$LIMIT" "$PYTHON" -m pytest -m gpu tests/kernels -p no:cacheprovider >"$OUT/tests.log" 2>&1
        status=$?
        tail -1 "$OUT/tests.log"
    else
        timeout "$LIMIT" "$PYTHON" -m benchmarks.gpu "$step" --out "$OUT" $DRY 2>&1 | tee "$OUT/$step.log"
        status=${PIPESTATUS[0]}
    fi
    [ "$status" -eq 0 ] || { echo "== $step ended with status $status (see $OUT/$step.log)"; failed=1; }
done
"$PYTHON" -m benchmarks.gpu report --out "$OUT" || failed=1
exit $failed
