"""Errors as OpenAI's clients know them."""

from starlette.responses import JSONResponse


def refuse(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    """Return an answer that says what is wrong, and whether trying again may help."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    headers = {"Retry-After": "5"} if status == 503 else {"X-Should-Retry": "false"}
    return JSONResponse({"error": error}, status, headers)
