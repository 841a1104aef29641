"""What can be wrong with a model or a text that is to be quantised, one class a fault."""

from __future__ import annotations

from ..errors import AwqRtError, CheckpointError


class QuantizeError(AwqRtError):
    """A model cannot be quantised as asked. What was finished is kept."""

    code = "AWQ-QUANT-000"


class AlreadyQuantized(QuantizeError, CheckpointError):
    """The source holds packed weights, or its configuration names a quantisation."""

    code = "AWQ-QUANT-001"


class NonFiniteWeights(QuantizeError):
    """A weight holds NaN or infinity, or is too large for the dtype that it is stored in."""

    code = "AWQ-QUANT-002"


class NonFiniteActivations(QuantizeError):
    """A layer's input holds NaN or infinity."""

    code = "AWQ-QUANT-003"


class CalibrationTooShort(QuantizeError):
    """The calibration text is empty, or gives fewer tokens than one sample needs."""

    code = "AWQ-QUANT-004"


class InvalidCalibration(QuantizeError):
    """The calibration source cannot be read, or is of an unknown kind."""

    code = "AWQ-QUANT-005"


class TokenizerMismatch(QuantizeError):
    """Token ids exceed the model's vocabulary, or there is no tokenizer to make them."""

    code = "AWQ-QUANT-006"


class CannotPack(QuantizeError):
    """Some linears have shapes that 4-bit packing does not hold, and `strict` was asked for; or none can be packed."""

    code = "AWQ-QUANT-007"


class UnfinishedRunDiffers(QuantizeError):
    """An unfinished run beside the destination was made from another model, text or settings, or is damaged."""

    code = "AWQ-QUANT-008"


class InvalidSetting(QuantizeError, ValueError):
    """A setting of the search has a value that it cannot have."""

    code = "AWQ-QUANT-009"
