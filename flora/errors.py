"""Every error that Flora raises for a user.

                                exit   code
    FloraError                       1   FL-ERROR        any other failure
    ├── UsageError                   2   FL-USAGE        the command or the settings do not fit
    ├── CheckFailed                  3   FL-CHECK        a check that was asked for did not hold
    ├── AuthError                    4   FL-AUTH         a token is missing or refused
    ├── NotFound                     5   FL-NOTFOUND     a folder, file, registry or repository is not there
    │   └── AdapterNotFound          5   FL-ADAPTER      no adapter, version or alias of that name
    ├── CheckpointError              1   FL-CHECKPOINT   a checkpoint is missing, damaged or of an unread kind
    │   ├── ShapeMismatch            1   FL-SHAPE        base and tuned (or base and adapter) disagree on a shape
    │   ├── NotFinite                1   FL-NOTFINITE    NaN or infinity among the weights
    │   ├── NothingChanged           1   FL-UNCHANGED    two checkpoints hold the same weights
    │   └── PickleRefused            1   FL-PICKLE       weights stored as pickled Python objects
    ├── AdapterInvalid               1   FL-INVALID      an adapter's files are damaged or are no LoRA that Flora reads
    │   └── Unsupported              1   FL-UNSUPPORTED  sound, but a part of it cannot be applied here
    ├── BaseMismatch                 1   FL-BASE         the adapter belongs to other base weights
    ├── NameInvalid                  2   FL-NAME         not a name, a reference or a digest
    ├── RegistryError                1   FL-REGISTRY     the registry cannot do this in its present state
    │   ├── AliasConflict            1   FL-CONFLICT     an alias moved since it was read
    │   └── StoreError               1   FL-STORE        reading or writing the store failed: disk full, damaged blob
    ├── RemoteError                  1   FL-REMOTE       a remote refused or could not be reached
    └── ServeError                   1   FL-SERVE        a server or an engine cannot go on with this
        ├── RequestInvalid           1   FL-REQUEST      a field of a request is out of its bounds
        │   └── PromptTooLong        1   FL-CONTEXT      prompt and answer do not fit the context
        ├── OutOfPages               1   FL-PAGES        the pool cannot hold this
        ├── Overloaded               1   FL-OVERLOAD     more waits than the queue holds
        │   └── DeadlineMissed       1   FL-SLO          the first token cannot come in the time that was promised
        └── EngineDead               1   FL-ENGINE       the engine process ended

A message has three parts: what happened, and where (file, tensor or field); the cause; the fix. Where a site gives no
fix, some classes have one that is always true of them. Values that a program
may want are attributes: `raise ShapeMismatch("...", tensor=name)` gives `error.tensor`.
"""

from typing import Any


class FloraError(Exception):
    """An error with a first line that stands alone, and where they help a cause and a fix."""

    code = "FL-ERROR"
    exit_code = 1
    usual_fix: str | None = None  # where a site has no better one

    def __init__(self, what: str, *, cause: str | None = None, fix: str | None = None, **values: Any) -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause
        self.fix = fix or self.usual_fix
        self.values = values
        for name, value in values.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        if self.cause:
            lines.append(f"cause: {self.cause}")
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


class UsageError(FloraError):
    code = "FL-USAGE"
    exit_code = 2


class CheckFailed(FloraError):
    code = "FL-CHECK"
    exit_code = 3


class AuthError(FloraError):
    code = "FL-AUTH"
    exit_code = 4


class NotFound(FloraError):
    code = "FL-NOTFOUND"
    exit_code = 5


class AdapterNotFound(NotFound):
    code = "FL-ADAPTER"


class CheckpointError(FloraError):
    code = "FL-CHECKPOINT"
    usual_fix = "fetch that checkpoint again, or save it again with the tool that wrote it"


class ShapeMismatch(CheckpointError):
    code = "FL-SHAPE"
    usual_fix = "use the checkpoint that it belongs to; its config.json or its card names that"


class NotFinite(CheckpointError):
    code = "FL-NOTFINITE"
    usual_fix = "its training diverged, or the file is damaged: use an earlier checkpoint, or fetch it again"


class NothingChanged(CheckpointError):
    code = "FL-UNCHANGED"


class PickleRefused(CheckpointError):
    code = "FL-PICKLE"


class AdapterInvalid(FloraError):
    code = "FL-INVALID"
    usual_fix = "fetch the adapter's files again; if they are so where they come from, only their maker can mend them"


class Unsupported(AdapterInvalid):
    code = "FL-UNSUPPORTED"
    usual_fix = "merge it into its base with the tool that made it, and extract the result: flora extract BASE MERGED"


class BaseMismatch(FloraError):
    code = "FL-BASE"


class NameInvalid(FloraError):
    code = "FL-NAME"
    exit_code = 2


class RegistryError(FloraError):
    code = "FL-REGISTRY"


class AliasConflict(RegistryError):
    code = "FL-CONFLICT"


class StoreError(RegistryError):
    code = "FL-STORE"
    usual_fix = "is the disk full, or the folder someone else's? `flora fsck` finds damaged blobs"


class RemoteError(FloraError):
    code = "FL-REMOTE"
    usual_fix = "check the address; if it is right, what lies there is damaged, or nothing that Flora reads"


class ServeError(FloraError):
    code = "FL-SERVE"


class RequestInvalid(ServeError):
    code = "FL-REQUEST"


class PromptTooLong(RequestInvalid):
    code = "FL-CONTEXT"


class OutOfPages(ServeError):
    code = "FL-PAGES"


class Overloaded(ServeError):
    code = "FL-OVERLOAD"


class DeadlineMissed(Overloaded):
    code = "FL-SLO"


class EngineDead(ServeError):
    code = "FL-ENGINE"
