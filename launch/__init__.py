"""What serve.sh does before vLLM's long start: check, download, prepare. Imports neither torch nor vllm."""


class Stop(Exception):
    """One line for the user, naming the fix; `code` is the exit code (2: a setting is wrong, else 1)."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code
