"""Hugging Face checkpoints.

- `names`: the folder that a name on the hub stands for.
- `checkpoint`: a folder's files and the tensors in them.
- `formats`: weights in few bits.
- `folder`: a language model of a known family.
- `writing`: a folder from parameters.
"""

from mcjax.hub.checkpoint import Checkpoint, read_json
from mcjax.hub.folder import Folder
from mcjax.hub.names import local
from mcjax.hub.writing import write

__all__ = ["Checkpoint", "Folder", "local", "read_json", "write"]
