#!/bin/bash
# The one-shot check on a machine with a GPU and without a network: at most 8 minutes, tables at the end.
#
#     python dev.py gpu-kit                 once, with a network: builds .gpu/ (about 25 MB)
#     bash benchmarks/gpu/check.sh          in a copy of the repository with .gpu/ on the machine with the GPU
#
# Parts alone: check.sh tests | steps | native | graph | host. On a CPU, to test the script itself: TINY=1 check.sh
cd "$(dirname "$0")/../.." || exit 1
KIT=$PWD/.gpu OUT=${OUT:-/tmp/gpu_check} SITE=${SITE:-/tmp/gpu_site} COMFY=${COMFY:-/tmp/gpu_comfy}
PYTHON=${PYTHON:-python3} WANTED=${*:-tests steps native graph host} START=$SECONDS BUDGET=${BUDGET:-430}
mkdir -p "$OUT"
left() { echo $((BUDGET - SECONDS + START)); }
say() { echo "=== $* ($(left) s left)"; }
tests() { # name, seconds it may take, files
  local name=$1 most=$2; shift 2
  say "$name"
  PYTHONPATH=$SITE:$PWD/benchmarks/gpu/stubs COMFYUI_PATH=$COMFY/ComfyUI timeout "$most" "$PYTHON" -m pytest \
    -c tests/pytest.ini --rootdir . --import-mode=importlib -p no:cacheprovider -q --maxfail=20 --durations=5 "$@" \
    > "$OUT/$name.log" 2>&1
  echo "$name: rc $?"; tail -20 "$OUT/$name.log" | cut -c1-220
}

say "installing wheels"
if [ ! -d "$SITE/diffusers" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$KIT"/whl/*.whl || exit 1
fi
[ -d "$COMFY/ComfyUI" ] || { mkdir -p "$COMFY" && tar xJf "$KIT/comfyui.tar.xz" -C "$COMFY"; }
export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
"$PYTHON" -c "import torch, transformers, diffusers; print(torch.__version__, transformers.__version__, diffusers.__version__)"

[[ $WANTED == *tests* ]] && tests tests 90 tests/trainers/training/test_gpu.py
if [[ $WANTED == *steps* ]]; then
  say "steps"
  timeout $(($(left) - 5)) "$PYTHON" benchmarks/gpu/steps.py ${TINY:+--tiny} --out "$OUT" --budget "${STEPS_BUDGET:-170}" > "$OUT/steps.log" 2>&1
  echo "steps: rc $?"; grep -E "^##|Error|left out" "$OUT/steps.log" | cut -c1-200
fi
if [[ $WANTED == *native* && $(left) -gt 60 ]]; then
  say "native"
  PYTHONPATH=$SITE:$PWD/benchmarks/gpu/stubs timeout $(($(left) - 5)) "$PYTHON" benchmarks/gpu/native.py ${TINY:+--tiny} \
    --comfyui "$COMFY/ComfyUI" --out "$OUT" --budget "${NATIVE_BUDGET:-110}" > "$OUT/native.log" 2>&1
  echo "native: rc $?"; grep -E "^##|Error|left out" "$OUT/native.log" | cut -c1-200
fi
if [[ $WANTED == *graph* && $(left) -gt 60 ]]; then
  say "graph"
  PYTHONPATH=$SITE:$PWD/benchmarks/gpu/stubs timeout $(($(left) - 5)) "$PYTHON" benchmarks/gpu/graph.py ${TINY:+--tiny} \
    --comfyui "$COMFY/ComfyUI" --out "$OUT" --budget "${GRAPH_BUDGET:-120}" > "$OUT/graph.log" 2>&1
  echo "graph: rc $?"; tail -12 "$OUT/graph.log" | cut -c1-300
fi
[[ $WANTED == *host* && $(left) -gt 30 ]] && tests host $(($(left) - 5)) tests/nodes/host/test_native.py tests/nodes/host/test_weights.py

say "tables"
sed -n '/^| what/,$p' "$OUT/steps.log" 2>/dev/null | cut -c1-330
sed -n '/^| LoRA on a transformer/,$p' "$OUT/native.log" 2>/dev/null | cut -c1-330
sed -n '/^| in the graph/,$p' "$OUT/graph.log" 2>/dev/null | cut -c1-330
say "done"
