"""What a request cannot say here."""

from gateway.protocol.errors import UnsupportedParameter


def unsupported(param: str, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{param} is not supported by this model's provider: {reason}", param=param)
