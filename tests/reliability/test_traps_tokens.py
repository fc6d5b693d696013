"""Token rows that do not fit: other numbers, more of them, a tie that one side lacks."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.cli import main
from poemerge.errors import CheckpointError, SettingError
from poemerge.merge import expert_weights, merge_checkpoints
from poemerge.vocabulary import read_vocabulary
from tests.reliability.traps import FILE, Trap, change, change_json
from tests.reliability.trials import Trials
from tests.zoo import VOCABULARY, Zoo, adapt, load, save, save_adapter, tokenizer

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
SIZE = len(VOCABULARY)
WORDS = ("<call>", "<result>", "<think>", "<|user|>", "überzug", "<image>")


def shuffle(trap: Trap, folder: Path, order: Tensor, *, tell: bool) -> Path:
    """Put token rows in another order, as another tokenizer would number them."""
    change(folder, lambda t: t.update({n: t[n][order].contiguous() for n in TABLES if n in t}))
    if tell:
        row = {int(old): new for new, old in enumerate(order)}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(trap.zoo.base() / name, folder / name)
        table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        table["model"]["vocab"] = {t: row[i] for t, i in table["model"]["vocab"].items()}
        table["added_tokens"] = [e | {"id": row[e["id"]]} for e in table["added_tokens"]]
        (folder / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    return folder


def grown(trap: Trap, name: str, words: Sequence[str], *, tied: bool) -> Path:
    """A fine-tune whose tokenizer has more tokens, resized and saved by transformers."""
    model, table = load(trap.full(f"{name}-small", tied=tied)), tokenizer()
    table.add_tokens(list(words))
    torch.manual_seed(trap.draw.randrange(1000))
    model.resize_token_embeddings(len(table), mean_resizing=False)
    save(model, trap.root / name)
    table.save_pretrained(trap.root / name)
    return trap.root / name


def test_another_numbering(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Tokens numbered otherwise are refused; matched by token they merge to the same bytes"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            tied = trap.draw.random() < 0.5
            sound, base = trap.other(tied=tied), zoo.base(tied=tied)
            plain, order = trap.full("plain", tied=tied), torch.arange(SIZE)
            while int((order == torch.arange(SIZE)).sum()) > SIZE // 2:
                order = torch.randperm(SIZE, generator=trap.generator)
            folder = shuffle(trap, trap.copy(plain, "trapped"), order, tell=True)
            experts = {"trapped": folder, "sound": sound}
            trap.refused("Expert 'trapped' .* numbers its tokens otherwise", experts, base)
            report = trap.warned("rows were matched by token", experts, base, vocabulary="pad")
            _, merged = trap.merge(experts, base, vocabulary="pad")
            _, wanted = trap.merge({"trapped": plain, "sound": sound}, base)
            assert report.rules
            assert merged.keys() == wanted.keys()
            assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_kept_rows(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Where the base's rows are kept, an expert whose rows do not fit changes none of them"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            if trap.draw.random() < 0.5:
                order = torch.randperm(SIZE, generator=trap.generator)
                folder = shuffle(trap, trap.full(), order, tell=True)
            else:
                folder = grown(trap, "trapped", trap.draw.sample(WORDS, 3), tied=False)
            trap.warned("the base's rows are kept", {"a": folder}, vocabulary="base")
            _, alone = trap.merge({"a": folder}, vocabulary="base")
            start = load_file(zoo.base() / FILE)
            assert all(torch.equal(alone[name], start[name]) for name in TABLES)
            assert any(not torch.equal(alone[name], start[name]) for name in start)
            sound = trap.other()
            _, both = trap.merge({"a": folder, "b": sound}, vocabulary="base")
            _, other = trap.merge({"b": sound})
            assert all(torch.equal(both[name], other[name]) for name in TABLES)


def test_rows_in_secret_order(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Rows in another order of which no tokenizer tells are noticed and refused"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            order = torch.randperm(SIZE, generator=trap.generator)
            experts = trap.among(shuffle(trap, trap.full(), order, tell=False))
            trap.refused("has the base's rows of .* in another order, of which no", experts)
            trap.warned("has nothing of the base left in", experts, foreign="warn")


def test_added_tokens(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Added tokens are refused, or kept: the merge loads, knows each and has its experts' rows"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            tied = trap.draw.random() < 0.5
            known = {n: trap.draw.sample(WORDS, trap.draw.randint(1, 4)) for n in ("a", "b")}
            experts = {n: grown(trap, n, words, tied=tied) for n, words in known.items()}
            experts["plain"] = trap.other(tied=tied)
            base = zoo.base(tied=tied)
            trap.refused("rows of tokens in .* where the base has 96", experts, base)
            out = trap.root / "out"
            trap.method = trap.draw.choice(("average", "cauchy_poe", "ties"))
            merge_checkpoints(base, experts, out, trap.method, "cpu", vocabulary="pad")
            added = list(dict.fromkeys(known["a"] + known["b"]))
            check_added(out, base, experts, known, added)


def check_added(
    out: Path,
    base: Path,
    experts: dict[str, Path],
    known: dict[str, list[str]],
    added: list[str],
) -> None:
    """The tokenizer, the rows and the size, as transformers and the files have them."""
    table, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert len(table) == SIZE + len(added) == model.config.vocab_size
    assert table("".join(added))["input_ids"] == list(range(SIZE, len(table)))
    model(**table("a" + added[0], return_tensors="pt"))
    merged = load_file(out / FILE)
    own = {name: load_file(experts[name] / FILE) for name in known}
    for name in (n for n in TABLES if n in merged):
        assert merged[name].shape[0] == len(table)
        for row, word in enumerate(added, SIZE):
            held = [own[n][name][SIZE + w.index(word)] for n, w in known.items() if word in w]
            torch.testing.assert_close(merged[name][row], torch.stack(held).mean(dim=0))
    plain = load_file(base / FILE)
    assert merged.keys() == plain.keys()


def test_added_tokens_of_adapters(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Adapters that came with added tokens merge with them, or are refused"""
    for number in trials(short=2, full=20):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            tied, words = trap.draw.random() < 0.5, trap.draw.sample(WORDS, 2)
            base, folder = zoo.base(tied=tied), trap.root / "adapter"
            model, table = load(base), tokenizer()
            table.add_tokens(words)
            model.resize_token_embeddings(len(table), mean_resizing=False)
            save_adapter(adapt(model, number), folder)
            table.save_pretrained(folder)
            experts = {"a": folder, "b": trap.other(tied=tied)}
            trap.refused("rows of tokens in .* where the base has 96", experts, base)
            out = trap.root / "out"
            merge_checkpoints(base, experts, out, "average", "cpu", vocabulary="pad")
            loaded = AutoModelForCausalLM.from_pretrained(out)
            assert loaded.config.vocab_size == SIZE + 2
            assert AutoTokenizer.from_pretrained(out)(words[1])["input_ids"] == [SIZE + 1]
            found, own = (m.get_input_embeddings().weight[SIZE:] for m in (loaded, model))
            torch.testing.assert_close(found, own)


def test_ties(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """A head of its own is refused on a tied base; a tied expert's embedding is its head"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            untied = trap.full("untied")
            pattern = "changes lm_head.weight apart from the other end of the tie"
            trap.refused(pattern, {"a": untied}, zoo.base(tied=True))
            trap.refused(
                pattern.replace("lm_head.weight", ".*"),
                {"a": zoo.adapter(number % 4, tied=True, modules_to_save=[ends(trap)])},
                zoo.base(tied=True),
            )
            tied = trap.full("tied", tied=True)
            trap.method = "average"
            report = trap.warned("ties lm_head.weight to its embedding", {"a": tied})
            _, merged = trap.merge({"a": tied})
            assert report.rules
            torch.testing.assert_close(merged["lm_head.weight"], load_file(tied / FILE)[TABLES[0]])


def ends(trap: Trap) -> str:
    return trap.draw.choice(["lm_head", "embed_tokens"])


def test_a_token_that_looks_like_markup(zoo: Zoo, tmp_path: Path) -> None:
    """Is shown as it is, by the command too."""
    trap = Trap(zoo, tmp_path, 0)
    base, expert = trap.copy(zoo.base(), "base"), grown(trap, "a", ["[/INST]"], tied=False)
    model = load(zoo.base())
    model.resize_token_embeddings(SIZE + 1, mean_resizing=False)
    save(model, base)  # with a row to spare
    words = ["check", "--base", str(base), "--expert", str(expert), "--method", "average"]
    found = CliRunner().invoke(main, words, catch_exceptions=False)
    assert found.exit_code == 0
    said = "has the token '[/INST]', which the base's tokenizer and so the merge lack"
    assert said in " ".join(found.output.split())


def test_an_expert_is_scored_with_its_rows_by_token(zoo: Zoo, tmp_path: Path) -> None:
    trap = Trap(zoo, tmp_path, 0)
    folder = grown(trap, "a", WORDS[:2], tied=False)
    own = load_file(folder / FILE)
    for name, weight in expert_weights(zoo.base(), folder):
        torch.testing.assert_close(weight, own[name][: len(weight)])


class TestPad:
    """What it cannot do is said."""

    def test_without_a_tokenizer(self, zoo: Zoo, tmp_path: Path) -> None:
        trap = Trap(zoo, tmp_path, 0)
        folder = grown(trap, "a", WORDS[:1], tied=False)
        (folder / "tokenizer.json").unlink()
        trap.refused("and it has no tokenizer.json to match", {"a": folder}, vocabulary="pad")

    def test_a_token_of_the_trained_part(self, zoo: Zoo, tmp_path: Path) -> None:
        trap = Trap(zoo, tmp_path, 0)
        folder = grown(trap, "a", WORDS[:1], tied=False)
        table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        entry = table["added_tokens"].pop()
        table["model"]["vocab"][entry["content"]] = entry["id"]
        (folder / "tokenizer.json").write_text(json.dumps(table), "utf-8")
        trap.refused("in the trained part of its tokenizer", {"a": folder}, vocabulary="pad")

    def test_into_an_adapter(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = grown(Trap(zoo, tmp_path, 0), "a", WORDS[:1], tied=False)
        with pytest.raises(SettingError, match="1 tokens are added, whose rows a merged adapter"):
            merge_checkpoints(
                zoo.base(), {"a": folder}, tmp_path / "o", output="adapter", vocabulary="pad"
            )

    def test_a_broken_tokenizer(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = grown(Trap(zoo, tmp_path, 0), "a", WORDS[:1], tied=False)
        change_json(folder / "tokenizer.json", model={"vocab": {"a": "x"}})
        with pytest.raises(CheckpointError, match=r"is no vocabulary .*; fetch it again"):
            read_vocabulary(folder)

    def test_of_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("a\nb\n", "utf-8")
        assert read_vocabulary(tmp_path).rows == {"a": 0, "b": 1}
        (tmp_path / "vocab.json").write_text('{"x": 1}', "utf-8")
        (tmp_path / "added_tokens.json").write_text('{"y": 2}', "utf-8")
        assert read_vocabulary(tmp_path).size == 3
        unigram = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": None}
        (tmp_path / "tokenizer.json").write_text(json.dumps(unigram), "utf-8")
        assert read_vocabulary(tmp_path).rows == {"a": 0, "b": 1}
