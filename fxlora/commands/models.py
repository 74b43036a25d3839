"""A transformers folder → the model and the example inputs that capture needs. No family is named here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlora.commands.errors import UnknownModelError

if TYPE_CHECKING:
    import torch

ROWS, LENGTH = 2, 8


def load_model(folder: Path) -> Any:
    """Return the model of the first architecture its config names, on the CPU, in its own dtype.

    A folder without weights gives the same modules with random ones, which is enough to see what adapters bind to.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UnknownModelError(f"{folder} holds no model that transformers can build: {error}") from error
    architectures = config.architectures or []
    known = [getattr(transformers, name) for name in architectures if hasattr(transformers, name)]
    if not known:
        raise UnknownModelError(
            f"{folder}/config.json names {architectures or 'no architecture'}, unknown to transformers"
        )
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    model = known[0].from_pretrained(folder, dtype="auto") if has_weights else known[0](config)
    return model.eval()


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs of two requests for whatever the model's main input is: ids, pixels or features."""
    import torch

    config = model.config
    main = model.main_input_name
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 7 + 1
    if main == "input_ids":
        inputs = {"input_ids": ids}
    elif main == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs = {"pixel_values": torch.zeros(ROWS, config.num_channels, height, width, dtype=model.dtype)}
    elif main == "input_features":
        frames = 2 * config.max_source_positions
        inputs = {"input_features": torch.zeros(ROWS, config.num_mel_bins, frames, dtype=model.dtype)}
    else:
        raise UnknownModelError(f"the main input of {type(model).__name__} is {main}, for which no example is known")
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : LENGTH - 3]
    return inputs
