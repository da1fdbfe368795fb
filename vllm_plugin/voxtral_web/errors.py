"""HTTP errors in the form of OpenAI's API."""

from starlette.responses import JSONResponse


def refuse(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    """Return a response with an error. Its headers state whether the client should try again.

    `code`: for programs. `param`: the field of the form that is wrong.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    headers = {"Retry-After": "5"} if status == 503 else {"X-Should-Retry": "false"}
    return JSONResponse({"error": error}, status, headers)
