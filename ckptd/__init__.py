"""ckptd: asynchronous checkpointing and in-memory fault tolerance for PyTorch training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptd.trainer.checkpointer import Checkpointer

__version__ = "0.1.0"
__all__ = ["Checkpointer", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import ckptd` alone must not import torch.
    if name == "Checkpointer":
        from ckptd.trainer.checkpointer import Checkpointer

        return Checkpointer
    raise AttributeError(f"module 'ckptd' has no attribute {name!r}")
