"""Text as a condition: the encoders of transformers, tiny and with random weights."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CSV, QUIET
from PIL import Image

from ldm import model_folder
from ldm.cli import main
from ldm.conditioning.text import Text

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "heart", "cat", "face", "flag"]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def encoder(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=32, **SIZES)
        model = transformers.BertModel(config)
    elif kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model = transformers.T5Model(transformers.T5Config(vocab_size=len(WORDS), decoder_start_token_id=0, **sizes))
    else:
        text = {"vocab_size": len(WORDS), "hidden_size": 32, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0, **SIZES}
        vision = {"hidden_size": 32, "image_size": 8, "patch_size": 4, **SIZES}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_states_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = encoder(kind, tmp_path / kind)
    conditioner, texts = Text(str(folder), max_tokens=8), ["red heart", "blue cat face flag", ""]
    cond = conditioner.encode({"text": texts}, lambda x: x)
    assert cond.tokens is not None
    assert cond.mask is not None
    assert cond.vector is not None
    assert (conditioner.token_dim, conditioner.vector_dim) == (32, 32)
    assert cond.tokens.shape == (3, 8, 32)
    assert cond.mask.sum(1).tolist() == [4, 6, 2]
    network = transformers.AutoModel.from_pretrained(folder).eval()
    network = network.encoder if kind == "t5" else network.text_model if kind == "clip" else network
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for i, text in enumerate(texts):
        with torch.no_grad():
            wanted = network(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"}).last_hidden_state[
                0
            ]
        torch.testing.assert_close(cond.tokens[i, : len(wanted)], wanted, rtol=2e-3, atol=2e-3)  # kept in 16 bits
        torch.testing.assert_close(cond.vector[i], wanted.mean(0), rtol=2e-3, atol=2e-3)
        assert (cond.tokens[i, len(wanted) :] == 0).all()
    assert cond.tokens[0].std() > 0.01
    null = conditioner.null({"text": texts})
    assert torch.equal(null.tokens[0], cond.tokens[2])  # type: ignore[index]
    assert Text(str(folder), vector="none").encode({"text": texts}, lambda x: x).vector is None
    if kind == "t5":
        with pytest.raises(ValueError, match="no pooled vector: set the conditioner's vector to mean"):
            Text(str(folder), vector="pooled")
    else:
        found = Text(str(folder), max_tokens=8, vector="pooled").encode({"text": texts}, lambda x: x)
        assert torch.equal(found.tokens, cond.tokens)  # type: ignore[arg-type]
        for i, text in enumerate(texts):
            tokens = {k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"}
            torch.testing.assert_close(found.vector[i], network(**tokens).pooler_output[0].detach(), rtol=2e-3, atol=2e-3)  # type: ignore[index]
    long = conditioner.encode({"text": ["red " * 50]}, lambda x: x)
    assert long.mask.sum() == 8, "cut, not refused"  # type: ignore[union-attr]


def test_a_text_is_encoded_once_and_kept_beside_the_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = encoder("bert", tmp_path / "bert"), tmp_path / "run" / "latents"
    texts = {"text": ["red heart", "blue \u2764 cat", ""]}
    plain = Text(str(folder)).encode(texts, lambda x: x)
    first, second, other = Text(str(folder)), Text(str(folder)), Text(str(folder), max_tokens=3)
    for conditioner in (first, second, other):
        conditioner.cache_in(str(cache))
    asked: list[str] = []
    for conditioner in (first, second, other):
        monkeypatch.setattr(
            conditioner, "_encoded", lambda text, most, encode=conditioner._encoded: asked.append(text) or encode(text, most)
        )
    one, two = first.encode(texts, lambda x: x), second.encode(texts, lambda x: x)
    assert asked == texts["text"], "the second finds what the first has kept"
    for found in (one, two):
        assert torch.equal(found.tokens, plain.tokens)  # type: ignore[arg-type]
        assert torch.equal(found.vector, plain.vector)  # type: ignore[arg-type]
    other.encode(texts, lambda x: x)
    assert asked == 2 * texts["text"], "shorter texts are others"
    assert len(list(cache.glob("texts-*.sqlite"))) == 2


def test_the_encoder_is_neither_trained_nor_stored(tmp_path: Path) -> None:
    conditioner = Text(str(encoder("bert", tmp_path / "bert")))
    assert list(conditioner.parameters()) == []
    assert list(conditioner.state_dict()) == ["sign"]


def test_another_encoder_than_that_of_the_training_is_refused(tmp_path: Path) -> None:
    folder, other = encoder("bert", tmp_path / "bert"), encoder("t5", tmp_path / "other")
    state = Text(str(folder)).state_dict()
    Text(str(folder), max_tokens=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'.*other' is not the one with which this model was trained"):
        Text(str(other)).load_state_dict(state)


def test_text_to_image_from_fit_to_sample(trained: Path, tmp_path: Path, capsys) -> None:
    folder = encoder("bert", tmp_path / "bert")
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for i, colour in enumerate(["red", "blue"] * 5):
        Image.new("RGB", (32, 32), colour).save(images / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{colour} flag"}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    first = str(trained / "autoencoder" / "model")
    sizes = {"channels": 16, "vector_dim": 32, "token_dim": 32, "in_channels": 2}
    command = ["fit", *CSV, *QUIET, "-c", "data/folder.yaml", "-c", "diffusion/emoji-text.yaml", "--data.size=32", "--data.batch_size=4"]
    command += ["--data.val_fraction=0.2", "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.sampling_steps=2"]
    command += [f"--model.network.{name}={value}" for name, value in sizes.items()]
    command += ["--model.first_stage", first, "--run", str(tmp_path / "run"), "--model.conditioner.encoder", str(folder)]
    assert main([*command, "--data.path", str(images)]) == 0
    assert list((tmp_path / "run" / "latents").glob("texts-*.sqlite")), "beside the latents"
    model = str(tmp_path / "run" / "diffusion" / "model")
    assert isinstance(model_folder.load(model).model.conditioner, Text)
    sample = ["sample", model, "--n=1", "--steps=2", "--guidance=5"]
    made = {}
    for name, options in {
        "red": ["--prompt=red flag"],
        "blue": ["--prompt=blue flag"],
        "away": ["--prompt=red flag", "--negative=blue flag"],
    }.items():
        assert main([*sample, *options, "--out", str(tmp_path / name)]) == 0
        made[name] = (tmp_path / name / "0.png").read_bytes()
    assert len(set(made.values())) == 3
    line = json.loads((tmp_path / "away" / "manifest.jsonl").read_text())
    assert (line["condition"], line["negative"]) == ({"text": "red flag"}, {"text": "blue flag"})
    assert main(["sample", model, "--n=3", "--steps=1", "--prompt=[red flag,cat]", "--out", str(tmp_path / "two")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "two" / "manifest.jsonl").read_text().splitlines()]
    assert [line["condition"]["text"] for line in lines] == ["red flag", "cat", "red flag"], "taken in turn"
    command += ["--data.path", str(images)]
    mistakes = {
        "a class was given ('3'), but this model takes a text: use --prompt": [*sample, "--class=3"],
        "a prompt was given ('red flag'), but this model takes no text": [
            "sample",
            str(trained / "diffusion" / "model"),
            "--prompt=red flag",
        ],
        "there is no text encoder 'nothing'": [*command, "--model.conditioner.encoder=nothing"],
        "the conditioner makes 32: leave the network's token_dim out": [
            *command,
            "--model.network.token_dim=8",
        ],
    }
    (images / "metadata.jsonl").unlink()
    mistakes["needs a text for each image, the data has none"] = command
    for said, wrong in mistakes.items():
        capsys.readouterr()
        assert main(wrong) == 1
        assert said in capsys.readouterr().err
