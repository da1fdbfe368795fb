#!/usr/bin/env bash
# Serve Voxtral Mini 4B Realtime at ws://HOST:PORT/v1/realtime.
#
#   ./serve.sh [any option of vllm serve, which takes precedence over the variables]
#   ./serve.sh --show-address [...]   only print the addresses, with a QR code for phones; with the same variables
#
# The download goes to HF_HOME (default: ~/.cache/huggingface). HF_HUB_DISABLE_XET=1 downloads over plain HTTP, HF_TOKEN is
# for models that need one. Plugins named in VLLM_PLUGINS are loaded too. docs/server.md explains the settings.
# The variables, their defaults and the options of vllm serve for the same:
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
run() { PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} python3 -m "$@"; }
case ${1:-} in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"
    run launch.settings
    exit ;;
esac
venv=${VOXTRAL_VENV:-$here/.venv}
if [ -x "$venv/bin/vllm" ]; then
  PATH=$(cd "$venv" && pwd)/bin:$PATH
elif ! command -v vllm > /dev/null; then
  echo "error: vLLM is not installed: run ./setup.sh" >&2
  exit 1
fi

export PYTHONDONTWRITEBYTECODE= # Docker images set it; vLLM would then compile all its modules at each start: 25 s more
export CUDA_DEVICE_ORDER=PCI_BUS_ID # as nvidia-smi counts; CUDA's default is the fastest first
config=${XDG_CONFIG_HOME-}
key=${config:-~/.config}/voxtral/key
[ ! -e "$key" ] || export VLLM_API_KEY="${VLLM_API_KEY-$(tr -d '\r\n' < "$key")}"
if [ "${1:-}" = --show-address ]; then run launch.address "${@:2}"; exit; fi

# Checks what would fail after vLLM's long start, downloads the model, prepares the tokenizer for another delay, and prints
# assignments: `export NAME=value` for the variables in force, `name=value` for what follows from them.
settings=$(run launch "$@") || exit
run launch.address "$@" >&2
declare device model tokenizer executor sessions servers
eval "$settings"

options=(
  --served-model-name "$SERVED_MODEL_NAME"
  --host "$HOST" --port "$PORT"
  --tokenizer-mode mistral --config-format mistral # the model comes in Mistral's own format
  --generation-config vllm # the model has no such file: decoding is greedy
  --max-model-len "$MAX_MODEL_LEN"
  --max-num-seqs "$MAX_NUM_SEQS"
  --max-num-queued-reqs "$sessions" # without this, a session too many would wait without a message
  --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS" # vLLM reserves twice this for each session
)
# Live audio never repeats, so both caches are useless. Stock vLLM needs the first one for its identifiers of frames.
[ "$VOXTRAL_SPEED" = 0 ] || options+=(--mm-processor-cache-gb 0 --no-enable-prefix-caching)
case $QUANTIZATION in
  none) options+=(--load-format mistral) ;;
  bitsandbytes) options+=(--quantization bitsandbytes --load-format bitsandbytes) ;;
  *) options+=(--quantization "$QUANTIZATION" --load-format mistral) ;;
esac
[ -z "$executor" ] || options+=(--distributed-executor-backend "$executor") # with --data-parallel-size
[ "$servers" -le 1 ] || options+=(--api-server-count "$servers") # one process cannot talk to so many sessions
[ -z "$tokenizer" ] || options+=(--tokenizer "$tokenizer")
[ -z "$TLS_CERT" ] || options+=(--ssl-certfile "$TLS_CERT" --ssl-keyfile "$TLS_KEY")
if [ "$device" = gpu ]; then
  options+=(--gpu-memory-utilization "$GPU_MEMORY_UTILIZATION")
  options+=(--max-cudagraph-capture-size "$MAX_NUM_BATCHED_TOKENS") # every step has a graph; otherwise a session that begins delays all others
  options+=(--kernel-config '{"enable_jit_warmup": false}') # it warms up samplers that are never used; our warm-up runs sessions
else
  options+=(--enforce-eager) # compiling would add 40 s to the start, and a tenth to the speed
  export VLLM_CPU_KVCACHE_SPACE=$CPU_KVCACHE_GB
  export VLLM_ENABLE_V1_MULTIPROCESSING=0 # the worker runs in the engine's process, which saves a third of the imports
fi
export VLLM_USE_FLASHINFER_SAMPLER=0 # decoding is greedy, and that sampler compiles CUDA code at every start
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 # everything is local: no request to the hub, no usage statistics

# The captions page at /captions/, files over HTTP, and access control: vllm_plugin/voxtral_web.
export VOXTRAL_WEB=$here/web
# vLLM loads only these plugins.
export VLLM_PLUGINS=${VLLM_PLUGINS:+$VLLM_PLUGINS,}bitsandbytes,voxtral_int4,voxtral_speed,voxtral_web
options+=(--middleware voxtral_web.guard.Guard)
[ ! -x "$venv/bin/vllm" ] || "$here/setup.sh" --is-current || true # prints a warning if it is not
exec vllm serve "$model" "${options[@]}" "$@"
