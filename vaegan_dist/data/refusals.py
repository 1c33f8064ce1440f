"""What the errors of the object stores' client mean, in our own words.

What a server answers is never repeated in a message: it may quote credentials.
"""

import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from vaegan_dist.errors import InputError

# Without credentials the SDKs ask the machine's metadata service, whose refusal names none.
_CREDENTIALS = re.compile(r"latest/(api/token|meta-data)|computeMetadata|oauth2/token|Missing(Account|Credential)")
_STATUS = re.compile(r"status code: (\d{3})")


def refusal(what: str, error: Exception) -> InputError | None:
    """The error line for what no further attempt can change."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{what}: is not there (404); check the URL, and that the whole data set was uploaded")
    if isinstance(error, PermissionDeniedError):
        return InputError(f"{what}: access denied (403); check that the credentials allow it")
    if isinstance(error, UnauthenticatedError):
        return InputError(f"{what}: credentials missing or wrong (401); set the cloud SDK's variables")
    if _CREDENTIALS.search(str(error)):
        return InputError(
            f"{what}: no credentials found; set the cloud SDK's variables (AWS_ACCESS_KEY_ID …, "
            "GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_KEY), or AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    status = _STATUS.search(str(error))
    if status is not None and status[1].startswith("4") and status[1] not in ("408", "429"):
        return InputError(f"{what}: the server refuses it ({status[1]}); check the URL, the region and the credentials")
    return None


def failure(error: Exception) -> str:
    """Why an attempt failed, in our own words."""
    text = str(error)
    if status := _STATUS.search(text):
        return f"the server answers {status[1]}"
    if "Timeout" in text or "timed out" in text:
        return "no answer in time"
    if "dns" in text.lower():
        return "its host name cannot be resolved"
    if "Connect" in text:
        return "no connection"
    if "Interrupted" in text or "Body" in text:
        return "the connection broke off"
    return type(error).__name__
