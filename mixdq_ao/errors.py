"""Errors a user can act on: each names the file, layer or field, the value, and what was expected."""


class MixDQError(ValueError):
    """Base of every error this library raises on purpose; the command line prints it in one line."""


class PlanError(MixDQError):
    """A plan file or a plan's field is wrong, or the plan does not fit the model."""


class CalibrationError(MixDQError):
    """A calibration is missing, unusable, or belongs to another model."""


class SensitivityError(MixDQError):
    """A sensitivity file or a store of measurements is wrong, or belongs to another run."""


class AllocationError(MixDQError):
    """No plan satisfies the budget, or the solver ran out of time."""


class QuantizationError(MixDQError):
    """A weight or a layer cannot be quantized as asked."""


class TextEncoderError(MixDQError):
    """A text encoder's first row is not the calibrated BOS embedding."""


class CheckpointError(MixDQError):
    """A saved model cannot be read or written: a file is missing, damaged, foreign, or newer than this release."""


class ScheduleError(MixDQError):
    """A schedule of precisions over denoising steps is wrong, cannot be found, or does not fit a model or scheduler."""


class OptimizerError(MixDQError):
    """A parameter, a gradient, an option or a checkpoint that an optimizer cannot use."""
