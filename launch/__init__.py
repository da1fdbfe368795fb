"""Runs in serve.sh before vLLM's long start: checks, download, preparation. Imports neither torch nor vllm."""


class Stop(Exception):
    """An error: one line for the user, with the fix. `code`: the exit code, 2 for a wrong setting, else 1."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code
