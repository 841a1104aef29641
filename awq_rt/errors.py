"""Every error that awq_rt raises on purpose, one class a fault.

A message names the object, what was found, what was expected and what to do. `code` is stable: scripts and
the documentation may refer to it.
"""

from __future__ import annotations

from typing import ClassVar


class AwqRtError(Exception):
    """Base of every error raised by awq_rt."""

    code: ClassVar[str] = "AWQ-000"

    def __str__(self) -> str:
        return f"{super().__str__()} [{self.code}]"


# --- finding a checkpoint --------------------------------------------------------------------------------------------


class CheckpointError(AwqRtError):
    """A checkpoint cannot be used as it is."""

    code = "AWQ-CKPT-000"


class CheckpointNotFound(CheckpointError):
    """The path does not exist, or holds no weights."""

    code = "AWQ-CKPT-001"


class HubUnavailable(CheckpointError):
    """A hub id could not be resolved: no network and not in the cache, no such repository, or no permission."""

    code = "AWQ-CKPT-002"


class MissingShard(CheckpointError):
    """The index names a file that is not there."""

    code = "AWQ-CKPT-003"


class CorruptFile(CheckpointError):
    """A file is empty, truncated, or its header cannot be right."""

    code = "AWQ-CKPT-004"


class UnsafePickle(CheckpointError):
    """A pickle holds more than tensors in plain containers. It was refused without being executed."""

    code = "AWQ-CKPT-005"


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


class MissingTensor(CheckpointError):
    """A tensor that the index, the layout or the model needs is absent."""

    code = "AWQ-CKPT-006"


class InvalidTensor(CheckpointError):
    """A tensor's shape, dtype or values contradict its layout."""

    code = "AWQ-CKPT-007"


class NonFiniteScales(InvalidTensor):
    """Scales hold NaN or infinity."""

    code = "AWQ-CKPT-008"


class ConfigMismatch(CheckpointError):
    """The configuration says one thing and the tensors another."""

    code = "AWQ-CKPT-009"


class InvalidConfig(CheckpointError):
    """A configuration file cannot be parsed, or holds a value of the wrong kind."""

    code = "AWQ-CKPT-010"


class UnsupportedFormat(CheckpointError):
    """The checkpoint is quantised in a way that is not 4-bit AWQ, or the version string is unknown."""

    code = "AWQ-CKPT-011"


class NotQuantized(CheckpointError):
    """The checkpoint holds no packed 4-bit tensors at all."""

    code = "AWQ-CKPT-012"


class ModelMismatch(CheckpointError):
    """The checkpoint's tensors do not fit the model that config.json describes."""

    code = "AWQ-CKPT-013"


class RemoteCodeRefused(CheckpointError):
    """The model needs Python code from its checkpoint, which runs only when asked for."""

    code = "AWQ-CKPT-014"


# --- writing ---------------------------------------------------------------------------------------------------------


class WriteError(AwqRtError):
    """A checkpoint could not be written; the destination was left as it was."""

    code = "AWQ-WRITE-000"


class DestinationExists(WriteError):
    """The destination is already there."""

    code = "AWQ-WRITE-001"


class LayoutCannotHold(WriteError):
    """A weight's shape or values do not fit the layout asked for."""

    code = "AWQ-WRITE-002"


class UnknownLayout(WriteError):
    """No layout of that name can be written."""

    code = "AWQ-WRITE-003"


# --- devices and backends --------------------------------------------------------------------------------------------


class UnsupportedDevice(AwqRtError):
    """The device does not exist, or this build of torch cannot use it."""

    code = "AWQ-DEVICE-001"


class BackendError(AwqRtError):
    """A backend plugin failed."""

    code = "AWQ-BACKEND-000"


class UnknownBackend(BackendError):
    """No backend of that name is installed."""

    code = "AWQ-BACKEND-001"


class UnknownKernel(BackendError):
    """No usable backend has a kernel family of that name."""

    code = "AWQ-BACKEND-002"


class BackendQuarantined(BackendError):
    """The backend asked for is installed but was quarantined."""

    code = "AWQ-BACKEND-003"


class NoBackend(BackendError):
    """Every backend refused this linear on this device."""

    code = "AWQ-BACKEND-004"


class InvalidInput(AwqRtError, ValueError):
    """A tensor handed to a linear has the wrong shape, dtype or device."""

    code = "AWQ-INPUT-001"


class InvalidWeight(AwqRtError, ValueError):
    """The parts of an `AwqWeight` contradict each other."""

    code = "AWQ-INPUT-002"


# --- quantising ------------------------------------------------------------------------------------------------------


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


# --- running ---------------------------------------------------------------------------------------------------------


class OutOfMemory(AwqRtError):
    """The device's memory does not suffice; the message says what would fit."""

    code = "AWQ-MEMORY-001"


class CannotFuseModel(AwqRtError):
    """Fusing was asked for, and the model is not built as fused decoders are; the message says which module."""

    code = "AWQ-FUSE-001"


# --- several processes -----------------------------------------------------------------------------------------------


class ParallelError(AwqRtError):
    """The processes of a model that is cut over several devices cannot work together."""

    code = "AWQ-PARALLEL-000"


class NotLaunched(ParallelError):
    """There is no process for each device: the program was not started by torchrun, or not with as many."""

    code = "AWQ-PARALLEL-001"


class CannotShard(ParallelError):
    """The model has fewer parts than there are processes; the message says how many it has."""

    code = "AWQ-PARALLEL-002"


class PeerLost(ParallelError):
    """Another process of the model has ended, or does not answer."""

    code = "AWQ-PARALLEL-003"


# --- adapters --------------------------------------------------------------------------------------------------------


class UnsupportedAdapter(AwqRtError, NotImplementedError):
    """PEFT was asked for something that needs the weight of a linear as a matrix: merging, DoRA, an SVD of it."""

    code = "AWQ-ADAPTER-001"


class NonFiniteOutput(AwqRtError):
    """With `AWQ_RT_CHECK=1`: a module's inputs were finite and its output is not."""

    code = "AWQ-NUMERIC-001"
