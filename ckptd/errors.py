"""The one error tree of ckptd.

Three branches say whose fault it is: `UserError` (configuration, state, environment: the message
ends with the way out), `PeerError` (something that came from another process or a file was wrong)
and `InternalError` (ckptd itself broke one of its own rules). Each message names the thing, the
value seen, the limit, and what to do.
"""


class CkptdError(Exception):
    """Base of everything that ckptd raises on purpose."""


class UserError(CkptdError):
    """The user can mend it: a flag, an environment variable, a value in the training script."""


class ConfigError(UserError):
    """A setting is missing or malformed."""


class UnsavableState(UserError):
    """A value in the state cannot be saved so that it loads without unpickling code."""


class StateMismatch(UserError):
    """The snapshot does not fit the live model, optimizer or world size."""


class MemoryTooSmall(UserError):
    """The agent's memory limit cannot hold what the job needs."""


class AgentUnreachable(UserError):
    """No agent answers at the configured socket."""


class CoordinatorUnreachable(UserError):
    """No coordinator answers at the configured address."""


class Superseded(UserError):
    """Another coordinator has taken over, or is alive: there must be one only."""


class ResumeImpossible(UserError):
    """A job that may have a snapshot cannot be resumed now, and must not start from nothing."""


class PeerError(CkptdError):
    """Another process, or a file, gave something that cannot be used."""


class ProtocolError(PeerError):
    """A message is malformed, too large, or of another protocol version."""


class Refused(PeerError):
    """A peer answered, and said no."""


class Gone(PeerError):
    """The peer no longer has what was asked for: retired, dropped, or never there."""


class CorruptData(PeerError):
    """Bytes do not have the digest they had when they were captured."""


class Unrecoverable(PeerError):
    """More cells of a stripe are lost than its parity can replace."""


class InternalError(CkptdError):
    """An invariant of ckptd does not hold; please report it with the log."""


class CaptureFailure(CkptdError):
    """A capture failed, and the Checkpointer is `strict`."""
