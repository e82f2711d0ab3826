"""What a server says that it can't do: one kind of error, told by each interface in its own shape.

Knows shapes and statuses. Knows no job.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from sdtrt.common.errors import SdtrtError, printable
from sdtrt.serve.jobs import Failure

# Of what jobs end with; everything else that its reader can mend is 422.
STATUSES = {
    "UsageError": 400,
    "MemoryShortage": 503,
    "DiskFull": 503,
    "ServerEnding": 503,
    "WorkerEnded": 503,
    "ServerError": 500,
    "QueueFull": 429,
}


class Answer(JSONResponse):
    """JSON in ASCII: text that came in may hold what is no UTF-8."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(content, separators=(",", ":")).encode()


class Refusal(Exception):  # noqa: N818 (an answer like any other)
    """What a request is answered that can't be served."""

    def __init__(
        self, status: int, kind: str, message: str, hint: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.hint = status, kind, printable(message), printable(hint)
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: SdtrtError) -> Refusal:
        """For a request that is wrong by itself."""
        kind = type(error).__name__
        return cls(STATUSES.get(kind, 422), kind, error.message, in_words(error.hint))

    @classmethod
    def of_failure(cls, failure: Failure) -> Refusal:
        """For a job that has no picture."""
        status = STATUSES.get(failure.kind, 422)
        headers = {"Retry-After": "10"} if status == 503 else None
        return cls(status, failure.kind, failure.message, in_words(failure.hint), headers)

    def answer(self, path: str) -> Response:
        """The answer in the shape of the interface that a path belongs to."""
        return Answer(self._shape(path), self.status, headers=self.headers)

    def _shape(self, path: str) -> dict[str, Any]:
        if path.startswith("/v1/"):
            kind = "invalid_request_error" if self.status < 500 else "server_error"
            kind = "rate_limit_error" if self.status == 429 else kind
            said = {"message": f"{self.message} ({self.hint})", "type": kind, "param": None, "code": self.kind}
            return {"error": {**said, "hint": self.hint}}
        if path.startswith("/sdapi/"):
            return {"error": self.kind, "detail": self.message, "body": "", "errors": self.message, "hint": self.hint}
        return {"error": {"kind": self.kind, "message": self.message, "hint": self.hint}}


def bug(request_id: str) -> Refusal:
    """The answer to a request that nobody expected to fail."""
    words = f"this request failed by a fault of the server (request {request_id})"
    return Refusal(500, "ServerError", words, "its log says more")


def in_words(hint: str) -> str:
    """A hint without the dashes of the command line: `use --steps 50` is `use steps 50`."""
    return hint.replace(" --", " ")
