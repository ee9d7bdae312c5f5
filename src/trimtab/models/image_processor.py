"""The image processor that comes with a model: what makes its pictures of one size and range."""

from __future__ import annotations

from typing import Any

from trimtab.errors import ModelError
from trimtab.models.load import loading
from trimtab.models.locate import Source


def load_image_processor(source: Source) -> Any:
    """The image processor of the model of ``source``. Raises ModelError if it has none, or one that cannot be read."""
    from transformers import AutoImageProcessor

    with loading(source, "image processor"):
        options = {"trust_remote_code": source.trust_remote_code}
        if source.kind == "hub" and source.revision is not None:
            options["revision"] = source.revision  # type: ignore[assignment]
        processor = AutoImageProcessor.from_pretrained(source.location, **options)
        if not callable(getattr(processor, "preprocess", None)):
            raise ModelError(f"{source.name}: its processor is none of pictures; expected preprocessor_config.json.")
        return processor
