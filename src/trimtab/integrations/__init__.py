"""Other libraries' models and training loops with our adapters. Each file teaches one library what an adapted model is.

A model is changed from the moment that adapters are attached until they are merged or detached; a library once, when
both it and this package are there.
"""

from __future__ import annotations

from trimtab.integrations import (
    liger,
    sentence_transformers,
    transformers_model,
    transformers_resizing,
    transformers_trainer,
)
from trimtab.surgery.watchers import WATCHERS, Watcher

WATCHERS.extend(
    [
        Watcher(transformers_model.attached, transformers_model.removed),
        Watcher(transformers_resizing.attached, transformers_resizing.removed),
    ]
)
transformers_trainer.teach_when_imported()
sentence_transformers.teach_when_imported()
liger.teach_when_imported()
