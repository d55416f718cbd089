"""What makes a control hint of a picture."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from PIL import Image

from nativesd.errors import UsageError, install_line


def preprocess(image: Image.Image, name: str) -> Image.Image:
    """A hint by name: "canny" by OpenCV, anything else by controlnet_aux ("openpose", "depth_midas", ...).

    Raises UsageError for a name that nobody knows, and where the library is not installed.
    """
    if name == "canny":
        return canny(image)
    try:
        processor: Any = importlib.import_module("controlnet_aux.processor")
    except ImportError as error:
        raise UsageError(
            f"the preprocessor {name!r} needs controlnet_aux: pip install controlnet_aux (canny is built in)"
        ) from error
    if name not in processor.MODELS:
        raise UsageError(f"there is no preprocessor {name!r}: canny, or one of {', '.join(processor.MODELS)}")
    made: Image.Image = processor.Processor(name)(image, to_pil=True)
    return made.convert("RGB")


def canny(image: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """White edges on black, of the picture's size (OpenCV's Canny; 100 and 200 are the field's usual thresholds).

    Raises UsageError where OpenCV is not installed.
    """
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise UsageError(f"the canny preprocessor needs OpenCV: {install_line('control')}") from error
    edges = cv2.Canny(np.asarray(image.convert("RGB")), low, high)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2))
