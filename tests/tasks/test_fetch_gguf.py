"""fetch from a .gguf file: a tiny real one, written with the `gguf` package."""

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from poemerge.checkpoint import Checkpoint
from poemerge.errors import SettingError, SourceError
from poemerge.hashing import hash_files, sha256
from poemerge.lineage import Lineage
from tasks.fetch import fetch

HEADS, KV_HEADS, LAYERS, WIDTH, INNER, VOCABULARY = 4, 2, 2, 32, 64, 64
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
PLACES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def places() -> dict[str, str]:
    """GGUF name → the name that transformers uses, both without `.weight`."""
    blocks = {
        f"blk.{i}.{key}": f"model.layers.{i}.{value}"
        for i in range(LAYERS)
        for key, value in BLOCKS.items()
    }
    return PLACES | blocks


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    return LlamaForCausalLM(config)


def permuted(name: str, weight: np.ndarray) -> np.ndarray:
    """Rows of q and k as llama.cpp orders them for its rotary embedding."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.rpartition(".")[2])
    if heads is None:
        return weight
    split = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return split.swapaxes(1, 2).reshape(weight.shape)


def tokens() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary with one merge, and the merges."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    marks = [*"0123456789Ġ.!?,'Ċ"]
    own = [*SPECIAL, *letters, *marks, "ĠĠ", "ab"]
    return own + [f"<x{i}>" for i in range(VOCABULARY - len(own))], ["Ġ Ġ", "a b"]


def write(
    path: Path,
    model: LlamaForCausalLM,
    *,
    tokenizer: bool = True,
    quantised: bool = False,
    without: str = "",
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    if tokenizer:
        vocabulary, merges = tokens()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(vocabulary)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary])
        writer.add_token_merges(merges)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(3)
        writer.add_add_bos_token(value=False)
        writer.add_chat_template(TEMPLATE)
    state = model.state_dict()
    for name, place in places().items():
        if name == without:
            continue
        weight = permuted(name, state[f"{place}.weight"].numpy())
        if quantised and weight.ndim == 2:
            blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.gguf` and, fetched from it, `out`."""
    folder = tmp_path_factory.mktemp("gguf")
    write(folder / "tiny.gguf", tiny())
    # What lies beside the file is no part of it.
    (folder / "config.json").write_text('{"model_type": "bert"}')
    fetch.fn("base", str(folder / "tiny.gguf"), folder / "out")
    return folder


def test_weights_are_those_of_the_file(made: Path) -> None:
    expected = {name: value.bfloat16() for name, value in tiny().state_dict().items()}
    with Checkpoint(made / "out") as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(checkpoint.read(name), value), name
        assert "quantization_config" not in checkpoint.config


def test_loads_and_computes_what_the_original_computes(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "out", dtype=torch.float32)
    original = tiny().bfloat16().float()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)


def test_tokenizer_round_trips_with_the_special_tokens_of_the_file(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "out")
    text = "<s>abc  12 don't!?</s>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    # digits one by one, and the white space before them as one run
    assert tokenizer.convert_ids_to_tokens(ids)[3:6] == ["ĠĠ", "1", "2"]
    assert (tokenizer.unk_token, tokenizer.bos_token) == ("<unk>", "<s>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")
    assert tokenizer.model_max_length == 128
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>ab</s>"


def test_lineage_names_file_dtype_and_converters(made: Path) -> None:
    record = Lineage.find(made / "out")
    assert record is not None
    assert record.params == {"dtype": "bfloat16"}
    assert record.revision == sha256(made / "tiny.gguf")
    assert record.inputs[0].files == {"tiny.gguf": record.revision}
    assert record.packages.keys() >= {"gguf", "tokenizers", "transformers", "torch"}


def test_same_file_same_bytes_wherever_it_lies(made: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other/tiny.gguf"
    copy.write_bytes((made / "tiny.gguf").read_bytes())
    fetch.fn("base", str(copy), tmp_path / "out")
    assert hash_files(tmp_path / "out") == hash_files(made / "out")


def test_up_to_date_until_the_dtype_changes(made: Path, tmp_path: Path) -> None:
    source = str(made / "tiny.gguf")
    expected = sha256(made / "tiny.gguf")
    assert fetch.fn("base", source, made / "out", sha256=expected) is False
    assert fetch.fn("base", source, tmp_path / "out", dtype="float32") is True
    with Checkpoint(tmp_path / "out") as checkpoint:
        weight = checkpoint.read("lm_head.weight")
    assert torch.equal(weight, tiny().lm_head.weight)


def test_dequantises_and_does_without_a_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    path = write(tmp_path / "tiny.gguf", model, quantised=True, tokenizer=False)
    with caplog.at_level(logging.WARNING, logger="tasks.fetch"):
        fetch.fn("base", str(path), tmp_path / "out", dtype="float32")
    assert "holds no tokenizer" in caplog.text
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with Checkpoint(tmp_path / "out") as checkpoint:
        for name, value in model.state_dict().items():
            step = value.abs().max() / 127
            assert (checkpoint.read(name) - value).abs().max() <= step, name


def test_refuses_another_hash_before_any_work(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=sha256(made / "tiny.gguf")):
        fetch.fn("base", str(made / "tiny.gguf"), tmp_path / "out", sha256="0" * 64)
    assert not list(tmp_path.iterdir())


def test_refuses_a_file_that_lacks_a_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tiny(), without="blk.1.ffn_up")
    with pytest.raises(SourceError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        fetch.fn("base", str(path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 3, 1000, -100])
def test_refuses_a_truncated_file(made: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes((made / "tiny.gguf").read_bytes()[:size])
    with pytest.raises(SourceError, match="cannot be read as GGUF"):
        fetch.fn("base", str(path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_what_is_no_gguf_and_an_unknown_dtype(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("this is a text of some length, and no model at all")
    with pytest.raises(SourceError, match="cannot be read as GGUF"):
        fetch.fn("base", str(path), tmp_path / "out")
    with pytest.raises(SettingError, match="int4 is unknown"):
        fetch.fn("base", str(made / "tiny.gguf"), tmp_path / "out", dtype="int4")
    assert list(tmp_path.iterdir()) == [path]
