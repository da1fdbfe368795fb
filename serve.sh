#!/usr/bin/env bash
# Serve Voxtral Mini 4B Realtime at ws://HOST:PORT/v1/realtime.
#
#   ./serve.sh [any option of vllm serve, which wins over the ones below]
#
# Environment variables and their defaults:
#   MODEL=mistralai/Voxtral-Mini-4B-Realtime-2602   a repository of the hub, or a folder
#   SERVED_MODEL_NAME      the name clients use (default: MODEL, of a folder its last part)
#   HOST=0.0.0.0           every network of this machine; 127.0.0.1 for this machine alone
#   PORT=8000
#   QUANTIZATION=bitsandbytes   INT4; none for bf16, or any method of vLLM
#   MAX_MODEL_LEN=32768    longest session in frames of 80 ms: 43 minutes
#   GPU_MEMORY_UTILIZATION=0.90   share of the GPU's memory to take
#   MAX_NUM_SEQS=8         sessions at once; the next one is told that the server is busy
#   MAX_NUM_BATCHED_TOKENS=512    frames in one step; more costs 2 MiB each in every session
#   CPU_KVCACHE_GB=2       memory for sessions where there is no GPU
set -euo pipefail

case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; exit ;; esac
fail() { echo "error: $*" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd)

MODEL=${MODEL:-mistralai/Voxtral-Mini-4B-Realtime-2602}
HOST=${HOST:-0.0.0.0} PORT=${PORT:-8000} QUANTIZATION=${QUANTIZATION:-bitsandbytes}
MAX_NUM_SEQS=${MAX_NUM_SEQS:-8} GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.90}
name=$MODEL
previous=
for argument; do # what is checked below may stand on the command line
  case $argument in --port=*) PORT=${argument#*=} ;; --host=*) HOST=${argument#*=} ;;
    --gpu-memory-utilization=*) GPU_MEMORY_UTILIZATION=${argument#*=} ;; esac
  case $previous in --port) PORT=$argument ;; --host) HOST=$argument ;;
    --gpu-memory-utilization) GPU_MEMORY_UTILIZATION=$argument ;; esac
  previous=$argument
done

# What would fail only after vLLM's long start.
if [ -x "$here/.venv/bin/vllm" ]; then
  PATH=$here/.venv/bin:$PATH
elif ! command -v vllm > /dev/null; then
  fail "vLLM is not installed: run ./setup.sh"
fi
if [ -d "$MODEL" ]; then
  for file in params.json tekken.json consolidated.safetensors; do
    [ -s "$MODEL/$file" ] || fail "$MODEL/$file is missing: MODEL must be a folder with the model's three files"
  done
  name=$(basename "$(cd "$MODEL" && pwd)")
elif [[ $MODEL == /* || $MODEL == .* || $MODEL != */* ]]; then
  fail "$MODEL: no such folder"
fi
python3 - "$HOST" "$PORT" << 'PYTHON' || exit 1
import errno, socket, sys
host, port = sys.argv[1:]
try:
    family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
except (OSError, ValueError, OverflowError) as error:
    taken = getattr(error, "errno", None) == errno.EADDRINUSE
    mend = "another program has this port: stop it, or choose another, PORT=8001 ./serve.sh" if taken else error
    sys.exit(f"error: {host}:{port}: {mend}")
PYTHON

options=(
  --served-model-name "${SERVED_MODEL_NAME:-$name}"
  --host "$HOST" --port "$PORT"
  --tokenizer-mode mistral --config-format mistral # the model comes in Mistral's own format
  --generation-config vllm # there is none to look for: decoding is greedy
  --max-model-len "${MAX_MODEL_LEN:-32768}"
  --max-num-seqs "$MAX_NUM_SEQS"
  --max-num-queued-reqs "$MAX_NUM_SEQS" # a session too many is told so; without this it waits in silence
  --max-num-batched-tokens "${MAX_NUM_BATCHED_TOKENS:-512}" # vLLM reserves twice this for each session
)
case $QUANTIZATION in
  none) options+=(--load-format mistral) ;;
  bitsandbytes) options+=(--quantization bitsandbytes --load-format bitsandbytes) ;;
  *) options+=(--quantization "$QUANTIZATION" --load-format mistral) ;;
esac
if memory=$(nvidia-smi --query-gpu=memory.free,memory.total --format=csv,noheader,nounits 2> /dev/null | head -n 1) &&
  [ -n "$memory" ]; then
  awk -v share="$GPU_MEMORY_UTILIZATION" -F', *' '{ if ($1 < share * $2) { printf \
    "error: %d of %d MiB of GPU memory are free, but %d are wanted: end other programs on the GPU (see nvidia-smi), " \
    "or set GPU_MEMORY_UTILIZATION=%.2f\n", $1, $2, share * $2, int(100 * $1 / $2) / 100 > "/dev/stderr"; exit 1 } }' \
    <<< "$memory"
  options+=(--gpu-memory-utilization "$GPU_MEMORY_UTILIZATION")
else
  options+=(--enforce-eager) # compiling takes longer than it saves here: 40 s of start for a tenth of the speed
  export VLLM_CPU_KVCACHE_SPACE=${CPU_KVCACHE_GB:-2}
fi
export VLLM_USE_FLASHINFER_SAMPLER=0 # decoding is greedy, and that sampler compiles CUDA code at every start
exec vllm serve "$MODEL" "${options[@]}" "$@"
