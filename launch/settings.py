"""The variables of serve.sh, and the options of vllm serve that take precedence over them.

python -m launch.settings     prints the table, as ./serve.sh -h does
"""

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

from voxtral_client.protocol import PROMPT_TOKENS

from . import Stop


class Setting(NamedTuple):
    """A variable. `number`: its kind, if it is one; `least`: as the user reads it. `options`: of vllm serve."""

    name: str
    default: str
    meaning: str
    options: str = ""
    number: type = str
    least: str = "above 0"


BATCH = "MAX_NUM_BATCHED_TOKENS"
TABLE = [
    Setting("MODEL", "mistralai/Voxtral-Mini-4B-Realtime-2602", "a Hugging Face repository, or a folder"),
    Setting("MODEL_REVISION", "", "its commit, tag or branch (default: a fixed commit; for other models main)"),
    Setting("SERVED_MODEL_NAME", "", "the name that clients use (default: MODEL; for a folder its last part)"),
    Setting("HOST", "0.0.0.0", "serves all networks of this machine; 127.0.0.1 serves this machine only", "--host"),
    Setting("PORT", "8000", "where it listens", "--port", int),
    Setting("VLLM_API_KEY", "", "the key of the clients (default: in ~/.config/voxtral/key, by scripts/make-key)"),
    Setting("TLS_CERT", "", "a certificate: wss:// in place of ws://; scripts/make-certificate", "--ssl-certfile"),
    Setting("TLS_KEY", "", "the certificate's private key", "--ssl-keyfile"),
    Setting("TRANSCRIPTION_DELAY_MS", "", "80 to 1200 in steps of 80, or 2400; longer is more accurate (default: 480)"),
    Setting("QUANTIZATION", "bitsandbytes", "INT4; none for bf16, or any method of vLLM", "--quantization -q"),
    Setting("VOXTRAL_INT4_ENCODER", "1", "0 leaves the audio encoder in bf16: 4.3 GiB of weights instead of 3.1"),
    Setting("MAX_MODEL_LEN", "32768", "longest session in frames of 80 ms: 43 minutes", "--max-model-len", int),
    Setting("GPU_MEMORY_UTILIZATION", "0.90", "share of the GPU's memory to use", "--gpu-memory-utilization", float),
    Setting("MAX_NUM_SEQS", "8", "sessions at once; the next one gets an error: busy", "--max-num-seqs", int),
    Setting(BATCH, "", "frames in one step (default: 88 for eight sessions)", "--max-num-batched-tokens", int),
    Setting("VOXTRAL_SPEED", "1", "0: without the speed patches; -name -name: without these"),
    Setting("CUDA_VISIBLE_DEVICES", "", "which GPU: nvidia-smi's number, or UUID (default: the first); empty: none"),
    Setting("VOXTRAL_VENV", ".venv", "the Python environment that setup.sh made"),
    Setting("CPU_KVCACHE_GB", "2", "memory for sessions without a GPU", number=int),
    Setting("SESSION_IDLE_MINUTES", "10", "ends sessions without any message; 0: never", "", float, "0 or more"),
    Setting("ALLOWED_ORIGINS", "", 'web pages of other sites that may use it: "https://a.example https://b.example"'),
    Setting("ALLOWED_HOSTS", "", "more names under which browsers may use it, besides its addresses and its own name"),
    Setting("MAX_UPLOAD_MB", "512", "largest file for /v1/audio/transcriptions, kept in TMPDIR", number=int),
    Setting("MAX_UPLOAD_HOURS", "12", "longest audio of such a file", number=float),
    Setting("UPLOAD_SESSIONS", "", "sessions of all such files together (default: half of MAX_NUM_SEQS)", number=int),
]
# Options of vllm serve that are read here, and what they set.
OPTIONS = {option: setting.name for setting in TABLE for option in setting.options.split()}
OPTIONS |= {
    "--tokenizer": "TOKENIZER",
    "--api-key": "API_KEY",
    "--kv-cache-dtype": "KV_CACHE_DTYPE",
    "--data-parallel-size": "DATA_PARALLEL_SIZE",
    "-dp": "DATA_PARALLEL_SIZE",
    "--api-server-count": "API_SERVERS",
    "-asc": "API_SERVERS",
}
# Options with which vLLM must choose how its workers run.
OPTIONS |= dict.fromkeys(
    "--distributed-executor-backend --tensor-parallel-size -tp --pipeline-parallel-size -pp --nnodes -n "
    "--prefill-context-parallel-size -pcp --data-parallel-backend -dpb".split(),
    "EXECUTOR",
)
STREAMS_PER_SERVER = 80  # live streams for one API process
FIRST_CHUNK = PROMPT_TOKENS + 6  # tokens with which a session begins: the delay of 480 ms is 6


class Settings:
    """`settings["HOST"]` is the value that vLLM will use, as text; empty if there is none. Raises Stop."""

    def __init__(self, environment: Mapping[str, str], arguments: list[str]):
        self._given: dict[str, tuple[str, str]] = {}  # variable: (option as written, value)
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
            option, equals, value = argument.partition("=")
            if variable := OPTIONS.get(option.replace("_", "-")):
                self._given[variable] = (option, value if equals else following)
        self._values = {setting.name: environment.get(setting.name) or setting.default for setting in TABLE}
        for name, _, _, _, number, least in TABLE:
            text = self._values[name]
            try:
                fits = number is str or not text or number(text) > 0 or (number(text) == 0 and least == "0 or more")
            except ValueError:
                fits = False
            if not fits and name not in self._given:
                raise Stop(f"{name}={text}: must be a {'whole number' if number is int else 'number'} {least}", 2)
        self._values |= {name: value for name, (_, value) in self._given.items()}
        model = self["MODEL"]
        folder = os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
        self._values["SERVED_MODEL_NAME"] = self["SERVED_MODEL_NAME"] or folder
        seqs, tokens = self.number("MAX_NUM_SEQS"), self.number(BATCH)
        if seqs and not self[BATCH]:
            # Enough for two sessions to begin while all others run. More would only reserve memory for each session.
            self._values[BATCH] = str(-(-(2 * FIRST_CHUNK + int(seqs)) // 8) * 8)
        elif seqs and tokens and tokens < seqs:
            less, fix = (self.assignment(BATCH, int(number)) for number in (tokens, seqs))
            raise Stop(f"{less} is less than {self.assignment('MAX_NUM_SEQS', int(seqs))}: set {fix}", 2)

    def __getitem__(self, variable: str) -> str:
        return self._values.get(variable, "")

    def number(self, variable: str) -> float | None:
        """Return the value; None if there is none, or one that only vLLM can read (32k, auto)."""
        try:
            return float(self[variable])
        except ValueError:
            return None

    @property
    def engines(self) -> int:
        """How many engines vLLM starts: --data-parallel-size, or 1."""
        size = self["DATA_PARALLEL_SIZE"]
        return int(size) if size.isdecimal() else 1

    @property
    def executor(self) -> str:
        """`uni` for several engines of one worker each; "": vLLM chooses.

        vLLM itself would run each worker in its own process, and the speed patch `features` would be off.
        """
        return "uni" if self.engines > 1 and not self.on_command_line("EXECUTOR") else ""

    def api_servers(self, cores: int) -> int:
        """How many API processes a GPU's server needs for all its sessions, on so many cores; 0: the user has chosen.

        One of three processes used half a core with 64 live streams of 192.
        """
        slots = self.number("MAX_NUM_SEQS")
        if not slots or self.on_command_line("API_SERVERS"):
            return 0
        return max(1, min(math.ceil(self.engines * slots / STREAMS_PER_SERVER), cores // 4))

    def on_command_line(self, variable: str) -> bool:
        """Return whether the value comes from an option."""
        return variable in self._given

    def assignment(self, variable: str, value: object) -> str:
        """Return how the user sets it: VARIABLE=VALUE, or the option if that is on the command line."""
        return f"{self._given[variable][0]} {value}" if variable in self._given else f"{variable}={value}"


def main() -> None:
    """Print the table; each line ends with the option of vllm serve that takes precedence."""
    for name, default, meaning, options, _, _ in TABLE:
        about = f"{meaning} [{options}]" if options else meaning
        print(f"  {f'{name}={default}' if default else name:27}", about.strip())


if __name__ == "__main__":
    main()
