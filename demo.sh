#!/usr/bin/env bash
# From a fresh clone to a transcript, without a GPU and without a model hub: sets up if needed,
# serves the small embedded checkpoint on a free port of this machine, and transcribes its sample.
set -euo pipefail
cd "$(dirname "$0")"
case ${1:-} in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; exit ;;
  ?*) echo "error: unknown option $1; ./demo.sh takes none" >&2; exit 2 ;;
esac

VOXTRAL_VENV=$(scripts/cpu-venv)
export VOXTRAL_VENV
export CUDA_VISIBLE_DEVICES= # run on the CPU, even if there is a GPU
./setup.sh --is-current 2> /dev/null || ./setup.sh --cpu >&2
python=$VOXTRAL_VENV/bin/python
port=$($python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
log=$(mktemp)
sample=tests/tiny_checkpoint/sample

unset TLS_CERT TLS_KEY TRANSCRIPTION_DELAY_MS QUANTIZATION SERVED_MODEL_NAME # the user may have exported them for another server
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more threads only wait for each other: the model is too small
MODEL=tests/tiny_checkpoint HOST=127.0.0.1 PORT=$port MAX_MODEL_LEN=2048 GPU_MEMORY_UTILIZATION=0.3 CPU_KVCACHE_GB=1 \
  setsid ./serve.sh > "$log" 2>&1 &
server=$!
trap 'kill -- -$server 2> /dev/null || true; wait $server 2> /dev/null || true; rm -f "$log"' EXIT
echo "starting vLLM with the embedded checkpoint in INT4 on 127.0.0.1:$port (10 to 60 s)" >&2
until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do # vLLM listens when it is ready
  kill -0 $server 2> /dev/null || { tail -n 20 "$log" >&2; echo "error: the server ended; its last lines are above" >&2; exit 1; }
  sleep 0.5
done

echo "transcribing $sample.wav:" >&2
text=$($python test_file_transcribe.py --audio_path $sample.wav --url "ws://127.0.0.1:$port/v1/realtime")
echo "$text"
if [ "$text" = "$(cat $sample.txt)" ]; then
  echo "this is what the speaker said. Next: README.md, \"On your GPU\"" >&2
else
  echo "error: expected: $(cat $sample.txt)" >&2
  exit 1
fi
