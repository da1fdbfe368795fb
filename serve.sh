#!/usr/bin/env bash
# Serve Voxtral Mini 4B Realtime at ws://HOST:PORT/v1/realtime.
#
#   ./serve.sh [any option of vllm serve, which takes precedence over the variables below]
#
# Environment variables and their defaults:
#   MODEL=mistralai/Voxtral-Mini-4B-Realtime-2602   a repository of the hub, or a folder
#   MODEL_REVISION         commit, tag or branch of the repository (default: a fixed commit; for other models main)
#   SERVED_MODEL_NAME      the name clients use (default: MODEL; for a folder its last part)
#   HOST=0.0.0.0           serves all networks of this machine; 127.0.0.1 serves this machine only
#   PORT=8000
#   VLLM_API_KEY           the key that clients must send (default: no key)
#   TLS_CERT               a certificate: wss:// instead of ws://; scripts/make-certificate makes one
#   TLS_KEY                the certificate's private key
#   TRANSCRIPTION_DELAY_MS how long the model waits before it writes: 80 to 1200 in steps of 80, or 2400
#                          (default: the model's own, 480); longer is more accurate
#   QUANTIZATION=bitsandbytes   INT4; none for bf16, or any method of vLLM
#   VOXTRAL_INT4_ENCODER=1      0 leaves the audio encoder in bf16: 4.3 GiB of weights instead of 3.1
#   MAX_MODEL_LEN=32768    longest session in frames of 80 ms: 43 minutes
#   GPU_MEMORY_UTILIZATION=0.90   share of the GPU's memory to use
#   MAX_NUM_SEQS=8         sessions at once; the next one gets an error, because the server is busy
#   MAX_NUM_BATCHED_TOKENS frames in one step; each frame reserves 2 MiB for each session
#                          (default: enough for two sessions to begin while all others run: 88 for MAX_NUM_SEQS=8)
#   VOXTRAL_SPEED=1        0 turns off the speed patches (vllm_plugin/voxtral_speed): a session then becomes slower with
#                          every minute; a list of names turns on only these patches, "-" before a name all but this one
#   CUDA_VISIBLE_DEVICES=0 which GPU: as nvidia-smi counts them, or its UUID (GPU-...); empty: none
#   VOXTRAL_VENV=.venv     the Python environment that setup.sh made
#   CPU_KVCACHE_GB=2       memory for sessions without a GPU
#   SESSION_IDLE_MINUTES=10   ends a session after this time without any message; 0: never
#   ALLOWED_ORIGINS=""     web pages of other sites that may use this server: "https://a.example https://b.example"
#   MAX_UPLOAD_MB=512      largest file that POST /v1/audio/transcriptions accepts; it is kept in TMPDIR (/tmp) meanwhile
#   UPLOAD_SESSIONS        sessions that all such files together may use (default: half of MAX_NUM_SEQS)
#   ALLOWED_HOSTS=""       further names under which browsers may use this server, besides its addresses and its own name
#
# The download goes to HF_HOME (default: ~/.cache/huggingface). HF_HUB_DISABLE_XET=1 downloads over plain HTTP, HF_TOKEN is
# for models that need one. Plugins named in VLLM_PLUGINS are loaded too. docs/server.md explains the settings.
set -euo pipefail

case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; exit ;; esac
here=$(cd "$(dirname "$0")" && pwd)
venv=${VOXTRAL_VENV:-$here/.venv}
if [ -x "$venv/bin/vllm" ]; then
  PATH=$(cd "$venv" && pwd)/bin:$PATH
elif ! command -v vllm > /dev/null; then
  echo "error: vLLM is not installed: run ./setup.sh" >&2
  exit 1
fi

export MODEL=${MODEL:-mistralai/Voxtral-Mini-4B-Realtime-2602} MODEL_REVISION=${MODEL_REVISION:-}
export HOST=${HOST:-0.0.0.0} PORT=${PORT:-8000} VLLM_API_KEY=${VLLM_API_KEY:-}
export TLS_CERT=${TLS_CERT:-} TLS_KEY=${TLS_KEY:-} TRANSCRIPTION_DELAY_MS=${TRANSCRIPTION_DELAY_MS:-}
export QUANTIZATION=${QUANTIZATION:-bitsandbytes} VOXTRAL_INT4_ENCODER=${VOXTRAL_INT4_ENCODER:-1}
export MAX_MODEL_LEN=${MAX_MODEL_LEN:-32768}
export GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.90} MAX_NUM_SEQS=${MAX_NUM_SEQS:-8}
export MAX_NUM_BATCHED_TOKENS=${MAX_NUM_BATCHED_TOKENS:-} CPU_KVCACHE_GB=${CPU_KVCACHE_GB:-2}
export SESSION_IDLE_MINUTES=${SESSION_IDLE_MINUTES:-10} ALLOWED_ORIGINS=${ALLOWED_ORIGINS:-}
export ALLOWED_HOSTS=${ALLOWED_HOSTS:-} MAX_UPLOAD_MB=${MAX_UPLOAD_MB:-512} UPLOAD_SESSIONS=${UPLOAD_SESSIONS:-}
export PYTHONDONTWRITEBYTECODE= # Docker images set it; vLLM would then compile all its modules at each start: 25 s more
name=$MODEL
[ ! -d "$MODEL" ] || name=$(basename "$(cd "$MODEL" && pwd)")

# Checks what would fail after vLLM's long start, downloads the model, prepares the tokenizer for another delay.
export CUDA_DEVICE_ORDER=PCI_BUS_ID # as nvidia-smi counts; CUDA's default is the fastest first
found=$(PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} python3 -m launch "$@") || exit
{ read -r device visible; read -r model; read -r tokenizer; read -r executor; read -r sessions; read -r batch; } <<< "$found"
[ -z "$visible" ] || export CUDA_VISIBLE_DEVICES=$visible # vLLM needs indices, not UUIDs

options=(
  --served-model-name "${SERVED_MODEL_NAME:-$name}"
  --host "$HOST" --port "$PORT"
  --tokenizer-mode mistral --config-format mistral # the model comes in Mistral's own format
  --generation-config vllm # the model has no such file: decoding is greedy
  --max-model-len "$MAX_MODEL_LEN"
  --max-num-seqs "$MAX_NUM_SEQS"
  --max-num-queued-reqs "$sessions" # without this, a session too many would wait without a message
  --max-num-batched-tokens "$batch" # vLLM reserves twice this for each session
)
# Live audio never repeats, so both caches are useless. Stock vLLM needs the first one for its identifiers of frames.
[ "${VOXTRAL_SPEED:-1}" = 0 ] || options+=(--mm-processor-cache-gb 0 --no-enable-prefix-caching)
case $QUANTIZATION in
  none) options+=(--load-format mistral) ;;
  bitsandbytes) options+=(--quantization bitsandbytes --load-format bitsandbytes) ;;
  *) options+=(--quantization "$QUANTIZATION" --load-format mistral) ;;
esac
[ -z "$executor" ] || options+=(--distributed-executor-backend "$executor") # with --data-parallel-size
[ -z "$tokenizer" ] || options+=(--tokenizer "$tokenizer")
[ -z "$TLS_CERT" ] || options+=(--ssl-certfile "$TLS_CERT" --ssl-keyfile "$TLS_KEY")
if [ "$device" = gpu ]; then
  options+=(--gpu-memory-utilization "$GPU_MEMORY_UTILIZATION")
  options+=(--max-cudagraph-capture-size "$batch") # every step has a graph; otherwise a session that begins delays all others
  options+=(--kernel-config '{"enable_jit_warmup": false}') # it warms up samplers that are never used; our warm-up runs sessions
else
  options+=(--enforce-eager) # compiling would add 40 s to the start, and a tenth to the speed
  export VLLM_CPU_KVCACHE_SPACE=$CPU_KVCACHE_GB
  export VLLM_ENABLE_V1_MULTIPROCESSING=0 # the worker runs in the engine's process, which saves a third of the imports
fi
export VLLM_USE_FLASHINFER_SAMPLER=0 # decoding is greedy, and that sampler compiles CUDA code at every start
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 # everything is local: no request to the hub, no usage statistics

# The captions page at /captions/, files over HTTP, and access control: vllm_plugin/voxtral_web.
export VOXTRAL_CAPTIONS=$here/captions VOXTRAL_HOME=$here
# vLLM loads only these plugins.
export VLLM_PLUGINS=${VLLM_PLUGINS:+$VLLM_PLUGINS,}bitsandbytes,voxtral_int4,voxtral_room,voxtral_speed,voxtral_captions,voxtral_warmup
options+=(--middleware voxtral_web.guard.Guard)
[ ! -x "$venv/bin/vllm" ] || "$here/setup.sh" --is-current || true # prints a warning if it is not
exec vllm serve "$model" "${options[@]}" "$@"
