"""What the gateway says when it does not answer: a closed set of reasons, each with its HTTP status."""

from __future__ import annotations

from dfmcl.common.errors import AnswerError

STATUSES = {
    "bad_request": 400,  # a header, a query parameter or a JSON body that cannot be understood
    "bad_image": 400,  # bytes that are no readable image
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "slow_client": 408,
    "too_large": 413,
    "unsupported_type": 415,
    "wrong_input": 422,  # understood, but not what the model takes
    "rate_limited": 429,
    "handshake": 495,  # TLS did not come about: only metrics and logs show it
    "client_left": 499,  # nobody is there to read it: only logs and metrics show it
    "internal": 500,
    "bad_answer": 502,
    "overloaded": 503,
    "unavailable": 503,
    "deadline": 504,
}
OF_IMAGES = ("bad_image", "too_large", "unsupported_type", "wrong_input")  # what one of a list may say by itself
RETRY_SECONDS = 1  # asked of clients where it is unknown when there will be room again

# What the client's errors mean to someone outside. Their messages name endpoints, so they go to the log only.
_OF_ANSWERS = {
    "unavailable": ("unavailable", "no server could answer; try again"),
    "internal": ("unavailable", "the server failed; try again"),
    "queue_full": ("overloaded", "too many requests are waiting; try again later"),
    "timeout": ("deadline", "no answer before the deadline; ask for more time with X-Request-Timeout-Ms"),
    "invalid": ("bad_answer", "the server refused what this gateway sent"),
    "unknown_model": ("unavailable", "the model is not served at the moment; try again"),
    "bad_output": ("bad_answer", "the server's answer cannot be believed"),
    "version_changed": ("unavailable", "the model changed meanwhile; try again"),
}


class Problem(Exception):
    """A request that ends without an answer. `detail` is for the log alone, the message for the client."""

    def __init__(self, reason: str, message: str, *, retry_seconds: int | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.reason, self.status, self.retry_seconds, self.detail = reason, STATUSES[reason], retry_seconds, detail

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        headers = {}
        if self.retry_seconds is not None:
            headers["retry-after"] = str(self.retry_seconds)
        if self.reason == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        return headers

    def to_json(self, request_id: str | None) -> dict[str, dict[str, str | None]]:
        """The body of the response. request_id: None where there was no request."""
        return {"error": {"reason": self.reason, "message": str(self), "request_id": request_id}}

    def of_image(self) -> dict[str, dict[str, str]]:
        """Of one image of a list, in place of its prediction."""
        return {"error": {"reason": self.reason, "message": str(self)}}

    def to_v2(self) -> dict[str, str]:
        """The same in KServe's protocol."""
        return {"error": str(self)}

    @classmethod
    def of(cls, error: AnswerError) -> Problem:
        """The same, said to someone outside."""
        reason, message = _OF_ANSWERS[error.reason]
        again = RETRY_SECONDS if STATUSES[reason] == 503 else None
        return cls(reason, message, retry_seconds=again, detail=str(error))
