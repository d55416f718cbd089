"""Where the files lie that travel in the package: the weight maps, the embedded model and what goes with it, TAESD."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
"""The embedded model, a folder in the published layout."""

LCM_LORA = TINY / "lcm_lora" / "tiny-lcm.safetensors"
"""With it the embedded model needs four steps and no guidance."""

IP_ADAPTER = TINY / "ip_adapter" / "ip-adapter_tiny.safetensors"
"""With it a picture says the embedded model what to paint."""

IMAGE_ENCODER = TINY / "ip_adapter" / "image_encoder"
"""What sees that picture: it lies beside the adapter, where one is published."""

NAMED = {"tiny": TINY, "tiny-lcm": LCM_LORA}
"""What is known by a name instead of a path."""

TAESD = Path(__file__).parent / "taesd"
"""The published TAESD of SD1.x and SD2.x, and that of SDXL: encoder and decoder of each."""

PARAMETERS = Path(__file__).parent / "parameters.json.gz"
"""The names and shapes of the published models' parameters."""

TABLES = next(
    path for path in (Path(__file__).parent / "weightmaps", Path(__file__).parents[1] / "weightmaps") if path.is_dir()
)
"""The weight maps: beside the modules in an installed package, at the repository's top in a checkout."""
