"""Data on the command line of pretrain.py: --data and its flags, on several meshes, with growing batches, and what bad data gets."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import pretrain, reading
from mtl.data.tokenizers import description
from mtl.data.tokenizers.load import load
from mtl.errors import UserError
from mtl.precision import PRECISIONS
from tests.corpora import write
from tests.forks import Forks
from tests.test_pretrain import MODEL, metrics, start

SHORT = ["--train.steps", "3", "--train.global-batch-size", "8", "--train.seq-len", "32", "--train.eval-samples", "6", *MODEL]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some texts as bytes."""
    tokenizer = load("bytes")
    assert tokenizer.eod is not None
    texts = [f"document {d} says {'again and ' * (d % 9)}again." for d in range(120)]
    path = write(tmp_path_factory.mktemp("data") / "texts", [[*tokenizer.encode(t), tokenizer.eod] for t in texts])
    description.save(description.describe(tokenizer), description.beside(path))
    return path


def run(forks: Forks, folder: Path, flags: list[str], ranks: int = 1) -> list[dict[str, Any]]:
    done = forks.complete(["tiny", "--precision", "fp64", *SHORT, *flags, "--out", str(folder)], ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(folder)


def test_corpora_train_alike_on_several_meshes(forks: Forks, corpus: str, tmp_path: Path) -> None:
    """A blend with documents kept apart, fill-in-the-middle and a ramp: one device's numbers on a mesh, another micro-batch and feed."""
    flags = ["--data", f"0.3 {corpus} 0.7 {corpus}", "--data.split", "8,1,1", "--data.set-vocab", "--batch.rampup", "4", "4", "8"]
    flags += ["--data.apart", "--data.reset-positions", "--data.mask-ends", "--data.fim-rate", "0.5", "--data.fim-ids", "1", "2", "3"]
    want = run(forks, tmp_path / "one", [*flags, "--batch.workers", "0"])
    assert [m["tokens"] for m in want[:2]] != [8 * 32] * 2 and want[0]["tokens"] < 4 * 32, "a ramp, and ends that count for nothing"
    assert want[-1]["epochs"]["texts#1"] == pytest.approx(want[-1]["epochs"]["texts#0"] * 7 / 3)
    assert {"eval_loss", "eval_bits_per_byte", "test_loss"} <= set(want[-1])
    assert want[-1]["eval_bits_per_byte"] > want[-1]["eval_loss"] / math.log(2), "end-of-document tokens are no bytes"
    meshed = ["--rules", "fsdp_context_tensor", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--train.micro-batch-size", "2"]
    got = run(forks, tmp_path / "four", [*flags, *meshed, "--batch.workers", "3"], ranks=4)
    for a, b in zip(got, want, strict=True):
        for name in ("loss", "grad_norm", "tokens", "eval_loss", "test_loss", "eval_bits_per_byte"):
            if name in b:
                assert abs(a[name] - b[name]) <= 1e-9 * abs(b[name]), name
    plain = run(forks, tmp_path / "plain", flags[:5])
    assert [m["tokens"] for m in plain] == [8 * 32] * 3
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config["model"]["vocab"] == description.read(description.beside(corpus)).vocab_size  # type: ignore[union-attr]


def test_megatrons_order_and_another_order_train_otherwise(forks: Forks, corpus: str, tmp_path: Path) -> None:
    flags = ["--data", corpus, "--data.set-vocab", "--train.steps", "2", "--train.seed", "1234"]
    ours, theirs = (run(forks, tmp_path / order, [*flags, "--data.order", order]) for order in ("stateless", "megatron"))
    assert ours[0]["loss"] != theirs[0]["loss"]


def test_plain_arrays_and_own_splits(forks: Forks, tmp_path: Path) -> None:
    for name in ("train", "valid"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint16))
    flags = ["--data.train", str(tmp_path / "train.npy"), "--data.valid", str(tmp_path / "valid.npy")]
    found = run(forks, tmp_path / "run", flags)
    assert "eval_loss" in found[-1] and "test_loss" not in found[-1] and "eval_bits_per_byte" not in found[-1]


BAD = {
    "vocabulary": (["--data", "{corpus}"], "ids and the model 256"),
    "missing": (["--data", "0.5 {corpus} 0.5 {folder}/gone", "--data.set-vocab"], "gone.idx does not exist"),
    "weights": (["--data", "0 {corpus} 0 {corpus}"], "all weights are 0"),
    "split": (["--data", "{corpus}", "--data.set-vocab", "--data.split", "0,1"], "has no tokens in split train"),
    "ids": (["--data", "{folder}/large.npy"], "is 300, but the vocabulary is 0 to 255"),
    "unused": (["--data.apart"], "data.apart is given, but --data is not"),
    "both": (["--data", "{corpus}", "--data.train", "{corpus}", "--data.set-vocab"], "are both given"),
    "only valid": (["--data.valid", "{corpus}", "--data.set-vocab"], "no data to train on"),
    "rampup": (["--batch.rampup", "3", "2", "10"], "batch.rampup is 3 2 10"),
    "divides": (["--batch.rampup", "3", "5", "10", "--train.micro-batch-size", "2"], "global-batch-size 3 does not divide"),
    "order": (["--data", "{folder}/large.npy", "--data.order", "megatron"], "reads .bin/.idx corpora alone"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_before_anything_is_made(name: str, corpus: str, tmp_path: Path) -> None:
    flags, message = BAD[name]
    np.save(tmp_path / "large.npy", np.full(500, 300))
    _, setup = pretrain.read_settings(["tiny", *SHORT, *(f.format(corpus=corpus, folder=tmp_path) for f in flags)])
    with pytest.raises(UserError, match=re.escape(message)):
        layout = pretrain.choose_layout(setup, 1)
        settled = pretrain.with_micro_batch(reading.work(setup)[0], *layout)
        pretrain.check(settled, *layout, PRECISIONS["fp32"], torch.device("cpu"))


def test_a_bad_token_that_one_rank_meets_later_ends_all(tmp_path: Path) -> None:
    tokens = np.zeros(33 * 64, np.int64)
    tokens[1500] = 999
    np.save(tmp_path / "late.npy", tokens)
    flags = ["--data.train", str(tmp_path / "late.npy"), "--train.steps", "9", "--mesh.fsdp", "2"]
    done = start(["tiny", *SHORT, *flags, "--out", str(tmp_path / "run")], ranks=2)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "token 1,500 is 999, but the vocabulary is 0 to 255" in said and "error on rank" not in said, said
