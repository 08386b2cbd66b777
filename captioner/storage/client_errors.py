"""What an error of a file system or a bucket's client means."""

import asyncio
import errno
import re

__all__ = ["http_status", "is_of_whole_store", "is_transient", "reason"]

# In a client's message, the query of a URL may hold a signature, and its authority a password.
_SECRETS = re.compile(r"(?<=://)(?:[^/\s@]*:[^\s@]*|[^/\s@]+)@|(?<=\S)\?[^\s\"'?]*=[^\s\"']*")

_TRANSIENT_STATUSES = {408, 425, 429}
_LASTING_STATUSES = {501, 505, 511}  # of 500 and above
_TRANSIENT_NUMBERS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ESTALE,
}
# By name: none of these packages is required.
_TRANSIENT_NAMES = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "azure.IncompleteReadError",
    "azure.ServiceRequestError",
    "azure.ServiceResponseError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "botocore.ResponseParserError",
    "google.TransportError",
    "httpx.TransportError",
    "httpx2.TransportError",
    "requests.ConnectionError",
    "requests.Timeout",
}

# Errors that every object of a store would meet, by name: credentials, settings, the endpoint.
_WHOLE_STORE_NAMES = {
    "aiohttp.ClientConnectorError",
    "aiohttp.InvalidURL",
    "azure.ClientAuthenticationError",
    "azure.CredentialUnavailableError",
    "botocore.ConfigNotFound",
    "botocore.ConfigParseError",
    "botocore.ConnectTimeoutError",
    "botocore.CredentialRetrievalError",
    "botocore.EndpointConnectionError",
    "botocore.InvalidConfigError",
    "botocore.InvalidRegionError",
    "botocore.NoAuthTokenError",
    "botocore.NoCredentialsError",
    "botocore.NoRegionError",
    "botocore.PartialCredentialsError",
    "botocore.ProfileNotFound",
    "botocore.ProxyConnectionError",
    "botocore.SSLError",
    "botocore.SSOError",
    "botocore.TokenRetrievalError",
    "botocore.UnauthorizedSSOTokenError",
    "google.DefaultCredentialsError",
    "google.RefreshError",
}
# Codes that a store answers with, where the status 400 or 403 alone might concern one object.
_WHOLE_STORE_CODES = {
    "AccountProblem",
    "AllAccessDisabled",
    "AuthFailure",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "AuthorizationHeaderMalformed",
    "CredentialsNotSupported",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidAuthenticationInfo",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "UnrecognizedClientException",
}


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed when it is retried."""
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError)):
        return True
    if _names(error) & _TRANSIENT_NAMES:
        return True
    if (status := http_status(error)) is not None:
        return status in _TRANSIENT_STATUSES or (status >= 500 and status not in _LASTING_STATUSES)
    return isinstance(error, OSError) and error.errno in _TRANSIENT_NUMBERS


def is_of_whole_store(error: Exception) -> bool:
    """Whether a bucket's error concerns the whole store: credentials, settings, or a dead endpoint.

    A single object's 403 or 404, or a connection that breaks off, concerns that object alone.
    """
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    if any(_is_broken_off(each) for each in causes):
        return False
    if any(_names(each) & _WHOLE_STORE_NAMES for each in causes):
        return True
    # Such as an endpoint that is not a URL: the client finds that before it asks anything.
    if type(error) is ValueError and "endpoint" in str(error).lower():
        return True
    return http_status(error) == 401 or any(_code(each) in _WHOLE_STORE_CODES for each in causes)


def _is_broken_off(error: BaseException) -> bool:
    """Whether a connection was made and broke off: botocore's error is that of a dead endpoint."""
    context = error.__context__
    names = set() if context is None else _names(context)
    return "aiohttp.ClientOSError" in names and "aiohttp.ClientConnectorError" not in names


def _code(error: BaseException) -> str | None:
    """The store's own code of an error: botocore's or Azure's."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("Error", {}).get("Code")
    else:
        code = getattr(error, "error_code", None)
        code = getattr(code, "value", code)  # Azure's are members of an enumeration
    return code if isinstance(code, str) else None


def _names(error: BaseException) -> set[str]:
    """An error's class and its bases, as ``PACKAGE.CLASS``."""
    return {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}


def http_status(error: Exception) -> int | None:
    """The HTTP status of an error or of its cause."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        # botocore's, aiohttp's, Azure's and gcsfs's, in this order
        if isinstance(status := metadata.get("HTTPStatusCode"), int):
            return status
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(each, name, None), int):
                return status
        if isinstance(status := getattr(response, "status_code", None), int):  # Hugging Face's
            return status
    return None


def reason(error: Exception) -> str:
    """The message of an error on one line, without what may be a secret."""
    if "huggingface_hub.GatedRepoError" in _names(error):  # its own message does not say what to do
        return "it is gated: accept its terms on its page, then set HF_TOKEN to your token"
    if "aiohttp.ClientResponseError" in _names(error):  # its own message repeats the URL
        return f"HTTP status {getattr(error, 'status', '')} {getattr(error, 'message', '')}".strip()
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    text = text.split(" RequestId:")[0]  # Azure's own; then all of it again as XML
    return _SECRETS.sub("…", text) or type(error).__name__
