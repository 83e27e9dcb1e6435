import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.data.packing import make_packer
from launcher.data.store import (
    GrowingArray,
    PackedDataset,
    PreparedData,
    RowsWriter,
    is_complete,
    split_folder,
    token_dtype,
    unigram_loss,
    write_marker,
)
from launcher.errors import DataError

DOCUMENTS = [[11, 12, 13, 0], [21, 22, 23, 24, 25, 26, 0], [31, 0]]


def write_rows(folder: Path, documents: list[list[int]], width: int, dtype: type = np.uint16) -> PackedDataset:
    packer = make_packer("concat", width, filler=0)
    writer = RowsWriter(folder, width, dtype)
    tokens = np.array([token for document in documents for token in document], np.uint32)
    writer.append(packer.add(tokens, np.array([len(document) for document in documents], np.int64)))
    writer.append(packer.finish())
    writer.close()
    return PackedDataset(folder, cross_document_attention=False)


def test_labels_and_positions_restart_at_each_document_and_at_the_padding(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "rows", DOCUMENTS, 8)
    assert len(dataset) == 2
    first, second = dataset
    assert first["input_ids"].tolist() == [11, 12, 13, 0, 21, 22, 23, 24]
    assert first["labels"].tolist() == [-100, 12, 13, 0, -100, 22, 23, 24]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert second["input_ids"].tolist() == [25, 26, 0, 31, 0, 0, 0, 0]
    assert second["labels"].tolist() == [-100, 26, 0, -100, 0, -100, -100, -100]
    assert second["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert {array.dtype for array in first.values()} == {np.dtype(np.int64)}


def test_with_cross_document_attention_a_row_is_one_stretch(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", DOCUMENTS, 8)
    second = PackedDataset(tmp_path / "rows", cross_document_attention=True)[1]
    assert second["labels"].tolist() == [25, 26, 0, 31, 0, -100, -100, -100]
    assert second["position_ids"].tolist() == list(range(8))


def test_a_dataset_is_a_sequence_and_pickles_as_its_path(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "rows", [list(range(100_000))], 1000, np.uint32)
    assert dataset[-1]["input_ids"].tolist() == dataset[99]["input_ids"].tolist()
    with pytest.raises(IndexError):
        dataset[100]
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert pickle.loads(content)[5]["input_ids"].tolist() == list(range(5000, 6000))


def test_token_ids_take_two_bytes_where_they_fit() -> None:
    assert token_dtype(65_536) is np.uint16
    assert token_dtype(65_537) is np.uint32


@pytest.mark.parametrize("rows", [0, 1, 12_345])
def test_a_growing_array_is_an_ordinary_npy_file(tmp_path: Path, rows: int) -> None:
    content = np.arange(rows * 3, dtype=np.uint16).reshape(rows, 3)
    array = GrowingArray(tmp_path / "a.npy", np.uint16, (3,))
    for part in np.array_split(content, 4):
        array.append(part)
    array.close()
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), content)


def logits_of(model: LlamaForCausalLM, input_ids: NDArray[np.int64], position_ids: NDArray[np.int64]) -> torch.Tensor:
    # Without use_cache=False transformers makes a cache, and then builds no mask from the position ids.
    row = {"input_ids": torch.from_numpy(input_ids)[None], "position_ids": torch.from_numpy(position_ids)[None]}
    with torch.no_grad():
        return model(**row, use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_sees_each_packed_document_as_if_it_were_alone(tmp_path: Path, attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    row = write_rows(tmp_path / "rows", DOCUMENTS, 16)[0]
    together = logits_of(model, row["input_ids"], row["position_ids"])
    start = 0
    for document in DOCUMENTS:
        alone = logits_of(model, np.array(document), np.arange(len(document)))
        torch.testing.assert_close(together[start : start + len(document)], alone, atol=1e-6, rtol=1e-5)
        start += len(document)
    crossing = logits_of(model, row["input_ids"], np.arange(16))
    assert (crossing[5] - together[5]).abs().max() > 1e-4  # the comparison above can fail


def prepared(folder: Path) -> PreparedData:
    """Two validation sources of 8 tokens a row, and training counts of 3, 1 and 0 for a vocabulary of 3."""
    for source, documents in enumerate([[[0, 1, 1, 2, 0, 0]], [[0, 0, 1], [0, 2]]]):
        write_rows(split_folder(folder, "validation", source), documents, 4)
    np.save(folder / "unigram_counts.npy", np.array([3, 1, 0]))
    write_marker(folder, "f", {"cross_document_attention": False}, {})
    return PreparedData.load(folder)


def test_unigram_loss_is_the_smoothed_cross_entropy_of_what_evaluation_counts(tmp_path: Path) -> None:
    nats = -np.log(np.array([4, 2, 1]) / 7)
    # Rows: [0 1 1 2][0 0 | padding], [0 0 1 | 0][2 | padding]; a row's and a document's first token is no target.
    assert unigram_loss(prepared(tmp_path), None) == pytest.approx(np.mean(nats[[1, 1, 2, 0, 0, 1]]))
    assert unigram_loss(PreparedData.load(tmp_path), 2) == pytest.approx(np.mean(nats[[1, 1, 2, 0, 1]]))


def test_unigram_loss_needs_targets(tmp_path: Path) -> None:
    write_rows(split_folder(tmp_path, "validation", 0), [[5]], 4)
    np.save(tmp_path / "unigram_counts.npy", np.ones(6, np.int64))
    write_marker(tmp_path, "f", {"cross_document_attention": False}, {})
    with pytest.raises(DataError, match="nothing to predict"):
        unigram_loss(PreparedData.load(tmp_path), None)


def test_a_folder_is_complete_only_with_its_marker_and_every_byte(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepared(folder)
    assert is_complete(folder)
    tokens = folder / "validation/source_00/tokens.npy"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"tokens\.npy cut off\); run `zerofleet prepare` again"):
        PreparedData.load(folder)
    tokens.write_bytes(content)
    assert is_complete(folder)
    for damage in ("", "{", "[]", json.dumps({"files": {"missing": 1}})):
        (folder / "prepared.json").write_text(damage)
        assert not is_complete(folder)
    (folder / "prepared.json").unlink()
    assert not is_complete(folder)


def test_splits_come_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    assert [len(dataset) for dataset in data.split("validation")] == [2, 2]
    assert data.split("train") == []
