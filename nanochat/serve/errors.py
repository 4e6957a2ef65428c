"""Error responses. Validation errors become sentences, instead of pydantic's descriptions of its own validators."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
SENTENCES = {
    "missing": "is required",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entry, got {actual_length}",
    "too_long": "must have at most {max_length} entries, got {actual_length}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}",
    "finite_number": "must be a finite number",
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "value_error": "{error}",
    "json_invalid": "is not valid JSON: {error}",
}
"""Meanings of pydantic's types of errors, with placeholders from their context."""
KINDS: dict[type, str] = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bytes: "text without Content-Type: application/json",
}


class ApiError(Exception):
    """An error response in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        error_type = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}
        self.status = status
        self.code = code
        self.headers = headers

    def response_to(self, path: str) -> JSONResponse:
        """Build the response to a request of `path`, in the format of its API."""
        if path.startswith("/api/"):  # Ollama
            return JSONResponse({"error": str(self)}, self.status, self.headers)
        anthropic = {"type": "error"} if path.startswith("/v1/messages") else {}
        return JSONResponse({**anthropic, **self.body}, self.status, self.headers)


def to_api_error(error: Exception) -> ApiError:
    """Convert an exception that a route raised."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case RequestValidationError() | ValidationError():
            return _validation_error(error.errors())
        case RecursionError():
            return ApiError(400, "the JSON of the request is nested too deeply")
        case _:
            return ApiError(400, str(error))


def _validation_error(errors: Sequence[Any]) -> ApiError:
    """Convert pydantic's errors to a sentence about the first one: the field's path, its rule and its value."""
    error = errors[0]
    steps = [step for step in error["loc"] if step not in ("body", "[key]")]
    if error["type"] == "json_invalid":  # its location is a number of characters
        steps = []
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).strip(".")
    text = SENTENCES.get(error["type"], "is invalid").format_map(error.get("ctx", {}))
    value = error["input"]
    if error["type"] not in ("missing", "too_short", "too_long", "value_error", "json_invalid"):
        # Of strings only the kind, because they may be long.
        scalar = value is None or isinstance(value, bool | int | float)
        text += f", got {json.dumps(value) if scalar else KINDS.get(type(value), 'another type')}"
    if param or error["type"] != "value_error":
        text = f"{param or 'the request body'} {text}"
    return ApiError(400, text, code="invalid_value", param=param or None)
