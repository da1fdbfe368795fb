"""The variables of serve.sh, and the options of vllm serve that take precedence over them."""

from collections.abc import Mapping

from . import Stop

# Options of vllm serve that are read here, and the variables over which they take precedence.
OPTIONS = {
    "--host": "HOST",
    "--port": "PORT",
    "--quantization": "QUANTIZATION",
    "-q": "QUANTIZATION",
    "--max-model-len": "MAX_MODEL_LEN",
    "--max-num-seqs": "MAX_NUM_SEQS",
    "--max-num-batched-tokens": "MAX_NUM_BATCHED_TOKENS",
    "--gpu-memory-utilization": "GPU_MEMORY_UTILIZATION",
    "--ssl-certfile": "TLS_CERT",
    "--ssl-keyfile": "TLS_KEY",
    "--tokenizer": "TOKENIZER",
    "--api-key": "API_KEY",
    "--kv-cache-dtype": "KV_CACHE_DTYPE",
    "--data-parallel-size": "DATA_PARALLEL_SIZE",
    "-dp": "DATA_PARALLEL_SIZE",
}
# Options with which vLLM must choose how its workers run.
OPTIONS |= dict.fromkeys(
    "--distributed-executor-backend --tensor-parallel-size -tp --pipeline-parallel-size -pp --nnodes -n "
    "--prefill-context-parallel-size -pcp --data-parallel-backend -dpb".split(),
    "EXECUTOR",
)
INTEGERS = "PORT MAX_MODEL_LEN MAX_NUM_SEQS MAX_NUM_BATCHED_TOKENS CPU_KVCACHE_GB MAX_UPLOAD_MB UPLOAD_SESSIONS".split()
FIRST_CHUNK = 39  # tokens with which a session begins: 1 + 32 of padding + the delay of 480 ms
NUMBERS = dict.fromkeys(INTEGERS, int) | {"GPU_MEMORY_UTILIZATION": float, "SESSION_IDLE_MINUTES": float}


class Settings:
    """`settings["HOST"]` is the value that vLLM will use, as text; empty if there is none. Raises Stop."""

    def __init__(self, environment: Mapping[str, str], arguments: list[str]):
        self._environment = environment
        self._given: dict[str, tuple[str, str]] = {}  # variable: (option as written, value)
        self._default: dict[str, str] = {}  # variable: value computed from others
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
            option, equals, value = argument.partition("=")
            if variable := OPTIONS.get(option.replace("_", "-")):
                self._given[variable] = (option, value if equals else following)
        for variable, kind in NUMBERS.items():
            text = environment.get(variable, "")
            least = "0 or more" if variable == "SESSION_IDLE_MINUTES" else "above 0"
            try:
                fits = kind(text or 1) > 0 or (kind(text) == 0 and least == "0 or more")
            except ValueError:
                fits = False
            if not fits and variable not in self._given:
                number = "whole number" if kind is int else "number"
                raise Stop(f"{variable}={text}: must be a {number} {least}", 2)
        if not self["MAX_NUM_BATCHED_TOKENS"] and (seqs := self.number("MAX_NUM_SEQS")):
            # Enough for two sessions to begin while all others run. More would only reserve memory for each session.
            self._default["MAX_NUM_BATCHED_TOKENS"] = str(-(-(2 * FIRST_CHUNK + int(seqs)) // 8) * 8)
        seqs, tokens = self.number("MAX_NUM_SEQS"), self.number("MAX_NUM_BATCHED_TOKENS")
        if seqs and tokens and tokens < seqs:
            less, fix = (self.assignment("MAX_NUM_BATCHED_TOKENS", int(number)) for number in (tokens, seqs))
            raise Stop(f"{less} is less than {self.assignment('MAX_NUM_SEQS', int(seqs))}: set {fix}", 2)

    def __getitem__(self, variable: str) -> str:
        if variable in self._given:
            return self._given[variable][1]
        return self._environment.get(variable, "") or self._default.get(variable, "")

    def number(self, variable: str) -> float | None:
        """Return the value; None if there is none, or one that only vLLM can read (32k, auto)."""
        try:
            return float(self[variable])
        except ValueError:
            return None

    @property
    def engines(self) -> int:
        """How many engines vLLM starts: --data-parallel-size, or 1."""
        size = self["DATA_PARALLEL_SIZE"] if self.on_command_line("DATA_PARALLEL_SIZE") else ""
        return int(size) if size.isdecimal() else 1

    @property
    def executor(self) -> str:
        """`uni` for several engines of one worker each; "": vLLM chooses.

        vLLM itself would run each worker in its own process, and the speed patch `features` would be off.
        """
        return "uni" if self.engines > 1 and not self.on_command_line("EXECUTOR") else ""

    def on_command_line(self, variable: str) -> bool:
        """Return whether the value comes from an option."""
        return variable in self._given

    def assignment(self, variable: str, value: object) -> str:
        """Return how the user sets it: VARIABLE=VALUE, or the option if that is on the command line."""
        return f"{self._given[variable][0]} {value}" if variable in self._given else f"{variable}={value}"
